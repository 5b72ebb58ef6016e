"""`kdpipe cache-teacher`: one pass of the teacher over a data set, kept on disk."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mmengine.config import Config
from rich.console import Console

from kdpipe.cache.fingerprint import digest_json, digest_tensors
from kdpipe.cache.part_writer import PartWriter
from kdpipe.cache.plan import ImageInfo, raw_bytes
from kdpipe.cache.reader import open_cache
from kdpipe.cache.schema import CacheSpec
from kdpipe.cache.writer import CacheWriter
from kdpipe.pipelines.checkpoints import Checkpoint, class_names
from kdpipe.pipelines.class_matching import match_classes
from kdpipe.pipelines.commits import Commits
from kdpipe.pipelines.console import ProgressBar, bytes_text
from kdpipe.pipelines.credentials import masked
from kdpipe.pipelines.data_report import report_data
from kdpipe.pipelines.datasets import DetectionData, ImageError, read_image
from kdpipe.pipelines.dry_run import check_space, folder_bytes
from kdpipe.pipelines.layouts import test_scale
from kdpipe.pipelines.mirroring import mirror_errors, mirror_table
from kdpipe.pipelines.ranks import Ranks
from kdpipe.pipelines.teacher import Teacher, TeacherError, load_teacher

__all__ = ["CacheOptions", "CachingResult", "cache_teacher", "prepare_teacher"]

_READ_AHEAD = 4
_MIRRORED = 4  # images on which mirrored targets are compared with true ones


@dataclass(frozen=True)
class CacheOptions:
    """What is cached of a teacher, and how.

    Attributes:
        tier: One of `TIERS`.
        dtype: One of `DTYPES`.
        codec: One of `CODECS`.
        proposals: The teacher's best proposals kept per image.
        views: Some of `VIEWS`.
        scale: `(w, h)` of the teacher's view; None takes the test-time scale of its config.
        part_size: Raw bytes per part, the unit of commit and of resuming.
        skip_bad_images: Go on past unreadable images, and record them.
        strict_data: Refuse data of which some would be left out.
    """

    tier: str = "pyramid"
    dtype: str = "int8"
    codec: str = "zstd"
    proposals: int = 512
    views: tuple[str, ...] = ("identity",)
    scale: tuple[int, int] | None = None
    part_size: int = 1 << 30
    skip_bad_images: bool = False
    strict_data: bool = False


@dataclass(frozen=True)
class CachingResult:
    """What a run of `cache_teacher` did.

    Attributes:
        path: The cache.
        images: Images in it.
        new_images: Images that this run added.
        skipped: Unreadable images that it records.
        seconds: Duration of the run, from the first image on.
        disk_bytes: Bytes of all its files.
        raw_bytes: Bytes before compression.
    """

    path: Path
    images: int
    new_images: int
    skipped: int
    seconds: float
    disk_bytes: int
    raw_bytes: int


def cache_teacher(
    checkpoint: Checkpoint,
    cfg: Config,
    data: DetectionData,
    out: Path,
    options: CacheOptions,
    *,
    source: dict[str, Any],
    device: torch.device,
    console: Console,
    ranks: Ranks | None = None,
) -> CachingResult:
    """Run the teacher once over a data set and keep what it says.

    Stopped at any moment, the cache stays valid, and the same call goes on with it.

    Args:
        checkpoint: The teacher's.
        cfg: Its config, as `teacher_config` gives it.
        data: Images and annotations.
        out: Where the cache is or will be.
        options: What is kept.
        source: Where the data came from, recorded for `train-student`.
        device: Where the teacher runs.
        console: Where progress is shown.
        ranks: The processes that share the work; None does it all in this one.

    Returns:
        What the run did; in other processes than the first, what was there when they had no more to do.

    Raises:
        KdpipeError: Bad checkpoint, data or options, an unreadable image, a cache of something else at `out`, or a full
            disk.
    """
    teacher, spec, data = prepare_teacher(checkpoint, cfg, data, options, device)
    report_data(data, console, trained=True, strict=options.strict_data)
    identity = {
        "teacher": {"weights": digest_tensors(teacher.model.state_dict()), "config": _digest_model(cfg)},
        "data": data.digest(),
    }
    metadata = {
        "teacher": {"checkpoint": str(checkpoint.path.resolve()), "config": masked(cfg.pretty_text)},
        "data": source,
    }
    ranks = ranks or Ranks()
    fresh = not out.exists()
    if fresh:
        check_space(teacher, data, data.images, spec, out)
    writer = CacheWriter(out, spec, data.images, options.part_size, identity, metadata)
    pending = ranks.agreed(writer.pending)
    if not fresh:
        check_space(teacher, data, [data.images[i] for index in pending for i in writer.parts[index]], spec, out)
    writer.write_head(teacher.head_state())
    new_images, seconds = _fill(writer, pending, teacher, data, spec, options, console, ranks)
    if new_images and ranks.first and len(spec.views) == 1:
        console.print("Flipped images get mirrored targets (--views identity,hflip caches the true ones, too):")
        console.print(mirror_table(mirror_errors(teacher, data, spec, _MIRRORED), min(_MIRRORED, len(data.images))))
    cache = open_cache(out, allow_partial=not ranks.first)
    return CachingResult(
        path=out,
        images=len(cache),
        new_images=new_images,
        skipped=len(cache.skipped),
        seconds=seconds,
        disk_bytes=folder_bytes(out),
        raw_bytes=sum(raw_bytes(data.images, spec).values()),
    )


def prepare_teacher(
    checkpoint: Checkpoint, cfg: Config, data: DetectionData, options: CacheOptions, device: torch.device
) -> tuple[Teacher, CacheSpec, DetectionData]:
    """The teacher, ready to answer, what a cache of it will hold, and the data with the teacher's classes.

    Raises:
        KdpipeError: Checkpoint, config, classes and options do not fit together.
    """
    scale = options.scale or _test_scale(cfg)
    teacher = load_teacher(checkpoint, cfg, proposals=options.proposals, device=device)
    known = class_names(checkpoint)
    if known is not None:
        data = match_classes(data, known, f"the teacher {checkpoint.path.name}")
    if teacher.num_classes != len(data.class_names):
        raise TeacherError(
            f"The teacher knows {teacher.num_classes} classes and {data.ann_file} has {len(data.class_names)} "
            f"({', '.join(data.class_names[:8])}). Cache it on a data set with the classes that it was trained on."
        )
    spec = teacher.spec(
        tier=options.tier,
        dtype=options.dtype,
        codec=options.codec,
        class_names=data.class_names,
        category_ids=data.category_ids,
        proposals=options.proposals,
        views=options.views,
        scale=scale,
    )
    return teacher, spec, data


def _digest_model(cfg: Config) -> str:
    """Identity of what a config says of the model beyond its weights, such as how it normalises images."""
    model = {name: value for name, value in cfg.model.to_dict().items() if name != "train_cfg"}
    return digest_json(json.dumps(model, sort_keys=True, default=str))


def _test_scale(cfg: Config) -> tuple[int, int]:
    scale, keep_ratio = test_scale(cfg)
    if not keep_ratio:
        raise TeacherError(
            f"The teacher's test pipeline resizes to {scale[0]}x{scale[1]} without keeping the ratio. Give --scale WxH "
            "to cache it with the ratio kept."
        )
    return scale


def _fill(
    writer: CacheWriter,
    pending: Sequence[int],
    teacher: Teacher,
    data: DetectionData,
    spec: CacheSpec,
    options: CacheOptions,
    console: Console,
    ranks: Ranks,
) -> tuple[int, float]:
    """Write this process's share of the parts that are missing; returns images that all added, and seconds."""
    todo = sum(len(writer.parts[index]) for index in pending)
    if todo < len(data.images):
        console.print(f"{len(data.images) - todo} of {len(data.images)} images are cached already")
    start = time.perf_counter()
    with ProgressBar(console, "cache teacher", todo) as progress:

        def show() -> None:
            ranks.check()
            for line in ranks.heard():
                console.print(line)
            seconds = time.perf_counter() - start
            done, written = ranks.count("images"), ranks.count("bytes")
            progress.update(min(done, todo), f"{done / seconds:.1f} images/s {bytes_text(written / seconds)}/s")

        with Commits() as commits:

            def left() -> list[int]:
                commits.wait()
                return writer.pending()

            for index in ranks.share(pending, left, show):
                with ExitStack() as stack:
                    part = stack.enter_context(writer.part(index))
                    for info, image in _read_ahead([data.images[i] for i in writer.parts[index]], data.img_dir):
                        if not isinstance(image, ImageError):
                            _add(part, teacher, data, spec, info, image)
                            ranks.count("bytes", sum(raw_bytes([info], spec).values()))
                        elif options.skip_bad_images:
                            ranks.say(f"skipped: {image}")
                            part.skip(info.image_id, info.file_name, str(image))
                        else:
                            raise image
                        ranks.count("images", 1)
                        show()
                    commits.begin(stack.pop_all())
    return todo, time.perf_counter() - start


