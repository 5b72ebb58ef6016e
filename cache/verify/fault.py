"""Fault: something that the check of a cache found."""

from dataclasses import dataclass

from kdpipe.cache.format.head import HEAD
from kdpipe.cache.store.location import part_key


@dataclass(frozen=True)
class Fault:
    """Something that is not as it should be.

    Attributes:
        where: such as `part 3`, or `the head`.
        message: what is wrong, to follow `where`.
        part: number of the part concerned.
        array: name of the array concerned.
        image_ids: of the images whose targets it concerns.
        remove: key of what to remove; None where there is nothing to remove.
        repairable: whether removing that, and running `cache-teacher` with the same options again, puts it right.
    """

    where: str
    message: str
    part: int | None = None
    array: str | None = None
    image_ids: tuple[int, ...] = ()
    remove: str | None = None
    repairable: bool = True

    @property
    def is_stray(self) -> bool:
        """Whether removing it is all that it takes, since it is no part of the cache."""
        return self.remove not in (None, HEAD, part_key(self.part or 0))
