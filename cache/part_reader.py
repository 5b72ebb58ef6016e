"""Reads the arrays of one committed part, and says what is damaged."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor
from zarr.core.sync import sync

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
        everything = self._read({"index": [slice(None)], "file_names": [slice(None)]}, [])
        self._index: npt.NDArray[np.int64] = everything["index"][0][: record["rows"]]
        self._names: npt.NDArray[np.uint8] = everything["file_names"][0]
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

    def read(
        self,
        row: int,
        arrays: Sequence[str],
        selected: npt.NDArray[np.int64] | None,
        levels: Sequence[int] | None,
    ) -> dict[str, Any]:
        """What is stored of an index row, read in one go.

        Args:
            row: of the index.
            arrays: row arrays, `features` and `scale`.
            selected: row numbers within the image for the row arrays; None reads all.
            levels: pyramid levels of `features`; None reads all.

        Returns:
            A tensor per array; for `features` a tuple with one tensor per stored level, None for those not asked for.

        Raises:
            CacheError: an array is damaged.
        """
        entry = self._entry(row)
        starts = self._level_starts(entry)
        runs = _runs(np.arange(len(starts) - 1) if levels is None else np.unique(levels), gap=1)
        row_bytes = self._spec.row_bytes()
        wanted: dict[str, list[slice]] = {}
        for name in arrays:
            if name == "features":
                wanted[name] = [slice(starts[run[0]], starts[run[-1] + 1]) for run in runs]
            elif name == "scale":
                wanted[name] = [slice(row, row + 1)]
            else:
                wanted[name] = _row_slices(entry, selected, gap=_GAP_BYTES // row_bytes[name])
        blocks = self._read(wanted, [entry["image_id"]])
        values: dict[str, Any] = {}
        for name in arrays:
            if name == "features":
                values[name] = self._unpack(entry, starts, runs, blocks[name])
            elif name == "scale":
                values[name] = torch.from_numpy(blocks[name][0][0])
            elif selected is None:
                values[name] = torch.from_numpy(blocks[name][0])
            else:
                values[name] = torch.from_numpy(self._select(name, entry, selected, wanted[name], blocks[name]))
        return values

    def _level_starts(self, entry: dict[str, int]) -> list[int]:
        """Where each level starts in `features`, and where the last one ends; empty tiers have none."""
        starts = [entry["element_start"]]
        for level in range(len(self._spec.strides) if "features" in self._spec.fields else 0):
            cells = entry[f"level{level}_height"] * entry[f"level{level}_width"]
            starts.append(starts[-1] + self._spec.channels * cells)
        return starts

    def _unpack(
        self, entry: dict[str, int], starts: list[int], runs: list[list[int]], blocks: list[Block]
    ) -> tuple[Tensor | None, ...]:
        """Levels out of the packed blocks that were read, one block per run of neighbouring levels."""
        result: list[Tensor | None] = [None] * (len(starts) - 1)
        for run, block in zip(runs, blocks, strict=True):
            packed = torch.from_numpy(block)
            for level in run:
                begin, end = starts[level] - starts[run[0]], starts[level + 1] - starts[run[0]]
                shape = (self._spec.channels, entry[f"level{level}_height"], entry[f"level{level}_width"])
                result[level] = packed[begin:end].view(shape)
        return tuple(result)

    def _select(
        self,
        name: str,
        entry: dict[str, int],
        selected: npt.NDArray[np.int64],
        slices: list[slice],
        blocks: list[Block],
    ) -> Block:
        """Selected rows, in their order, out of the blocks that cover them."""
        shape, dtype = self._spec.row_arrays()[name]
        out = np.empty((len(selected), *shape), dtype=dtype)
        rows = selected + entry["row_start"]
        for span, block in zip(slices, blocks, strict=True):
            inside = (rows >= span.start) & (rows < span.stop)
            out[inside] = block[rows[inside] - span.start]
        return out

    def _entry(self, row: int) -> dict[str, int]:
        return dict(zip(self._columns, self._index[row].tolist(), strict=True))

    def _read(self, wanted: dict[str, list[slice]], image_ids: list[int]) -> dict[str, list[Block]]:
        """Slices of arrays, all in one round trip to zarr's event loop, which takes longer than a small read.

        Raises:
            CacheError: an array is damaged.
        """
        requests = [(name, rows) for name, slices in wanted.items() for rows in slices]
        arrays = [self._checked(name, rows, image_ids) for name, rows in requests]
        spans = [self._span(array, rows) for array, (_, rows) in zip(arrays, requests, strict=True)]

        async def fetch() -> list[Any]:
            reads = (array.async_array.getitem(span) for array, span in zip(arrays, spans, strict=True))
            return await asyncio.gather(*reads, return_exceptions=True)

        blocks: dict[str, list[Block]] = {name: [] for name in wanted}
        for (name, rows), span, values in zip(requests, spans, sync(fetch()), strict=True):
            if isinstance(values, Exception):  # zarr and zarrs raise many types for damaged bytes
                raise self._damaged(name, f"{type(values).__name__}: {values}", image_ids) from values
            if isinstance(values, BaseException):
                raise values
            begin = (rows.start or 0) - span.start
            blocks[name].append(np.asarray(values)[begin : None if rows.stop is None else rows.stop - span.start])
        return blocks

    def _span(self, array: "zarr.Array[Any]", rows: slice) -> slice:
        """The rows to read for these rows: whole chunks, since zarrs checks no checksum otherwise."""
        start, stop, _ = rows.indices(array.shape[0])
        if stop <= start:
            return slice(start, stop)
        chunk = array.chunks[0]
        return slice(start // chunk * chunk, -(-stop // chunk) * chunk)

    def _checked(self, name: str, rows: slice, image_ids: list[int]) -> "zarr.Array[Any]":
        """The open array, its files for these rows checked: zarr reads a missing file as zeros."""
        array = self._open(name, image_ids)
        start, stop, _ = rows.indices(array.shape[0])
        if stop <= start or array.shards is None:
            return array
        for number in range(start // array.shards[0], (stop - 1) // array.shards[0] + 1):
            file = f"{name}/{shard_name(number, array.ndim - 1)}"
            expected = self._record["files"][file][0]
            try:
                found = (self._folder / file).stat().st_size
            except OSError as error:
                raise self._damaged(name, f"{file}: {error.strerror}", image_ids) from error
            if found != expected:
                raise self._damaged(name, f"{file} has {found} bytes instead of {expected}", image_ids)
        return array

    def _open(self, name: str, image_ids: list[int]) -> "zarr.Array[Any]":
        key = (self._number, name)
        if key in self._arrays:
            self._arrays.move_to_end(key)
            return self._arrays[key]
        if wrong := check_metadata(self._folder, self._record, name):
            raise self._damaged(name, wrong, image_ids)
        array = self._arrays[key] = open_array(self._folder / name)
        if len(self._arrays) > _MAX_OPEN_ARRAYS:
            self._arrays.popitem(last=False)
        return array

    def _damaged(self, name: str, reason: str, image_ids: list[int]) -> CacheError:
        whose = f", needed for image {', '.join(map(str, image_ids))}," if image_ids else ""
        return CacheError(
            f"The array {name!r} of part {self._number}{whose} is damaged ({reason}). Delete the folder {self._folder} "
            "and run `kdpipe cache-teacher` with the same options again: it makes this part anew."
        )


def _runs(numbers: npt.NDArray[np.int64], gap: int) -> list[list[int]]:
    """Ascending numbers, divided where neighbours are more than `gap` apart."""
    splits = np.flatnonzero(np.diff(numbers) > gap) + 1
    return [run.tolist() for run in np.split(numbers, splits) if len(run)]


def _row_slices(entry: dict[str, int], selected: npt.NDArray[np.int64] | None, gap: int) -> list[slice]:
    """Slices that cover the selected rows of an image, in the row numbers of the part."""
    start = entry["row_start"]
    if selected is None:
        return [slice(start, entry["row_stop"])]
    return [slice(start + run[0], start + run[-1] + 1) for run in _runs(np.unique(selected), max(1, gap))]
