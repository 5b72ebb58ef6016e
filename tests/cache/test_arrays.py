from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.cache import arrays
from kdpipe.cache.store.files import file_record
from kdpipe.cache.write.arrays import ArrayWriter, rows_per_chunk, write_array

POOL = ThreadPoolExecutor(2)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 9), max_size=8),
    st.sampled_from([(), (3,), (2, 2)]),
    st.sampled_from(["int8", "float16", "float32", "int64"]),
    st.sampled_from(["zstd", "lz4", "none"]),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_ragged_rows_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    shape: tuple[int, ...],
    dtype: str,
    codec: str,
    chunk_rows: int,
    shard_chunks: int,
) -> None:
    folder = tmp_path_factory.mktemp("a") / "array"
    rng = np.random.default_rng(1)
    pieces = [rng.integers(-99, 99, (count, *shape)).astype(dtype) for count in counts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "SHARD_CHUNKS", shard_chunks)
        writer = ArrayWriter(folder, shape, dtype, chunk_rows, codec, POOL)
        for piece in pieces:
            writer.append(piece)
        files = writer.close()
    values = np.concatenate([np.zeros((0, *shape), dtype), *pieces])
    read = zarr.open_array(folder, mode="r")
    padding = -len(values) % chunk_rows
    assert read.shape == (len(values) + padding, *shape)
    np.testing.assert_array_equal(read[: len(values)], values)
    assert not np.asarray(read[len(values) :]).any()
    assert files == {file.name: file_record(file.read_bytes()) for file in folder.iterdir()}
    middle = slice(len(values) // 3, 2 * len(values) // 3)
    np.testing.assert_array_equal(read[middle], values[middle])


def test_pieces_do_not_change_the_bytes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((100, 3)).astype(np.float32)
    files = []
    for name, splits in (("one", []), ("many", [1, 2, 30, 31, 77])):
        writer = ArrayWriter(tmp_path / name, (3,), "float32", 8, "zstd", POOL)
        for piece in np.split(values, splits):
            writer.append(piece)
        files.append(writer.close())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "values",
    [
        np.array(7, dtype=np.int64),
        np.zeros((0, 3), np.float32),
        np.zeros((3, 0), np.float32),
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.array([True, False]),
    ],
)
def test_whole_arrays_come_back(tmp_path: Path, values: npt.NDArray[Any]) -> None:
    write_array(tmp_path / "a", values, "zstd")
    read = np.asarray(zarr.open_array(tmp_path / "a", mode="r")[...])
    np.testing.assert_array_equal(read, values)
    assert read.dtype == values.dtype


def test_large_arrays_are_chunked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_FILE_BYTES", 70)
    values = np.arange(30, dtype=np.float32).reshape(5, 6)
    files = write_array(tmp_path / "a", values, "lz4")
    assert sorted(files) == ["c.0.0", "c.1.0", "c.2.0", "zarr.json"]
    np.testing.assert_array_equal(np.asarray(zarr.open_array(tmp_path / "a", mode="r")[...]), values)


@pytest.mark.parametrize("codec", ["zstd", "lz4", "none"])
def test_chunks_begin_at_multiples_of_64(tmp_path: Path, codec: str) -> None:
    values = np.random.default_rng(0).integers(-9, 9, (50, 7)).astype(np.int8)
    writer = ArrayWriter(tmp_path / "a", (7,), "int8", 8, codec, POOL)
    writer.append(values)
    writer.close()
    data = (tmp_path / "a" / "c.0.0").read_bytes()
    index = np.frombuffer(data[-(7 * 16 + 4) : -4], dtype="<u8").reshape(7, 2)
    ends = index.sum(axis=1)
    np.testing.assert_array_equal(index[:, 0], [0, *(-(-ends[:-1] // 64) * 64)])
    for end, start in zip(ends[:-1], index[1:, 0], strict=True):
        assert data[end:start] == bytes(int(start - end))
    np.testing.assert_array_equal(np.asarray(zarr.open_array(tmp_path / "a", mode="r")[:50]), values)


def test_rows_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    writer = ArrayWriter(tmp_path / "a", (3,), "float32", 8, "zstd", POOL)
    with pytest.raises(ValueError, match="rows are"):
        writer.append(np.zeros((2, 4), np.float32))


@pytest.mark.parametrize(
    ("shape", "dtype", "rows"),
    [((4,), "float32", 1024), ((81,), "float16", 512), ((80, 4), "float16", 128), ((256, 49), "float32", 1)],
)
def test_rows_per_chunk(shape: tuple[int, ...], dtype: str, rows: int) -> None:
    assert rows_per_chunk(shape, dtype, 128 << 10) == (rows if rows > 1 else 2)
