"""How fast are targets read, beside what people use instead?

    python tests/benchmarks/reading.py --out /tmp/reading

Makes up targets of the size of a Faster R-CNN R50-FPN at 800 pixels, stores the same arrays in every format, and prints
a table for whole images and one for RoI fields. Every reader gives tensors with memory of their own, but for "checked
read": the least that reading with a checksum takes, into memory that is always the same. What is not installed is left
out; `pip install 'kdpipe[bench]'` installs all of it. About 1 GB is written below `--out`, and removed at the end.
"""

import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from awscrt import checksums

from kdpipe.cache import CacheSpec, CacheWriter, ImageInfo, TeacherRecord, open_cache
from kdpipe.cache.plan import level_shapes
from kdpipe.cache.read.buffers import Buffers

ROI_FIELDS = ("boxes", "logits", "deltas", "embeddings")
FIELDS = ("features", "scale", *ROI_FIELDS)
# Bytes that are checked while they are in the processor's cache.
BLOCK = 1 << 20

# The arrays of one image by field, the pyramid packed; and what reads them from a store, given the fields.
Sample = dict[str, npt.NDArray[Any]]
Read = Callable[[int, tuple[str, ...]], list[Any]]


def make_caches(out: Path, names: dict[str, str], count: int, size: tuple[int, int], boxes: int) -> None:
    """kdpipe caches by name and codec, all of the same records.

    Features are Laplace-distributed, to a power: as int8, zstd makes as much of them as of a trained pyramid.
    """
    images = [ImageInfo(n, f"{n:06d}.jpg", *size, 0) for n in range(count)]
    spec: dict[str, Any] = {
        **{"tier": "pyramid", "dtype": "int8", "class_names": tuple(map(str, range(80)))},
        **{"category_ids": tuple(range(80)), "channels": 256, "strides": (4, 8, 16, 32, 64), "roi_levels": 4},
        **{"finest_scale": 56, "roi_size": 7, "roi_sampling_ratio": 0, "roi_aligned": True, "embedding_dim": 1024},
        **{"box_means": (0.0,) * 4, "box_stds": (0.1, 0.1, 0.2, 0.2), "class_agnostic": False, "proposals": boxes},
        **{"views": ("identity",), "scale": (max(size), min(size))},
    }
    writers = [
        CacheWriter(out / name, CacheSpec(**spec, codec=codec), images, part_size=1 << 50, identity={}, metadata={})
        for name, codec in names.items()
    ]
    generator = torch.Generator().manual_seed(0)

    def laplace(*shape: int) -> torch.Tensor:
        uniform = torch.rand(shape, generator=generator).sub_(0.5)
        return -uniform.sign() * (1 - 2 * uniform.abs()).clamp_(min=1e-7).log_()

    def peaked(*shape: int) -> torch.Tensor:
        values = laplace(*shape)
        return values.sign() * values.abs_() ** 1.85

    parts = [writer.part(0).__enter__() for writer in writers]
    for image in images:
        corners = torch.rand(boxes, 2, generator=generator) * 300
        record = TeacherRecord(
            image_id=image.image_id,
            view="identity",
            file_name=image.file_name,
            original_size=size,
            input_size=size,
            num_proposals=boxes,
            boxes=torch.cat([corners, corners + 50], dim=1),
            logits=laplace(boxes, 81),
            deltas=laplace(boxes, 80, 4),
            embeddings=laplace(boxes, 1024).clamp_(min=0),
            features=[peaked(256, *shape) for shape in level_shapes(size, writers[0].spec.strides)],
        )
        for part in parts:
            part.add(record)
    for part in parts:
        part.__exit__(None, None, None)


def samples(cache: Path) -> Iterator[Sample]:
    """What is in a cache, image by image."""
    source = open_cache(cache)
    for image_id in source.image_ids.tolist():
        targets = source.targets(image_id)
        levels = [level.reshape(-1) for level in targets.features or () if level is not None]
        yield {"features": torch.cat(levels).numpy()} | {n: getattr(targets, n).numpy() for n in FIELDS[1:]}


def open_kdpipe(folder: Path) -> Read:
    cache = open_cache(folder)

    def read(number: int, fields: tuple[str, ...]) -> list[Any]:
        targets = cache.targets(number, fields=[field for field in fields if field != "scale"])
        return [getattr(targets, field) for field in fields]

    return read


def write_raw(folder: Path, content: Iterable[Sample]) -> None:
    for number, sample in enumerate(content):
        for fields in (FIELDS, ROI_FIELDS):
            data = b"".join(sample[field].tobytes() for field in fields)
            (folder / f"{number}.{len(fields)}").write_bytes(data)


def open_raw(folder: Path) -> Read:
    return lambda number, fields: [np.fromfile(folder / f"{number}.{len(fields)}", np.uint8)]


def open_checked(folder: Path) -> Read:
    memory = Buffers().take(max(file.stat().st_size for file in folder.iterdir()))
    memory[:] = 0  # touched

    def read(number: int, fields: tuple[str, ...]) -> list[Any]:
        with (folder / f"{number}.{len(fields)}").open("rb", buffering=0) as file:
            start = 0
            while count := file.readinto(memory[start : start + BLOCK].data):
                checksums.crc32c(memory[start : start + count].data)
                start += count
        return [memory[:start]]

    return read


