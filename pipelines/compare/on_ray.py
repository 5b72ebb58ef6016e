"""Cells as tasks of a Ray cluster, one each, which go on elsewhere when their machine is lost."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from kdpipe.pipelines.compare.cells import Cell
from kdpipe.pipelines.compare.process import Outcome
from kdpipe.pipelines.compare.ray_cell import cell_faults, run_cell
from kdpipe.pipelines.runtime.console import first_line
from kdpipe.pipelines.runtime.ray_cluster import Nodes

__all__ = ["RayEngine"]

_ATTEMPTS = 3
_LOOK_SECONDS = 5.0
_PATIENCE = 120.0  # seconds in which a process of a lost task ends
_SECONDS_TO_STOP = 60.0


class RayEngine:
    """Where cells run: an `Engine`.

    Args:
        ray: The module, connected.
        cpus: Of each cell; None is one.
        gpus: Of each cell; None is one where the cluster has any.
        console: Told where it has to wait.
    """

    def __init__(self, ray: Any, cpus: float | None, gpus: float | None, console: Console) -> None:
        self._ray, self._nodes = ray, Nodes(ray, cpus, gpus, console)
        self._run = ray.remote(num_cpus=self._nodes.cpus, num_gpus=self._nodes.gpus, max_retries=0)(run_cell)
        self._tasks: dict[Any, Cell] = {}
        self._lost: Counter[str] = Counter()  # times that a cell lost its process or machine
        self._ended: Counter[str] = Counter()  # of these, those in which the machine stayed
        self._slots, self._next_look = 1, 0.0

    def check_nodes(self, cells: Sequence[Cell], work_dir: Path) -> None:
        """Ask each node whether it sees what the cells need.

        Args:
            cells: That will run.
            work_dir: Of the comparison; it is made.

        Raises:
            KdpipeError: Some do not.
        """
        work_dir.mkdir(parents=True, exist_ok=True)
        values = [value for cell in cells for value in cell.command["options"].values()]
        paths = {value for value in values if isinstance(value, str) and value.startswith("/")}
        needs = "cache, images, configs and work directory under the same paths (a shared disk)"
        self._nodes.check(cell_faults, sorted({*paths, str(work_dir.absolute())}), verb="train", needs=needs)

    def has_room(self) -> bool:
        if time.monotonic() >= self._next_look:
            self._slots, self._next_look = self._nodes.slots(), time.monotonic() + _LOOK_SECONDS
        return len(self._tasks) < self._slots

    def start(self, cell: Cell) -> None:
        patience = _PATIENCE if self._lost[cell.name] else 0.0
        words = [*cell.words, *cell.secret_words]
        self._tasks[self._run.remote(words, cell.line, str(cell.folder), patience)] = cell

    def ended(self) -> list[tuple[Cell, Outcome | None]]:
        if not self._tasks:
            return []
        ready, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0)
        return [(cell, self._outcome(task, cell)) for task in ready for cell in [self._tasks.pop(task)]]

    def _outcome(self, task: Any, cell: Cell) -> Outcome | None:
        errors = self._ray.exceptions
        try:
            return Outcome(*self._ray.get(task))
        except errors.RayTaskError as error:
            return Outcome(1, str(getattr(error, "cause", error)).strip())
        except errors.RayError as error:
            self._lost[cell.name] += 1
            self._ended[cell.name] += not isinstance(error, errors.NodeDiedError)
            if self._ended[cell.name] < _ATTEMPTS:
                return None
            times = f"it ended its worker {_ATTEMPTS} times"
            return Outcome(1, f"{times}, most likely because memory ran out: {first_line(error)}")

    def stop(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task)
        if self._tasks:
            self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=_SECONDS_TO_STOP)
