"""What do storage type and codec cost and spoil? The table that the defaults (int8, zstd) are chosen from.

    python tests/benchmarks/formats.py --ckpt teacher.pth --ann-file train.json --img-dir JPEGImages --out /tmp/formats

Runs a trained teacher on a few photographs, stores what it says in both large tiers, every type and codec, and prints
per choice: bytes, write and read speed (from the page cache, whole images), and how far fields and distillation losses
are from those of float32. A teacher for it is trained by `kdpipe train-teacher`; bccd.py beside this file leaves one in
its output folder.
"""

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import kdpipe.pipelines  # noqa: F401  mmdet finds mmcv's ops from here on
from kdpipe.cache import CacheSpec, CacheWriter, ImageInfo, TeacherCache, TeacherRecord, TeacherTargets, open_cache
from kdpipe.cache.spec import CODECS, DTYPES
from kdpipe.cache.views import map_boxes
from kdpipe.distill.losses.ckd import ckd_loss
from kdpipe.distill.losses.ckd_negatives import same_object
from kdpipe.distill.losses.prediction import class_aware_regression_kd_loss, classification_kd_loss
from kdpipe.distill.losses.sgfi import SGFI
from kdpipe.distill.rois.align import roi_align_assigned, roi_align_levels
from kdpipe.pipelines.data.datasets import load_coco
from kdpipe.pipelines.data.images import read_image
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.teacher.teacher import load_teacher, teacher_config

FIELDS = ("features", "roi_features", "logits", "deltas", "embeddings")
LOSSES = ("sgfi", "ckd", "cls", "reg")
# Boxes of an image that the losses are taken of.
ROIS = 64
TIERS = {"pyramid": 512, "objects": 256}  # proposals
Kind = tuple[str, str, str]  # tier, dtype, codec
KINDS = [(tier, dtype, codec) for tier in TIERS for dtype in reversed(DTYPES) for codec in CODECS]


def pyramid(targets: TeacherTargets) -> list[Tensor]:
    """All levels as [1, C, h, w] float32."""
    return [level[None] for level in targets.pyramid() if level is not None]


def values_of(targets: TeacherTargets, field: str) -> Tensor | None:
    """A field as float32 values in one dimension; None where the tier has none."""
    if getattr(targets, field) is None:
        return None
    if field == "features":
        return torch.cat([level.reshape(-1) for level in pyramid(targets)])
    if field == "roi_features":
        return targets.float_roi_features().reshape(-1)
    if field == "embeddings":
        return targets.float_embeddings().reshape(-1)
    return getattr(targets, field).float().reshape(-1)  # type: ignore[no-any-return]


def errors(stored: TeacherTargets, exact: TeacherTargets) -> dict[str, float]:
    """Relative error of each field: the norm of the difference over that of the exact values."""
    found = {}
    for field in FIELDS:
        stored_values, exact_values = values_of(stored, field), values_of(exact, field)
        if stored_values is not None and exact_values is not None:
            found[field] = float((stored_values - exact_values).norm() / exact_values.norm())
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
        student_features = roi_align_levels([student(level) for level in pyramid(exact)], spec.strides, rois)
        count = spec.roi_levels
        teacher_features = roi_align_assigned(pyramid(teacher)[:count], spec.strides[:count], rois, spec.finest_scale)
        assert teacher.logits is not None
        assert teacher.deltas is not None
        assert exact.logits is not None
        assert exact.deltas is not None
        logits, deltas = teacher.logits[rows].float(), teacher.deltas[rows].float()
        noisy = [student(values[rows]) for values in (exact.logits, exact.deltas, exact.float_embeddings())]
        place = exact.boxes[rows], torch.zeros(len(rows))
        exclude = same_object(*place, *place)
        cls = classification_kd_loss(noisy[0], logits)
        reg = class_aware_regression_kd_loss(noisy[1], deltas, logits)
        ckd = ckd_loss(self._theta(noisy[2]), self._theta(teacher.float_embeddings()[rows]), exclude=exclude)
        sgfi = float(self._sgfi(student_features, teacher_features)[0])
        return {"sgfi": sgfi, "ckd": float(ckd), "cls": float(cls), "reg": float(reg)}


def raw_bytes(targets: TeacherTargets) -> int:
    """Bytes of all that was read."""
    names = ("boxes", "logits", "deltas", "embeddings", "embedding_scale", "scale")
    values = [getattr(targets, name) for name in (*names, "roi_rows", "roi_features", "roi_scale")]
    return sum(value.nbytes for value in [*values, *(targets.features or ())] if value is not None)


