"""What is still missing of a cache that several processes fill."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from kdpipe.cache.write.writer import CacheWriter

__all__ = ["MissingParts"]

_LOOK_SECONDS = 20.0


class MissingParts:
    """The parts that are not committed, by their records, whoever commits them; a context manager.

    Args:
        writer: Of the cache.
        parts: Those that were missing at the beginning.

    Attributes:
        parts: Those that were missing at the beginning.
    """

    def __init__(self, writer: CacheWriter, parts: Sequence[int]) -> None:
        self._writer = writer
        self.parts = self._left = list(parts)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kdpipe-missing")
        self._asked: Future[list[int]] | None = None
        self._next = time.monotonic() + _LOOK_SECONDS

    def __enter__(self) -> "MissingParts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    @property
    def images(self) -> int:
        """How many images the parts have that were missing lately; looks again in the background, now and then."""
        if self._asked is not None and self._asked.done():
            self._left, self._asked = self._asked.result(), None
            self._next = time.monotonic() + _LOOK_SECONDS
        if self._asked is None and time.monotonic() >= self._next:
            self._asked = self._pool.submit(self._writer.pending, self._left)
        return sum(len(self._writer.parts[index]) for index in self._left)

    def look(self) -> list[int]:
        """The parts that are missing now."""
        self._left = self._writer.pending(self._left)
        return self._left