def _add(
    part: PartWriter,
    teacher: Teacher,
    data: DetectionData,
    spec: CacheSpec,
    info: ImageInfo,
    image: npt.NDArray[np.uint8],
) -> None:
    """Ask the teacher about an image in all views, and add the answers to a part."""
    truth = data.gt_boxes(info.image_id)
    for view in spec.views:
        part.add(teacher.record(image, truth, spec=spec, image_id=info.image_id, file_name=info.file_name, view=view))


def _read_ahead(
    images: Sequence[ImageInfo], folder: Path
) -> Iterator[tuple[ImageInfo, npt.NDArray[np.uint8] | ImageError]]:
    """Decode images on a thread, a few ahead of the teacher; an unreadable one is given as its error."""

    def read(info: ImageInfo) -> npt.NDArray[np.uint8] | ImageError:
        try:
            return read_image(folder / info.file_name, (info.height, info.width))
        except ImageError as error:
            return error

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdpipe-read") as pool:
        ahead: list[Future[npt.NDArray[np.uint8] | ImageError]] = [pool.submit(read, x) for x in images[:_READ_AHEAD]]
        for i, info in enumerate(images):
            if i + _READ_AHEAD < len(images):
                ahead.append(pool.submit(read, images[i + _READ_AHEAD]))
            yield info, ahead.pop(0).result()