def write(path: Path, spec: CacheSpec, images: list[ImageInfo], records: list[TeacherRecord]) -> float:
    """Make a cache; returns the seconds."""
    writer = CacheWriter(path, spec, images, part_size=1 << 40, identity={}, metadata={})
    start = time.perf_counter()
    with writer.part(0) as part:
        for record in records:
            part.add(record)
    return time.perf_counter() - start


def read_seconds(caches: dict[Kind, TeacherCache], rounds: int) -> dict[Kind, float]:
    """Median seconds per image, all caches by turns."""
    taken: dict[Kind, list[float]] = {}
    for _ in range(rounds):
        for kind, cache in caches.items():
            for image_id in cache.image_ids.tolist():
                start = time.perf_counter()
                cache.targets(image_id)
                taken.setdefault(kind, []).append(time.perf_counter() - start)
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
@click.option("--rounds", type=int, default=5, show_default=True)
def main(
    ckpt: Path, ann_file: Path, img_dir: Path, out: Path, images: int, scale: tuple[int, int], rounds: int
) -> None:
    """Run the teacher, store what it says in all ways, print the table."""
    checkpoint, data = load_checkpoint(ckpt), load_coco(ann_file, img_dir, limit=images)
    config, device = teacher_config(checkpoint, None), torch.device("cpu")
    options: dict[str, Any] = {"class_names": data.class_names, "category_ids": data.category_ids, "scale": scale}
    out.mkdir(parents=True)
    try:
        caches, written, listed = {}, {}, list(data.images)
        for tier, proposals in TIERS.items():
            teacher = load_teacher(checkpoint, config, proposals=proposals, device=device)
            specs = {
                kind: teacher.spec(
                    tier=tier, dtype=kind[1], codec=kind[2], proposals=proposals, views=["identity"], **options
                )
                for kind in KINDS
                if kind[0] == tier
            }
            records = [
                teacher.record(
                    read_image(data.img_dir / image.file_name),
                    data.gt_boxes(image.image_id),
                    data.gt_labels(image.image_id),
                    spec=specs[tier, "float32", "none"],
                    image_id=image.image_id,
                    file_name=image.file_name,
                    view="identity",
                )
                for image in listed
            ]
            for kind, spec in specs.items():
                written[kind] = write(out / "-".join(kind), spec, listed, records)
                caches[kind] = open_cache(out / "-".join(kind))
        print_table(caches, written, read_seconds(caches, rounds))
    finally:
        shutil.rmtree(out)


def print_table(caches: dict[Kind, TeacherCache], written: dict[Kind, float], read: dict[Kind, float]) -> None:
    losses = Losses(caches["pyramid", "float32", "none"].spec)
    exact = {
        tier: {image_id: cache.targets(image_id) for image_id in cache.image_ids.tolist()}
        for tier, cache in ((tier, caches[tier, "float32", "none"]) for tier in TIERS)
    }
    reference = [losses(targets, targets) for targets in exact["pyramid"].values()]
    titles = ["tier, type, codec", "MB", "of float16", "write MB/s", "read MB/s"]
    titles += [f"error of {field}" for field in FIELDS] + [f"change of {name}" for name in LOSSES]
    click.echo(f"{len(reference)} images, {torch.get_num_threads()} threads, per image.\n")
    click.echo(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    size = {
        kind: sum(f.stat().st_size for f in Path(str(cache.location)).rglob("*") if f.is_file()) / len(cache)
        for kind, cache in caches.items()
    }
    for kind, cache in caches.items():
        stored = [cache.targets(image_id) for image_id in exact[kind[0]]]
        raw = statistics.mean(map(raw_bytes, stored))
        kind_errors = [errors(a, b) for a, b in zip(stored, exact[kind[0]].values(), strict=True)]
        cells = [", ".join(kind), f"{size[kind] / 1e6:.2f}", f"{size[kind] / size[kind[0], 'float16', 'none']:.0%}"]
        cells += [f"{raw * len(cache) / written[kind] / 1e6:.0f}", f"{raw / read[kind] / 1e6:.0f}"]
        cells += [f"{mean(kind_errors, field):.1e}" if field in kind_errors[0] else "" for field in FIELDS]
        if kind[0] == "pyramid":
            here = [losses(a, b) for a, b in zip(stored, exact[kind[0]].values(), strict=True)]
            cells += [f"{mean(here, name) / mean(reference, name) - 1:+.1e}" for name in LOSSES]
        click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
