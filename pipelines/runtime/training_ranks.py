"""Processes that train together: none can go on without the others, and one of them tells the user why."""

import os
import re
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

import click
import torch
from mmengine.dist import init_dist
from torch.distributed import DistError, PrefixStore, Store  # type: ignore[attr-defined]

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.runtime.console import stop
from kdpipe.pipelines.runtime.heartbeat import Heartbeat
from kdpipe.pipelines.runtime.launch import Launch, ToldError, find_launch
from kdpipe.pipelines.runtime.rendezvous import connect, meet
from kdpipe.pipelines.runtime.watchdog import Watchdog

__all__ = ["TrainingRanks", "join_process_group", "lost_others"]

# A process that gave no sign of life for so long counts as dead; it only decides what is said.
_DEAD_SECONDS = 5.0
# How long the first process, which may keep the store, waits for the others in the end. After an error they may wait
# for it in the middle of a step until it is gone; but they have heard of it.
_FAREWELL_SECONDS, _ERROR_SECONDS = 10.0, 3.0
_POLL_SECONDS = 0.1
_LOST = re.compile(
    r"gloo|nccl|c10d|connection (closed|reset|refused|was lost)|broken pipe|socket closed|timed out waiting",
    re.IGNORECASE,
)
_GO_ON = (
    "What was saved is good: go on with the same command and --resume, or begin anew where no epoch was finished yet."
)

_met: "TrainingRanks | None" = None


class TrainingRanks:
    """The processes of a training, as a context manager: they meet, and end together with one message.

    Where one fails, the others end with `ToldError`; where one is gone without a word (killed, out of memory), one of
    those that are left says so; where one is interrupted, all are.

    Args:
        launch: The place of this process, one of several.

    Raises:
        LaunchError: The others did not come.
        KdpipeError: In one process: another one is gone.
        ToldError: Another process has told the user.
    """

    _store: Store  # once they have met

    def __init__(self, launch: Launch) -> None:
        self.launch = launch

    def __enter__(self) -> "TrainingRanks":
        global _met
        self._store = meet(self.launch)
        self._heart = Heartbeat(self._store, self.launch.rank, self.launch.size)
        self._heart.start()
        others = [rank for rank in range(self.launch.size) if rank != self.launch.rank]
        self._watchdog = Watchdog(self._heart, others, self._give_up)
        self._watchdog.start()
        _met = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _met
        _met = None
        stop.between_steps = True  # torchrun ends the others of one that is gone: they have a word to say before
        self._watchdog.stop()
        try:
            self._leave(error)
        except DistError as unreachable:
            self._say_first_is_gone(error or unreachable)
        finally:
            stop.between_steps = False
            self._heart.end()

    def _leave(self, error: BaseException | None) -> None:
        """Tell the others how this process ends, and find out who speaks; returns where `error` is to go on."""
        lost = error is not None and lost_others(error)
        failed = isinstance(error, Exception) and not lost and not isinstance(error, click.ClickException)
        told = self._store.add("failed", int(failed)) > int(failed)
        if isinstance(error, KeyboardInterrupt):
            self._store.set("interrupted", "")
        if error is not None:
            self._store.set("stop", "")
        self._store.set(f"left {self.launch.rank}", "")
        try:
            if error is None:
                torch.distributed.destroy_process_group() if torch.distributed.is_initialized() else None
                return
            if not failed and not told and not isinstance(error, click.ClickException):
                self._say_who_is_gone(error, lost)
            if told or (not failed and self._store.add("failed", 0)):
                raise ToldError("Another process of this run failed.") from error
        finally:
            if self.launch.rank == 0 and not self.launch.is_hosted:
                self._linger(_FAREWELL_SECONDS if error is None else _ERROR_SECONDS)

    def _say_who_is_gone(self, error: BaseException, lost: bool) -> None:
        """Where this process was interrupted or lost the others: whether one of them is gone."""
        gone = self._heart.silent(_DEAD_SECONDS)
        if self._store.add("failed", 0):
            return
        if not gone and (not lost or self._store.check(["interrupted"])):
            raise KeyboardInterrupt from error
        if self._store.add("failed", 1) > 1:
            raise ToldError("Another process of this run is gone.") from error
        if gone:
            raise KdpipeError(self._gone_text(gone)) from error
        raise KdpipeError(
            f"The processes of this run lost each other: {str(error).strip().splitlines()[0]}\n{_GO_ON}"
        ) from error

    def _gone_text(self, gone: list[int]) -> str:
        return (
            f"Another process of this run is gone (number {', '.join(map(str, gone))} of {self.launch.size}, from 0): "
            f"it was killed, ran out of memory, or its machine ended. {_GO_ON}"
        )

    def _give_up(self, gone: list[int]) -> None:
        """End this process from beside its main thread, which waits for what will not come."""
        if not gone:
            os._exit(1 if self._heart.is_told else 130)
        try:
            speaks = self._store.add("failed", 1) == 1
        except DistError:
            speaks = self.launch.rank == 1
        if speaks:
            click.echo(f"Error: {self._gone_text(gone)}", err=True)
        os._exit(1)

    def _say_first_is_gone(self, error: BaseException) -> None:
        if self._heart.is_told:
            raise ToldError("Another process of this run failed.") from error
        if self._heart.is_stopped or isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        if self.launch.rank > 1:  # the second speaks
            raise ToldError("The first process of this run is gone.") from error
        raise KdpipeError(self._gone_text([0])) from error

    def _linger(self, seconds: float) -> None:
        """Keep the store until the others have left."""
        names = [f"left {rank}" for rank in range(1, self.launch.size)]
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._store.check(names):
            time.sleep(_POLL_SECONDS)


def lost_others(error: BaseException) -> bool:
    """Whether an error, or what led to it, says that another process cannot be reached (gloo, NCCL, torch's store)."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DistError) or (type(seen) is RuntimeError and _LOST.search(str(seen))):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def join_process_group(settings: Mapping[str, Any]) -> None:
    """Make torch's process group of this run, from the store at which its processes met, or meet now.

    Args:
        settings: mmengine's `dist_cfg`: `backend`, for GPUs, and `timeout` in seconds.
    """
    launch = find_launch(os.environ)
    store = PrefixStore("training", meet(launch) if _met is None else connect(launch))
    place: dict[str, Any] = {"store": store, "rank": launch.rank, "world_size": launch.size}
    if torch.cuda.is_available():
        init_dist("pytorch", **settings, **place)
        return
    # by itself, mmengine would choose a GPU for each
    timeout: dict[str, Any] = {"timeout": timedelta(seconds=settings["timeout"])} if "timeout" in settings else {}
    torch.distributed.init_process_group("gloo", **timeout, **place)
