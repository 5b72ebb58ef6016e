"""What the commands print: one style of progress, and sizes that people can read."""

import contextlib
import io
import os
import re
import select
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kdpipe.pipelines.runtime.launch import is_first

__all__ = [
    "ProgressBar",
    "bytes_text",
    "command_console",
    "error_text",
    "first_line",
    "nobody_reads",
    "plain",
    "robust_output",
    "silent_stdout",
    "stop",
]

_LINE_SECONDS = 30.0


class Stop:
    """That somebody asked the process to end, by Ctrl-C or SIGTERM.

    Raising KeyboardInterrupt at once is right for most work, but not enough: Python drops one that happens to be raised
    in a callback of its own, such as a weak reference's. Work that shows its progress asks again (`check`).

    Attributes:
        between_steps: Wait for the next `check`. Stopped in the middle of a step of training, loader processes would be
            cut off while they hand over a batch. Asked twice, it ends at once all the same.
    """

    def __init__(self) -> None:
        self.between_steps = False
        self._asked = threading.Event()

    def forget(self) -> None:
        """Begin anew: nobody asked."""
        self.between_steps = False
        self._asked.clear()

    def ask(self) -> None:
        """To be called by the handler of a signal.

        Raises:
            KeyboardInterrupt: Unless it can wait.
        """
        waits = self.between_steps and not self._asked.is_set()
        self._asked.set()
        if not waits:
            raise KeyboardInterrupt

    def check(self) -> None:
        """End here if somebody asked.

        Raises:
            KeyboardInterrupt: Somebody did.
        """
        if self._asked.is_set():
            raise KeyboardInterrupt


stop = Stop()


class ProgressBar:
    """Progress with count, rate, time spent and time left; where the output is no terminal, a line every half minute.

    Args:
        console: Where it is shown; a quiet console shows nothing.
        description: What is being done.
        total: Units of work.
        done: How many were done before.
    """

    def __init__(self, console: Console, description: str, total: int, done: int = 0) -> None:
        self.console, self.description, self.total = console, description, total
        self._first, self._start = done, time.monotonic()
        self._last_line = self._start
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=total, completed=done, rate="starting")

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, done: int, rate: str) -> None:
        """Show that `done` units are done, at a rate such as `3.1 images/s`.

        Raises:
            KeyboardInterrupt: Somebody asked the process to end.
        """
        stop.check()
        self._bar.update(self._task, completed=done, rate=rate)
        now = time.monotonic()
        if self.console.is_terminal or now - self._last_line < _LINE_SECONDS or done <= self._first:
            return
        self._last_line = now
        time_left = timedelta(seconds=round((now - self._start) / (done - self._first) * (self.total - done)))
        self.console.print(f"{self.description}: {done}/{self.total}, {rate}, {time_left} left")

    def close(self) -> None:
        """Take the bar off the console."""
        self._bar.stop()


def command_console(*, shared: bool = True, live: bool = True) -> Console:
    """Standard output.

    Args:
        shared: Several processes do this together: only the first speaks.
        live: Nobody else shows progress there: where it is a terminal, a bar that moves.
    """
    terminal = None if live else False
    quiet = shared and not is_first()
    return Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=quiet, force_terminal=terminal)


@contextlib.contextmanager
def robust_output() -> Iterator[None]:
    """Let output fail quietly where nobody reads it (`| head`), and never for a character that it cannot show."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # was closed before this process began
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would try again, and complain, in the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        sys.exit(1)


def nobody_reads() -> bool:
    """Whether what reads standard output has ended."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):
        return False
    return any(state & select.POLLERR for _, state in poll.poll(0))


def bytes_text(size: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def plain(text: object) -> str:
    """Text from a file, with escapes in place of what a terminal would obey: control, direction and private characters.

    rich's markup stays as it is: print it with `markup=False`, or put it into a `rich.text.Text`.
    """
    characters = (
        char.encode("unicode_escape").decode() if unicodedata.category(char)[0] == "C" else char for char in str(text)
    )
    return "".join(characters)


def error_text(error: BaseException) -> str:
    """The message of an error; of one that crossed over from a loader worker, the message that it had there."""
    text = str(error)
    if not text.startswith("Caught ") or "Original Traceback" not in text:
        return text
    return re.split(rf"^(?:[\w.]+\.)?{type(error).__name__}: ", text, flags=re.MULTILINE)[-1].strip()


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def silent_stdout() -> Iterator[None]:
    """Keep what libraries print to themselves; consoles made before still show."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield
