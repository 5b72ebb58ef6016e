"""A cell as a process of its own, on this machine."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

__all__ = ["INTERRUPTED", "CellProcess", "Outcome"]

_ERROR = re.compile(r"^(?:Error|Internal error): .*\Z", re.MULTILINE | re.DOTALL)
_SECONDS_TO_STOP = 60.0
INTERRUPTED = 130  # exit code


class Outcome:
    """How a cell ended.

    Args:
        code: Exit code of its process, negative for a signal.
        message: What it said last, where it failed.
    """

    def __init__(self, code: int, message: str = "") -> None:
        self.code, self.message = code, message


class CellProcess:
    """A process that trains; what it prints is added to a file.

    It has a session of its own: Ctrl-C in a terminal reaches it by `stop` only, and not its loader workers.

    Args:
        words: What stands behind `kdpipe`.
        log: The file.
        environment: Additions to that of this process.
        shown: Of the words, those that the file may hold.
    """

    program: ClassVar = (sys.executable, "-m", "kdpipe.pipelines.cli.cell")  # is given the parent's id, and the words

    def __init__(self, words: Sequence[str], log: Path, environment: Mapping[str, str], shown: str) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("ab") as output:
            output.write(f"$ {shown}\n".encode())
            output.flush()
            self._start = output.tell()
            self._process = subprocess.Popen(
                [*self.program, str(os.getpid()), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def poll(self) -> Outcome | None:
        """How it ended; None while it runs."""
        code = self._process.poll()
        return None if code is None else self._outcome(code)

    def stop(self) -> None:
        """Ask it to end, as Ctrl-C does: between two steps, with files left whole."""
        self._process.terminate()  # SIGINT may be blocked in what a worker of Ray starts

    def end(self) -> None:
        """Wait for a process that was asked to end, and kill one that does not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS_TO_STOP)
        self.kill()

    def kill(self) -> None:
        """End it at once, with all that it started; harmless where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _outcome(self, code: int) -> Outcome:
        if code == 0:
            return Outcome(0)
        if code < 0:
            name = signal.Signals(-code).name
            return Outcome(code, f"ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}")
        with self._log.open("rb") as file:
            file.seek(self._start)
            text = file.read().decode(errors="replace").strip()
        found = _ERROR.search(text)
        last = text.rpartition("\n")[2] or "it said nothing"
        return Outcome(code, found[0].removeprefix("Error: ") if found else last)
