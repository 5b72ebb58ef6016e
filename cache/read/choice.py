"""Images of a cache for those that look at some of them only."""

import numpy as np

from kdpipe.cache.read.reader import TeacherCache

__all__ = ["evenly_chosen"]


def evenly_chosen(cache: TeacherCache, count: int) -> list[int]:
    """Ids of at most so many images, evenly chosen from the first to the last.

    Args:
        cache: The cache, which may be empty.
        count: How many.
    """
    positions = np.unique(np.linspace(0, len(cache) - 1, min(count, len(cache))).round().astype(int))
    ids: list[int] = cache.image_ids[positions].tolist()
    return ids
