"""`kdpipe cache-teacher`: one pass of the teacher over a data set, kept on disk."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console

from kdpipe.cache.identity import digest_tensors
from kdpipe.cache.plan import ImageInfo, raw_bytes
from kdpipe.cache.read.reader import open_cache
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.store.location import Location
from kdpipe.cache.write.part_writer import PartWriter
from kdpipe.cache.write.writer import CacheWriter, check_resumable
from kdpipe.pipelines.commands.dry_run import check_space
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.decoding import Decoding
from kdpipe.pipelines.data.find import DataSource
from kdpipe.pipelines.data.images import ImageError, Picture, load_picture
from kdpipe.pipelines.data.picture_checks import usable_images
from kdpipe.pipelines.data.report import report_data
from kdpipe.pipelines.detectors.checkpoints import Checkpoint, class_names
from kdpipe.pipelines.detectors.credentials import masked
from kdpipe.pipelines.runtime.console import ProgressBar, bytes_text
from kdpipe.pipelines.runtime.ranks import Ranks
from kdpipe.pipelines.teacher.commits import Commits
from kdpipe.pipelines.teacher.options import CacheOptions
from kdpipe.pipelines.teacher.setup import digest_model, prepare_teacher, with_classes
from kdpipe.pipelines.teacher.teacher import Teacher

__all__ = ["CachingResult", "cache_teacher"]

_READ_AHEAD = 4


@dataclass(frozen=True)
class CachingResult:
    """What a run of `cache_teacher` did.

    Attributes:
        location: Of the cache.
        images: Images in it.
        new_images: Images that this run added.
        skipped: Unreadable images that it records.
        seconds: Duration of the run, from the first image on.
        disk_bytes: Bytes of its files, the teacher's heads left out.
        raw_bytes: Bytes before compression.
        head_bytes: Bytes of the files of the teacher's heads.
    """

    location: Location
    images: int
    new_images: int
    skipped: int
    seconds: float
    disk_bytes: int
    raw_bytes: int
    head_bytes: int


def cache_teacher(
    checkpoint: Checkpoint,
    cfg: Config,
    source: DataSource,
    out: Location,
    options: CacheOptions,
    *,
    device: torch.device,
    console: Console,
    ranks: Ranks | None = None,
) -> CachingResult:
    """Run the teacher once over a data set and keep what it says.

    Stopped at any moment, the cache stays valid, and the same call goes on with it.

    Args:
        checkpoint: The teacher's.
        cfg: Its config, as `teacher_config` gives it.
        source: Images and annotations, read when all else fits.
        out: Where the cache is or will be.
        options: What is kept.
        device: Where the teacher runs.
        console: Where progress is shown.
        ranks: The processes that share the work; None does it all in this one.

    Returns:
        What the run did; in other processes than the first, what was there when they had no more to do.

    Raises:
        KdpipeError: Bad checkpoint, data or options, an unreadable image, a cache of something else at `out`, or a full
            disk.
    """
    teacher, spec = prepare_teacher(checkpoint, cfg, options, device)
    identity: dict[str, Any] = {
        "teacher": {
            "weights": digest_tensors(teacher.model.state_dict()),
            "config": digest_model(cfg),
            **teacher.pixels.identity(),
        }
    }
    check_resumable(out, spec, identity, options.part_size)
    spec, data = with_classes(spec, source.load(), class_names(checkpoint), f"the teacher {checkpoint.path.name}")
    report_data(data, console, trained=True, strict=options.strict_data)
    if options.strict_data or not options.skip_bad_images:  # otherwise bad images are found, and recorded, when read
        usable_images(data, console, scale=spec.scale, decoding=teacher.pixels.decoding)
    identity["data"] = data.digest()
    metadata = {
        "teacher": {"checkpoint": str(checkpoint.path.resolve()), "config": masked(cfg.pretty_text)},
        "data": source.record(),
    }
    ranks = ranks or Ranks()
    with out.explained("Reading the cache"):
        fresh = out.is_absent()
    if fresh:
        check_space(teacher, data, data.images, spec, out)
    writer = CacheWriter(out, spec, data.images, options.part_size, identity, metadata)
    pending = ranks.agreed(writer.pending)
    if not fresh:
        check_space(teacher, data, [data.images[i] for index in pending for i in writer.parts[index]], spec, out)
    writer.write_head(teacher.head_state())
    new_images, seconds = _fill(writer, pending, teacher, data, spec, options, console, ranks)
    cache = open_cache(out, allow_partial=not ranks.first)
    with out.explained("Reading the cache"):
        head_bytes, all_bytes = out.size("head"), out.size("")
    return CachingResult(
        location=out,
        images=len(cache),
        new_images=new_images,
        skipped=len(cache.skipped),
        seconds=seconds,
        disk_bytes=all_bytes - head_bytes,
        raw_bytes=sum(raw_bytes(data.images, spec).values()),
        head_bytes=head_bytes,
    )


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
                    images = [data.images[i] for i in writer.parts[index]]
                    for info, image in _read_ahead(images, data.img_dir, spec.scale, teacher.pixels.decoding):
                        if not isinstance(image, ImageError):
                            if image.note and options.skip_bad_images:
                                ranks.say(f"Warning: used as decoded: {image.note}")
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
    image: Picture,
) -> None:
    """Ask the teacher about an image in all views, and add the answers to a part."""
    truth = data.gt_boxes(info.image_id), data.gt_labels(info.image_id)
    ask = partial(teacher.record, image.pixels, *truth, spec=spec)
    for view in spec.views:
        part.add(ask(image_id=info.image_id, file_name=info.file_name, view=view, file_digest=image.digest))


def _read_ahead(
    images: Sequence[ImageInfo], folder: Path, scale: tuple[int, int], decoding: Decoding
) -> Iterator[tuple[ImageInfo, Picture | ImageError]]:
    """Decode images on a thread, a few ahead of the teacher; an unreadable one is given as its error."""

    def read(info: ImageInfo) -> Picture | ImageError:
        try:
            return load_picture(folder / info.file_name, (info.height, info.width), scale, decoding)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdpipe-read") as pool:
        ahead: list[Future[Picture | ImageError]] = [pool.submit(read, x) for x in images[:_READ_AHEAD]]
        for i, info in enumerate(images):
            if i + _READ_AHEAD < len(images):
                ahead.append(pool.submit(read, images[i + _READ_AHEAD]))
            yield info, ahead.pop(0).result()
