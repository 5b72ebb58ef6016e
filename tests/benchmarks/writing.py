"""Does writing hide behind the teacher? The bare forward pass against cache-teacher, and the writer alone.

    python tests/benchmarks/writing.py --data path/to/bccd

First a Faster R-CNN R50-FPN with random weights sees the same photographs at 800 pixels three times: in mmdet's own
`test_step`, in what `cache-teacher` asks of it, of which nothing is kept, and in `cache-teacher`, which also writes the
pyramid tier in several parts. Then a stand-in for a teacher, which has its answers ready, shows how many images per
second the writer takes, by type of storage and codec, and how many bytes it reads and writes for each byte on disk.
"""

import itertools
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from kdpipe.cache import CacheSpec, CacheWriter, ImageInfo, TeacherRecord, raw_bytes
from kdpipe.cache.spec import CODECS, DTYPES
from kdpipe.cache.store.location import open_location
from kdpipe.cache.views import input_size
from kdpipe.pipelines.commands.cache_teacher import cache_teacher
from kdpipe.pipelines.data.datasets import DetectionData, load_coco
from kdpipe.pipelines.data.find import DataSource
from kdpipe.pipelines.data.images import read_image
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.detectors.configs import find_config, set_num_classes
from kdpipe.pipelines.teacher.options import CacheOptions
from kdpipe.pipelines.teacher.teacher import Teacher, load_teacher, teacher_config

SCALE = (1333, 800)


@contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="kdpipe-writing-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def random_teacher(path: Path, classes: int) -> Path:
    """A checkpoint of an untrained R50-FPN."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    config = find_config("faster-rcnn_r50_fpn_1x_coco")
    config.model.backbone.init_cfg = None
    set_num_classes(config.model, classes)
    model = MODELS.build(config.model)
    torch.save({"state_dict": model.state_dict(), "meta": {"cfg": config.pretty_text}}, path)
    return path


def bare_forward(teacher: Teacher, data: DetectionData) -> float:
    """Seconds of mmdet's own prediction over all images, reading and resizing included."""
    from mmcv import imresize
    from mmdet.structures import DetDataSample

    start = time.perf_counter()
    for info in data.images:
        image = read_image(data.img_dir / info.file_name, (info.height, info.width))
        height, width = input_size((info.height, info.width), SCALE)
        pixels = torch.from_numpy(imresize(image, (width, height)).transpose(2, 0, 1).copy())
        sample = DetDataSample(
            metainfo={"img_shape": (height, width), "ori_shape": image.shape[:2], "scale_factor": (1.0, 1.0)}
        )
        with torch.inference_mode():
            teacher.model.test_step({"inputs": [pixels], "data_samples": [sample]})
    return time.perf_counter() - start


def answers_alone(teacher: Teacher, data: DetectionData) -> float:
    """Seconds of what cache-teacher asks of the teacher, over all images, reading included; nothing is kept."""
    options: dict[str, Any] = {"class_names": data.class_names, "category_ids": data.category_ids, "scale": SCALE}
    spec = teacher.spec(tier="pyramid", dtype="int8", codec="zstd", proposals=512, views=("identity",), **options)
    start = time.perf_counter()
    for info in data.images:
        image = read_image(data.img_dir / info.file_name, (info.height, info.width))
        truth = data.gt_boxes(info.image_id)
        teacher.record(image, truth, spec=spec, image_id=info.image_id, file_name=info.file_name, view="identity")
    return time.perf_counter() - start


def against_forward(data: DetectionData, rounds: int) -> None:
    with folder() as work:
        checkpoint = load_checkpoint(random_teacher(work / "teacher.pth", len(data.class_names)), trust=False)
        config = teacher_config(checkpoint, None)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher = load_teacher(checkpoint, config, proposals=512, device=device)
        bare, alone, cached = [], [], []
        for number in range(rounds):  # by turns, so that both see the same machine
            bare.append(bare_forward(teacher, data))
            alone.append(answers_alone(teacher, data))
            out = work / f"{number}.zarr"
            options = CacheOptions(scale=SCALE, part_size=64 << 20)  # three images of this size
            source, quiet = (
                DataSource(DataOptions(data.ann_file, data.img_dir), limit=len(data.images)),
                Console(quiet=True),
            )
            result = cache_teacher(
                checkpoint, config, source, open_location(out), options, device=device, console=quiet
            )
            cached.append(result.seconds)
            shutil.rmtree(out)
        print(
            f"\n{len(data.images)} images at {SCALE[0]}x{SCALE[1]}, {rounds} rounds by turns; seconds per image, best "
            "round"
        )
        print("| | seconds | cache-teacher / this |\n|---|---|---|")
        print(f"| mmdet's test_step | {min(bare) / len(data.images):.2f} | {min(cached) / min(bare):.3f} |")
        print(f"| answers alone | {min(alone) / len(data.images):.2f} | {min(cached) / min(alone):.3f} |")
        print(f"| cache-teacher | {min(cached) / len(data.images):.2f} | |")


