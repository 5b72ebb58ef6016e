"""Opens a cache and reads targets back."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.head import HEAD, parameter_layout
from kdpipe.cache.format.record import files_key, parse_part_record, read_files, read_head_record, read_part_record
from kdpipe.cache.format.root import Root
from kdpipe.cache.read.arrays import ArrayReader, DamagedError, read_rows
from kdpipe.cache.read.gone import gone_error, unreadable_error
from kdpipe.cache.read.part_reader import PartReader, check_rows
from kdpipe.cache.read.root import read_root
from kdpipe.cache.records import TargetIndex, TeacherTargets
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.store.location import RECORD, Location, Place, open_location, part_key
from kdpipe.cache.views import view_matrix

# Kept in memory per process: rows of indices, some 200 bytes each, and parts, some 30 kB each.
_MAX_INDEX_ROWS = 200_000
_MAX_PARTS = 1_000
# Commit records that a thread reads one after the other.
_MOST_RECORDS = 512
_NAMED_PARTS = 10


def open_cache(place: Place, *, allow_partial: bool = False) -> "TeacherCache":
    """Open a cache for reading.

    Args:
        place: path, URL or location of the cache.
        allow_partial: also open a cache some of whose parts are still missing.

    Raises:
        CacheError: it is no cache, has another format version, is incomplete or damaged.
    """
    location = open_location(place)
    root = read_root(location)
    parts, digest = root.parts, root.digest

    def read(numbers: range) -> list[bytes | None]:
        return [location.read(f"{part_key(number)}/{RECORD}") for number in numbers]

    step = max(1, min(_MOST_RECORDS, -(-len(parts) // location.threads)))
    batches = [range(start, min(start + step, len(parts))) for start in range(0, len(parts), step)]
    with location.explained("Reading the cache"):
        files = [data for batch in location.at_once(read, batches) for data in batch]
    # parsed when all are read: threads that do both wait for each other
    records = (parse_part_record(data, number, parts[number], digest) for number, data in enumerate(files))
    skipped = {number: record["skipped"] for number, record in enumerate(records) if record is not None}
    missing = [str(number) for number in range(len(parts)) if number not in skipped]
    if missing and not allow_partial:
        part_names = ", ".join(missing[:_NAMED_PARTS]) + ", ..." * (len(missing) > _NAMED_PARTS)
        raise CacheError(
            f"The cache {location} is incomplete: {len(missing)} of {len(parts)} parts are missing or damaged (part "
            f"{part_names}). Run `kdpipe cache-teacher` with the same options again: it makes only what is missing."
        )
    return TeacherCache(location, root, skipped)


class TeacherCache:
    """What the teacher said of a data set. Made by `open_cache`; can be pickled and sent to other processes.

    Parts are opened when first read, in each process anew: a parent that has read does not disturb its children,
    however they are started. No file is kept open.

    Attributes:
        location: of the cache.
        spec: what is stored.
        identity: what the targets depend on, as the writer recorded it.
        metadata: what else the writer recorded.
        image_ids: [N] int64, of the images that can be read, in the order of the data set.
        skipped: image_id, file_name and reason of each image that could not be read when the cache was made.
        is_complete: whether every part of the plan was there when the cache was opened.
    """

    def __init__(self, location: Location, root: Root, skipped: dict[int, list[dict[str, Any]]]) -> None:
        self.location = location
        self.spec: CacheSpec = root.spec
        self.identity = root.identity
        self.metadata = root.metadata
        self.skipped: list[dict[str, Any]] = [entry for entries in skipped.values() for entry in entries]
        self.is_complete = len(skipped) == len(root.parts)
        self._starts, self._root = root.part_starts, root.digest
        keep = np.zeros(len(root.image_ids), dtype=bool)
        for number, span in enumerate(root.parts):
            keep[span.start : span.stop] = number in skipped
        if self.skipped:
            keep &= ~np.isin(root.image_ids, [entry["image_id"] for entry in self.skipped])
        positions = np.flatnonzero(keep)
        self.image_ids: npt.NDArray[np.int64] = root.image_ids[positions]
        order = np.argsort(self.image_ids, kind="stable")
        self._sorted_ids, self._positions = self.image_ids[order], positions[order]
        self._process: _Process | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, int | np.integer) and self._find(int(image_id)) is not None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def head(self) -> dict[str, Tensor]:
        """Weights of the teacher's RPN and RoI head by parameter name, float32.

        Raises:
            CacheError: they were never stored, or are damaged.
        """
        if gone := gone_error(self.location):
            raise gone
        remedy = f"run `kdpipe verify {self.location} --repair`, then `kdpipe cache-teacher` with the same options"
        with self.location.explained("Reading the head"):
            record = read_head_record(self.location)
            if record is None or record["root"] != self._root:
                state = "missing, damaged, or was made for another cache"
                raise CacheError(f"The teacher's head in the cache {self.location} is {state}: {remedy}.")
            try:
                return self._read_head(record)
            except DamagedError as error:
                raise CacheError(
                    f"The teacher's head in the cache {self.location} is damaged ({error}): {remedy}."
                ) from error

    def _read_head(self, record: dict[str, Any]) -> dict[str, Tensor]:
        key = files_key(HEAD, record)
        files = read_files(self.location, key, record["files"])
        if files is None:
            raise DamagedError(HEAD, "its list of files is missing or has other content than was written")
        requests = []
        for name, entry in record["parameters"].items():
            layout, rows = parameter_layout(entry, self.spec.codec)
            requests.append((ArrayReader(self.location, key, name, layout, rows, files), range(rows)))
        parameters = zip(record["parameters"].items(), read_rows(requests), strict=True)
        return {name: torch.from_numpy(block.reshape(entry["shape"])) for (name, entry), block in parameters}

    def index(self, image_id: int, view: str = "identity") -> TargetIndex:
        """Sizes of an image in a view; reads no targets.

        Raises:
            CacheError: the image or the view is not in the cache.
        """
        part, row = self._locate(image_id, view)
        return part.describe(row)

    def targets(
        self,
        image_id: int,
        view: str = "identity",
        fields: Sequence[str] | None = None,
        levels: Sequence[int] | None = None,
        rows: npt.ArrayLike | None = None,
    ) -> TeacherTargets:
        """What the teacher said of an image in a view. Reads what is asked for, and the boxes always.

        Args:
            image_id: of the image.
            view: one of `spec.views`.
            fields: some of `spec.fields`; None reads all.
            levels: positions in `spec.strides` of the pyramid levels to read; None reads all.
            rows: numbers [M] within the image, proposals before jittered boxes before ground truth, applied to all
                fields that have a row per box; None reads all. `num_proposals` of the result counts the proposals among
                them, `num_jittered` the jittered boxes.

        Raises:
            CacheError: the image, view, field, level or row is not in the cache, or its data is damaged.
        """
        fields = self._check_fields(fields)
        part, row = self._locate(image_id, view)
        info = part.describe(row)
        selected = None if rows is None else check_rows(rows, info)
        num_proposals, num_jittered = info.num_proposals, info.num_jittered
        if selected is not None:
            before_gt = int(np.count_nonzero(selected < num_proposals + num_jittered))
            num_proposals = int(np.count_nonzero(selected < num_proposals))
            num_jittered = before_gt - num_proposals
        arrays = ["boxes", *(name for field in fields if field != "boxes" for name in self.spec.arrays_of(field))]
        values = part.read(row, arrays, selected, self._check_levels(levels))
        return TeacherTargets(
            image_id=info.image_id,
            view=info.view,
            file_name=info.file_name,
            original_size=info.original_size,
            input_size=info.input_size,
            matrix=view_matrix(info.original_size, info.input_size, view == "hflip"),
            num_proposals=num_proposals,
            num_jittered=num_jittered,
            **values,
        )

    def _find(self, image_id: int) -> int | None:
        """Position of an image in the plan."""
        place = int(np.searchsorted(self._sorted_ids, image_id))
        if place == len(self._sorted_ids) or self._sorted_ids[place] != image_id:
            return None
        return int(self._positions[place])

    def _locate(self, image_id: int, view: str) -> tuple[PartReader, int]:
        if view not in self.spec.views:
            raise CacheError(
                f"The cache {self.location} has the views {', '.join(self.spec.views)}, not {view!r}: cache the "
                f"teacher with --views including {view}, or let the targets be mirrored."
            )
        position = self._find(int(image_id))
        if position is None:
            raise CacheError(
                f"Image {image_id} is not in the cache {self.location} of {len(self)} images"
                f"{self._why_missing(int(image_id))}. Is it the cache of this data set?"
            )
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        part = self._here().part(number)
        row = part.row(int(image_id), view)
        if row is None:
            raise CacheError(
                f"The index of part {number} lacks image {image_id} in view {view!r}: run `kdpipe verify "
                f"{self.location} --repair`, then `kdpipe cache-teacher` with the same options."
            )
        return part, row

    def _why_missing(self, image_id: int) -> str:
        reasons = [entry["reason"] for entry in self.skipped if entry["image_id"] == image_id]
        return f" (skipped when it was made: {reasons[0]})" if reasons else ""

    def _here(self) -> "_Process":
        """What this process has open: nothing is inherited from a parent."""
        if self._process is None or self._process.pid != os.getpid():
            self._process = _Process(self.location, self.spec, self._starts, self._root)
        return self._process

    def _check_fields(self, fields: Sequence[str] | None) -> tuple[str, ...]:
        if fields is None:
            return self.spec.fields
        if unknown := [field for field in fields if field not in self.spec.fields]:
            raise CacheError(
                f"The cache {self.location} has the tier {self.spec.tier!r} with {', '.join(self.spec.fields)}; it "
                f"cannot give {', '.join(unknown)}. Cache the teacher again with other --targets."
            )
        return tuple(dict.fromkeys(fields))

    def _check_levels(self, levels: Sequence[int] | None) -> Sequence[int] | None:
        count = len(self.spec.strides)
        if levels is not None and any(not 0 <= level < count for level in levels):
            raise CacheError(f"The cache has the pyramid levels 0 to {count - 1}, asked for {list(levels)}.")
        if missing := [self.spec.level_name(level) for level in levels or () if level not in self.spec.levels]:
            raise CacheError(
                f"The cache {self.location} does not hold {', '.join(missing)} of the pyramid: cache the teacher again "
                "with these among --levels."
            )
        return levels


class _Process:
    """What one process has in memory of the parts that it reads."""

    def __init__(self, location: Location, spec: CacheSpec, starts: npt.NDArray[np.int64], root: str) -> None:
        self.pid = os.getpid()
        self._location, self._spec, self._starts, self._root = location, spec, starts, root
        self._parts: OrderedDict[int, PartReader] = OrderedDict()
        self._rows = 0
        self._lock = threading.Lock()

    def part(self, number: int) -> PartReader:
        """The reader of a part; those not used for long are let go of."""
        with self._lock:
            if number in self._parts:
                self._parts.move_to_end(number)
                return self._parts[number]
            span = range(int(self._starts[number]), int(self._starts[number + 1]))
            try:
                record = read_part_record(self._location, number, span, self._root)
            except OSError as error:
                name = f"Part {number} of the cache {self._location}"
                raise unreadable_error(error, name, part_key(number)) from error
            if record is None:
                raise gone_error(self._location, number) or CacheError(
                    f"Part {number} of the cache {self._location} is no longer whole: run `kdpipe cache-teacher` with "
                    "the same options again, it makes this part anew."
                )
            part = PartReader(self._location, number, record, self._spec)
            self._parts[number] = part
            self._rows += part.rows
            while len(self._parts) > 1 and (self._rows > _MAX_INDEX_ROWS or len(self._parts) > _MAX_PARTS):
                _, oldest = self._parts.popitem(last=False)
                self._rows -= oldest.rows
            return part
