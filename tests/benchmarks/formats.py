"""What do storage type and codec cost and spoil? The table that the defaults (int8, zstd) are chosen from.

    python tests/benchmarks/formats.py --ckpt teacher.pth --ann-file train.json --img-dir JPEGImages --out /tmp/formats

Runs a trained teacher on a few photographs, stores what it says as float32, float16 and int8 by each codec, and prints
per choice: bytes, write and read speed (from the page cache, whole images, beside np.fromfile of as many raw bytes and
the least that a checked read of them takes), the codec's own speed from memory to memory, and how far fields and
distillation losses are from those of float32. A teacher for it is trained by `kdpipe train-teacher`; bccd.py beside
this file leaves one in its output folder.
"""

import itertools
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from awscrt import checksums
from numcodecs import blosc
from torch import Tensor

import kdpipe.pipelines  # noqa: F401  mmdet finds mmcv's ops from here on
from kdpipe.cache import CacheSpec, CacheWriter, ImageInfo, TeacherCache, TeacherRecord, TeacherTargets, open_cache
from kdpipe.cache.codecs import encode_chunk
from kdpipe.cache.read.buffers import Buffers
from kdpipe.cache.spec import CODECS, DTYPES
from kdpipe.cache.views import map_boxes
from kdpipe.distill.losses.ckd import ckd_loss, exclude_pairs
from kdpipe.distill.losses.prediction import class_aware_regression_kd_loss, classification_kd_loss
from kdpipe.distill.losses.sgfi import SGFI
from kdpipe.distill.rois.sampling import roi_align_assigned, roi_align_levels
from kdpipe.pipelines.data.datasets import load_coco
from kdpipe.pipelines.data.images import read_image
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.teacher.teacher import load_teacher, teacher_config

FIELDS = ("features", "logits", "deltas", "embeddings")
LOSSES = ("sgfi", "ckd", "pred")
CHUNK = 1 << 20
# Boxes of an image that the losses are taken of.
ROIS = 64


def pyramid(targets: TeacherTargets) -> list[Tensor]:
    """All levels as [1, C, h, w] float32."""
    return [level[None] for level in targets.pyramid() if level is not None]


