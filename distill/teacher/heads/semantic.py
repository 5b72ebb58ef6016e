"""The frozen semantic branch of HTC, which adds features of the whole pyramid to those of RoIs."""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.losses.numeric import no_autocast
from kdpipe.distill.rois.align import roi_align_assigned
from kdpipe.distill.rows import rows_of_each
from kdpipe.distill.teacher.heads.fc import TeacherHeadError, moved_to, parameters_of
from kdpipe.distill.teacher.pyramids import TeacherPyramids, TeacherRois

SEMANTIC_BRANCH = "roi_head.semantic_head."
_CONV = re.compile(r"(lateral_convs\.\d+|convs\.\d+|conv_embedding)\.conv\.(weight|bias)|conv_logits\.(weight|bias)")


class SemanticBranch:
    """mmdet's `FusedSemanticHead` up to its features: all levels, brought to the size of one, summed and convolved.

    Not a Module, as `TeacherHead`.

    Args:
        state: Parameters by their names in the teacher's state dict.
        spec: What the teacher is, `semantic` included.

    Raises:
        TeacherHeadError: The branch has other layers than these.
    """

    def __init__(self, state: Mapping[str, Tensor], spec: CacheSpec) -> None:
        self._spec = spec
        self._state = parameters_of(state, SEMANTIC_BRANCH)
        if unknown := sorted(name for name in self._state if not _CONV.fullmatch(name)):
            raise TeacherHeadError(
                "The teacher's semantic branch cannot be rebuilt from its weights: it has "
                f"{', '.join(SEMANTIC_BRANCH + name for name in unknown[:3])}. Expected convolutions without norms."
            )
        self._levels, self._convs = (
            len([name for name in self._state if name.startswith(f"{part}.") and name.endswith(".weight")])
            for part in ("lateral_convs", "convs")
        )
        if not spec.semantic or not 0 < self._levels <= len(spec.strides):
            raise TeacherHeadError(
                "The teacher's RoI head has a semantic branch of which the cache does not say how it is built. It is "
                "of an unusual kind, or was cached by an older kdpipe; in the second case, cache it again."
            )

    def of_rois(self, rois: TeacherRois) -> Callable[[Tensor], Tensor]:
        """A function of boxes, row by row of the images of these RoIs: RoI features with the semantic ones added."""
        if not isinstance(rois.pyramids, TeacherPyramids):
            raise TeacherHeadError("The teacher's semantic branch reads the whole of its own pyramid, and no other's.")
        maps = {image: self.map_of(levels) for image, levels in rois.pyramids.levels().items()}
        rows_of = rows_of_each(rois.image_index, max(maps, default=-1) + 1)

        def fused_features(boxes: Tensor) -> Tensor:
            features = rois.features_at(boxes).clone()
            for image, semantic_map in maps.items():
                features[rows_of[image]] += self.at(semantic_map, boxes[rows_of[image]])
            return features

        return fused_features

    @torch.no_grad()
    def map_of(self, pyramid: Sequence[Tensor]) -> Tensor:
        """The semantic features of an image, Tensor[1, C, h, w] float32, at the size of the level of fusion.

        Args:
            pyramid: All levels, Tensor[C, h_l, w_l] float32.
        """
        fusion, _ = self._spec.semantic
        self._state = moved_to(self._state, pyramid[0].device)
        with no_autocast(pyramid[0]):
            size = pyramid[fusion].shape[1:]
            x = self._conv(f"lateral_convs.{fusion}", pyramid[fusion][None])
            for index, level in enumerate(pyramid[: self._levels]):
                if index != fusion:
                    same = functional.interpolate(level[None], size=size, mode="bilinear", align_corners=True)
                    x = x + self._conv(f"lateral_convs.{index}", same)
            for index in range(self._convs):
                x = self._conv(f"convs.{index}", x)
            return self._conv("conv_embedding", x)

    def at(self, features: Tensor, boxes: Tensor) -> Tensor:
        """What is added to RoI features, Tensor[R, C, size, size].

        Args:
            features: `map_of` an image.
            boxes: Tensor[R, 4] (x1, y1, x2, y2), pixels of the teacher's network input.
        """
        spec = self._spec
        fusion, size = spec.semantic
        rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
        options = (spec.finest_scale, size, spec.roi_sampling_ratio, spec.roi_aligned)
        pooled = roi_align_assigned([features], [spec.strides[fusion]], rois, *options)
        return functional.adaptive_avg_pool2d(pooled, spec.roi_size)

    def _conv(self, name: str, x: Tensor) -> Tensor:
        weight = self._state[f"{name}.conv.weight"]
        return functional.conv2d(x, weight, self._state[f"{name}.conv.bias"], padding=weight.shape[2] // 2).relu_()
