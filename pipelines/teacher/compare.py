"""Compares a cache with what its teacher says today."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kdpipe.cache.errors import CacheError, present
from kdpipe.cache.identity import difference, digest_tensors
from kdpipe.cache.read.choice import evenly_chosen
from kdpipe.cache.read.reader import TeacherCache
from kdpipe.cache.records import TeacherRecord, TeacherTargets
from kdpipe.cache.spec import CacheSpec
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.images import read_image
from kdpipe.pipelines.data.provenance import recorded_config, recorded_entry
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.runtime.console import ProgressBar
from kdpipe.pipelines.teacher.teacher import Teacher, load_teacher

__all__ = ["FieldError", "compare_with_teacher", "errors_table", "load_recorded_teacher", "unexplained"]

# Mean error relative to the mean magnitude, beyond rounding: what other kernels and TensorFloat-32 change between the
# machine of the cache and this one. Of proposals the last few may also be others.
_MACHINES, _PROPOSALS = 0.01, 0.05


@dataclass
class FieldError:
    """How far what is cached of a field is from what the teacher says, absolute.

    Attributes:
        largest: Of all values.
        total: Of all errors.
        magnitude: Sum of the magnitudes of what the teacher says.
        count: Of values.
        rounding: Sum of the most that rounding to the storage type changes a value.
    """

    largest: float = 0.0
    total: float = 0.0
    magnitude: float = 0.0
    count: int = 0
    rounding: float = 0.0

    def add(self, cached: Tensor, live: Tensor, dtype: str, scale: Tensor | None = None) -> None:
        """Take in values of one image.

        Args:
            cached: As floats.
            live: Of the same shape.
            dtype: What the cached ones are stored as.
            scale: Of int8, of a shape that fits `cached`.
        """
        if cached.numel() == 0:
            return
        live = live.detach().cpu().float()
        error = (cached.float() - live).abs()
        self.largest = max(self.largest, float(error.max()))
        self.total += float(error.sum(dtype=torch.float64))
        self.magnitude += float(live.abs().sum(dtype=torch.float64))
        self.count += cached.numel()
        half = live.abs() * torch.finfo(getattr(torch, dtype)).eps / 2 if scale is None else scale.expand_as(live) / 2
        self.rounding += float(half.sum(dtype=torch.float64))

    @property
    def mean(self) -> float:
        """Mean error."""
        return self.total / max(1, self.count)

    @property
    def relative(self) -> float:
        """Mean error relative to the mean magnitude."""
        return self.total / self.magnitude if self.magnitude else 0.0


def load_recorded_teacher(
    cache: TeacherCache, ckpt: Path, *, config: str | None, device: torch.device, trust: bool
) -> Teacher:
    """The teacher that a cache was made of, from its checkpoint.

    Args:
        cache: The cache.
        ckpt: The checkpoint.
        config: Its config; None takes the one that the cache records.
        device: Where it runs.
        trust: Unpickle the checkpoint even where it holds more than weights.

    Raises:
        CacheError: it is another teacher; both digests are named.
        KdpipeError: it cannot be loaded.
    """
    cfg = recorded_config(cache, config, trust=trust)
    teacher = load_teacher(load_checkpoint(ckpt, trust=trust), cfg, proposals=cache.spec.proposals, device=device)
    digest, recorded_digest = (
        digest_tensors(teacher.model.state_dict()),
        recorded_entry(cache.identity, "teacher", "weights"),
    )
    if digest != recorded_digest:
        raise CacheError(
            f"{ckpt} is not the teacher that {cache.location} was made of: its weights have the digest {digest}, those "
            f"of the cache's teacher {recorded_digest}. Name the checkpoint that was cached: --ckpt."
        )
    recorded_pixels = {"pixels": recorded_entry(cache.identity, "teacher", "pixels") or {}}
    if lines := difference(recorded_pixels, {"pixels": {}, **teacher.pixels.identity()}):
        raise CacheError(
            f"The teacher's test pipeline is not the one that {cache.location} was made with:\n  "
            + "\n  ".join(lines)
            + "\n"
            "Name the config that was cached (--config), or cache the teacher again."
        )
    return teacher


def compare_with_teacher(
    cache: TeacherCache, teacher: Teacher, data: DetectionData, sample: int, console: Console
) -> dict[str, FieldError]:
    """Run the teacher on some images of a cache, evenly chosen, in all views.

    Proposals are compared with the nearest that the teacher gives now, since equal scores may come in any order; the
    other fields are compared at the cached boxes.

    Args:
        cache: The cache.
        teacher: Its teacher.
        data: What it was made of.
        sample: How many images.
        console: Where progress is shown.

    Returns:
        Field -> errors.

    Raises:
        KdpipeError: an image cannot be read, or the cache is damaged.
    """
    errors = {field: FieldError() for field in cache.spec.fields}
    image_ids = evenly_chosen(cache, sample)
    start = time.perf_counter()
    with ProgressBar(console, "live teacher", len(image_ids)) as progress:
        for done, image_id in enumerate(image_ids, 1):
            for view in cache.spec.views:
                cached = cache.targets(image_id, view)
                image = read_image(data.img_dir / cached.file_name, cached.original_size, teacher.pixels.decoding)
                live = teacher.record(
                    image,
                    cached.boxes.numpy(),
                    spec=replace(cache.spec, jittered=0),
                    image_id=image_id,
                    file_name=cached.file_name,
                    view=view,
                )
                _compare(cached, live, cache.spec, errors)
            progress.update(done, f"{done / (time.perf_counter() - start):.1f} images/s")
    return errors


def _compare(cached: TeacherTargets, live: TeacherRecord, spec: CacheSpec, errors: Mapping[str, FieldError]) -> None:
    """Take in one image; the rows of `live` behind its proposals are those of the cached boxes."""
    proposals, count = live.boxes[: live.num_proposals].cpu(), cached.num_proposals
    if count and len(proposals):
        distance = (cached.boxes[:count, None] - proposals[None]).abs().amax(-1)  # [cached, live]
        errors["boxes"].add(cached.boxes[:count], proposals[distance.argmin(1)], "float32")
    for field in ("logits", "deltas", "embeddings", "roi_features"):
        live_values = getattr(live, field)
        if field not in errors or live_values is None:
            continue
        scale: Tensor | None = None
        live_values = live_values[live.num_proposals :].cpu()
        if field == "embeddings":
            values, scale = cached.float_embeddings(), _beside(cached.embedding_scale, 1)
        elif field == "roi_features":
            rows = present(cached.roi_rows, "the rows of the RoI features").long()
            values, live_values, scale = cached.float_roi_features(), live_values[rows], _beside(cached.roi_scale, 2)
        else:
            values = getattr(cached, field)
            if field == "deltas":
                is_kept = _kept_deltas(cached, spec)
                values, live_values = values[is_kept], live_values[is_kept]
        errors[field].add(values, live_values, spec.field_dtype(field), scale)
    if "features" in errors:
        for number, (stored, level) in enumerate(zip(cached.pyramid(), live.features or (), strict=True)):
            if stored is not None:
                scale = None if cached.scale is None else cached.scale[number]
                errors["features"].add(stored, level, spec.dtype, _beside(scale, 2))


def _kept_deltas(cached: TeacherTargets, spec: CacheSpec) -> Tensor:
    """Which deltas are those of their class, Tensor[R, K or 1] bool, and not the mean of those of unlikely ones."""
    deltas, logits = present(cached.deltas, "the deltas"), present(cached.logits, "the logits")
    if spec.class_agnostic or not spec.is_quantized:
        return torch.ones(deltas.shape[:2], dtype=torch.bool)
    return logits.float().softmax(dim=1)[:, :-1] >= spec.delta_floor


def _beside(scale: Tensor | None, dims: int) -> Tensor | None:
    """A scale, of a shape that fits values with so many more dimensions."""
    return None if scale is None else scale.float().reshape(*scale.shape, *[1] * dims)


def unexplained(errors: Mapping[str, FieldError]) -> list[str]:
    """Lines on the fields whose errors neither rounding to the storage type nor another machine explains."""
    lines = []
    for field, error in errors.items():
        rounding = error.rounding / error.magnitude if error.magnitude else 0.0
        limit = rounding + (_PROPOSALS if field == "boxes" else _MACHINES)
        if error.relative > limit:
            lines.append(
                f"{field} of the cache are not what the teacher says: their mean error is {100 * error.relative:.3g} % "
                f"of the mean magnitude, expected at most {100 * limit:.3g} % (rounding, and other machines)."
            )
    return lines


def errors_table(errors: Mapping[str, FieldError]) -> Table:
    """The errors of each field."""
    table = Table("field", "largest error", "mean error", "mean error / mean magnitude")
    for field, error in errors.items():
        table.add_row(field, f"{error.largest:.3g}", f"{error.mean:.3g}", f"{100 * error.relative:.3g} %")
    return table
