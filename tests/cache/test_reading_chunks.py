"""Reading of stored arrays: the same as plain zarr reads, in any selection, and nothing that is not sound."""

import hashlib
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdpipe.cache import CacheError, open_cache
from kdpipe.cache.codecs import Block, crc32c, node_json
from kdpipe.cache.read.array_reader import ArrayReader, Readers, Rows, read_array
from kdpipe.cache.verify.chunks import check_file, read_layout
from kdpipe.cache.write.arrays import ArrayWriter, write_array

if TYPE_CHECKING:
    from tests.cache.conftest import Kit

CODECS = ("zstd", "lz4", "none")


def sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in folder.iterdir()}


def read(array: ArrayReader, rows: Rows, readers: Readers | None = None) -> Block:
    with ExitStack() as files:
        request = array.request(rows, files)
        (readers or Readers()).run(lambda run: run.read(), request.runs)
    return request.values()


def write(folder: Path, values: Block, codec: str, chunk_rows: int) -> ArrayReader:
    with ThreadPoolExecutor(1) as pool:
        writer = ArrayWriter(folder, values.shape[1:], str(values.dtype), chunk_rows, codec, pool)
        writer.append(values)
        writer.close()
    return ArrayReader(folder, sizes(folder), codec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("tier", ["roi", "pyramid"])
def test_all_arrays_are_as_zarr_reads_them(tmp_path: Path, kit: "type[Kit]", tier: str, codec: str) -> None:
    path = kit.make(tmp_path / "x.zarr", kit.spec(tier=tier, codec=codec), count=4)
    for folder in [file.parent for file in path.rglob("zarr.json")]:
        node = zarr.open(folder, mode="r")
        if not isinstance(node, zarr.Array):
            continue
        in_part = "parts" in folder.parts
        if in_part:
            array = ArrayReader(folder, sizes(folder), codec)
            found = read(array, range(array.rows))
        else:
            found = read_array(folder, "zstd" if "plan" in folder.parts else codec)
        expected = np.asarray(node[...])
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(), (0, 3), (3,), (7, 2, 5)])
@pytest.mark.parametrize("dtype", ["int8", "float32", "int64"])
def test_whole_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: str) -> None:
    monkeypatch.setattr("kdpipe.cache.write.arrays._FILE_BYTES", 100)
    values = np.arange(math.prod(shape)).astype(dtype).reshape(shape)
    for codec in CODECS:
        write_array(tmp_path / codec, values, codec)
        found = read_array(tmp_path / codec, codec)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> tuple[Block, list[ArrayReader]]:
    """50 rows in chunks of 4, by all codecs, in shards of 3 chunks."""
    values = np.random.default_rng(0).integers(-9, 9, (50, 3, 2)).astype(np.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdpipe.cache.write.arrays.SHARD_CHUNKS", 3)
        patch.setattr("os.fsync", lambda handle: None)
        return values, [write(tmp_path_factory.mktemp("a") / codec, values, codec, chunk_rows=4) for codec in CODECS]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Block, ArrayReader]:
    """300 rows of which 16 are a chunk of 192 bytes, in shards of 8 chunks."""
    values = np.random.default_rng(0).integers(-9, 9, (300, 3, 2)).astype(np.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdpipe.cache.write.arrays.SHARD_CHUNKS", 8)
        patch.setattr("os.fsync", lambda handle: None)
        return values, write(tmp_path_factory.mktemp("packed") / "a", values, "none", chunk_rows=16)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows(arrays: tuple[Block, list[ArrayReader]], data: st.DataObject) -> None:
    values, readers = arrays
    start, stop = sorted(data.draw(st.tuples(st.integers(0, 50), st.integers(0, 50))))
    numbers = np.array(data.draw(st.lists(st.integers(0, 49), max_size=8)), dtype=np.int64)
    for array in readers:
        np.testing.assert_array_equal(read(array, range(start, stop)), values[start:stop])
        np.testing.assert_array_equal(read(array, numbers), values[numbers])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_of_chunks_without_gaps(packed: tuple[Block, ArrayReader], data: st.DataObject) -> None:
    values, array = packed
    start, stop = sorted(data.draw(st.tuples(st.integers(0, 300), st.integers(0, 300))))
    numbers = np.array(data.draw(st.lists(st.integers(0, 299), max_size=8)), dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdpipe.cache.read.array_reader._LEAST_RUN_BYTES", data.draw(st.sampled_from([1, 400, 1 << 20])))
        np.testing.assert_array_equal(read(array, range(start, stop)), values[start:stop])
        np.testing.assert_array_equal(read(array, numbers), values[numbers])


def test_rows_that_are_not_there(arrays: tuple[Block, list[ArrayReader]]) -> None:
    with pytest.raises(ValueError, match="rows only"):
        read(arrays[1][0], range(40, 60))


@pytest.mark.parametrize("codec", CODECS)
def test_many_threads_read_the_same(
    tmp_path: Path, kit: "type[Kit]", monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    monkeypatch.setattr("kdpipe.cache.read.array_reader._LEAST_RUN_BYTES", 1)  # as many runs as threads
    array = write(tmp_path / "a", np.arange(3000, dtype=np.float32), codec, chunk_rows=16)
    for threads in (1, 2, 5):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        readers = Readers()
        for _ in range(3):
            np.testing.assert_array_equal(read(array, range(5, 2990), readers), np.arange(5, 2990))
    for at in (0.2, 0.9):
        kit.flip_bit(tmp_path / "a" / "c.0", at)
        with pytest.raises(ValueError, match="does not fit"):
            read(array, range(3000), readers)


def test_threads_of_the_caller_read_at_once(tmp_path: Path, kit: "type[Kit]", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    cache = open_cache(kit.make(tmp_path / "x.zarr"))
    ids = cache.image_ids.tolist() * 5
    expected = {image_id: cache.targets(image_id).boxes for image_id in ids}
    fresh = open_cache(cache.path)
    with ThreadPoolExecutor(4) as pool:
        for image_id, boxes in zip(ids, pool.map(lambda n: fresh.targets(n).boxes, ids), strict=True):
            assert torch.equal(boxes, expected[image_id])


INDEX_DAMAGE = {
    "beyond the file": lambda index: index.__setitem__((1, 0), 10**6),
    "huge": lambda index: index.__setitem__((1, 1), 2**62),
    "all huge": lambda index: index.__setitem__((slice(None), 1), 2**63),
    "overlapping": lambda index: index.__setitem__((1, 0), index[0, 0]),
    "swapped": lambda index: index.__setitem__(slice(0, 2), index[1::-1].copy()),
    "tiny": lambda index: index.__setitem__((1, 1), 3),
    "absent": lambda index: index.__setitem__(1, 2**64 - 1),
    "none": lambda index: index.__setitem__(slice(None), 2**64 - 1),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
@pytest.mark.parametrize("codec", CODECS)
def test_an_index_that_cannot_be(tmp_path: Path, codec: str, damage: str) -> None:
    """Its checksum is right: what it says is wrong all the same."""
    array = write(tmp_path / "a", np.arange(40, dtype=np.int64), codec, chunk_rows=8)
    file = tmp_path / "a" / "c.0"
    data = bytearray(file.read_bytes())
    index = np.frombuffer(data[-84:-4], dtype="<u8").reshape(5, 2).copy()
    INDEX_DAMAGE[damage](index)
    data[-84:] = index.tobytes() + crc32c(index.tobytes())
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"the index of c\.0 does not fit"):
        read(array, range(40))


@pytest.mark.parametrize(
    ("checksums", "message"),
    [
        ("", "0 checksums for 5 chunks"),
        ("00" * 16, "4 checksums for 5 chunks"),
        ("00" * 24, "6 checksums for 5 chunks"),
        ("zz" * 20, "non-hexadecimal"),
        (7, "cannot be understood"),
        (None, "cannot be understood"),
    ],
)
@pytest.mark.parametrize("codec", CODECS)
def test_checksums_that_cannot_be(tmp_path: Path, codec: str, checksums: object, message: str) -> None:
    write(tmp_path / "a", np.arange(40, dtype=np.int64), codec, chunk_rows=8)
    file = tmp_path / "a" / "zarr.json"
    metadata = json.loads(file.read_bytes())
    metadata["attributes"]["checksums"] = checksums
    file.write_bytes(node_json({name: value for name, value in metadata.items() if name != "zarr_format"}))
    with pytest.raises(ValueError, match=message):
        ArrayReader(tmp_path / "a", sizes(tmp_path / "a"), codec)


def test_a_sound_chunk_of_another_file(tmp_path: Path) -> None:
    """As where a file of the same size was put in the place of another."""
    array = write(tmp_path / "a", np.arange(40, dtype=np.int64), "none", chunk_rows=8)
    write(tmp_path / "b", np.arange(40, dtype=np.int64) + 1, "none", chunk_rows=8)
    shutil.copyfile(tmp_path / "b" / "c.0", tmp_path / "a" / "c.0")
    with pytest.raises(ValueError, match="checksum"):
        read(array, range(40))


def test_a_chunk_of_another_size(tmp_path: Path) -> None:
    """Sound by all checksums, but it decodes to fewer bytes than the metadata says."""
    folder = tmp_path / "a"
    write_array(folder, np.zeros(64, dtype=np.int64), "zstd")
    small = tmp_path / "b"
    write_array(small, np.zeros(32, dtype=np.int64), "zstd")
    shutil.copyfile(small / "c.0", folder / "c.0")
    with pytest.raises(ValueError, match="not a chunk of this array"):
        read_array(folder, "zstd")
    (folder / "c.0").write_bytes(b"abc")
    with pytest.raises(ValueError, match="has 3 bytes"):
        read_array(folder, "zstd")


def test_what_cannot_be_read_is_not_called_damaged(cache_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk or of the system is no reason to delete anything."""
    cache = open_cache(cache_path)
    cache.index(1000)

    def fail(*arguments: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("os.open", fail)
    with pytest.raises(CacheError, match=r"'boxes' of part 0, needed for image 1000, cannot be read \(Too many open"):
        cache.targets(1000)


def test_a_bit_between_two_chunks_changes_no_value_but_is_found(tmp_path: Path) -> None:
    values = np.arange(40, dtype=np.int8)
    array = write(tmp_path / "a", values, "none", chunk_rows=20)
    file = tmp_path / "a" / "c.0"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    data = bytearray(file.read_bytes())
    data[30] ^= 1  # a chunk has 24 bytes, the next begins at 64
    file.write_bytes(data)
    np.testing.assert_array_equal(read(array, range(40)), values)
    layout = read_layout((tmp_path / "a" / "zarr.json").read_bytes(), "none")
    found = check_file(file, len(data), digest, layout, range(2), None, lambda count: None)
    assert [each.reason for each in found] == ["has other content than was written"]
