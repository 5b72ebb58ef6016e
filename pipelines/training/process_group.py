"""Processes that train together, by mmengine's DDP, as torchrun or srun start them."""

import functools
import os
import re
import signal
import socket
import subprocess
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import click

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.runtime.launch import LaunchError, find_rank

__all__ = ["join_process_group", "lost_others", "set_rendezvous", "trained_together"]

_LOST = re.compile(
    r"gloo|nccl|c10d|connection (closed|reset|refused|was lost)|broken pipe|socket closed|timed out waiting",
    re.IGNORECASE,
)


def trained_together(command: Callable[..., Any]) -> Callable[..., Any]:
    """For commands that train: each of several processes is told where they meet, and ends with one message."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        if set_rendezvous(os.environ) == 1:
            return command(*args, **options)
        import torch

        try:
            result = command(*args, **options)
        except Exception as error:
            if isinstance(error, LaunchError) or not lost_others(error):
                raise
            raise KdpipeError(
                f"Another process of this training is gone: it failed (look at what it printed), was killed, ran out "
                f"of memory, or its machine ended ({str(error).strip().splitlines()[0]}). What was saved is good: go "
                "on with the same command and --resume, or begin anew where no epoch was finished yet."
            ) from error
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return result

    return run


def set_rendezvous(environment: MutableMapping[str, str]) -> int:
    """Check torchrun's variables, by which torch and mmengine find each other; in a step of Slurm, set them.

    Args:
        environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set in it.

    Returns:
        Number of processes.

    Raises:
        LaunchError: A variable is missing or makes no sense, or the first node has no address.
    """
    rank = find_rank(environment)
    if rank.count == 1:
        return 1
    if "RANK" not in rank.variables:
        # Jobs that share a node must not share the port.
        job = environment.get("SLURM_JOB_ID", "0")
        port = 20_000 + (int(job) if job.isdecimal() else zlib.crc32(job.encode())) % 10_000
        environment["MASTER_ADDR"] = environment.get("MASTER_ADDR") or _first_node(environment)
        environment["MASTER_PORT"] = environment.get("MASTER_PORT") or str(port)
        environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
        environment["RANK"], environment["WORLD_SIZE"] = str(rank.index), str(rank.count)
    environment["LOCAL_RANK"] = environment.get("LOCAL_RANK") or "0"  # Kubernetes: one process on each machine
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise LaunchError(
                f"There are {rank.count} processes by {rank.source}, and {name} is not set. Start them with torchrun "
                f"or srun; for one process alone, unset {rank.source}."
            )
    try:
        socket.getaddrinfo(environment["MASTER_ADDR"], environment["MASTER_PORT"])
    except (OSError, UnicodeError) as error:
        raise LaunchError(
            f"The first of {rank.count} processes cannot be reached: {environment['MASTER_ADDR']}, port "
            f"{environment['MASTER_PORT']}, has no address here ({error}). Set MASTER_ADDR to a name or address by "
            "which all machines reach it, and MASTER_PORT to a free port."
        ) from error
    return rank.count


def join_process_group(settings: Mapping[str, Any]) -> None:
    """Wait for the other processes, and make torch's process group with them.

    Args:
        settings: mmengine's `dist_cfg`: `backend`, for GPUs, and `timeout` in seconds.

    Raises:
        LaunchError: They did not come.
    """
    import torch
    from mmengine.dist import init_dist

    rank = find_rank(os.environ)
    where = f"{rank.count} processes ({rank.source}) at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if rank.index == 0:
        click.echo(f"Waiting for {where}; Ctrl-C ends it.", err=True)
    try:
        with _default_signals():
            if torch.cuda.is_available():
                init_dist("pytorch", **settings)
                return
            # by itself, mmengine would choose a GPU for each
            timeout = timedelta(seconds=settings["timeout"]) if "timeout" in settings else None
            torch.distributed.init_process_group("gloo", timeout=timeout)
    except RuntimeError as error:
        raise LaunchError(
            f"The {where} did not come together: {str(error).strip().splitlines()[0]}\nLook at what the others "
            f"printed. Is the port taken? Set MASTER_PORT to another one for all. If this is the only process, unset "
            f"{rank.source}."
        ) from error


def lost_others(error: BaseException) -> bool:
    """Whether an error, or what led to it, says that another process cannot be reached (gloo, NCCL, torch's store)."""
    from torch.distributed import DistError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DistError) or (type(cause) is RuntimeError and _LOST.search(str(cause))):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


@contextmanager
def _default_signals() -> Iterator[None]:
    """Let signals end the process: while torch waits for others, Python's own handlers do not run."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _first_node(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or "localhost"
    if "," not in nodes and "[" not in nodes:
        return nodes
    try:
        listing = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return listing.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise LaunchError(
            f"The first node of {nodes} cannot be found out (scontrol show hostnames: {error}). Set MASTER_ADDR to it."
        ) from error
