"""Ways to store what a teacher said of images, for reading.py: each is written, and read in a process of its own."""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from kdpipe.cache import CacheSpec, CacheWriter, ImageInfo, TeacherRecord, open_cache
from kdpipe.cache.plan import level_shapes

ROI_FIELDS = ("boxes", "logits", "deltas", "embeddings")
# Arrays of an image, in the order in which readers give them: those of the RoI fields, then the others.
ROI_ARRAYS = (*ROI_FIELDS, "embedding_scale")
ARRAYS = (*ROI_ARRAYS, "features", "scale", "roi_rows", "roi_features", "roi_scale")
# Proposals and ground-truth boxes of an image.
BOXES = {"pyramid": (512, 0), "objects": (256, 7)}
SIZE = (800, 1088)

# The arrays of one image; and what reads an image: all its arrays, or those of the RoI fields.
Sample = dict[str, npt.NDArray[Any]]
Read = Callable[[int, bool], list[Tensor]]


def make_cache(out: Path, tier: str, codec: str, count: int) -> None:
    """A cache of made-up records, always the same ones.

    Features are smooth and far from normally distributed: zstd makes as much of them, as int8, with a bitshuffle and
    without, as of the pyramids of two small trained teachers.
    """
    proposals, truth = BOXES[tier]
    images = [ImageInfo(n, f"{n:06d}.jpg", *SIZE, truth) for n in range(count)]
    options: dict[str, Any] = {
        **{"tier": tier, "dtype": "int8", "codec": codec, "class_names": tuple(map(str, range(80)))},
        **{"category_ids": tuple(range(80)), "channels": 256, "strides": (4, 8, 16, 32, 64), "roi_levels": 4},
        **{"finest_scale": 56, "roi_size": 7, "roi_sampling_ratio": 0, "roi_aligned": True, "embedding_dim": 1024},
        **{"box_means": (0.0,) * 4, "box_stds": (0.1, 0.1, 0.2, 0.2), "class_agnostic": False},
        **{"proposals": proposals, "views": ("identity",), "scale": (max(SIZE), min(SIZE))},
    }
    spec = CacheSpec(**options)
    generator = torch.Generator().manual_seed(0)

    def laplace(*shape: int) -> Tensor:
        uniform = torch.rand(shape, generator=generator).sub_(0.5)
        return -uniform.sign() * (1 - 2 * uniform.abs()).clamp_(min=1e-7).log_()

    def pyramid(height: int, width: int) -> Tensor:
        values = laplace(1, 256, -(-height // 4), -(-width // 4))
        values = values.sign() * values.abs_().sqrt_()
        return interpolate(values, scale_factor=4.0, mode="bilinear")[0, :, :height, :width]

    writer = CacheWriter(out, spec, images, part_size=1 << 40, identity={}, metadata={})
    for number in range(len(writer.parts)):
        with writer.part(number) as part:
            for image in images[writer.parts[number].start : writer.parts[number].stop]:
                corners = torch.rand(proposals + truth, 2, generator=generator) * 300
                boxes = torch.cat([corners, corners + 50], dim=1)
                for n in range(proposals if truth else 0):  # half of them around the objects
                    if n % 2:
                        boxes[n] = boxes[proposals + n % truth] + torch.rand(4, generator=generator) * 16 - 8
                fields: dict[str, Any] = {"features": [pyramid(*shape) for shape in level_shapes(SIZE, spec.strides)]}
                if tier == "objects":
                    fields = {"roi_features": laplace(len(boxes), 256, 7, 7), "gt_labels": torch.zeros(truth).long()}
                record = TeacherRecord(
                    image_id=image.image_id,
                    view="identity",
                    file_name=image.file_name,
                    original_size=SIZE,
                    input_size=SIZE,
                    num_proposals=proposals,
                    boxes=boxes,
                    logits=laplace(len(boxes), 81),
                    deltas=laplace(len(boxes), 80, 4),
                    embeddings=laplace(len(boxes), 1024).clamp_(min=0),
                    **fields,
                )
                part.add(record)


def open_kdpipe(folder: Path) -> Read:
    cache = open_cache(folder)

    def read(number: int, rois: bool) -> list[Tensor]:
        targets = cache.targets(number, fields=ROI_FIELDS if rois else None)
        arrays = [getattr(targets, name, None) for name in (ROI_ARRAYS if rois else ARRAYS)]
        values = [value for entry in arrays for value in (entry if isinstance(entry, tuple) else [entry])]
        return [value for value in values if value is not None]

    return read


def samples(cache: Path) -> Iterator[Sample]:
    """What is in a cache, image by image."""
    source = open_cache(cache)
    for image_id in source.image_ids.tolist():
        targets = source.targets(image_id)
        arrays = {name: getattr(targets, name, None) for name in ARRAYS}
        if targets.features is not None:
            arrays["features"] = torch.cat([level.reshape(-1) for level in targets.features if level is not None])
        yield {name: value.numpy() for name, value in arrays.items() if value is not None}


def write_torch(folder: Path, content: Iterable[Sample]) -> None:
    for number, sample in enumerate(content):
        torch.save({name: torch.from_numpy(values) for name, values in sample.items()}, folder / f"{number}.pt")


def open_torch(folder: Path) -> Read:
    def read(number: int, rois: bool) -> list[Tensor]:
        mapped = torch.load(folder / f"{number}.pt", weights_only=True, mmap=rois)
        return [mapped[name].clone() if rois else mapped[name] for name in _names(mapped, rois)]

    return read


def write_hdf5(folder: Path, content: Iterable[Sample], **options: Any) -> None:
    import h5py

    with h5py.File(folder / "all.h5", "w") as file:
        for number, sample in enumerate(content):
            for name, values in sample.items():
                file.create_dataset(f"{number}/{name}", data=values, **options)


def write_hdf5_lzf(folder: Path, content: Iterable[Sample]) -> None:
    write_hdf5(folder, content, compression="lzf", shuffle=True, fletcher32=True)


def open_hdf5(folder: Path) -> Read:
    import h5py

    file = h5py.File(folder / "all.h5", "r")

    def read(number: int, rois: bool) -> list[Tensor]:
        group = file[str(number)]
        return [torch.from_numpy(group[name][...]) for name in _names(group, rois)]

    return read


def write_lmdb(folder: Path, content: Iterable[Sample]) -> None:
    import lmdb

    with lmdb.open(str(folder), map_size=1 << 36) as env:
        for number, sample in enumerate(content):
            with env.begin(write=True) as transaction:
                for name, values in sample.items():
                    transaction.put(f"{number}/{name}".encode(), values.tobytes())
            shapes = {name: (list(values.shape), str(values.dtype)) for name, values in sample.items()}
            (folder / f"{number}.json").write_text(json.dumps(shapes))


def open_lmdb(folder: Path) -> Read:
    import lmdb

    env = lmdb.open(str(folder), readonly=True, lock=False, readahead=True)
    shapes = {int(file.stem): json.loads(file.read_text()) for file in folder.glob("*.json")}

    def read(number: int, rois: bool) -> list[Tensor]:
        result = []
        with env.begin(buffers=True) as transaction:
            for name in _names(shapes[number], rois):
                shape, dtype = shapes[number][name]
                values = np.frombuffer(transaction.get(f"{number}/{name}".encode()) or b"", dtype).reshape(shape)
                result.append(torch.from_numpy(values.copy()))
        return result

    return read


def write_litdata(folder: Path, content: Iterable[Sample]) -> None:
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, sample in enumerate(content):
        writer[number] = {name: torch.from_numpy(values) for name, values in sample.items()}
    writer.done()
    writer.merge()


def open_litdata(folder: Path) -> Read:
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(folder))

    def read(number: int, rois: bool) -> list[Tensor]:
        sample = dataset[number]
        return [sample[name].clone() for name in _names(sample, rois)]  # they are views of a mapped file

    return read


class PlainPart:
    """Where the arrays of a cache with one part lie, and which rows of them belong to an image, for other libraries."""

    def __init__(self, cache: Path) -> None:
        from kdpipe.cache.format.layout import index_columns, part_layout
        from kdpipe.cache.format.record import files_key, read_record
        from kdpipe.cache.store.location import open_location, part_key

        location, spec = open_location(cache), open_cache(cache).spec
        record = read_record(location, part_key(0)) or {}
        self.folder = cache / files_key(part_key(0), record)
        self.layout = part_layout(spec)
        self._columns, self._end = index_columns(spec), record["rows"].get("element", 0)

    def names(self, rois: bool) -> list[str]:
        return list(_names(self.layout, rois))

    def rows(self, index: npt.NDArray[np.int64], number: int) -> dict[str, slice]:
        """Rows of an image, by what an array has a row for."""
        row = dict(zip(self._columns, index[number].tolist(), strict=True))
        following = index[number + 1 :, self._columns.index("element_start")]
        return {
            "view": slice(number, number + 1),
            "box": slice(row["box_start"], row["box_stop"]),
            "object": slice(row["object_start"], row["object_stop"]),
            "element": slice(row["element_start"], int(following[0]) if len(following) else self._end),
        }


def open_tensorstore(folder: Path) -> Read:
    import tensorstore

    part, limit = PlainPart(folder), {"limit": torch.get_num_threads()}
    context = tensorstore.Context({"data_copy_concurrency": limit, "file_io_concurrency": limit})
    arrays = {
        name: tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(part.folder / name)}},
            context=context,
            read=True,
        ).result()
        for name in (*part.names(False), "index")
    }
    index = arrays["index"].read().result()

    def read(number: int, rois: bool) -> list[Tensor]:
        rows = part.rows(index, number)
        pending = [arrays[name][rows[part.layout[name].per]].read() for name in part.names(rois)]
        return [torch.from_numpy(future.result()) for future in pending]

    return read


