"""Reads the arrays of one committed part, and says what is damaged."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor

from kdpipe.cache.arrays import shard_name
from kdpipe.cache.check import check_metadata
from kdpipe.cache.codecs import Block, open_array
from kdpipe.cache.encode import index_columns
from kdpipe.cache.errors import CacheError
from kdpipe.cache.schema import VIEWS, CacheSpec
from kdpipe.cache.targets import TargetIndex

# Selected rows with less than this between them are read in one go: a read costs about as much as decoding this.
_GAP_BYTES = 1 << 20
_MAX_OPEN_ARRAYS = 2048

OpenArrays = OrderedDict[tuple[int, str], "zarr.Array[Any]"]


class PartReader:
    """One part: its index in memory, its arrays opened when first read.

    Args:
        folder: of the part.
        number: of the part.
        record: its commit record.
        spec: of the cache.
        arrays: open arrays of all parts, least recently used first; shared so that their number stays bounded.

    Raises:
        CacheError: the index is damaged.
    """

    def __init__(self, folder: Path, number: int, record: dict[str, Any], spec: CacheSpec, arrays: OpenArrays) -> None:
        self._folder, self._number, self._record, self._spec = folder, number, record, spec
        self._arrays = arrays
        self._columns = {name: position for position, name in enumerate(index_columns(spec))}
        self._index: npt.NDArray[np.int64] = self._read("index", slice(None), [])
        self._names: npt.NDArray[np.uint8] = self._read("file_names", slice(None), [])
        self.rows = len(self._index)
        # Index and names are in memory now: only the other arrays are worth keeping open.
        for name in ("index", "file_names"):
            self._arrays.pop((number, name), None)

    def row(self, image_id: int, view: str) -> int | None:
        """Number of the index row of an image in a view."""
        found = np.flatnonzero((self._index[:, 0] == image_id) & (self._index[:, 1] == VIEWS.index(view)))
        return int(found[0]) if len(found) else None

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
            file_name=self._names[entry["name_start"] : entry["name_stop"]].tobytes().decode(),
            original_size=(entry["height"], entry["width"]),
            input_size=(entry["input_height"], entry["input_width"]),
            num_proposals=entry["num_proposals"],
            num_rois=entry["row_stop"] - entry["row_start"],
            level_shapes=tuple(shapes),
        )

    def rois(self, row: int, name: str, selected: npt.NDArray[np.int64] | None) -> Tensor:
        """Rows of a row array that belong to an index row: all of them, or the selected ones in their order."""
        entry = self._entry(row)
        start, stop, image_id = entry["row_start"], entry["row_stop"], entry["image_id"]
        if selected is None:
            return torch.from_numpy(self._read(name, slice(start, stop), [image_id]))
        shape, dtype = self._spec.row_arrays()[name]
        out = np.empty((len(selected), *shape), dtype=dtype)
        wanted, place = np.unique(selected, return_inverse=True)
        gap = max(1, _GAP_BYTES // self._spec.row_bytes()[name])
        splits = np.flatnonzero(np.diff(wanted) > gap) + 1
        pieces = [
            self._read(name, slice(start + int(run[0]), start + int(run[-1]) + 1), [image_id])[run - run[0]]
            for run in np.split(wanted, splits)
            if len(run)
        ]
        if pieces:
            np.take(np.concatenate(pieces), place, axis=0, out=out)
        return torch.from_numpy(out)

    def features(self, row: int, levels: Sequence[int] | None) -> tuple[Tensor | None, ...]:
        """Pyramid levels of an index row, None for those not asked for; neighbours are read in one go."""
        entry = self._entry(row)
        shapes = [
            (self._spec.channels, entry[f"level{level}_height"], entry[f"level{level}_width"])
            for level in range(len(self._spec.strides))
        ]
        starts = np.cumsum([entry["element_start"], *(int(np.prod(shape)) for shape in shapes)]).tolist()
        wanted = list(range(len(shapes))) if levels is None else sorted(set(levels))
        result: list[Tensor | None] = [None] * len(shapes)
        for run in np.split(np.array(wanted, dtype=np.int64), np.flatnonzero(np.diff(wanted) > 1) + 1):
            if not len(run):
                continue
            first, last = int(run[0]), int(run[-1])
            packed = torch.from_numpy(
                self._read("features", slice(starts[first], starts[last + 1]), [entry["image_id"]])
            )
            for level in range(first, last + 1):
                begin, end = starts[level] - starts[first], starts[level + 1] - starts[first]
                result[level] = packed[begin:end].view(shapes[level])
        return tuple(result)

    def scale(self, row: int) -> Tensor:
        """[L, C] float32 scales of an index row's features."""
        return torch.from_numpy(self._read("scale", slice(row, row + 1), [self._entry(row)["image_id"]])[0])

    def _entry(self, row: int) -> dict[str, int]:
        return dict(zip(self._columns, self._index[row].tolist(), strict=True))

    def _read(self, name: str, rows: slice, image_ids: list[int]) -> Block:
        """Rows of an array.

        Raises:
            CacheError: the array is damaged.
        """
        try:
            array = self._open(name)
            self._check_shards(array, name, rows)
            values = array[rows]
        except CacheError:
            raise
        except Exception as error:  # zarr and zarrs raise many types for damaged bytes
            raise self._damaged(name, f"{type(error).__name__}: {error}", image_ids) from error
        return np.asarray(values)

    def _open(self, name: str) -> "zarr.Array[Any]":
        key = (self._number, name)
        if key in self._arrays:
            self._arrays.move_to_end(key)
            return self._arrays[key]
        if wrong := check_metadata(self._folder, self._record, name):
            raise self._damaged(name, wrong, [])
        array = self._arrays[key] = open_array(self._folder / name)
        if len(self._arrays) > _MAX_OPEN_ARRAYS:
            self._arrays.popitem(last=False)
        return array

    def _check_shards(self, array: "zarr.Array[Any]", name: str, rows: slice) -> None:
        """Zarr reads a missing file as zeros: see that the files to be read are there, and whole."""
        start, stop, _ = rows.indices(array.shape[0])
        if stop <= start or array.shards is None:
            return
        for number in range(start // array.shards[0], (stop - 1) // array.shards[0] + 1):
            file = f"{name}/{shard_name(number, array.ndim - 1)}"
            found, expected = (self._folder / file).stat().st_size, self._record["files"][file][0]
            if found != expected:
                raise ValueError(f"{file} has {found} bytes instead of {expected}")

    def _damaged(self, name: str, reason: str, image_ids: list[int]) -> CacheError:
        whose = f", needed for image {', '.join(map(str, image_ids))}," if image_ids else ""
        return CacheError(
            f"The array {name!r} of part {self._number}{whose} is damaged ({reason}). Delete the folder {self._folder} "
            "and run `kdpipe cache-teacher` with the same options again: it makes this part anew."
        )
