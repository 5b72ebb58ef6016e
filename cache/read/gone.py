"""What is not there any more of a cache that was opened: deleted, moved, or on a disk that went away."""

from kdpipe.cache.errors import CacheError
from kdpipe.cache.store.location import RECORD, Location, part_key

_ADVICE = "A training goes on with --resume from what it saved"


def gone_error(location: Location, number: int | None = None) -> CacheError | None:
    """Where something cannot be found: whether a part, or all of the cache, is gone; None where both are there.

    Args:
        location: of the cache.
        number: of the part; None looks at the cache only.
    """
    try:
        if location.read(RECORD) is None:
            return CacheError(
                f"The cache {location} is gone: it was there when it was opened, and has been deleted or moved since, "
                "or its disk was taken away. Bring it back to this place, or make it again with the same `kdpipe "
                f"cache-teacher` command. {_ADVICE}."
            )
        if number is not None and location.read(f"{part_key(number)}/{RECORD}") is None:
            return CacheError(
                f"Part {number} of the cache {location} is gone: it was there when the cache was opened. Run "
                f"`kdpipe cache-teacher` with the same options again, it makes only what is missing. {_ADVICE}."
            )
    except OSError as error:
        return unreadable_error(error, f"Part {number} of the cache {location}", part_key(number or 0))
    return None


def unreadable_error(error: OSError, name: str, file: str) -> CacheError:
    """What to say where the system does not let a file be read.

    Args:
        error: of the system.
        name: of what cannot be read; begins the sentence.
        file: that it was, unless the error says it.
    """
    return CacheError(
        f"{name} cannot be read ({error.strerror or error}: {error.filename or file}). Check that the disk or network "
        "is sound and that this user may read the cache."
    )
