"""Too little memory, told as what to lower. Nothing heavy is imported here."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from kdpipe.cache.errors import KdpipeError

__all__ = ["LESS_FOR_A_CACHE", "memory_advice", "memory_shortage"]

LESS_FOR_A_CACHE = (
    "What is cached is valid: the same command goes on from there, where there is more memory (--device, such as cpu). "
    "A cache with a smaller --scale or fewer --proposals needs less; give it another --out."
)

# Of torch's allocators, of CUDA itself (pinned memory, a new context), and of its libraries.
_TEXTS = re.compile(r"can't allocate memory|CUDA (error: )?out of memory|_STATUS_ALLOC_FAILED", re.IGNORECASE)
_FREE = re.compile(r".*? is free\.")  # what torch says behind it is for programmers


def memory_shortage(error: BaseException) -> str | None:
    """What an error says of memory that ran out, on one line; None for an error of another kind."""
    line = (str(error).strip().splitlines() or [""])[0]
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not is_memory and not (isinstance(error, RuntimeError) and _TEXTS.search(str(error))):
        return None
    short = _FREE.match(line)
    return short[0] if short else line or "the machine's memory ran out"


@contextmanager
def memory_advice(remedy: str) -> Iterator[None]:
    """Turn what is raised where memory runs out into a `KdpipeError`.

    Args:
        remedy: What to do about it, with the names of options.

    Raises:
        KdpipeError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (shortage := memory_shortage(error)) is None:
            raise
        raise KdpipeError(f"There is too little memory: {shortage}\n{remedy}") from error
