"""The teacher's pyramid of an image, which can be asked about any box of the student's view of that image."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdpipe.cache.errors import present
from kdpipe.cache.quantize import dequantize
from kdpipe.cache.read.reader import TeacherCache
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.views import map_boxes, mirror_deltas, mirror_features, relative_matrix
from kdpipe.distill.losses.numeric import no_autocast
from kdpipe.distill.outputs import BatchRois, TeacherOutputs
from kdpipe.distill.teacher.cached_boxes import cached_view
from kdpipe.distill.teacher.heads.cascade import CascadeHead
from kdpipe.distill.teacher.heads.fc import TeacherHead
from kdpipe.distill.teacher.heads.semantic import SemanticBranch
from kdpipe.distill.teacher.heads.shared_stage import SharedStageHead
from kdpipe.distill.teacher.pyramids import TeacherPyramids
from kdpipe.distill.teacher.targets import map_tensors


@dataclass(frozen=True)
class TeacherView:
    """What the teacher saw of one image.

    Attributes:
        view: `exact`, `mirrored` or `skipped` (nothing is asked of it).
        matrix: `[3, 3]` float64, pixels of the student's network input -> pixels of the teacher's.
        pyramid: Per level that the teacher's RoI head reads, Tensor[C, h_l, w_l] in storage type.
        scale: Tensor[L, C] float32 of an int8 pyramid, or None.
        size: (height, width) of the teacher's network input without padding, pixels; a cascade keeps boxes inside.
    """

    view: str
    matrix: npt.NDArray[np.float64]
    pyramid: tuple[Tensor, ...] = ()
    scale: Tensor | None = None
    size: tuple[int, int] = (0, 0)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "TeacherView":
        """The same on another device; stored types stay as they are, int8 included."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TeacherView":
        """The same in page-locked memory; torch's DataLoader calls this."""
        return map_tensors(self, lambda tensor: tensor.pin_memory())

    def levels(self) -> list[Tensor]:
        """The pyramid in float32."""
        if self.scale is None:
            return [level.float() for level in self.pyramid]
        return [dequantize(level, scale) for level, scale in zip(self.pyramid, self.scale, strict=False)]


def read_teacher_view(
    cache: TeacherCache, image_id: int, matrix: npt.NDArray[np.float64], *, missing_view: str
) -> TeacherView:
    """Read the levels of an image's pyramid that the teacher's RoI head reads, and nothing else.

    Args:
        cache: The teacher's cache, of the `pyramid` tier.
        image_id: COCO image id.
        matrix: `[3, 3]` original pixels -> the student's network input.
        missing_view: `mirror` or `skip`: what becomes of a flipped image whose flipped view is not cached.

    Raises:
        CacheError: The image or its pyramid is not in the cache, or its data is damaged.
        ViewError: The student's view is rotated, sheared or upside down.
    """
    view, mirrored = cached_view(cache.spec, matrix)
    if mirrored and missing_view == "skip":
        return TeacherView("skipped", np.eye(3))
    levels = range(cache.spec.head_levels)
    said = cache.targets(image_id, view, fields=("features",), levels=levels, rows=())
    features = present(said.features, f"the pyramid of image {image_id}")
    pyramid = tuple(level for level in features if level is not None)
    relative = relative_matrix(matrix, said.matrix)
    return TeacherView("mirrored" if mirrored else "exact", relative, pyramid, said.scale, said.input_size)


@torch.no_grad()
def apply_teacher_head(
    views: Sequence[TeacherView],
    rois: BatchRois,
    head: TeacherHead | CascadeHead | SharedStageHead,
    spec: CacheSpec,
    needs: Collection[str],
) -> TeacherOutputs:
    """What the teacher says of the RoIs of a batch: RoIAlign on its pyramids, then its box head.

    Args:
        views: Of each image of the batch.
        rois: On the device of the views, none of them in a skipped image.
        head: The teacher's box head, as `frozen_head` gives it.
        spec: What the teacher is.
        needs: Some of `logits`, `deltas`, `embeddings`, `features`; no more than these is computed.
    """
    of_head = [name for name in needs if name != "features"]
    asked = rois if of_head else rois.select(rois.positive)
    with no_autocast(rois.rois):
        image = asked.rois[:, 0].long()  # [R or P]

        seen = {index: view for index, view in enumerate(views) if (image == index).any()}
        pyramids = TeacherPyramids({index: (view.pyramid, view.scale) for index, view in seen.items()}, spec)

        def look(boxes: Tensor, size: int = spec.roi_size) -> Tensor:
            return pyramids.roi_align(torch.cat([asked.rois[:, :1], boxes], dim=1), size)

        boxes = asked.rois[:, 1:].float()
        for index, view in enumerate(views):
            boxes = torch.where((image == index)[:, None], map_boxes(boxes, view.matrix), boxes)
        features = look(boxes)  # [R or P, C, size, size]
        mirrored = torch.tensor([view.view == "mirrored" for view in views], device=features.device)[image]
        said: dict[str, Tensor] = {}
        if of_head:
            if isinstance(head, CascadeHead):
                sizes = boxes.new_tensor([view.size[::-1] for view in views])[image]  # [R, 2]
                fused = _fused(head.semantic, seen, image, look)
                outputs = head(fused(boxes) if head.semantic else features, boxes, sizes, fused)
            elif isinstance(head, SharedStageHead):
                outputs = head(look(boxes, head.size))
            else:
                outputs = head(features)
            said = {name: getattr(outputs, name) for name in of_head}
        if "deltas" in said:
            said["deltas"] = torch.where(mirrored[:, None, None], mirror_deltas(said["deltas"]), said["deltas"])
        if "features" in needs:
            features, mirrored = features[asked.positive], mirrored[asked.positive]
            said["features"] = torch.where(mirrored[:, None, None, None], mirror_features(features), features)
    return TeacherOutputs(**said)


def _fused(
    semantic: SemanticBranch | None, views: Mapping[int, TeacherView], image: Tensor, look: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """What box heads see of boxes: their RoI features, and those of the semantic branch where there is one."""
    if semantic is None:
        return look
    maps = {index: semantic.map_of(view.levels()) for index, view in views.items()}

    def fused(boxes: Tensor) -> Tensor:
        features = look(boxes)
        for index, seen in maps.items():
            features[image == index] += semantic.at(seen, boxes[image == index])
        return features

    return fused
