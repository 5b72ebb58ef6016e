"""What a cache knows at a sample of its boxes of one image: which view, which boxes, and what is read of them."""

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdpipe.cache.errors import present
from kdpipe.cache.read.reader import TeacherCache
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.views import is_flipped, map_boxes, mirror_deltas, relative_matrix, visible_boxes
from kdpipe.distill.rois.align import assign_levels
from kdpipe.distill.rois.sampling import RoiSampling, sample_rois
from kdpipe.distill.teacher.maps import StoredMaps
from kdpipe.distill.teacher.targets import RoiTargets, no_rois


def cached_view(spec: CacheSpec, matrix: npt.NDArray[np.float64]) -> tuple[str, bool]:
    """Which of the cached views is nearest to what the student sees, and whether it has to be mirrored.

    Raises:
        ViewError: The student's view is rotated, sheared or upside down.
    """
    flipped = is_flipped(matrix)
    view = "hflip" if flipped and "hflip" in spec.views else spec.views[0]
    return view, flipped != (view == "hflip")


def read_roi_targets(
    cache: TeacherCache,
    image_id: int,
    matrix: npt.NDArray[np.float64],
    size: tuple[int, int],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    *,
    needs: Collection[str],
    sampling: RoiSampling | None,
    missing_view: str,
    generator: torch.Generator,
    map_levels: Collection[int] = (),
) -> RoiTargets:
    """Sample cached boxes of one image and read what the losses need, and nothing else.

    Where the losses look at RoI features that the cache holds of a few boxes, positives are drawn from these.

    Args:
        cache: The teacher's cache.
        image_id: COCO image id.
        matrix: `[3, 3]` original pixels -> the student's network input.
        size: `(h, w)` of the student's network input without padding.
        gt_boxes: Tensor[G, 4] (x1, y1, x2, y2), pixels of the student's network input.
        gt_labels: Tensor[G] int64.
        needs: Some of `logits`, `deltas`, `embeddings`, `roi_features`, `features`.
        sampling: Of the RoIs; None for no RoIs.
        missing_view: `mirror` or `skip`: what becomes of a flipped image whose flipped view is not cached.
        generator: Source of randomness.
        map_levels: Levels of the pyramid whose feature maps losses compare.

    Raises:
        CacheError: The image is not in the cache, or its data is damaged.
        ViewError: The student's view is rotated, sheared or upside down.
    """
    spec = cache.spec
    view, mirrored = cached_view(spec, matrix)
    if mirrored and missing_view == "skip":
        return no_rois(spec, needs, "skipped")
    if sampling is None:
        maps = read_maps(cache, image_id, view, matrix, map_levels)
        return no_rois(spec, needs, "mirrored" if mirrored else "exact", maps)

    fields = ["boxes", *(name for name in ("logits", "deltas", "embeddings") if name in needs)]
    if "roi_features" in needs and "roi_features" in spec.fields:
        fields.append("roi_features")
    cached = cache.targets(image_id, view, fields=fields)
    boxes = map_boxes(cached.boxes, matrix)
    visible = visible_boxes(boxes, size).nonzero().squeeze(1)  # rows that a crop left in the image
    height, width = size
    shown = boxes[visible].clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))  # as annotations are
    sample = sample_rois(
        shown,
        int((visible < cached.num_proposals + cached.num_jittered).sum()),
        gt_boxes,
        gt_labels,
        sampling=sampling,
        num_classes=spec.num_classes,
        generator=generator,
        # positives are drawn from boxes that have RoI features, where these are read
        eligible=None if cached.roi_rows is None else torch.isin(visible, cached.roi_rows),
    )
    rows = visible[sample.rows]
    num_positive = int(sample.positive.sum())
    deltas = _at(cached.deltas, rows)
    if deltas is not None and mirrored:
        deltas = mirror_deltas(deltas)
    targets = RoiTargets(
        boxes=boxes[rows],  # whole: of these the teacher speaks
        labels=sample.labels,
        num_positive=num_positive,
        view="mirrored" if mirrored else "exact",
        logits=_at(cached.logits, rows),
        deltas=deltas,
        embeddings=_at(cached.embeddings, rows),
        embedding_scale=_at(cached.embedding_scale, rows),
    )
    positives = rows[:num_positive]
    if cached.roi_rows is not None:
        objects = (positives[:, None] == cached.roi_rows).int().argmax(dim=1)
        features, scale = _at(cached.roi_features, objects), _at(cached.roi_scale, objects)
        return replace(targets, roi_features=features, roi_scale=scale)
    levels = set(map_levels)
    if "roi_features" in needs:
        teacher_boxes = map_boxes(cached.boxes[positives], cached.matrix)
        levels |= set(assign_levels(teacher_boxes, spec.finest_scale, spec.roi_levels).tolist())
        targets = replace(targets, teacher_boxes=teacher_boxes)
    return replace(targets, maps=read_maps(cache, image_id, view, matrix, levels)) if levels else targets


def read_maps(
    cache: TeacherCache, image_id: int, view: str, matrix: npt.NDArray[np.float64], levels: Collection[int]
) -> StoredMaps:
    """Read levels of the pyramid of an image, and nothing else.

    Args:
        cache: The teacher's cache, of the `pyramid` tier.
        image_id: COCO image id.
        view: Which of the cached views.
        matrix: `[3, 3]` original pixels -> the student's network input.
        levels: Which.

    Raises:
        CacheError: The image or its pyramid is not in the cache, or its data is damaged.
    """
    cached = cache.targets(image_id, view, fields=("features",), levels=sorted(levels), rows=())
    features = present(cached.features, f"the pyramid of image {image_id}")
    return StoredMaps(relative_matrix(matrix, cached.matrix), features, cached.scale, cached.input_size)


def _at(values: Tensor | None, rows: Tensor) -> Tensor | None:
    """Rows of what was read, without a copy where these are all; None where nothing was."""
    if values is None or torch.equal(rows, torch.arange(len(values))):
        return values
    return values[rows]
