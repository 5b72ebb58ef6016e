"""What `kdpipe compare --ray` runs on the machines of a cluster. Nothing heavy is imported here."""

import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from kdpipe.pipelines.compare.process import CellProcess
from kdpipe.pipelines.runtime.ray_cluster import version_faults
from kdpipe.pipelines.training.work_dir import WorkDir

__all__ = ["cell_faults", "run_cell"]

_POLL_SECONDS = 0.2


def cell_faults(paths: Sequence[str], versions: dict[str, str]) -> list[str]:
    """Why this machine cannot train; empty where it can.

    Args:
        paths: That have to be there.
        versions: As `own_versions` gives them where the run was started.
    """
    return [*version_faults(versions), *(f"{path} is not there" for path in paths if not Path(path).exists())]


def run_cell(words: Sequence[str], shown: str, folder: str, patience: float) -> tuple[int, str]:
    """Train a cell in a process of its own, which ends when this one does.

    Args:
        words: What stands behind `kdpipe`.
        shown: Of them, what the log may hold.
        folder: Work directory.
        patience: Seconds to wait for a process that still trains there, whose loss was noticed before its end.

    Returns:
        Exit code, and what it said last where it failed.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a cluster that was started with & would ignore
    work, until = WorkDir(Path(folder)), time.monotonic() + patience
    while work.is_busy() and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    process = CellProcess(words, work.path.with_name(f"{work.path.name}.log"), {}, shown)
    try:
        while (outcome := process.poll()) is None:
            time.sleep(_POLL_SECONDS)  # and not in a system call, which Ray cannot interrupt
    finally:  # a task that is given up gets a KeyboardInterrupt
        process.stop()
        process.end()
    host = f" (on {socket.gethostname()})" if outcome.code else ""
    return outcome.code, f"{outcome.message}{host}"
