"""How arrays lie in files, held against what zarr itself writes and reads."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from zarr import AsyncArray
from zarr.core.array_spec import ArrayConfig
from zarr.core.metadata import ArrayV3Metadata
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore, StorePath

from kdpipe.cache.format.layout import ArrayLayout, array_layout, index_columns, is_as_written, part_layout
from kdpipe.cache.format.zarr_arrays import FileArray, StoreArray, WrittenFiles, check_metadata
from kdpipe.cache.read.range_array import RangeArray
from kdpipe.cache.spec import CODECS, DTYPES, TIERS
from kdpipe.cache.store.folder import Folder
from kdpipe.cache.store.location import GoneError
from kdpipe.cache.write.arrays import ArrayWriter, encoding_threads, write_array

if TYPE_CHECKING:
    from tests.cache.conftest import Kit

layouts = st.builds(
    lambda row, dtype, chunk, chunks, codec: ArrayLayout("box", row, dtype, chunk, chunk * chunks, codec),
    row=st.sampled_from([(), (3,), (2, 3)]),
    dtype=st.sampled_from(["float32", "float16", "int8", "int64", "uint8", "bool"]),
    chunk=st.integers(1, 9),
    chunks=st.integers(1, 4),
    codec=st.sampled_from(CODECS),
)


def some(layout: ArrayLayout, rows: int, seed: int = 0) -> "np.ndarray[Any, Any]":
    """Values of that type, of which a part are zeros, the fill value."""
    numbers = np.random.default_rng(seed).integers(0, 3, size=(rows, *layout.row_shape))
    return numbers.astype(layout.dtype)


class Far(Folder):
    """A folder of which ranges are fetched, as of an object store."""

    async def fetch(self, key: str, start: int, stop: int) -> bytes:
        data = self.read(key) or b""
        if len(data) < stop:
            raise GoneError(key)
        return data[start:stop]


def readers(folder: Path, layout: ArrayLayout, rows: int) -> list[FileArray | StoreArray | RangeArray]:
    """All that read the array `x`."""
    sizes = {file.name: file.stat().st_size for file in (folder / "x").iterdir()}
    remote = RangeArray(Far(folder), "x", layout, rows, sizes)
    return [FileArray(folder / "x", layout, rows), StoreArray(folder / "x", layout, rows), remote]


@settings(max_examples=40)
@given(layout=layouts, rows=st.integers(0, 60), pieces=st.lists(st.integers(0, 40), max_size=5), data=st.data())
def test_written_and_read(
    tmp_path_factory: pytest.TempPathFactory, layout: ArrayLayout, rows: int, pieces: list[int], data: st.DataObject
) -> None:
    """Appended in pieces, read by all readers and by zarr, in any range; and the files are those that are foretold."""
    folder, values = tmp_path_factory.mktemp("a"), some(layout, rows)
    files = WrittenFiles(LocalStore(folder))
    cuts = np.clip(np.cumsum([0, *pieces]), 0, rows).tolist()
    with encoding_threads() as threads:
        writer = ArrayWriter(files, "x", layout, threads)
        for start, stop in zip(cuts, [*cuts[1:], rows], strict=True):
            writer.append(values[start:stop])
        writer.close()
    contents = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert files.files == {name: (len(text), hashlib.sha256(text).hexdigest()) for name, text in contents.items()}
    assert set(contents) == {"x/zarr.json", *(f"x/{name}" for name in layout.files(rows))}
    assert layout.num_files(rows) == len(contents) - 1
    assert sum(len(span) for span in layout.files(rows).values()) == rows
    assert check_metadata(contents["x/zarr.json"], layout, rows) is None
    array: Any = zarr.open_array(folder / "x", mode="r")
    assert array.dtype == values.dtype
    assert np.array_equal(array[...], values)
    for reader in readers(folder, layout, rows):
        start = data.draw(st.integers(0, rows))
        stop = data.draw(st.integers(start, rows))
        block = reader.start(range(start, stop)).result()
        assert block.dtype == values.dtype
        assert np.array_equal(block, values[start:stop])


@settings(max_examples=40)
@given(layout=layouts, rows=st.integers(0, 60))
@example(layout=ArrayLayout("element", (), "uint8", 1 << 18, 1 << 20, "zstd"), rows=1_500_000)  # as large as they are
@example(layout=ArrayLayout("element", (), "int8", 1 << 18, 1 << 20, "zstd"), rows=1_500_000)
@example(layout=ArrayLayout("box", (80, 4), "float16", 256, 1024, "zstd"), rows=1100)
@example(layout=ArrayLayout("box", (80, 4), "float32", 256, 1024, "lz4"), rows=1100)
@example(layout=ArrayLayout("view", (26,), "int64", 256, 1024, "zstd"), rows=1100)
def test_the_bytes_are_zarrs(layout: ArrayLayout, rows: int) -> None:
    """Those that zarr's own pipeline writes."""
    values, own, store = some(layout, rows), WrittenFiles(MemoryStore()), WrittenFiles(MemoryStore())
    write_array(own, "x", layout, values)
    metadata = ArrayV3Metadata.from_dict(layout.metadata(rows))
    array = AsyncArray(metadata, StorePath(store, "x"), ArrayConfig.from_dict({"write_empty_chunks": True}))
    sync(array.resize(values.shape))
    if rows:
        sync(array.setitem(slice(0, rows), values))
    assert own.files == store.files


