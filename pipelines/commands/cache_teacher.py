"""`kdpipe cache-teacher`: one pass of the teacher over a data set, kept on disk."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console

from kdpipe.cache.identity import digest_tensors
from kdpipe.cache.plan import raw_bytes
from kdpipe.cache.read.reader import open_cache
from kdpipe.cache.store.location import Location
from kdpipe.cache.write.writer import CacheWriter, check_resumable
from kdpipe.pipelines.commands.dry_run import check_space
from kdpipe.pipelines.data.find import DataSource
from kdpipe.pipelines.data.picture_checks import usable_images
from kdpipe.pipelines.data.report import report_data
from kdpipe.pipelines.detectors.checkpoints import Checkpoint, class_names
from kdpipe.pipelines.detectors.credentials import masked
from kdpipe.pipelines.detectors.mmdet2 import for_record
from kdpipe.pipelines.runtime.console import ProgressBar, bytes_text
from kdpipe.pipelines.runtime.launch import Rank
from kdpipe.pipelines.teacher.class_order import with_right_classes
from kdpipe.pipelines.teacher.commit_thread import CommitThread
from kdpipe.pipelines.teacher.missing import MissingParts
from kdpipe.pipelines.teacher.options import CacheOptions
from kdpipe.pipelines.teacher.parts import PartMaker
from kdpipe.pipelines.teacher.setup import digest_model, prepare_teacher

__all__ = ["CachingResult", "cache_teacher", "prepare_parts"]


@dataclass(frozen=True)
class CachingResult:
    """What a run of `cache_teacher` did.

    Attributes:
        location: Of the cache.
        images: Images in it.
        new_images: Images that this run added.
        skipped: Unreadable images that it records.
        missing_parts: Parts that other shards still have to make.
        parts: Parts of the whole cache.
        seconds: Duration of the run, from the first image on.
        disk_bytes: Bytes of its files, the teacher's heads left out.
        raw_bytes: Bytes before compression.
        head_bytes: Bytes of the files of the teacher's heads.
    """

    location: Location
    images: int
    new_images: int
    skipped: int
    missing_parts: int
    parts: int
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
    config: str | None = None,
    shard: Rank | None = None,
    deal: Callable[[PartMaker], int] | None = None,
) -> CachingResult:
    """Run the teacher once over a data set and keep what it says.

    Stopped at any moment, the cache stays valid, and the same call goes on with it. Any number of processes may do so
    at once; none waits for another.

    Args:
        checkpoint: The teacher's.
        cfg: Its config, as `teacher_config` gives it.
        source: Images and annotations, read when all else fits.
        out: Where the cache is or will be.
        options: What is kept.
        device: Where the teacher runs.
        console: Where progress is shown.
        config: Name or path that `cfg` was found by, for the record; None where the checkpoint carries it.
        shard: Part `i` is made where `i % shard.count == shard.index`; None makes all.
        deal: Lets the missing parts be made elsewhere, and returns how many images they have; None makes them here.

    Raises:
        KdpipeError: Bad checkpoint, data or options, an unreadable image, a cache of something else at `out`, or a full
            disk.
    """
    maker = prepare_parts(checkpoint, cfg, source, out, options, device=device, console=console, config=config)
    start = time.perf_counter()
    with MissingParts(maker.writer, maker.missing) as missing:
        new_images = _fill(maker, missing, shard or Rank(), console) if deal is None else deal(maker)
        return _result(maker, missing, new_images, time.perf_counter() - start)


def prepare_parts(
    checkpoint: Checkpoint,
    cfg: Config,
    source: DataSource,
    out: Location,
    options: CacheOptions,
    *,
    device: torch.device,
    console: Console,
    config: str | None,
    is_prepared: bool = False,
) -> PartMaker:
    """Load and check all that a part is made from; root and head of the cache are there afterwards.

    Args:
        checkpoint: The teacher's.
        cfg: Its config, as `teacher_config` gives it.
        source: Images and annotations, read when all else fits.
        out: Where the cache is or will be.
        options: What is kept.
        device: Where the teacher runs.
        console: Told what of the data is left out.
        config: The name or file that `cfg` came from, to be recorded; None where that is the checkpoint.
        is_prepared: Another process has done this: images, missing parts and free disk are not looked at again.
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
    names, whose = class_names(checkpoint), f"the teacher {checkpoint.path.name}"
    spec, data = with_right_classes(
        teacher, spec, source.load(), names, whose, partial(console.print, markup=False, highlight=False)
    )
    report_data(data, console, trained=True, strict=options.strict_data)
    if not is_prepared and (options.strict_data or not options.skip_bad_images):  # else they are found when read
        usable_images(data, console, scale=spec.scale, decoding=teacher.pixels.decoding)
    identity["data"] = data.digest()
    metadata = {
        "teacher": {"checkpoint": str(checkpoint.path.resolve()), "config": masked(for_record(cfg).pretty_text)},
        "data": source.record(),
        "options": {"config": config, "skip_bad_images": options.skip_bad_images},
    }
    with out.explained("Reading the cache"):
        fresh = out.is_absent()
    if fresh:
        check_space(teacher, data, data.images, spec, out)
    writer = CacheWriter(out, spec, data.images, options.part_size, identity, metadata)
    missing: Sequence[int] = range(len(writer.parts))
    if not fresh:
        missing = () if is_prepared else writer.pending()
        check_space(teacher, data, [data.images[i] for index in missing for i in writer.parts[index]], spec, out)
    writer.write_head(teacher.head_state())
    return PartMaker(teacher, data, writer, missing, options.skip_bad_images)


def _result(maker: PartMaker, missing: MissingParts, new_images: int, seconds: float) -> CachingResult:
    """What is there now."""
    out, left = maker.writer.location, missing.look()
    cache = open_cache(out, allow_partial=bool(left))
    with out.explained("Reading the cache"):
        head_bytes, all_bytes = out.size("head"), out.size("")
    return CachingResult(
        location=out,
        images=len(cache),
        new_images=new_images,
        skipped=len(cache.skipped),
        missing_parts=len(left),
        parts=len(maker.writer.parts),
        seconds=seconds,
        disk_bytes=all_bytes - head_bytes,
        raw_bytes=sum(raw_bytes(maker.data.images, maker.writer.spec).values()),
        head_bytes=head_bytes,
    )


def _fill(maker: PartMaker, missing: MissingParts, shard: Rank, console: Console) -> int:
    """Make the parts of a shard that are missing; returns how many images they have."""
    writer, images = maker.writer, len(maker.data.images)
    shard_parts = [index for index in missing.parts if index % shard.count == shard.index]
    if missing.images < images:
        console.print(f"{images - missing.images} of {images} images are cached already")
    new_images = done = written = 0
    start = time.perf_counter()
    bar = ProgressBar(console, "cache teacher", sum(len(writer.parts[index]) for index in shard_parts))
    with bar as progress, CommitThread() as commits, maker.reader() as reader:

        def show(new: int, size: int) -> None:
            nonlocal done, written, new_images
            done, written = done + new, written + size
            new_images += new if size else 0  # what was skipped, or made by somebody else, has none
            seconds = time.perf_counter() - start
            whole = "" if shard.count == 1 else f", all shards {images - missing.images}/{images}"
            progress.update(done, f"{done / seconds:.1f} images/s {bytes_text(written / seconds)}/s{whole}")

        for index, following in zip_longest(shard_parts, shard_parts[1:]):
            if writer.pending([index]):  # nobody else has made it meanwhile
                commits.begin(maker.fill(index, reader, console.print, show, following))
            else:
                show(len(writer.parts[index]), 0)
    return new_images
