"""Reads rows of the arrays of a cache, after their files were checked against what was recorded."""

import hashlib
from collections.abc import Sequence

from kdpipe.cache.format.layout import ArrayLayout, Block
from kdpipe.cache.format.record import Files, check_sizes, files_below
from kdpipe.cache.format.zarr_arrays import FileArray, PendingRead, StoreArray, check_metadata, may_read_files
from kdpipe.cache.read.range_array import RangeArray
from kdpipe.cache.store.location import GoneError, Location

# What tensorstore begins an error of the system with. All others say that the data are not as they should be.
_SYSTEM = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "INTERNAL", "UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED")


class DamagedError(Exception):
    """An array is not as it was written.

    Args:
        name: of the array.
        reason: what is wrong.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name, self.reason = name, reason


class ArrayReader:
    """One array, opened: its metadata and the sizes of its files are as they were recorded.

    Args:
        location: of the cache, or of its local copy.
        key: of the folder of files.
        name: of the array.
        layout: of the array.
        rows: number of rows.
        files: in the folder.

    Raises:
        DamagedError: they are not.
    """

    def __init__(self, location: Location, key: str, name: str, layout: ArrayLayout, rows: int, files: Files) -> None:
        self.location, self.name, self.rows = location, name, rows
        array_files = files_below(files, name)
        if len(array_files) != 1 + layout.num_files(rows) or array_files.keys() != {"zarr.json", *layout.files(rows)}:
            raise DamagedError(name, f"its {len(array_files)} files are not those of {rows} rows")
        place = f"{key}/{name}"
        if wrong := check_sizes(location, place, array_files):
            raise DamagedError(name, "; ".join(wrong))
        data = location.read(f"{place}/zarr.json")
        if data is None or hashlib.sha256(data).hexdigest() != array_files["zarr.json"][1]:
            raise DamagedError(name, "zarr.json has other content than was written")
        if reason := check_metadata(data, layout, rows):
            raise DamagedError(name, f"zarr.json {reason}")
        folder = location.local_path(place)
        self._array: FileArray | StoreArray | RangeArray
        if folder is None:
            sizes = {file: size for file, (size, _) in array_files.items()}
            self._array = RangeArray(location, place, layout, rows, sizes)
        elif may_read_files():
            self._array = FileArray(folder, layout, rows)
        else:
            self._array = StoreArray(folder, layout, rows)
        self._layout = layout

    def start(self, rows: range) -> PendingRead:
        """Begin to read rows.

        Raises:
            DamagedError: the array has fewer.
        """
        if not 0 <= rows.start <= rows.stop <= self.rows:
            raise DamagedError(self.name, f"it has {self.rows} rows, and rows {rows.start} to {rows.stop} are needed")
        return self._array.start(rows)


def read_rows(requests: Sequence[tuple[ArrayReader, range]]) -> list[Block]:
    """Rows of arrays, all at the same time.

    Raises:
        DamagedError: what is stored is not what was written, or is missing.
        OSError: it cannot be read.
    """
    started = [reader.start(rows) for reader, rows in requests]
    blocks: list[Block] = []
    failed: list[tuple[str, Exception]] = []
    for (reader, _), reading in zip(requests, started, strict=True):
        try:
            blocks.append(reading.result())
        except (ValueError, RuntimeError, GoneError, OSError) as error:
            failed.append((reader.name, error))  # the others are waited for
    for name, reason in failed:
        raise _explained(name, reason) from reason
    return blocks


def read_array(location: Location, key: str, name: str, layout: ArrayLayout, rows: int, files: Files) -> Block:
    """A whole array.

    Args:
        location: of the cache.
        key: of the group that the array is in.
        name: of the array.
        layout: of the array.
        rows: how many it has.
        files: of the group: size and sha256 by name.

    Raises:
        DamagedError: it is not as it was written.
        OSError: it cannot be read.
    """
    (block,) = read_rows([(ArrayReader(location, key, name, layout, rows, files), range(rows))])
    return block


def _explained(name: str, error: Exception) -> DamagedError | OSError:
    """What an error of tensorstore or zarr means, in their words without the places in their source."""
    text = str(error).split("\n")[0].split(" [source locations")[0].split(" [tensorstore_spec")[0]
    if isinstance(error, OSError) or text.startswith(_SYSTEM):
        return error if isinstance(error, OSError) else OSError(text)
    return DamagedError(name, text)