@settings(max_examples=20)
@given(layout=layouts, rows=st.integers(1, 40), seeds=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_equal_values_are_equal_bytes(layout: ArrayLayout, rows: int, seeds: tuple[int, int]) -> None:
    values = [some(layout, rows, seed) for seed in seeds]
    stores = [WrittenFiles(MemoryStore()) for _ in seeds]
    for store, block in zip(stores, values, strict=True):
        write_array(store, "x", layout, block)
    assert (stores[0].files == stores[1].files) == np.array_equal(values[0], values[1])


@pytest.mark.parametrize("codec", CODECS)
def test_any_other_entry_of_the_metadata_is_refused(tmp_path: Path, codec: str) -> None:
    """Whatever leaf is changed, added or removed."""
    layout = array_layout("box", (2, 3), "float16", codec)
    write_array(WrittenFiles(LocalStore(tmp_path)), "x", layout, some(layout, 5))
    text = (tmp_path / "x" / "zarr.json").read_text()
    assert check_metadata(text.encode(), layout, 5) is None
    for other in ("", "[]", "5", text[:-2], text.replace("{", '{"shape": [5],', 1)):
        assert check_metadata(other.encode(), layout, 5)
    assert check_metadata(None, layout, 5)
    assert check_metadata(text.encode(), layout, 6)
    places = list(leaves(json.loads(text)))
    others: list[Any] = ["other", 7, None, [], {"a": 1}]
    assert len(places) > 20
    for place in places:
        if place[0] not in ("attributes", "dimension_names", "storage_transformers"):
            for value in others:
                content = json.loads(text)
                inner = content
                for step in place[:-1]:
                    inner = inner[step]
                if inner[place[-1]] != value:
                    inner[place[-1]] = value
                    assert not is_as_written(content, layout, 5), (place, value)
            del inner[place[-1]]
            assert not is_as_written(content, layout, 5), place
    assert not is_as_written({**json.loads(text), "storage_transformers": [{"name": "x"}]}, layout, 5)
    assert not is_as_written({**json.loads(text), "more": 1}, layout, 5)


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Any:
    """Where there is something in nested mappings and lists, the inner ones as well."""
    if place:
        yield place
    entries: Any = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    for key, inner in entries:
        yield from leaves(inner, (*place, key))


@pytest.mark.parametrize("state", ["gone", "empty", "cut"])
def test_missing_files_are_not_zeros(tmp_path: Path, state: str) -> None:
    """Zarr takes what is missing for the fill value."""
    layout = array_layout("box", (3,), "float32", "none", 16)
    write_array(WrittenFiles(LocalStore(tmp_path)), "x", layout, some(layout, 40))
    opened = readers(tmp_path, layout, 40)
    file = tmp_path / "x" / "c.0.0"
    if state == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 0 if state == "empty" else 150])
    for reader in opened:
        with pytest.raises((ValueError, GoneError)):
            reader.start(range(20, 30)).result()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tier", TIERS)
def test_arrays_of_a_part(kit: "type[Kit]", tier: str, dtype: str, codec: str) -> None:
    spec = kit.spec(tier=tier, dtype=dtype, codec=codec, channels=256, embedding_dim=1024, scale=(1333, 800))
    layouts = part_layout(spec)
    assert {"index", "file_names"} < set(layouts)
    assert set(layouts) == {name for field in spec.fields for name in spec.arrays_of(field)} | {"index", "file_names"}
    assert layouts["index"].row_shape == (len(index_columns(spec)),)
    for name, layout in layouts.items():
        row = int(np.prod(layout.row_shape)) * np.dtype(layout.dtype).itemsize
        assert layout.shard_rows % layout.chunk_rows == 0
        assert layout.chunk_rows & (layout.chunk_rows - 1) == 0
        assert layout.shard_rows * row <= 64 << 20
        assert layout.chunk_rows == 1 or layout.chunk_rows * row <= 4 << 20
        assert layout.shard(1) == layout.chunk_rows
        assert layout.shard(10**9) == layout.shard_rows
        (codecs,) = layout.metadata(5)["codecs"]
        inner = [entry["name"] for entry in codecs["configuration"]["codecs"]]
        is_whole = layout.dtype in ("uint8", "int32", "int64")
        compressor = {"none": [], "lz4": ["blosc"], "zstd": ["blosc" if is_whole else "zstd"]}[codec]
        assert inner == ["bytes", *compressor, "crc32c"], name


def test_a_shape_that_is_huge_costs_nothing() -> None:
    layout = array_layout("box", (4,), "float32", "zstd")
    assert layout.num_files(10**12) == -(-(10**12) // layout.shard_rows)


@pytest.mark.parametrize("codec", CODECS)
def test_every_reader_checks_the_rows_it_reads(tmp_path: Path, codec: str) -> None:
    """A changed byte in their chunk, or in the index of the shard, is an error; one of another chunk is not seen."""
    layout = array_layout("box", (3,), "float32", codec, 16)
    values = np.arange(192, dtype=np.float32).reshape(64, 3)
    write_array(WrittenFiles(LocalStore(tmp_path)), "x", layout, values)
    file = tmp_path / "x" / "c.0.0"
    data = file.read_bytes()
    places = np.frombuffer(data[-68:-4], dtype="<u8").reshape(4, 2)
    (start, size), other = places[1].tolist(), int(places[3, 0])
    for at in (*range(start, start + size, 5), *range(len(data) - 68, len(data), 5)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        for reader in readers(tmp_path, layout, 64):
            with pytest.raises((ValueError, RuntimeError)):
                reader.start(range(17, 19)).result()
    file.write_bytes(data[:other] + bytes([data[other] ^ 1]) + data[other + 1 :])
    for reader in readers(tmp_path, layout, 64):
        assert np.array_equal(reader.start(range(17, 19)).result(), values[17:19])
