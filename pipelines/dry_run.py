"""What caching a teacher will cost in bytes and time, measured on a few images before anything is written."""

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kdpipe.cache.plan import ImageInfo, raw_bytes
from kdpipe.cache.records import TeacherRecord
from kdpipe.cache.spec import DTYPES, TIERS, CacheSpec
from kdpipe.cache.write.encode import encode_record
from kdpipe.cache.write.estimate import compression, disk_bytes
from kdpipe.pipelines.console import bytes_text
from kdpipe.pipelines.datasets import DataError, DetectionData, ImageError
from kdpipe.pipelines.images import load_picture
from kdpipe.pipelines.teacher import Teacher

__all__ = ["Estimate", "check_space", "estimate", "folder_bytes", "free_bytes", "print_estimate"]

_SAMPLES = 4


@dataclass(frozen=True)
class Estimate:
    """What a cache will cost.

    Attributes:
        raw: Bytes of each field before compression; those of boxes and what belongs to them are the most that can be.
        disk: Bytes of each field on disk, estimated from the sampled images.
        choices: The same as `disk`, all fields together, of each other tier and storage type.
        images_per_second: Measured on the sampled images, all views of an image together.
        samples: How many images were sampled.
    """

    raw: dict[str, int]
    disk: dict[str, int]
    choices: dict[tuple[str, str], int]
    images_per_second: float
    samples: int


def estimate(teacher: Teacher, data: DetectionData, images: Sequence[ImageInfo], spec: CacheSpec) -> Estimate:
    """Ask the teacher about a few images, and work out what all of them will cost.

    Args:
        teacher: That will be cached.
        data: The data set.
        images: Those of its images that are to be cached; the sampled ones are spread evenly over them.
        spec: Of the cache.

    Raises:
        DataError: None of the sampled images can be read.
    """
    step = max(1, len(images) // _SAMPLES)
    pyramids: list[TeacherRecord] = []
    regions: list[TeacherRecord] = []
    seconds = 0.0
    for info in images[step // 2 :: step][:_SAMPLES]:
        try:
            size = (info.height, info.width)
            image = load_picture(data.img_dir / info.file_name, size, spec.scale, teacher.pixels.decoding).pixels
        except ImageError:
            continue  # the run itself will stop there, or skip it
        ask = partial(
            teacher.record, image, data.gt_boxes(info.image_id), image_id=info.image_id, file_name=info.file_name
        )
        regions.append(ask(spec=replace(spec, tier="roi"), view=spec.views[0]))
        pyramids.append(ask(spec=replace(spec, tier="pyramid"), view=spec.views[0]))
        start = time.perf_counter()
        for view in spec.views:
            encode_record(ask(spec=spec, view=view), spec)  # waits for the device
        seconds += time.perf_counter() - start
    if not pyramids:
        raise DataError(f"None of {_SAMPLES} sampled images of {data.img_dir} can be read.")
    choices: dict[tuple[str, str], dict[str, int]] = {}
    for dtype in DTYPES:
        other = replace(spec, dtype=dtype)
        ratios = compression(regions, replace(other, tier="roi")) | compression(
            pyramids, replace(other, tier="pyramid")
        )
        for tier in TIERS:
            choices[tier, dtype] = disk_bytes(images, replace(other, tier=tier), ratios)
    return Estimate(
        raw=raw_bytes(images, spec),
        disk=choices[spec.tier, spec.dtype],
        choices={choice: sum(sizes.values()) for choice, sizes in choices.items()},
        images_per_second=len(pyramids) / seconds,
        samples=len(pyramids),
    )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, in which other processes may be at work."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(parent) / name).stat().st_size
    return total


def free_bytes(path: Path) -> int:
    """Bytes that are free on the disk where a path is, or will be."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_space(teacher: Teacher, data: DetectionData, images: Sequence[ImageInfo], spec: CacheSpec, out: Path) -> None:
    """Refuse to begin what cannot fit on the disk. Images are sampled only where the raw bytes would not fit.

    Args:
        teacher: That will be cached.
        data: The data set.
        images: Those of its images that are not cached yet.
        spec: Of the cache.
        out: Where the cache is or will be.

    Raises:
        DataError: It does not fit.
    """
    free = free_bytes(out)
    if sum(raw_bytes(images, spec).values()) <= free:
        return
    found = estimate(teacher, data, images, spec)
    needed = sum(found.disk.values())
    if needed > free:
        raise DataError(
            f"The cache will not fit: {len(images)} images need about {bytes_text(needed)} (estimated from "
            f"{found.samples} of them), and {bytes_text(free)} are free at {out}. Nothing was changed. Free space, "
            f"choose another --out, or cache less:{_cheaper(found, free)}"
        )


def _cheaper(found: Estimate, free: int) -> str:
    fitting = [choice for choice, size in found.choices.items() if size <= free]
    if not fitting:
        return " --limit N, or a smaller --scale (no tier and type of storage fits)."
    lines = [
        f"\n  --targets {tier} --dtype {dtype}: {bytes_text(found.choices[tier, dtype])}" for tier, dtype in fitting
    ]
    return "".join(lines)


def print_estimate(console: Console, found: Estimate, spec: CacheSpec, images: int, out: Path) -> None:
    """Show bytes per field, the cost of other choices, the free disk and the time."""
    table = Table(title=f"{images} images, {spec.tier}, {spec.dtype}, {spec.codec}, views {', '.join(spec.views)}")
    for column in ("field", "raw", "on disk"):
        table.add_column(column, justify="left" if column == "field" else "right")
    for field, size in found.raw.items():
        table.add_row(field, bytes_text(size), bytes_text(found.disk[field]))
    needed = sum(found.disk.values())
    table.add_section()
    table.add_row("all", bytes_text(sum(found.raw.values())), bytes_text(needed))
    console.print(table)
    others = Table("--targets", *(f"--dtype {dtype}" for dtype in DTYPES), title=f"on disk, by choice ({spec.codec})")
    for tier in TIERS:
        others.add_row(tier, *(bytes_text(found.choices[tier, dtype]) for dtype in DTYPES))
    console.print(others)
    free = free_bytes(out)
    seconds = timedelta(seconds=round(images / found.images_per_second))
    console.print(
        f"On disk is an estimate from {found.samples} images. Raw bytes of features are exact; boxes and what belongs "
        f"to them are counted with all {spec.proposals} proposals.\n"
        f"Time: about {seconds} at {found.images_per_second:.2f} images/s.\n"
        f"Free at {out}: {bytes_text(free)}. "
        + ("It fits." if needed <= free else f"It does not fit:{_cheaper(found, free)}")
    )
