"""A student's pyramids of a batch, and what the teacher's RoI extractor would take from them."""

from collections.abc import Sequence

from torch import Tensor

from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.rois.align import roi_align_assigned


class StudentPyramids:
    """RoI features from one level each, part of the student's graph.

    That is the level with the stride of the one that the teacher's extractor would read for a box of this size in the
    student's view; or the nearest that the student has, such as P3 of RetinaNet for boxes of P2.

    Args:
        pyramid: Per level Tensor[B, C, h_l, w_l].
        strides: Pixels per cell of each level.
        spec: What the teacher is.
    """

    def __init__(self, pyramid: Sequence[Tensor], strides: Sequence[int], spec: CacheSpec) -> None:
        finest, coarsest = spec.strides[0], spec.strides[spec.roi_levels - 1]
        stop = max(1, sum(stride <= coarsest for stride in strides))
        start = min(sum(stride < finest for stride in strides), stop - 1)
        self._pyramid, self._strides, self._spec = pyramid[start:stop], strides[start:stop], spec
        self._finest_scale = spec.finest_scale * self._strides[0] / finest

    def roi_align(self, rois: Tensor, size: int | None = None) -> Tensor:
        """RoIAlign with the settings of the teacher's own extractor.

        Args:
            rois: Tensor[R, 5] (image, x1, y1, x2, y2), pixels of the student's network input.
            size: Cells per side; by default those of the RoI features that students imitate.

        Returns:
            Tensor[R, C, size, size] float32.
        """
        settings = size or self._spec.roi_size, self._spec.roi_sampling_ratio, self._spec.roi_aligned
        return roi_align_assigned(self._pyramid, self._strides, rois, self._finest_scale, *settings)
