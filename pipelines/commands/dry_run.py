"""What caching a teacher will cost in bytes and time, measured on a few images before anything is written."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta

from rich.console import Console
from rich.table import Table

from kdpipe.cache.errors import CacheError
from kdpipe.cache.plan import ImageInfo, raw_bytes
from kdpipe.cache.records import TeacherRecord
from kdpipe.cache.spec import DTYPES, TIERS, CacheSpec
from kdpipe.cache.store.location import Location
from kdpipe.cache.write.encode import encode_record
from kdpipe.cache.write.estimate import as_stored, disk_bytes, padding
from kdpipe.cache.write.head import head_bytes
from kdpipe.pipelines.data.coco_entries import DataError
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.images import ImageError, load_picture
from kdpipe.pipelines.runtime.console import bytes_text
from kdpipe.pipelines.teacher.options import tier_defaults
from kdpipe.pipelines.teacher.teacher import Teacher

__all__ = ["Estimate", "check_space", "estimate", "print_estimate"]

_SAMPLES = 8
_SMALL = ("objects", tier_defaults("objects").dtype)  # what those whose disk is full are told of
_NONE = "—"


@dataclass(frozen=True)
class Estimate:
    """What a cache will cost.

    Attributes:
        raw: Bytes of each field before compression; those of boxes and what belongs to them are the most that can be.
        disk: Bytes of each field on disk, estimated from the sampled images.
        head: Bytes on disk of the weights of the teacher's heads, once per cache.
        choices: The same as `disk`, all fields together, of each other tier and storage type.
        images_per_second: Measured on the sampled images, all views of an image together.
        samples: How many images were sampled.
    """

    raw: dict[str, int]
    disk: dict[str, int]
    head: int
    choices: dict[tuple[str, str], int]
    images_per_second: float
    samples: int

    @property
    def needed(self) -> int:
        """Bytes on disk of all."""
        return sum(self.disk.values()) + self.head


def estimate(teacher: Teacher, data: DetectionData, images: Sequence[ImageInfo], spec: CacheSpec) -> Estimate:
    """Ask the teacher about a few images, and work out what all of them will cost.

    Args:
        teacher: That will be cached.
        data: The data set.
        images: Those of its images that are to be cached; the sampled ones have from few to many objects.
        spec: Of the cache.

    Raises:
        DataError: None of the sampled images can be read.
    """
    records: list[TeacherRecord] = []
    seconds = 0.0
    choices = [_as_choice(spec, tier, dtype) for tier in TIERS for dtype in DTYPES]
    before = teacher.keep_proposals(max(choice.proposals for choice in choices))
    full_spec = replace(spec, jittered=max(choice.jittered for choice in choices))
    for info in _sampled(images):
        try:
            size = (info.height, info.width)
            image = load_picture(data.img_dir / info.file_name, size, spec.scale, teacher.pixels.decoding).pixels
        except ImageError:
            continue  # the run itself will stop there, or skip it
        truth = data.gt_boxes(info.image_id), data.gt_labels(info.image_id)
        start = time.perf_counter()
        for view in spec.views:
            record = teacher.record(
                image, *truth, spec=full_spec, image_id=info.image_id, file_name=info.file_name, view=view
            )
            encode_record(as_stored(record, spec), spec)  # waits for the device
        seconds += time.perf_counter() - start
        records.append(record)
    teacher.keep_proposals(before)
    if not records:
        raise DataError(f"None of {_SAMPLES} sampled images of {data.img_dir} can be read.")
    disk: dict[tuple[str, str], dict[str, int]] = {}
    for choice in choices:  # the cache's own, which has encoded all records above, among them
        with suppress(CacheError):  # it cannot hold what the teacher says, such as numbers beyond float16
            disk[choice.tier, choice.dtype] = disk_bytes(records, images, choice)
    raw = raw_bytes(images, spec)
    if "features" in raw:
        raw["features"] = round(raw["features"] * padding(records, spec))
    return Estimate(
        raw=raw,
        disk=disk[spec.tier, spec.dtype],
        head=head_bytes(teacher.head_state(), spec.codec),
        choices={choice: sum(sizes.values()) for choice, sizes in disk.items()},
        images_per_second=len(records) / seconds,
        samples=len(records),
    )


def _sampled(images: Sequence[ImageInfo]) -> list[ImageInfo]:
    """A few images, spread evenly over all in the order of their numbers of objects."""
    ordered = sorted(images, key=lambda image: image.num_gt)
    count = min(_SAMPLES, len(ordered))
    return [ordered[(2 * number + 1) * len(ordered) // (2 * count)] for number in range(count)]


def _as_choice(spec: CacheSpec, tier: str, dtype: str) -> CacheSpec:
    """What a cache of another tier or type would hold."""
    if tier == spec.tier:
        return replace(spec, dtype=dtype)
    before, after = tier_defaults(spec.tier), tier_defaults(tier)
    return replace(
        spec,
        tier=tier,
        dtype=dtype,
        levels=(),
        proposals=after.proposals if spec.proposals == before.proposals else spec.proposals,
        jittered=after.jittered,
        views=after.views if spec.views == before.views else spec.views,
    )


def check_space(
    teacher: Teacher, data: DetectionData, images: Sequence[ImageInfo], spec: CacheSpec, out: Location
) -> None:
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
    free = out.free_bytes()
    if not images or free is None:
        return
    head = sum(value.numel() * 4 for value in teacher.head_state().values())
    if sum(raw_bytes(images, spec).values()) + head <= free and not teacher.pixels.pads_to_a_size:
        return
    costs = estimate(teacher, data, images, spec)
    if costs.needed > free:
        raise DataError(
            f"The cache will not fit: {len(images)} images need about {bytes_text(costs.needed)} (estimated from "
            f"{costs.samples} of them), and {bytes_text(free)} are free at {out}. Nothing was changed. Free space, "
            f"choose another --out, or cache less:{_cheaper(costs, free)}"
        )


def _cheaper(costs: Estimate, free: int) -> str:
    """Which choices fit, the one that holds most first; `objects` is named whether it fits or not."""
    sizes = {
        choice: size + costs.head
        for choice, size in costs.choices.items()
        if choice[0] in ("objects", "pyramid") or choice[1] != "int4"  # elsewhere as int8
    }
    fitting = sorted((choice for choice, size in sizes.items() if size <= free), key=lambda choice: -sizes[choice])
    lines = [f"\n  --targets {tier} --dtype {dtype}: {bytes_text(sizes[tier, dtype])}" for tier, dtype in fitting]
    if _SMALL in sizes and _SMALL not in fitting:
        lines += [f"\n  (--targets objects needs {bytes_text(sizes[_SMALL])})"]
    if not fitting:
        lines = [" --limit N, or a smaller --scale (no tier and type of storage fits).", *lines]
    return "".join(lines)


def _choice_text(costs: Estimate, choice: tuple[str, str]) -> str:
    return bytes_text(costs.choices[choice]) if choice in costs.choices else _NONE


def print_estimate(console: Console, costs: Estimate, spec: CacheSpec, images: int, out: Location) -> None:
    """Show bytes per field, the cost of other choices, the free disk and the time.

    Args:
        console: Where it is shown.
        costs: As `estimate` gives them.
        spec: What is cached.
        images: How many.
        out: Where the cache is or will be.
    """
    table = Table(title=f"{images} images, {spec.tier}, {spec.dtype}, {spec.codec}, views {', '.join(spec.views)}")
    for column in ("field", "raw", "on disk"):
        table.add_column(column, justify="left" if column == "field" else "right")
    for field, size in costs.raw.items():
        table.add_row(field, bytes_text(size), bytes_text(costs.disk[field]))
    table.add_section()
    table.add_row("targets", bytes_text(sum(costs.raw.values())), bytes_text(sum(costs.disk.values())))
    table.add_row("head's weights, once", "", bytes_text(costs.head))
    console.print(table)
    others = Table("--targets", *(f"--dtype {dtype}" for dtype in DTYPES), title=f"on disk, by choice ({spec.codec})")
    for tier in TIERS:
        others.add_row(tier, *(_choice_text(costs, (tier, dtype)) for dtype in DTYPES))
    console.print(others)
    if len(costs.choices) < len(TIERS) * len(DTYPES):
        console.print(f"{_NONE}: the teacher gives numbers there that float16 cannot hold.")
    free = out.free_bytes()
    seconds = timedelta(seconds=round(images / costs.images_per_second))
    console.print(
        f"On disk is an estimate from {costs.samples} images. Raw bytes of features are those of all images, padded "
        f"as these; boxes and what belongs to them are counted with all {spec.proposals} proposals.\n"
        f"--targets objects: {_choice_text(costs, _SMALL)}, for --rois teacher alone; "
        f"views {', '.join(_as_choice(spec, *_SMALL).views)}.\n"
        f"Time: about {seconds} at {costs.images_per_second:.2f} images/s."
    )
    if free is not None:
        fits = "It fits." if costs.needed <= free else f"It does not fit:{_cheaper(costs, free)}"
        console.print(f"Free at {out}: {bytes_text(free)}. {fits}")