def stand_in(images: list[ImageInfo], spec: CacheSpec) -> Iterator[TeacherRecord]:
    """Answers of the size of R50-FPN's, made before; features like those of a trained network, half of them zeros."""
    g = torch.Generator().manual_seed(0)
    size = input_size((600, 800), SCALE)
    levels = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in spec.strides]
    features = [torch.randn(spec.channels, h, w, generator=g).mul_(3).round_().div_(3).relu_() for h, w in levels]
    count = spec.proposals
    corner = torch.rand(count, 2, generator=g) * 300
    record = TeacherRecord(
        image_id=0,
        view="identity",
        file_name="",
        original_size=(600, 800),
        input_size=size,
        num_proposals=count,
        boxes=torch.cat([corner, corner + 100], dim=1),
        logits=torch.randn(count, spec.num_classes + 1, generator=g),
        deltas=torch.randn(count, spec.num_classes, 4, generator=g),
        embeddings=torch.randn(count, spec.embedding_dim, generator=g).relu_(),
        features=features,
    )
    return (replace(record, image_id=image.image_id, file_name=image.file_name) for image in images)


def sustained(count: int) -> None:
    images = [ImageInfo(n, f"{n}.jpg", 600, 800, 0) for n in range(count)]
    print(f"\nA teacher that has its answers ready: {count} images, pyramid tier, 256 MiB parts")
    print(
        "| dtype | codec | images/s | processor, ms per image | raw MB/s | disk MB/s | waiting at ends of parts "
        "| read / disk | written / disk |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype, codec in itertools.product(DTYPES, CODECS):
        spec = CacheSpec(
            tier="pyramid",
            dtype=dtype,
            codec=codec,
            class_names=tuple(f"class {n}" for n in range(80)),
            category_ids=tuple(range(80)),
            channels=256,
            strides=(4, 8, 16, 32, 64),
            roi_levels=4,
            finest_scale=56,
            roi_size=7,
            roi_sampling_ratio=0,
            roi_aligned=True,
            embedding_dim=1024,
            box_means=(0.0, 0.0, 0.0, 0.0),
            box_stds=(0.1, 0.1, 0.2, 0.2),
            class_agnostic=False,
            proposals=512,
            views=("identity",),
            scale=SCALE,
        )
        with folder() as work:
            writer = CacheWriter(work / "x.zarr", spec, images, 256 << 20, {}, {})
            answers = stand_in(images, spec)
            waited = 0.0
            before, start, cpu = passed(), time.perf_counter(), time.process_time()
            for index in writer.pending():
                with writer.part(index) as part:
                    for _ in writer.parts[index]:
                        part.add(next(answers))
                    end = time.perf_counter()
                waited += time.perf_counter() - end
            seconds, busy, after = time.perf_counter() - start, time.process_time() - cpu, passed()
            disk = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
        raw = sum(raw_bytes(images, spec).values())
        print(
            f"| {dtype} | {codec} | {count / seconds:.1f} | {1e3 * busy / count:.0f} | {raw / seconds / 1e6:.0f} "
            f"| {disk / seconds / 1e6:.0f} | {100 * waited / seconds:.0f} % | {(after[0] - before[0]) / disk:.3f} "
            f"| {(after[1] - before[1]) / disk:.3f} |",
            flush=True,
        )


def passed() -> tuple[int, int]:
    """Bytes that this process has read from files and written to them so far, page cache included."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), default=Path("../shared/data/bccd"))
@click.option("--images", type=int, default=12, show_default=True)
@click.option("--rounds", type=int, default=3, show_default=True)
@click.option("--stand-in-images", type=int, default=48, show_default=True)
def main(data: Path, images: int, rounds: int, stand_in_images: int) -> None:
    """Print both tables."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if images:
        against_forward(load_coco(data / "train.json", data / "JPEGImages", images), rounds)
    if stand_in_images:
        sustained(stand_in_images)


if __name__ == "__main__":
    main()
