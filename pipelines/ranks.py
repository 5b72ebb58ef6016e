"""The processes that share one run, and what they tell each other."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import TracebackType

from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.launch import ToldError

__all__ = ["Ranks"]

_BEAT_SECONDS = 1.0
# A process that gave no sign of life for so long counts as dead. Where it was only cut off, no harm is done: of two
# that write one part, the second drops its own.
_DEAD_SECONDS = 30.0
# How long the first process, which may host the store, waits for the others after an error.
_FAREWELL_SECONDS = 10.0
_START_SECONDS = 300.0
_POLL_SECONDS = 0.1


class Ranks:
    """The processes of a run, of which one may be all.

    A context manager. All that they know of each other is in a key-value store, and none waits for a particular other
    one, so that one that is killed does not hang the rest. Where one fails, or is interrupted, the others stop at their
    next `check`, and the context ends with `ToldError` in all but the first that failed: the user sees one message.

    Args:
        rank: Number of this process; the first, 0, speaks for the run.
        size: Number of processes.

    Raises:
        KdpipeError: The other processes cannot be reached, or did not come.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        # torchrun hosts the store itself, so that it outlives every process
        self._hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._store: Store = HashStore() if self.size == 1 else self._connect()
        self._heard = 0
        self._stopped = self._lost = False
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="kdpipe-beat", daemon=True)

    @classmethod
    def launched(cls) -> "Ranks":
        """Those that torchrun or Slurm started; this process alone where there is neither."""
        return cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @property
    def first(self) -> bool:
        """Whether this process speaks for the run."""
        return self.rank == 0

    def __enter__(self) -> "Ranks":
        if self.size == 1:
            return self
        self._thread.start()
        come, start = self._store.add("come", 1), time.monotonic()
        while come < self.size:  # so that none fails before all can hear of it
            if time.monotonic() - start > _START_SECONDS:
                raise KdpipeError(
                    f"{come} of the {self.size} processes of this run came within {_START_SECONDS:.0f} s. Look at what "
                    "the others printed, and start again."
                )
            self.check()
            time.sleep(_POLL_SECONDS)
            come = self._store.add("come", 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        self._leaving.set()
        self._thread.join()
        try:
            told = self._leave(error)
        except DistError as unreachable:
            if error is None or isinstance(error, DistError):
                error = unreachable
            told = False
        if isinstance(error, DistError):
            if not self._stopped and self.rank == 1:  # the first of those that can lose their host
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
        if self._stopped:
            raise KeyboardInterrupt
        if self._lost:
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

    def _connect(self) -> Store:
        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except KeyError as error:
            raise KdpipeError(
                f"WORLD_SIZE is {self.size}, and {error} is not set. Start several processes with torchrun or srun."
            ) from None
        try:
            store = TCPStore(
                host,
                port,
                is_master=self.first and not self._hosted,
                timeout=timedelta(seconds=_START_SECONDS),
                wait_for_workers=False,
            )
        except DistError as error:
            raise KdpipeError(
                f"Process {self.rank} cannot reach the others at MASTER_ADDR {host}, MASTER_PORT {port}: "
                f"{str(error).splitlines()[0]}. Is the port taken? Set MASTER_PORT to another one."
            ) from error
        return PrefixStore(f"kdpipe {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _beat(self) -> None:
        """The thread: shows that this process lives, and looks whether to go on."""
        try:
            while not self._leaving.wait(_BEAT_SECONDS):
                self._store.add(f"beat {self.rank}", 1)
                self._stopped = self._store.check(["stop"])
        except DistError:
            self._lost = True

    def _leave(self, error: BaseException | None) -> bool:
        """Tell the others how this process ends; returns whether another one has told the user."""
        failed = isinstance(error, Exception) and not isinstance(error, DistError)
        told = self._store.add("failed", int(failed)) > int(failed)
        if error is not None:
            self._store.set("stop", "")
        self._store.set(f"left {self.rank}", "")
        if error is not None and self.first and not self._hosted:
            until = time.monotonic() + _FAREWELL_SECONDS
            self._wait_for_others(lambda: None, until)
        return told and error is not None

    def _wait_for_others(self, wait: Callable[[], None], until: float = float("inf")) -> None:
        """Return when all others have left or are dead, or at a time of the monotonic clock."""
        seen = dict.fromkeys(range(1, self.size), (-1, 0.0))
        while seen and time.monotonic() < until:
            for rank, (beats, when) in list(seen.items()):
                now, found = time.monotonic(), self._store.add(f"beat {rank}", 0)
                if found != beats:
                    seen[rank] = found, now
                if self._store.check([f"left {rank}"]) or (found == beats and now - when > _DEAD_SECONDS):
                    del seen[rank]
            wait()
            time.sleep(_POLL_SECONDS)
