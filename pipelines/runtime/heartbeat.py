"""That a process lives, and which of the others do."""

import threading
import time

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

__all__ = ["Heartbeat"]

_BEAT_SECONDS = 1.0
_POLL_SECONDS = 0.1
_SETTLE_SECONDS = 0.5


class Heartbeat:
    """A thread that shows in the store that this process lives, and looks whether all are to stop.

    Attributes:
        is_stopped: The key `stop` was set.
        is_told: By a process that told the user why (it counted in `failed` before).
        is_lost: The store is gone.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self.is_stopped = self.is_told = self.is_lost = False
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="kdpipe-beat", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def end(self) -> None:
        """Beat no more."""
        self._leaving.set()
        self._thread.join()

    def beats(self, rank: int) -> int:
        """How often another process has shown that it lives."""
        return self._store.add(f"beat {rank}", 0)

    def has_left(self, rank: int) -> bool:
        """Whether another process has ended in its own way."""
        return self._store.check([f"left {rank}"])

    def silent(self, seconds: float) -> list[int]:
        """Processes that have not left, and give no sign of life for so long; returns when that is clear.

        Raises:
            DistError: The store is gone.
        """
        time.sleep(_SETTLE_SECONDS)  # the last sign of one that is gone may be on its way
        start = time.monotonic()
        others = {rank: self.beats(rank) for rank in range(self._size) if rank != self._rank}
        while others and time.monotonic() - start < seconds:
            time.sleep(_POLL_SECONDS)
            for rank, before in list(others.items()):
                if self.has_left(rank) or self.beats(rank) != before:
                    del others[rank]
        return list(others)

    def _beat(self) -> None:
        try:
            while not self._leaving.wait(_BEAT_SECONDS):
                self._store.add(f"beat {self._rank}", 1)
                stopped = self._store.check(["stop"])
                self.is_told = stopped and self._store.add("failed", 0) > 0
                self.is_stopped = stopped
        except DistError:
            self.is_lost = True