def errors(stored: TeacherTargets, exact: TeacherTargets) -> dict[str, float]:
    """Relative error of each field: the norm of the difference over that of the exact values."""
    found = {}
    for field in FIELDS:
        if field == "features":
            pairs = list(zip(pyramid(stored), pyramid(exact), strict=True))
        else:
            pairs = [(getattr(stored, field).float(), getattr(exact, field))]
        gap = sum(float((a - b).square().sum()) for a, b in pairs)
        found[field] = (gap / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5
    return found


class Losses:
    """Distillation losses of a made-up student: the exact teacher with as much noise as it has signal."""

    def __init__(self, spec: CacheSpec) -> None:
        self._spec = spec
        torch.manual_seed(0)
        self._sgfi = SGFI(spec.channels, spec.channels)
        self._theta = torch.nn.Linear(spec.embedding_dim, 128)

    @torch.no_grad()
    def __call__(self, teacher: TeacherTargets, exact: TeacherTargets) -> dict[str, float]:
        """The losses of these targets; the student is made from the exact ones."""
        generator = torch.Generator().manual_seed(exact.image_id)

        def student(values: Tensor) -> Tensor:
            return values + values.std() * torch.randn(values.shape, generator=generator)

        spec, rows = self._spec, torch.arange(0, len(exact.boxes), max(1, len(exact.boxes) // ROIS))
        boxes = map_boxes(exact.boxes[rows], exact.matrix)
        rois = torch.cat([torch.zeros(len(rows), 1), boxes], dim=1)
        ours = roi_align_levels([student(level) for level in pyramid(exact)], spec.strides, rois)
        count = spec.roi_levels
        theirs = roi_align_assigned(pyramid(teacher)[:count], spec.strides[:count], rois, spec.finest_scale)
        logits, deltas, embeddings = (getattr(teacher, name)[rows].float() for name in FIELDS[1:])
        noisy = [student(getattr(exact, name)[rows]) for name in FIELDS[1:]]
        exclude = exclude_pairs(exact.boxes[rows], torch.zeros(len(rows)))
        cls = classification_kd_loss(noisy[0], logits)
        reg = class_aware_regression_kd_loss(noisy[1], deltas, logits)
        ckd = ckd_loss(self._theta(noisy[2]), self._theta(embeddings), exclude=exclude)
        return {"sgfi": float(self._sgfi(ours, theirs)[0]), "ckd": float(ckd), "pred": float(cls + reg)}


def timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def raw_bytes(targets: TeacherTargets) -> int:
    """Bytes of all that was read."""
    levels = [level for level in targets.features or () if level is not None]
    others = [getattr(targets, name) for name in ("boxes", "scale", *FIELDS[1:])]
    return sum(value.nbytes for value in [*levels, *others] if value is not None)


def codec_rate(targets: TeacherTargets, codec: str) -> float:
    """MB/s of decoded features that the codec gives from memory into memory, in one thread."""
    values = torch.cat([level.reshape(-1) for level in targets.features or () if level is not None]).numpy()
    blocks = [values[start : start + CHUNK] for start in range(0, len(values), CHUNK)]
    chunks = [(encode_chunk(block, codec)[0], np.empty_like(block)) for block in blocks]

    def decode() -> None:
        for data, out in chunks:
            blosc.decompress(data, out)

    return values.nbytes / statistics.median(timed(decode) for _ in range(3)) / 1e6


def write(path: Path, spec: CacheSpec, images: list[ImageInfo], records: list[TeacherRecord]) -> float:
    """Make a cache; returns the seconds."""
    writer = CacheWriter(path, spec, images, part_size=1 << 50, identity={}, metadata={})
    start = time.perf_counter()
    with writer.part(0) as part:
        for record in records:
            part.add(record)
    return time.perf_counter() - start


def checked_read(file: Path, memory: npt.NDArray[np.uint8]) -> None:
    """The least that one thread does to read and check: into memory used before, each block checked in the cache."""
    view = memory.data
    with file.open("rb", buffering=0) as opened:
        for start in range(0, len(view), CHUNK):
            opened.readinto(view[start : start + CHUNK])
            checksums.crc32c(view[start : start + CHUNK])


def read_seconds(caches: dict[tuple[str, str], TeacherCache], out: Path, rounds: int) -> dict[tuple[str, str], float]:
    """Median seconds per image; (dtype, "fromfile") and (dtype, "checked") are those of a file of as many bytes.

    (dtype, "features") is of uncompressed features alone, (dtype, "features fromfile") of a file of as many bytes.
    """
    taken: dict[tuple[str, str], list[float]] = {}
    ids = next(iter(caches.values())).image_ids.tolist()
    for dtype in DTYPES:
        for image_id in ids:
            targets = caches[dtype, "none"].targets(image_id)
            np.zeros(raw_bytes(targets), np.int8).tofile(out / f"{image_id}.{dtype}")
            count = sum(level.nbytes for level in targets.features or () if level is not None)
            np.zeros(count, np.int8).tofile(out / f"{image_id}.features.{dtype}")
    files = {dtype: [out / f"{image_id}.{dtype}" for image_id in ids] for dtype in DTYPES}
    # Touched, and at the beginning of a page.
    memory = {dtype: Buffers().take(max(file.stat().st_size for file in files[dtype])) for dtype in DTYPES}
    for block in memory.values():
        block[:] = 0
    for _, (position, image_id) in itertools.product(range(rounds), enumerate(ids)):
        for dtype in DTYPES:
            file, other = files[dtype][position], files[dtype][position - 1]  # not what is in the cache from just now
            taken.setdefault((dtype, "fromfile"), []).append(timed(partial(np.fromfile, file, np.int8)))
            block = memory[dtype][: other.stat().st_size]
            taken.setdefault((dtype, "checked"), []).append(timed(partial(checked_read, other, block)))
            features = out / f"{image_id}.features.{dtype}"
            taken.setdefault((dtype, "features fromfile"), []).append(timed(partial(np.fromfile, features, np.int8)))
            read = partial(caches[dtype, "none"].targets, image_id, fields=("features",))
            taken.setdefault((dtype, "features"), []).append(timed(read))
        for kind, cache in caches.items():
            taken.setdefault(kind, []).append(timed(partial(cache.targets, image_id)))
    return {kind: statistics.median(values) for kind, values in taken.items()}


def mean(values: list[dict[str, float]], name: str) -> float:
    return statistics.mean(value[name] for value in values)


@click.command()
@click.option("--ckpt", type=click.Path(exists=True, path_type=Path), required=True, help="A trained teacher.")
@click.option("--ann-file", type=click.Path(exists=True, path_type=Path), default=Path("../shared/data/bccd/test.json"))
@click.option("--img-dir", type=click.Path(exists=True, path_type=Path), default=Path("../shared/data/bccd/JPEGImages"))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder for the caches.")
@click.option("--images", type=int, default=6, show_default=True)
@click.option("--scale", type=(int, int), default=(1066, 800), show_default=True, help="Long and short side.")
@click.option("--proposals", type=int, default=512, show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True)
def main(
    ckpt: Path,
    ann_file: Path,
    img_dir: Path,
    out: Path,
    images: int,
    scale: tuple[int, int],
    proposals: int,
    rounds: int,
) -> None:
    """Run the teacher, store what it says in all ways, print the table."""
    checkpoint, data = load_checkpoint(ckpt), load_coco(ann_file, img_dir, limit=images)
    teacher = load_teacher(
        checkpoint, teacher_config(checkpoint, None), proposals=proposals, device=torch.device("cpu")
    )
    options: dict[str, Any] = {"class_names": data.class_names, "category_ids": data.category_ids, "scale": scale}
    specs = {
        kind: teacher.spec(
            tier="pyramid", dtype=kind[0], codec=kind[1], proposals=proposals, views=["identity"], **options
        )
        for kind in itertools.product(reversed(DTYPES), CODECS)
    }
    records = [
        teacher.record(
            read_image(data.img_dir / image.file_name),
            data.gt_boxes(image.image_id),
            spec=specs["float32", "none"],
            image_id=image.image_id,
            file_name=image.file_name,
            view="identity",
        )
        for image in data.images
    ]
    out.mkdir(parents=True)
    try:
        listed = list(data.images)
        paths = {kind: out / "-".join(kind) for kind in specs}
        write_taken = {kind: write(paths[kind], spec, listed, records) for kind, spec in specs.items()}
        caches = {kind: open_cache(path) for kind, path in paths.items()}
        read_taken = read_seconds(caches, out, rounds)
        losses = Losses(specs["float32", "none"])
        exact = {
            image_id: caches["float32", "none"].targets(image_id) for image_id in caches["float32", "none"].image_ids
        }
        reference = [losses(targets, targets) for targets in exact.values()]
        click.echo(f"{len(exact)} images at {scale[0]} x {scale[1]}, {torch.get_num_threads()} threads, per image.\n")
        titles = [
            "type, codec",
            "MB",
            "of float16",
            "write MB/s",
            "read MB/s",
            "of np.fromfile",
            "of a checked read",
            "codec alone, 1 thread",
        ]
        titles += [f"error of {field}" for field in FIELDS] + [f"change of {name}" for name in LOSSES]
        click.echo(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
        size = {
            kind: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) / len(exact) for kind, p in paths.items()
        }
        for kind, cache in caches.items():
            dtype, codec = kind
            stored = [cache.targets(image_id) for image_id in exact]
            raw = statistics.mean(map(raw_bytes, stored))
            found = [errors(a, b) for a, b in zip(stored, exact.values(), strict=True)]
            here = [losses(a, b) for a, b in zip(stored, exact.values(), strict=True)]
            cells = [f"{dtype}, {codec}", f"{size[kind] / 1e6:.1f}", f"{size[kind] / size['float16', 'none']:.0%}"]
            cells += [f"{raw * len(exact) / write_taken[kind] / 1e6:.0f}", f"{raw / read_taken[kind] / 1e6:.0f}"]
            cells += [f"{read_taken[dtype, other] / read_taken[kind]:.2f}" for other in ("fromfile", "checked")]
            cells += ["" if codec == "none" else f"{codec_rate(stored[0], codec):.0f}"]
            cells += [f"{mean(found, field):.1e}" for field in FIELDS]
            cells += [f"{mean(here, name) / mean(reference, name) - 1:+.1e}" for name in LOSSES]
            click.echo(f"| {' | '.join(cells)} |")
        for dtype in reversed(DTYPES):
            fromfile, checked = (read_taken[dtype, other] for other in ("fromfile", "checked"))
            raw = statistics.mean(raw_bytes(caches[dtype, "none"].targets(image_id)) for image_id in exact)
            rates = f"np.fromfile {raw / fromfile / 1e6:.0f} MB/s, checked read {raw / checked / 1e6:.0f} MB/s"
            click.echo(f"{dtype}: {rates}, {fromfile / checked:.2f} of it")
            fromfile, ours = read_taken[dtype, "features fromfile"], read_taken[dtype, "features"]
            seconds = f"np.fromfile {fromfile * 1e3:.2f} ms, kdpipe {ours * 1e3:.2f} ms"
            click.echo(f"{dtype}, features alone: {seconds}, {fromfile / ours:.2f} of it")
    finally:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
