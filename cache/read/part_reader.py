"""Reads the arrays of one committed part, and says what is damaged."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.index import index_fault, rows_fault
from kdpipe.cache.format.layout import Block, index_columns, part_layout
from kdpipe.cache.format.record import files_key, read_files
from kdpipe.cache.read.arrays import ArrayReader, DamagedError, read_rows
from kdpipe.cache.read.gone import gone_error, unreadable_error
from kdpipe.cache.records import TargetIndex
from kdpipe.cache.spec import VIEWS, CacheSpec
from kdpipe.cache.store.location import Location, part_key


class PartReader:
    """One part: its index in memory, its arrays opened when first read.

    Args:
        location: of the cache.
        number: of the part.
        record: its commit record.
        spec: of the cache.

    Raises:
        CacheError: the index is damaged.
    """

    def __init__(self, location: Location, number: int, record: dict[str, Any], spec: CacheSpec) -> None:
        self._location, self._number, self._spec = location, number, spec
        self._record, self._key = record, files_key(part_key(number), record)
        self._layout = part_layout(spec)
        self._columns = {name: position for position, name in enumerate(index_columns(spec))}
        self._arrays: dict[str, ArrayReader] = {}
        self._not_copied: set[str] = set()  # arrays of which the local copy is bad
        self._files = read_files(location, self._key, record["files"])
        if fault := rows_fault(record, spec):
            raise self._damaged(DamagedError("index", f"it {fault}"), [])
        index, names = self._read([("index", None), ("file_names", None)], [])
        if fault := index_fault(index, names, record["rows"], spec):
            raise self._damaged(DamagedError("index", f"it {fault}"), [])
        self._index: npt.NDArray[np.int64] = index
        self._names = names.tobytes()
        self._arrays.clear()  # these are read once
        self.rows = len(self._index)

    def row(self, image_id: int, view: str) -> int | None:
        """Number of the index row of an image in a view."""
        index_rows = np.flatnonzero((self._index[:, 0] == image_id) & (self._index[:, 1] == VIEWS.index(view)))
        return int(index_rows[0]) if len(index_rows) else None

    def describe(self, row: int) -> TargetIndex:
        """Sizes of the image and view in an index row."""
        entry = self._entry(row)
        shapes = [
            (entry[f"level{level}_height"], entry[f"level{level}_width"])
            for level in range(len(self._spec.strides))
            if "features" in self._spec.fields
        ]
        return TargetIndex(
            image_id=entry["image_id"],
            view=VIEWS[entry["view"]],
            file_name=self._names[entry["name_start"] : entry["name_stop"]].decode(),
            original_size=(entry["height"], entry["width"]),
            input_size=(entry["input_height"], entry["input_width"]),
            num_proposals=entry["num_proposals"],
            num_jittered=entry["num_jittered"],
            num_rois=entry["box_stop"] - entry["box_start"],
            num_objects=entry["object_stop"] - entry["object_start"],
            level_shapes=tuple(shapes),
            file_digest=entry["file_digest"],
        )

    def read(
        self, row: int, arrays: Sequence[str], selected: npt.NDArray[np.int64] | None, levels: Sequence[int] | None
    ) -> dict[str, Any]:
        """What is stored of an index row, read in one go.

        Args:
            row: of the index.
            arrays: names; of those of the part but `index` and `file_names`.
            selected: row numbers within the image, of arrays with a row per box; None reads all.
            levels: pyramid levels of `features`; None reads all.

        Returns:
            A tensor per array; for `features` a tuple with one tensor per stride, None for those not asked for.

        Raises:
            CacheError: an array is damaged.
        """
        entry = self._entry(row)
        starts = self._level_starts(entry)
        runs = _runs(self._spec.levels if levels is None else levels) if "features" in arrays else []
        boxes = range(entry["box_start"], entry["box_stop"])
        rows = {"view": range(row, row + 1), "object": range(entry["object_start"], entry["object_stop"])}
        rows["box"] = boxes if selected is None else _span(selected, boxes.start)
        requests: list[tuple[str, range | None]] = []
        for name in arrays:
            if name == "features":
                requests += [(name, range(starts[run[0]], starts[run[-1] + 1])) for run in runs]
            else:
                requests.append((name, rows[self._layout[name].per]))
        blocks = self._read(requests, [entry["image_id"]])
        values: dict[str, Any] = {}
        if "features" in arrays:
            packed = [block for (name, _), block in zip(requests, blocks, strict=True) if name == "features"]
            values["features"] = self._unpack(entry, starts, runs, packed)
        for (name, _), block in zip(requests, blocks, strict=True):
            per = self._layout[name].per
            if name != "features":
                picked = (
                    block[selected + boxes.start - rows["box"].start]
                    if selected is not None and per == "box"
                    else block
                )
                values[name] = torch.from_numpy(picked[0] if per == "view" else picked)
        return values

    def _level_starts(self, entry: dict[str, int]) -> list[int]:
        """Where each level starts in `features`, and where the last one ends; tiers without features have none."""
        starts = [entry["element_start"]]
        for level in range(len(self._spec.strides) if "features" in self._spec.fields else 0):
            cells = entry[f"level{level}_height"] * entry[f"level{level}_width"]
            starts.append(starts[-1] + self._spec.stored_elements(level, cells))
        return starts

    def _unpack(
        self, entry: dict[str, int], starts: list[int], runs: list[list[int]], blocks: list[Block]
    ) -> tuple[Tensor | None, ...]:
        """Levels out of the packed blocks that were read, one block per run of neighbouring levels."""
        result: list[Tensor | None] = [None] * (len(starts) - 1)
        for run, block in zip(runs, blocks, strict=True):
            for level in run:
                begin, end = starts[level] - starts[run[0]], starts[level + 1] - starts[run[0]]
                shape = (self._spec.stored_channels, entry[f"level{level}_height"], entry[f"level{level}_width"])
                result[level] = torch.from_numpy(block[begin:end].reshape(shape))
        return tuple(result)

    def _entry(self, row: int) -> dict[str, int]:
        return dict(zip(self._columns, self._index[row].tolist(), strict=True))

    def _read(self, requests: Sequence[tuple[str, range | None]], image_ids: list[int]) -> list[Block]:
        """Rows of arrays (None: all rows), at the same time.

        Raises:
            CacheError: an array is damaged, or cannot be read.
        """
        with self._location.explained(f"Reading part {self._number}"):
            try:
                if self._location.local_path(self._key) is None:  # opening one takes a few requests
                    self._location.at_once(self._array, {name for name, _ in requests} - self._arrays.keys())
                pairs = [(self._array(name), rows) for name, rows in requests]
                return read_rows([(array, range(array.rows) if rows is None else rows) for array, rows in pairs])
            except DamagedError as error:
                if not self._leave_copy(error):
                    raise self._damaged(error, image_ids) from error
            except OSError as error:
                raise unreadable_error(error, f"Part {self._number} of {self._location}", self._key) from error
        return self._read(requests, image_ids)

    def _array(self, name: str) -> ArrayReader:
        """An array, opened where it is nearest, also if it was copied since it was opened."""
        near = self._nearest(name)
        opened = self._arrays.get(name)
        if opened is None or (opened.location is self._location and near is not self._location):
            if self._files is None:
                raise DamagedError(name, "the part's files.json is missing or has other content than was written")
            rows = self._record["rows"][self._layout[name].per]
            self._arrays[name] = ArrayReader(near, self._key, name, self._layout[name], rows, self._files)
        return self._arrays[name]

    def _nearest(self, name: str) -> Location:
        return self._location if name in self._not_copied else self._location.nearest(f"{self._key}/{name}")

    def _leave_copy(self, error: DamagedError) -> bool:
        """Whether what is damaged is a local copy; then it is not used any more."""
        opened = self._arrays.pop(error.name, None)
        if (self._nearest(error.name) if opened is None else opened.location) is self._location:
            return False
        self._not_copied.add(error.name)
        logging.getLogger("kdpipe").warning(
            f"The local copy of the array {error.name!r} of part {self._number} is damaged, and not used: delete "
            f"{self._location.copy}, so that it is made anew."
        )
        return True

    def _damaged(self, error: DamagedError, image_ids: list[int]) -> CacheError:
        """What to say of damage: it names the array and the images that it was read for."""
        return gone_error(self._location, self._number) or CacheError(
            f"{self._describe(error.name, image_ids)} is damaged ({error.reason}). Run `kdpipe verify {self._location} "
            "--repair`, then `kdpipe cache-teacher` with the same options: it makes this part anew."
        )

    def _describe(self, name: str, image_ids: list[int]) -> str:
        whose = f", needed for image {', '.join(map(str, image_ids))}," if image_ids else ""
        return f"The array {name!r} of part {self._number}{whose}"


def check_rows(rows: npt.ArrayLike, info: TargetIndex) -> npt.NDArray[np.int64]:
    """Row numbers [M] within an image, as they are.

    Raises:
        CacheError: they are none.
    """
    selected = np.asarray(rows)
    if selected.size == 0:
        return np.zeros(0, dtype=np.int64)
    if selected.ndim != 1 or selected.dtype.kind not in "iu" or selected.min() < 0 or selected.max() >= info.num_rois:
        raise CacheError(
            f"Rows of image {info.image_id} are whole numbers from 0 to {info.num_rois - 1} in one dimension, found "
            f"{selected.dtype} of shape {selected.shape} from {selected.min()} to {selected.max()}."
        )
    return selected.astype(np.int64)


def _span(selected: npt.NDArray[np.int64], start: int) -> range:
    """The rows from the first to the last of those selected, which are numbered from `start`."""
    if not len(selected):
        return range(start, start)
    return range(start + int(selected.min()), start + int(selected.max()) + 1)


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    """Numbers in ascending order, divided where there is a gap."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
