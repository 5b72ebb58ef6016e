"""What is not there any more of a cache that was opened: deleted, moved, or on a disk that went away."""

from pathlib import Path

from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.record import part_folder

_ADVICE = "A training goes on with --resume from what it saved"


def gone_error(cache: Path, number: int | None = None) -> CacheError | None:
    """Where something cannot be found: whether a part, or all of the cache, is gone; None where both are there.

    Args:
        cache: path of the cache.
        number: of the part; None looks at the cache only.
    """
    folder = cache if number is None else part_folder(cache, number)
    try:
        if not (cache / "zarr.json").exists():
            return CacheError(
                f"The cache {cache} is gone: it was there when it was opened, and has been deleted or moved since, or "
                "its disk was taken away. Bring it back to this place, or make it again with the same `kdpipe "
                f"cache-teacher` command. {_ADVICE}."
            )
        if not folder.exists():
            return CacheError(
                f"Part {number} of the cache {cache} is gone: {folder} was there when the cache was opened. Run "
                f"`kdpipe cache-teacher` with the same options again, it makes only what is missing. {_ADVICE}."
            )
    except OSError as error:
        return unreadable_error(error, f"Part {number} of the cache {cache}", folder)
    return None


def unreadable_error(error: OSError, what: str, file: Path) -> CacheError:
    """What to say where the system does not let a file be read.

    Args:
        error: of the system.
        what: cannot be read; begins the sentence.
        file: that it was, unless the error says it.
    """
    return CacheError(
        f"{what} cannot be read ({error.strerror or error}: {error.filename or file}). Check that the disk or network "
        "is sound and that this user may read the cache."
    )