def write_npy(folder: Path, content: Iterable[Sample]) -> None:
    for number, sample in enumerate(content):
        for field, values in sample.items():
            np.save(folder / f"{number}.{field}.npy", values)


def open_npy(folder: Path) -> Read:
    return lambda number, fields: [torch.from_numpy(np.load(folder / f"{number}.{field}.npy")) for field in fields]


def write_torch(folder: Path, content: Iterable[Sample]) -> None:
    for number, sample in enumerate(content):
        torch.save({field: torch.from_numpy(values) for field, values in sample.items()}, folder / f"{number}.pt")


def open_torch(folder: Path) -> Read:
    def read(number: int, fields: tuple[str, ...]) -> list[Any]:
        if fields == FIELDS:
            return list(torch.load(folder / f"{number}.pt", weights_only=True).values())
        mapped = torch.load(folder / f"{number}.pt", weights_only=True, mmap=True)
        return [mapped[field].clone() for field in fields]

    return read


def write_hdf5(folder: Path, content: Iterable[Sample], **options: Any) -> None:
    import h5py

    with h5py.File(folder / "all.h5", "w") as file:
        for number, sample in enumerate(content):
            for field, values in sample.items():
                file.create_dataset(f"{number}/{field}", data=values, **options)


def write_hdf5_lzf(folder: Path, content: Iterable[Sample]) -> None:
    write_hdf5(folder, content, compression="lzf", shuffle=True, fletcher32=True)


def open_hdf5(folder: Path) -> Read:
    import h5py

    file = h5py.File(folder / "all.h5", "r")
    return lambda number, fields: [torch.from_numpy(file[f"{number}/{field}"][...]) for field in fields]


def write_lmdb(folder: Path, content: Iterable[Sample]) -> None:
    import lmdb

    with lmdb.open(str(folder), map_size=1 << 36) as env:
        for number, sample in enumerate(content):
            with env.begin(write=True) as transaction:
                for field, values in sample.items():
                    transaction.put(f"{number}/{field}".encode(), values.tobytes())
            shapes = {field: (list(values.shape), str(values.dtype)) for field, values in sample.items()}
            (folder / f"{number}.json").write_text(json.dumps(shapes))


def open_lmdb(folder: Path) -> Read:
    import lmdb

    env = lmdb.open(str(folder), readonly=True, lock=False, readahead=True)
    shapes = {int(file.stem): json.loads(file.read_text()) for file in folder.glob("*.json")}

    def read(number: int, fields: tuple[str, ...]) -> list[Any]:
        result = []
        with env.begin(buffers=True) as transaction:
            for field in fields:
                shape, dtype = shapes[number][field]
                values = np.frombuffer(transaction.get(f"{number}/{field}".encode()) or b"", dtype).reshape(shape)
                result.append(torch.from_numpy(values.copy()))
        return result

    return read


def write_litdata(folder: Path, content: Iterable[Sample]) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, sample in enumerate(content):
        writer[number] = {field: torch.from_numpy(values) for field, values in sample.items()}
    writer.done()
    writer.merge()


def open_litdata(folder: Path) -> Read:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder))

    def read(number: int, fields: tuple[str, ...]) -> list[Any]:
        sample = dataset[number]
        return [sample[field].clone() for field in fields]  # they are views of a mapped file

    return read


def open_tensorstore(folder: Path) -> Read:
    import tensorstore

    one = {"limit": 1}
    context = tensorstore.Context({"data_copy_concurrency": one, "file_io_concurrency": one})
    part = folder / "parts" / "00000"
    arrays = {
        field: tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(part / field)}}, context=context, read=True
        ).result()
        for field in (*FIELDS, "index")
    }
    index = arrays["index"].read().result()
    columns = json.loads((part / "index" / "zarr.json").read_text())["attributes"]["columns"]
    row, element = columns.index("row_start"), columns.index("element_start")
    cells = index[:, columns.index("level0_height") :].astype(np.int64)
    stops = index[:, element] + 256 * (cells[:, 0::2] * cells[:, 1::2]).sum(axis=1)

    def read(number: int, fields: tuple[str, ...]) -> list[Any]:
        rows = slice(int(index[number, row]), int(index[number, row + 1]))
        places = {
            "features": slice(int(index[number, element]), int(stops[number])),
            "scale": slice(number, number + 1),
        }
        pending = [arrays[field][places.get(field, rows)].read() for field in fields]
        return [torch.from_numpy(np.require(future.result(), requirements="W")) for future in pending]

    return read


@dataclass(frozen=True)
class Store:
    """A way to store samples: the module that it needs, how it is written (None: it reads another's files) and read."""

    module: str | None
    write: Callable[[Path, Iterable[Sample]], None] | None
    open: Callable[[Path], Read]
    folder: str


