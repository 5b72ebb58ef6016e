"""Rows of gpu.py: run one after the other within a budget of time, and kept as soon as each is there."""

import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

RESERVE = 8.0  # seconds of the budget in which nothing is measured any more: files are removed
GRACE = 5.0  # seconds beyond the budget after which the process ends, whatever it is in


class OutOfTime(BaseException):
    """A row took longer than it may; nothing that it runs catches this."""


@dataclass(frozen=True)
class Row:
    """Something that is measured.

    Attributes:
        name: Of the row, such as `train/faster-rcnn/float32/plain`; what stands before the first slash is its table.
        run: Measures; gives the cells by column.
        least: Seconds that it needs at least: it does not begin with less time left.
        most: Seconds after which it is given up.
    """

    name: str
    run: Callable[[], Mapping[str, object]]
    least: float
    most: float = 60.0

    @property
    def table(self) -> str:
        return self.name.partition("/")[0]


class Board:
    """What has been measured: on the console, in `gpu.md`, and row by row in `gpu.jsonl`.

    Args:
        out: Folder of these files, and of `gpu.log` with all that was printed meanwhile.
        titles: Heading of each table.
        start: `time.monotonic()` of the beginning.
        seconds: Budget from then on.
    """

    def __init__(self, out: Path, titles: Mapping[str, str], start: float, seconds: float) -> None:
        self.out, self._titles, self._start, self._end = out, titles, start, start + seconds - RESERVE
        self.machine: dict[str, object] = {}
        self.cells: dict[str, Mapping[str, object]] = {}  # of the rows that were measured
        self.notes: dict[str, str] = {}  # of the others, why
        self._order: list[str] = []
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.jsonl").write_text("")
        self._log = (out / "gpu.log").open("w", buffering=1, errors="backslashreplace")
        watch = threading.Timer(max(1.0, self.left + RESERVE + GRACE), self._end_process)
        watch.daemon = True
        watch.start()

    @property
    def left(self) -> float:
        """Seconds that are left to measure."""
        return self._end - time.monotonic()

    def _end_process(self) -> None:
        """End now: the main thread is somewhere from which it does not come back."""
        print(f"The budget of time ended {GRACE:.0f} s ago: stopped.", file=sys.__stderr__, flush=True)
        os._exit(3)

    def say(self, line: str) -> None:
        """Print a line, and keep it in the log."""
        print(f"[{time.monotonic() - self._start:5.0f} s] {line}", flush=True)
        self._log.write(f"=== {line}\n")

    def describe(self, machine: Mapping[str, object]) -> None:
        """What stands on top of the tables."""
        self.machine |= machine
        self.say(", ".join(f"{name}: {value}" for name, value in machine.items()))
        self._keep({"machine": self.machine})

    def measure(self, rows: Sequence[Row], after: Callable[[], None]) -> None:
        """Run the rows in this order.

        Args:
            rows: The most worth knowing first.
            after: Called behind each, to free what it left.
        """
        for row in rows:
            self._order.append(row.name)
            begin = time.monotonic()
            if self.left < row.least:
                self.notes[row.name] = "not reached"
            else:
                self._run(row)
                gc.collect()
                self._safely(after)
            cells, note = self.cells.get(row.name, {}), self.notes.get(row.name, "")
            self.say(f"{row.name}: {note or '; '.join(f'{name} {shown(value)}' for name, value in cells.items())}")
            self._keep({"row": row.name, "seconds": time.monotonic() - begin, "note": note, "cells": cells})

    def _run(self, row: Row) -> None:
        limit = min(row.most, max(1.0, self.left))
        try:
            with redirect_stdout(self._log), redirect_stderr(self._log), alarm(limit):
                self.cells[row.name] = dict(row.run())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit and OutOfTime, too: the next row is another matter
            if not isinstance(error, OutOfTime):
                self.notes[row.name] = f"failed: {last_line(error)}"
            elif limit < row.most:
                self.notes[row.name] = f"not reached: begun with {limit:.0f} s of the budget left"
            else:
                self.notes[row.name] = f"not finished in {limit:.0f} s"
            self._log.write(traceback.format_exc())

    def _safely(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self.say(f"after a row: {last_line(error)}")

    def _keep(self, line: Mapping[str, object]) -> None:
        with (self.out / "gpu.jsonl").open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
        aside = self.out / "gpu.md.tmp"
        aside.write_text("\n".join(self._markdown()) + "\n")
        aside.replace(self.out / "gpu.md")

    def _markdown(self) -> Iterator[str]:
        yield "# On a GPU\n"
        yield from (f"- {name}: {value}" for name, value in self.machine.items())
        for table, title in self._titles.items():
            names = [name for name in self._order if name.partition("/")[0] == table]
            if not names:
                continue
            columns = list(dict.fromkeys(x for name in names for x in self.cells.get(name, {})))
            yield f"\n## {title}\n"
            yield f"| | {' | '.join(columns)} |" if columns else "| |"
            yield "|---|" + "---|" * len(columns)
            for name in names:
                cells = self.cells.get(name)
                note = self.notes.get(name, "").replace("|", "/")
                texts = [note] if cells is None else [shown(cells.get(column, "")) for column in columns]
                yield f"| {name.partition('/')[2]} | {' | '.join(texts)} |"

    @property
    def failed(self) -> list[str]:
        """Rows that did not end well, those left out for want of time not among them."""
        return [name for name, note in self.notes.items() if not note.startswith("not reached")]


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the main thread after so many seconds, and again where that was caught."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def last_line(error: BaseException) -> str:
    """Kind and message of an error, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line})" if frames else ""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}{place}"


def shown(value: Any) -> str:
    """A cell."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
