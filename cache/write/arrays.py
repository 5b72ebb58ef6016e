"""Arrays that grow by rows, written shard by shard through zarr."""

from typing import Any

import numpy as np
from zarr import AsyncArray
from zarr.core.sync import sync

from kdpipe.cache.format.layout import ArrayLayout, Block
from kdpipe.cache.format.zarr_arrays import WrittenFiles, writable_array


class ArrayWriter:
    """Writes one array, row after row.

    Rows are kept until they fill a shard, since zarr writes a shard at once. zarr encodes its chunks in threads.

    Args:
        files: store to write to.
        name: of the array.
        layout: of the array.
    """

    def __init__(self, files: WrittenFiles, name: str, layout: ArrayLayout) -> None:
        self.rows = 0
        self._files, self._name, self._layout = files, name, layout
        self._array: AsyncArray[Any] | None = None
        self._pending: list[Block] = []
        self._filled = 0

    def append(self, rows: Block) -> None:
        """Add rows [N, *row_shape] of the array's type, which must not change any more."""
        if rows.shape[1:] != self._layout.row_shape or rows.dtype != np.dtype(self._layout.dtype):
            raise ValueError(f"rows are {rows.shape} {rows.dtype}, not {self._layout.row_shape} {self._layout.dtype}")
        while self._filled + len(rows) >= self._layout.shard_rows:
            count = self._layout.shard_rows - self._filled
            self._pending.append(rows[:count])
            rows = rows[count:]
            self._write()
        if len(rows):
            self._pending.append(rows)
            self._filled += len(rows)

    def close(self) -> None:
        """Write what is left, and the array's metadata."""
        self._write()

    def _write(self) -> None:
        block = self._pending[0] if len(self._pending) == 1 else _joined(self._pending, self._layout)
        start, self.rows = self.rows, self.rows + len(block)
        self._pending, self._filled = [], 0
        if self._array is None:
            self._array = writable_array(self._files, self._name, self._layout, self.rows)
        sync(self._array.resize((self.rows, *self._layout.row_shape)))
        if len(block):
            sync(self._array.setitem(slice(start, self.rows), block))


def write_array(files: WrittenFiles, name: str, layout: ArrayLayout, values: Block) -> None:
    """Write a whole array.

    Args:
        files: where it is written.
        name: of the array.
        layout: of the array.
        values: [rows, *row_shape] of its type.
    """
    writer = ArrayWriter(files, name, layout)
    writer.append(values)
    writer.close()


def _joined(blocks: list[Block], layout: ArrayLayout) -> Block:
    if not blocks:
        return np.zeros((0, *layout.row_shape), dtype=layout.dtype)
    joined: Block = np.concatenate(blocks)
    return joined