def open_zarr(folder: Path, pipeline: str = "zarr.core.codec_pipeline.BatchedCodecPipeline") -> Read:
    import zarr

    zarr.config.set({"threading.max_workers": torch.get_num_threads(), "codec_pipeline.path": pipeline})
    part = PlainPart(folder)
    arrays: dict[str, Any] = {
        name: zarr.open_array(part.folder / name, mode="r") for name in (*part.names(False), "index")
    }
    index = arrays["index"][:]

    def read(number: int, rois: bool) -> list[Tensor]:
        rows = part.rows(index, number)
        return [torch.from_numpy(arrays[name][rows[part.layout[name].per]]) for name in part.names(rois)]

    return read


def open_zarrs(folder: Path) -> Read:
    return open_zarr(folder, "zarrs.ZarrsCodecPipeline")


def _names(available: Iterable[str], rois: bool) -> Iterator[str]:
    return (name for name in (ROI_ARRAYS if rois else ARRAYS) if name in available)


@dataclass(frozen=True)
class Store:
    """A way to store samples: the module that it needs, how it is written (None: it reads kdpipe's) and read."""

    module: str | None
    write: Callable[[Path, Iterable[Sample]], None] | None
    open: Callable[[Path], Read]


# "@zstd": reads the cache that kdpipe wrote by this codec.
STORES = {
    "kdpipe@zstd": Store(None, None, open_kdpipe),
    "kdpipe@lz4": Store(None, None, open_kdpipe),
    "kdpipe@none": Store(None, None, open_kdpipe),
    "tensorstore@zstd": Store("tensorstore", None, open_tensorstore),
    "zarrs@zstd": Store("zarrs", None, open_zarrs),
    "zarr@zstd": Store("zarr", None, open_zarr),
    "HDF5": Store("h5py", write_hdf5, open_hdf5),
    "HDF5, lzf, fletcher32": Store("h5py", write_hdf5_lzf, open_hdf5),
    "LMDB": Store("lmdb", write_lmdb, open_lmdb),
    "LitData": Store("litdata", write_litdata, open_litdata),
    "torch.save per image": Store(None, write_torch, open_torch),
}


def digest(read: Read, number: int) -> str:
    """Of all arrays of an image."""
    state = hashlib.sha256()
    for value in read(number, False):
        state.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def work(out: Path) -> None:
    """A worker: does what each line of its input says, and answers with a line."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    read: Read | None = None
    for line in sys.stdin:
        order = json.loads(line)
        answer: Any = None
        if order["do"] == "make":
            make_cache(out / order["folder"], order["tier"], order["codec"], order["images"])
        elif order["do"] == "close":
            read = None
        elif order["do"] == "open":
            read = STORES[order["store"]].open(out / order["folder"])
        elif order["do"] == "digests":
            read = None
            try:
                read = STORES[order["store"]].open(out / order["folder"])
                answer = [digest(read, number) for number in order["numbers"]]
            except Exception as error:  # whatever a library says of damage
                answer = str(error)[:200]
        elif read is not None:
            start, cpu = time.monotonic(), time.process_time()
            for number in order["numbers"]:
                read(number, order["rois"])
            answer = [start, time.monotonic(), time.process_time() - cpu]
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        work(Path(sys.argv[1]))
