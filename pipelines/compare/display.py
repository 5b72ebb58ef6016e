"""What a comparison shows while it runs: which cells, how far each is, and when all are done."""

import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kdpipe.pipelines.compare.cells import Cell
from kdpipe.pipelines.compare.process import Outcome
from kdpipe.pipelines.compare.results import Progress, read_progress
from kdpipe.pipelines.runtime.console import plain
from kdpipe.pipelines.training.work_dir import WorkDir

__all__ = ["Display"]

_LINE_SECONDS, _LOOK_SECONDS = 30.0, 1.0


class Display:
    """A table of the cells that run; where the output is no terminal, a line for each event and every half minute.

    Args:
        cells: Those that are to be trained.
        done: How many others are finished.
        console: Where it is shown.

    Attributes:
        running: The names of the cells that run now.
    """

    def __init__(self, cells: Sequence[Cell], done: int, console: Console) -> None:
        self.running: list[str] = []
        self._cells = {cell.name: cell for cell in cells}
        self._total, self._done, self._failed = len(cells) + done, done, 0
        self._console = console
        self._start = self._last_line = time.monotonic()
        self._last_look = 0.0
        self._progress = {cell.name: read_progress(cell.folder) for cell in cells}  # of those that are not done
        self._first_share = self._share()
        self._live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def started(self, cell: Cell) -> None:
        """A cell was started."""
        self.running.append(cell.name)
        if self._live is None:
            self._say(f"{cell.name}: started")

    def ended(self, cell: Cell, outcome: Outcome | None) -> None:
        """A cell ended; None if it was lost, and will be started again."""
        self.running.remove(cell.name)
        if outcome is not None:
            del self._progress[cell.name]
        if outcome is None:
            self._say(f"{cell.name}: its machine or process was lost; it will go on from its last epoch")
        elif outcome.code:
            self._failed += 1
            self._say(f"{cell.name}: failed: {outcome.message}\n  {cell.log}")
        else:
            self._done += 1
            ap = (WorkDir(cell.folder).read("result.json") or {}).get("ap")
            self._say(f"{cell.name}: done{'' if ap is None else f', AP {ap:.3f}'}")

    def _say(self, line: str) -> None:
        self._console.print(plain_lines(line), markup=False)

    def update(self) -> None:
        """Show how far all is, every now and then."""
        now = time.monotonic()
        if now - self._last_look < _LOOK_SECONDS:
            return
        self._last_look = now
        for name in self.running:
            self._progress[name] = read_progress(self._cells[name].folder)
        if self._live is not None:
            self._live.update(Group(self._table(), Text(self._summary())), refresh=True)
        elif now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            cells = (f"{name} {_place(self._progress[name])}" for name in self.running)
            self._say(f"{self._summary()}: {'; '.join(cells)}")

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for name in self.running:
            progress = self._progress[name]
            share = 0.0 if progress is None else progress.share
            table.add_row(Text(plain(name)), ProgressBar(total=1.0, completed=share, width=30), _place(progress))
        return table

    def _summary(self) -> str:
        waiting = self._total - self._done - self._failed - len(self.running)
        text = f"{self._done} of {self._total} done, {len(self.running)} running, {waiting} waiting"
        text += f", {self._failed} failed" if self._failed else ""
        seconds = self._seconds_left()
        return text if seconds is None else f"{text}, {timedelta(seconds=round(seconds))} left"

    def _share(self) -> float:
        """How many cells are trained, with those that are so in part."""
        return self._done + sum(progress.share for progress in self._progress.values() if progress is not None)

    def _seconds_left(self) -> float | None:
        """Time until all is done, at the pace so far; None before there is one."""
        share = self._share()
        gained = share - self._first_share
        if gained <= 0:
            return None
        return (time.monotonic() - self._start) * max(0.0, self._total - self._failed - share) / gained


def plain_lines(text: str) -> str:
    """`plain`, line by line."""
    return "\n".join(plain(line) for line in text.split("\n"))


def _place(progress: Progress | None) -> str:
    if progress is None:
        return "starting"
    return f"epoch {progress.epoch}/{progress.epochs}, step {progress.step}/{progress.steps}"
