"""The teacher's pyramids of a batch of images, as they were stored, and what its RoI extractor takes from them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdpipe.cache.quantize import dequantize
from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.rois.align import roi_align_assigned

# Of an image: per level Tensor[C, h_l, w_l] in storage type, or None where no RoI needs it; scale Tensor[L, C] of int8.
StoredPyramid = tuple[Sequence[Tensor | None], Tensor | None]


class TeacherPyramids:
    """Pyramids that can be asked about any RoI; images of the same size are looked at together.

    Args:
        stored: By number of the image in the batch.
        spec: What the teacher is.
    """

    def __init__(self, stored: Mapping[int, StoredPyramid], spec: CacheSpec) -> None:
        self._spec = spec
        alike: dict[tuple[torch.Size | None, ...], list[int]] = {}
        for index, (levels, _) in stored.items():
            shapes = tuple(None if level is None else level.shape for level in levels[: spec.roi_levels])
            alike.setdefault(shapes, []).append(index)
        self._groups = [
            (images, [_stack([stored[image] for image in images], level) for level in range(len(shapes))])
            for shapes, images in alike.items()
        ]

    def roi_align(self, rois: Tensor, size: int | None = None) -> Tensor:
        """RoIAlign with the settings of the teacher's own extractor.

        Args:
            rois: Tensor[R, 5] (image, x1, y1, x2, y2), pixels of the teacher's network input.
            size: Cells per side; by default those of the RoI features that students imitate.

        Returns:
            Tensor[R, C, size, size] float32.
        """
        spec = self._spec
        size = size or spec.roi_size
        parts, parts_rows = [rois.new_zeros(0, spec.channels, size, size)], [rois.new_zeros(0, dtype=torch.int64)]
        for images, levels in self._groups:
            own = rois[:, :1] == torch.tensor(images, device=rois.device)  # [R, images]
            rows = own.any(dim=1).nonzero().squeeze(1)
            place = own[rows].int().argmax(dim=1, keepdim=True)
            parts.append(
                roi_align_assigned(
                    levels,
                    spec.strides[: spec.roi_levels],
                    torch.cat([place.to(rois), rois[rows, 1:]], dim=1),
                    spec.finest_scale,
                    size,
                    spec.roi_sampling_ratio,
                    spec.roi_aligned,
                )
            )
            parts_rows.append(rows)
        return torch.cat(parts)[torch.cat(parts_rows).argsort()]


def _stack(images: Sequence[StoredPyramid], level: int) -> Tensor | None:
    """One level of images of the same size, Tensor[B, C, h, w] float32, channels last in memory for RoIAlign."""
    maps = [levels[level] for levels, _ in images]
    if any(found is None for found in maps):
        return None
    values = torch.stack([found for found in maps if found is not None])
    values = values.contiguous(memory_format=torch.channels_last)  # while an element is a byte
    scales = [scale[level] for _, scale in images if scale is not None]
    return dequantize(values, torch.stack(scales)) if scales else values.float()
