"""Creates or resumes a cache and writes its parts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.record import is_whole, read_part_record
from kdpipe.cache.format.root import describe_plan, digest_root
from kdpipe.cache.identity import canonical_json, difference
from kdpipe.cache.plan import ImageInfo, plan_parts
from kdpipe.cache.read.root import read_root
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.store.location import Location, Place, open_location, part_key
from kdpipe.cache.write.head import write_head
from kdpipe.cache.write.part_writer import PartWriter
from kdpipe.cache.write.root import create_root


class CacheWriter:
    """Creates a cache, or goes on with it where there is one of the same identity.

    Any number of processes may write to one cache at once: a part appears in one atomic act, and of two that wrote the
    same part the second drops its own.

    Args:
        place: path, URL or location of the cache.
        spec: what is stored.
        images: all images of the data set, in order.
        part_size: raw bytes per part.
        identity: JSON values that say what the targets depend on, such as {"teacher": ..., "options": ...};
            compared when a cache is resumed.
        metadata: JSON values that are recorded, and not compared when a cache is resumed.

    Raises:
        CacheError: there is something else, it is damaged, was made with another identity, specification, data set or
            part size (the message names what differs), or cannot be written. What is there stays untouched.
    """

    def __init__(
        self,
        place: Place,
        spec: CacheSpec,
        images: Sequence[ImageInfo],
        part_size: int,
        identity: Mapping[str, Any],
        metadata: Mapping[str, Any],
    ) -> None:
        self.location = location = open_location(place)
        self.spec = spec
        self.images = tuple(images)
        self.parts = plan_parts(self.images, spec, part_size)
        canonical_json([identity, metadata])  # not JSON: say so before anything is made
        plan = describe_plan(self.images, self.parts, part_size)
        self._root = digest_root(spec, identity, plan)
        if not self.images:
            raise CacheError(f"There are no images to cache at {location}: check the annotation file.")
        with location.explained("Creating the cache"):
            is_new = location.check_new()
            location.tidy()
            if is_new and create_root(location, spec, self.images, self.parts, part_size, identity, metadata):
                return
            root = read_root(location)
            recorded = {**root.identity, "spec": root.spec.to_json(), "plan": root.plan}
            _check_same(location, recorded, {**identity, "spec": spec.to_json(), "plan": plan})

    def pending(self, among: Sequence[int] | None = None) -> list[int]:
        """Numbers of the parts that are not committed, or whose files are missing or cut short.

        Args:
            among: the parts to look at; None looks at all.
        """
        among = range(len(self.parts)) if among is None else among
        committed = self.location.at_once(self._committed, among)
        return [index for index, is_committed in zip(among, committed, strict=True) if not is_committed]

    def write_head(self, state: Mapping[str, Tensor]) -> None:
        """Store the weights of the teacher's RPN and RoI head; does nothing where they are stored already.

        Args:
            state: by parameter name. Floating point becomes float32.

        Raises:
            CacheError: a name cannot be stored, or writing failed.
        """
        write_head(self.location, state, self._root, self.spec.codec)

    def part(self, index: int) -> PartWriter:
        """The writer of one part, a context manager."""
        span = self.parts[index]
        images = self.images[span.start : span.stop]
        return PartWriter(self.location, index, span, images, self.spec, self._root)

    def _committed(self, index: int) -> bool:
        with self.location.explained(f"Reading part {index}"):
            record = read_part_record(self.location, index, self.parts[index], self._root)
            return record is not None and is_whole(self.location, part_key(index), record)


def check_resumable(place: Place, spec: CacheSpec, identity: Mapping[str, Any], part_size: int) -> None:
    """Refuse a cache that `CacheWriter` would refuse whatever the data; do so before the data is read.

    Args:
        place: where the cache is or will be.
        spec: of the cache to write; its classes are not compared.
        identity: the part of the cache's identity that is known without the data.
        part_size: raw bytes per part.

    Raises:
        CacheError: there is something else, it is damaged, or was made with something else; the message names what
            differs.
    """
    location = open_location(place)
    with location.explained("Reading the cache"):
        if location.check_new():
            return
        root = read_root(location)
    recorded = {name: root.identity.get(name) for name in identity}
    requested = replace(spec, class_names=root.spec.class_names, category_ids=root.spec.category_ids)
    _check_same(
        location,
        {**recorded, "spec": root.spec.to_json(), "plan": {"part_size": root.plan["part_size"]}},
        {**identity, "spec": requested.to_json(), "plan": {"part_size": part_size}},
    )


def _check_same(location: Location, recorded: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    if lines := difference(recorded, requested):
        raise CacheError(
            f"The cache {location} was made with something else, and stays as it is:\n  "
            + "\n  ".join(lines)
            + "\nUse the same options to go on with it, or choose another --out."
        )
