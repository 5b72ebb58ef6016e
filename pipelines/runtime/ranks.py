"""The processes that share one run, and what they tell each other."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from torch.distributed import DistError, HashStore, Store  # type: ignore[attr-defined]

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.runtime.heartbeat import Heartbeat
from kdpipe.pipelines.runtime.launch import Launch, ToldError, find_launch
from kdpipe.pipelines.runtime.rendezvous import meet

__all__ = ["Ranks"]

# A process that gave no sign of life for so long counts as dead. Where it was only cut off, no harm is done: of two
# that write one part, the second drops its own.
_DEAD_SECONDS = 30.0
# How long the first process, which may host the store, waits for the others after an error.
_FAREWELL_SECONDS = 10.0
_POLL_SECONDS = 0.1


class Ranks:
    """The processes of a run, of which one may be all.

    A context manager. All that they know of each other is in a key-value store, and none waits for a particular other
    one, so that one that is killed does not hang the rest. Where one fails, or is interrupted, the others stop at their
    next `check`, and the context ends with `ToldError` in all but the first that failed: the user sees one message.

    Args:
        launch: The place of this process among them; by default it is the only one.

    Raises:
        LaunchError: The other processes cannot be reached, or did not come.
    """

    def __init__(self, launch: Launch | None = None) -> None:
        launch = launch or Launch()
        self.rank, self.size = launch.rank, launch.size
        self._launch = launch
        self._store: Store = HashStore()  # of this process alone
        self._heard = 0

    @classmethod
    def launched(cls) -> "Ranks":
        """Those that torchrun or Slurm started; this process alone where there is neither."""
        return cls(find_launch(os.environ))

    @property
    def first(self) -> bool:
        """Whether this process speaks for the run."""
        return self.rank == 0

    def __enter__(self) -> "Ranks":
        if self.size == 1:
            return self
        self._store = meet(self._launch)  # so that none fails before all can hear of it
        self._heart = Heartbeat(self._store, self.rank, self.size)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        self._heart.end()
        try:
            told = self._leave(error)
        except DistError as unreachable:
            if error is None or isinstance(error, DistError):
                error = unreachable
            told = False
        if isinstance(error, DistError):
            if not self._heart.is_stopped and self.rank == 1:  # the first of those that can lose their host
                raise KdpipeError(
                    "The first process of this run is gone. What is cached is valid; the same command goes on from "
                    "there."
                ) from error
            told = True
        if told:
            raise ToldError("Another process of this run failed.") from error

    def check(self) -> None:
        """Look whether to go on.

        Raises:
            KeyboardInterrupt: Another process failed or was interrupted.
            DistError: The store is gone.
        """
        if self.size == 1:
            return
        if self._heart.is_stopped:
            raise KeyboardInterrupt
        if self._heart.is_lost:
            raise DistError("the store is gone")

    def agreed(self, look: Callable[[], list[int]]) -> list[int]:
        """What the first process finds; two that look at different moments could find different things."""
        if self.first:
            self._store.set("agreed", json.dumps(look()))
        while not self._store.check(["agreed"]):
            self.check()
            time.sleep(_POLL_SECONDS)
        found: list[int] = json.loads(self._store.get("agreed"))
        return found

    def share(self, work: Sequence[int], left: Callable[[], list[int]], wait: Callable[[], None]) -> Iterator[int]:
        """Pieces of work for this process, each taken when the one before is done.

        Args:
            work: All pieces, the same for every process.
            left: Finds the pieces that are not done. The first process does those of processes that died.
            wait: Called all the time while the first process waits for the others.
        """
        while (place := self._store.add("taken", 1) - 1) < len(work):
            yield work[place]
        if self.first and self.size > 1:
            self._wait_for_others(wait)
            yield from left()

    def count(self, what: str, more: int = 0) -> int:
        """Add to a number that all processes share; returns it."""
        return self._store.add(f"count {what}", more)

    def say(self, line: str) -> None:
        """Leave a line for the first process to print."""
        self._store.set(f"line {self._store.add('lines', 1)}", line)

    def heard(self) -> Iterator[str]:
        """Lines that were left since the last time; in the first process."""
        while self.first and self._store.check([key := f"line {self._heard + 1}"]):
            self._heard += 1
            yield self._store.get(key).decode()

    def _leave(self, error: BaseException | None) -> bool:
        """Tell the others how this process ends; returns whether another one has told the user."""
        failed = isinstance(error, Exception) and not isinstance(error, DistError)
        told = self._store.add("failed", int(failed)) > int(failed)
        if error is not None:
            self._store.set("stop", "")
        self._store.set(f"left {self.rank}", "")
        if error is not None and self.first and not self._launch.is_hosted:
            until = time.monotonic() + _FAREWELL_SECONDS
            self._wait_for_others(lambda: None, until)
        return told and error is not None

    def _wait_for_others(self, wait: Callable[[], None], until: float = float("inf")) -> None:
        """Return when all others have left or are dead, or at a time of the monotonic clock."""
        seen = dict.fromkeys(range(1, self.size), (-1, 0.0))
        while seen and time.monotonic() < until:
            for rank, (beats, when) in list(seen.items()):
                now, found = time.monotonic(), self._heart.beats(rank)
                if found != beats:
                    seen[rank] = found, now
                if self._store.check([f"left {rank}"]) or (found == beats and now - when > _DEAD_SECONDS):
                    del seen[rank]
            wait()
            time.sleep(_POLL_SECONDS)
