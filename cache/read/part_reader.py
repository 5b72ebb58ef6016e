"""Reads the arrays of one committed part, and says what is damaged."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdpipe.cache.codecs import Block
from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.record import check_metadata
from kdpipe.cache.read.array_reader import ArrayReader, Readers, Rows, Run
from kdpipe.cache.read.gone import gone_error, unreadable_error
from kdpipe.cache.records import TargetIndex
from kdpipe.cache.spec import VIEWS, CacheSpec
from kdpipe.cache.write.encode import index_columns


class PartReader:
    """One part: its index in memory, its arrays opened when first read.

    Args:
        folder: of the part.
        number: of the part.
        record: its commit record.
        spec: of the cache.
        readers: read the chunks.

    Raises:
        CacheError: the index is damaged.
    """

    def __init__(self, folder: Path, number: int, record: dict[str, Any], spec: CacheSpec, readers: Readers) -> None:
        self._folder, self._number, self._record, self._spec = folder, number, record, spec
        self._readers = readers
        self._arrays: dict[str, ArrayReader] = {}
        self._columns = {name: position for position, name in enumerate(index_columns(spec))}
        index, names = self._read([("index", range(record["rows"])), ("file_names", None)], [])
        # Copies, since the chunks that they are part of are much larger. They are read once.
        self._index: npt.NDArray[np.int64] = index.copy()
        self._names = names[: int(index[-1, self._columns["name_stop"]]) if len(index) else 0].tobytes()
        self._arrays.clear()
        self.rows = len(self._index)

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
            file_name=self._names[entry["name_start"] : entry["name_stop"]].decode(),
            original_size=(entry["height"], entry["width"]),
            input_size=(entry["input_height"], entry["input_width"]),
            num_proposals=entry["num_proposals"],
            num_rois=entry["row_stop"] - entry["row_start"],
            level_shapes=tuple(shapes),
            file_digest=entry["file_digest"],
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
        runs = _runs(range(len(starts) - 1) if levels is None else levels)
        wanted: list[tuple[str, Rows | None]] = []
        for name in arrays:
            if name == "features":
                wanted += [(name, range(starts[run[0]], starts[run[-1] + 1])) for run in runs]
            elif name == "scale":
                wanted.append((name, range(row, row + 1)))
            elif selected is None:
                wanted.append((name, range(entry["row_start"], entry["row_stop"])))
            else:
                wanted.append((name, selected + entry["row_start"]))
        blocks = self._read(wanted, [entry["image_id"]])
        values: dict[str, Any] = {}
        if "features" in arrays:
            packed = [block for (name, _), block in zip(wanted, blocks, strict=True) if name == "features"]
            values["features"] = self._unpack(entry, starts, runs, packed)
        for (name, _), block in zip(wanted, blocks, strict=True):
            if name != "features":
                values[name] = torch.from_numpy(block[0] if name == "scale" else block)
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
            for level in run:
                begin, end = starts[level] - starts[run[0]], starts[level + 1] - starts[run[0]]
                shape = (self._spec.channels, entry[f"level{level}_height"], entry[f"level{level}_width"])
                result[level] = torch.from_numpy(block[begin:end].reshape(shape))
        return tuple(result)

    def _entry(self, row: int) -> dict[str, int]:
        return dict(zip(self._columns, self._index[row].tolist(), strict=True))

    def _read(self, wanted: Sequence[tuple[str, Rows | None]], image_ids: list[int]) -> list[Block]:
        """Rows of arrays (None: all rows), by all threads at once.

        Raises:
            CacheError: an array is damaged, or cannot be read.
        """
        with ExitStack() as files:
            requests = []
            runs: list[tuple[str, Run]] = []
            for name, rows in wanted:
                try:
                    array = self._open(name)
                    request = array.request(range(array.rows) if rows is None else rows, files)
                except (ValueError, OSError) as error:
                    raise self._damaged(error, name, image_ids) from error
                requests.append(request)
                runs += [(name, run) for run in request.runs]

            def read(item: tuple[str, Run]) -> None:
                name, run = item
                try:
                    run.read()
                except (ValueError, OSError) as error:
                    raise self._damaged(error, name, image_ids) from error

            self._readers.run(read, runs)
        return [request.values() for request in requests]

    def _open(self, name: str) -> ArrayReader:
        if name not in self._arrays:
            if wrong := check_metadata(self._folder, self._record, name):
                raise ValueError(wrong)
            start = f"{name}/"
            sizes = {
                file[len(start) :]: entry[0] for file, entry in self._record["files"].items() if file.startswith(start)
            }
            self._arrays[name] = ArrayReader(self._folder / name, sizes, self._spec.codec)
        return self._arrays[name]

    def _damaged(self, error: ValueError | OSError, name: str, image_ids: list[int]) -> CacheError:
        """What to say of an error: it names the array and the images that it was read for."""
        whose = f", needed for image {', '.join(map(str, image_ids))}," if image_ids else ""
        what = f"The array {name!r} of part {self._number}{whose}"
        cache = self._folder.parents[1]
        if isinstance(error, FileNotFoundError | NotADirectoryError) and (gone := gone_error(cache, self._number)):
            return gone
        if isinstance(error, ValueError | FileNotFoundError | NotADirectoryError | IsADirectoryError):
            reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
            return CacheError(
                f"{what} is damaged ({reason}). Run `kdpipe verify {cache} --repair`, then `kdpipe cache-teacher` with "
                "the same options: it makes this part anew."
            )
        return unreadable_error(error, what, self._folder / name)


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    """Numbers in ascending order, divided where there is a gap."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs
