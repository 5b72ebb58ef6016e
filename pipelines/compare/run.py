"""Runs the cells of a comparison: so many at once, and one that fails leaves the others alone."""

import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from rich.console import Console

from kdpipe.pipelines.compare.cells import Cell, is_finished
from kdpipe.pipelines.compare.display import Display
from kdpipe.pipelines.compare.process import INTERRUPTED, CellProcess, Outcome
from kdpipe.pipelines.runtime.console import stop
from kdpipe.pipelines.runtime.machine import cores

__all__ = ["Engine", "LocalEngine", "run_cells"]

_POLL_SECONDS = 0.2
_WORKERS = 4  # loaders of a training, at most


class Engine(Protocol):
    """Where cells run."""

    def has_room(self) -> bool:
        """Whether one more can start now."""

    def start(self, cell: Cell) -> None:
        """Start one."""

    def ended(self) -> list[tuple[Cell, Outcome | None]]:
        """Those that have ended since this was asked before; None for one that was lost, and is to be started again."""

    def stop(self) -> None:
        """Ask all that run to end, and wait for that."""


class LocalEngine:
    """Cells as processes of this machine, each with a share of it.

    Args:
        jobs: How many at once; None is one per GPU, or one.
        environment: Of this process: `CUDA_VISIBLE_DEVICES` and `OMP_NUM_THREADS` are heeded.
    """

    def __init__(self, jobs: int | None, environment: Mapping[str, str] = os.environ) -> None:
        gpus = gpu_names(environment)
        self.jobs = jobs or max(1, len(gpus))
        self._shares = [slot_environment(slot, self.jobs, gpus, environment) for slot in range(self.jobs)]
        self._free = list(range(self.jobs))
        self._running: dict[int, tuple[Cell, CellProcess]] = {}

    def has_room(self) -> bool:
        return bool(self._free)

    def start(self, cell: Cell) -> None:
        slot = self._free.pop(0)
        words = [*cell.words, *cell.secret_words]
        if self.jobs > 1 and "--workers" not in words:
            words += ["--workers", str(max(1, min(_WORKERS, cores() // (2 * self.jobs))))]
        self._running[slot] = cell, CellProcess(words, cell.log, self._shares[slot], cell.line)

    def ended(self) -> list[tuple[Cell, Outcome | None]]:
        found: list[tuple[Cell, Outcome | None]] = []
        for slot, (cell, process) in list(self._running.items()):
            outcome = process.poll()
            if outcome is not None:
                del self._running[slot]
                self._free.append(slot)
                found.append((cell, outcome))
        return found

    def stop(self) -> None:
        processes = [process for _, process in self._running.values()]
        try:
            for process in processes:
                process.stop()
            for process in processes:
                process.end()
        finally:  # asked twice, there is no waiting
            for process in processes:
                process.kill()


def run_cells(cells: Sequence[Cell], done: int, engine: Engine, console: Console) -> dict[str, Outcome]:
    """Train cells, in their order.

    Args:
        cells: Those that are not finished.
        done: How many others are.
        engine: Where they run.
        console: Where it is shown how far they are.

    Returns:
        The cells that failed, by name.

    Raises:
        KeyboardInterrupt: Somebody asked to stop. All cells have ended, and can go on.
    """
    waiting, failed = deque(cells), dict[str, Outcome]()
    with Display(cells, done, console) as display:
        try:
            while waiting or display.running:
                while waiting and engine.has_room():
                    cell = waiting.popleft()
                    engine.start(cell)
                    display.started(cell)
                for cell, outcome in engine.ended():
                    if outcome is None:
                        waiting.appendleft(cell)
                    elif outcome.code == INTERRUPTED:  # by somebody else
                        outcome.message = "it was interrupted, and can go on"
                    elif outcome.code == 0 and not is_finished(cell):
                        outcome = Outcome(1, f"it ended well, and {cell.folder} does not hold it: is it a shared disk?")
                    if outcome is not None and outcome.code:
                        failed[cell.name] = outcome
                    display.ended(cell, outcome)
                display.update()
                stop.check()
                time.sleep(_POLL_SECONDS)
        except BaseException:
            if display.running:
                console.print(
                    f"Stopping {len(display.running)} trainings, which can go on from their last epoch. Ctrl-C again "
                    "ends them at once."
                )
            engine.stop()
            raise
    return failed


def gpu_names(environment: Mapping[str, str]) -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls the GPUs that this process may use."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def slot_environment(slot: int, jobs: int, gpus: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The share of a machine that one of several processes has: a GPU, if there are any, and its threads.

    Args:
        slot: Number of the process, from 0.
        jobs: Number of processes.
        gpus: Names of the GPUs; where there are fewer than processes, some share one.
        environment: A number of threads that is set there stays.
    """
    share = {}
    if gpus:
        share["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    if not environment.get("OMP_NUM_THREADS"):
        share["OMP_NUM_THREADS"] = str(max(1, cores() // jobs))
    return share