STORES = {
    "kdpipe, zstd": Store(None, None, open_kdpipe, "zstd"),
    "kdpipe, none": Store(None, None, open_kdpipe, "none"),
    "np.fromfile, the limit": Store(None, write_raw, open_raw, "raw"),
    "checked read, the limit": Store(None, None, open_checked, "raw"),
    "a .npy per array": Store(None, write_npy, open_npy, "npy"),
    "torch.save per image": Store(None, write_torch, open_torch, "torch"),
    "HDF5": Store("h5py", write_hdf5, open_hdf5, "hdf5"),
    "HDF5, lzf, fletcher32": Store("h5py", write_hdf5_lzf, open_hdf5, "hdf5-lzf"),
    "LMDB": Store("lmdb", write_lmdb, open_lmdb, "lmdb"),
    "LitData": Store("litdata", write_litdata, open_litdata, "litdata"),
    "tensorstore on kdpipe's zstd": Store("tensorstore", None, open_tensorstore, "zstd"),
    "tensorstore on kdpipe's none": Store("tensorstore", None, open_tensorstore, "none"),
}


def work(pipe: Connection, out: Path) -> None:
    """A worker: opens the stores that it is told, reads what it is told, and says when it began and ended."""
    torch.set_num_threads(1)  # as workers of a data loader do
    while (order := pipe.recv()) is not None:
        name, numbers, fields, warm = order
        store = STORES[name]
        read = store.open(out / store.folder)
        if warm:
            for number in numbers:
                read(number, fields)
        pipe.send(None)
        pipe.recv()
        start = time.monotonic()
        for number in numbers:
            read(number, fields)
        pipe.send((start, time.monotonic()))
        del read


def measure(pipes: list[Connection], name: str, numbers: list[int], fields: tuple[str, ...], warm: bool) -> float:
    """Images per second of as many workers as there are pipes. Opening is not counted."""
    for position, pipe in enumerate(pipes):
        pipe.send((name, numbers[position :: len(pipes)], fields, warm))
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send(None)
    spans = [pipe.recv() for pipe in pipes]
    rate: float = len(numbers) / (max(stop for _, stop in spans) - min(start for start, _ in spans))
    return rate


def drop_pages(folder: Path) -> None:
    """Write a folder's files to disk and take them out of the page cache (posix_fadvise, DONTNEED)."""
    for file in filter(Path.is_file, folder.rglob("*")):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def table(
    out: Path, names: list[str], count: int, fields: tuple[str, ...], rounds: int, pipes: list[Connection]
) -> str:
    """Medians of images per second, in order and shuffled, cold and warm, of one worker and of two."""
    orders = {"in order": list(range(count)), "shuffled": np.random.default_rng(0).permutation(count).tolist()}
    runs = [(warm, order, workers) for warm in (False, True) for order in orders for workers in (1, 2)]
    rates: dict[tuple[str, bool, str, int], list[float]] = {}
    for warm, order, workers in runs:
        for _ in range(rounds):
            for name in names:
                if not warm:
                    drop_pages(out / STORES[name].folder)
                rate = measure(pipes[:workers], name, orders[order], fields, warm)
                rates.setdefault((name, warm, order, workers), []).append(rate)
    titles = [f"{'warm' if warm else 'cold'}, {order}, {workers}" for warm, order, workers in runs]
    lines = [
        f"| images/s | MB on disk per image | {' | '.join(titles)} | warm, shuffled, 1, per byte of disk |",
        "|---|---|" + "---|" * (len(runs) + 1),
    ]
    per_byte = {}
    for name in names:
        files = filter(Path.is_file, (out / STORES[name].folder).rglob("*"))
        size = sum(file.stat().st_size for file in files) / count
        medians = [statistics.median(rates[(name, *run)]) for run in runs]
        per_byte[name] = medians[runs.index((True, "shuffled", 1))] / size
        cells = " | ".join(f"{rate:.1f}" for rate in medians)
        lines.append(f"| {name} | {size / 1e6:.2f} | {cells} | {per_byte[name] / per_byte[names[0]]:.2f} |")
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder for the data.")
@click.option("--images", type=int, default=8, show_default=True)
@click.option("--size", type=(int, int), default=(800, 1088), show_default=True, help="Height and width.")
@click.option("--boxes", type=int, default=512, show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True)
def main(out: Path, images: int, size: tuple[int, int], boxes: int, rounds: int) -> None:
    """Make the data, measure, and print the tables."""
    out.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        make_caches(out, {"zstd": "zstd", "none": "none"}, images, size, boxes)
        names = []
        for name, store in STORES.items():
            if store.module is not None and importlib.util.find_spec(store.module) is None:
                click.echo(f"{name}: left out, {store.module} is not installed.")
                continue
            names.append(name)
            if store.write is not None:
                (out / store.folder).mkdir()
                store.write(out / store.folder, samples(out / "none"))
        for _ in range(2):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=work, args=(theirs, out)))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        for title, fields in (("Whole images", FIELDS), ("RoI fields only", ROI_FIELDS)):
            click.echo(f"\n{title}: page cache, order, worker processes.\n")
            click.echo(table(out, names, images, fields, rounds, pipes))
        for pipe in pipes:
            pipe.send(None)
    finally:
        for process in processes:
            process.join(5)
            process.terminate()
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
