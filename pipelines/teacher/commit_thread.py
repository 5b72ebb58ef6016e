"""A thread that commits a cache's parts beside the making of the next one."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType


class CommitThread:
    """Commits a part on a thread of its own while the next one is made; a context manager that waits for the last."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdpipe-commit")
        self._last: Future[None] | None = None

    def __enter__(self) -> "CommitThread":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()

    def begin(self, part: ExitStack) -> None:
        """Close what holds the writer of a part, once the part before is committed."""
        with part:  # discarded where the one before failed
            self.wait()
            self._last = self._pool.submit(part.pop_all().close)

    def wait(self) -> None:
        """Wait for the commit under way.

        Raises:
            CacheError: It failed.
        """
        last, self._last = self._last, None
        if last is not None:
            last.result()
