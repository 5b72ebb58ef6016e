"""The teacher's pyramids of a batch of images, as they were stored, and what its RoI extractor takes from them."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from kdpipe.cache.quantize import dequantize
from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.rois.align import roi_align_assigned
from kdpipe.distill.rows import in_order, on_cpu, rows_of_each

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
        self._stored = stored
        alike: dict[tuple[torch.Size | None, ...], list[int]] = {}
        for index, (levels, _) in stored.items():
            shapes = tuple(None if level is None else level.shape for level in levels[: spec.roi_levels])
            alike.setdefault(shapes, []).append(index)
        self._groups = [
            (images, [_stack([stored[image] for image in images], level) for level in range(len(shapes))])
            for shapes, images in alike.items()
        ]
        self._places = torch.zeros(max(stored, default=-1) + 1, 2, dtype=torch.int64)  # group and place of each image
        for group, (images, _) in enumerate(self._groups):
            for place, image in enumerate(images):
                self._places[image] = torch.tensor([group, place])

    def levels(self) -> dict[int, list[Tensor]]:
        """What there is of each image's pyramid in float32, by number of the image: per level Tensor[C, h_l, w_l]."""
        return {image: _full_precision(*stored) for image, stored in self._stored.items()}

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
        if not self._groups:
            return rois.new_zeros(0, spec.channels, size, size)
        group, place = self._places.to(rois.device, non_blocking=True)[rois[:, 0].long()].unbind(dim=1)  # [R] each
        parts, parts_rows = [], rows_of_each(group, len(self._groups))
        for (_, levels), rows in zip(self._groups, parts_rows, strict=True):
            parts.append(
                roi_align_assigned(
                    levels,
                    spec.strides[: spec.roi_levels],
                    torch.cat([place[rows, None].to(rois), rois[rows, 1:]], dim=1),
                    spec.finest_scale,
                    size,
                    spec.roi_sampling_ratio,
                    spec.roi_aligned,
                )
            )
        return in_order(parts, parts_rows)


class RoiFeatures(Protocol):
    """What gives RoI features of any box of a batch: `TeacherPyramids`, or those of a student."""

    def roi_align(self, rois: Tensor, size: int | None = None) -> Tensor:
        """Tensor[R, C, size, size] of Tensor[R, 5] (image, x1, y1, x2, y2)."""


class TeacherRois:
    """R boxes of a batch in the teacher's view, with the pyramids that they lie on: what a box head looks at.

    Args:
        pyramids: Of the images that the boxes are of; a semantic branch wants those of the teacher.
        image_index: Tensor[R] int64, the image in the batch.
        boxes: Tensor[R, 4] (x1, y1, x2, y2), pixels of the teacher's network input.
        sizes: Tensor[R, 2] (width, height) of that input without padding; a cascade keeps boxes inside.
    """

    def __init__(self, pyramids: RoiFeatures, image_index: Tensor, boxes: Tensor, sizes: Tensor) -> None:
        self.pyramids, self.image_index, self.boxes, self.sizes = pyramids, image_index, boxes, sizes

    @cached_property
    def features(self) -> Tensor:
        """RoI features of the boxes, Tensor[R, C, size, size] float32, of the size that students imitate."""
        return self._roi_align(self.boxes)

    def features_at(self, boxes: Tensor, size: int | None = None) -> Tensor:
        """RoI features of boxes of the same images, row by row.

        Args:
            boxes: Tensor[R, 4], these boxes or where a cascade moved them.
            size: Cells per side; by default those that students imitate.

        Returns:
            Tensor[R, C, size, size] float32.
        """
        return self.features if boxes is self.boxes and size is None else self._roi_align(boxes, size)

    def _roi_align(self, boxes: Tensor, size: int | None = None) -> Tensor:
        return self.pyramids.roi_align(torch.cat([self.image_index[:, None].to(boxes), boxes], dim=1), size)


def _full_precision(levels: Sequence[Tensor | None], scale: Tensor | None) -> list[Tensor]:
    given = [(index, level) for index, level in enumerate(levels) if level is not None]
    return [dequantize(level, None if scale is None else scale[index]) for index, level in given]


def _stack(images: Sequence[StoredPyramid], level: int) -> Tensor | None:
    """One level of images of the same size, Tensor[B, C, h, w] float32, laid out as RoIAlign of the device reads it."""
    maps = [levels[level] for levels, _ in images]
    given = [values for values in maps if values is not None]
    if len(given) < len(maps):
        return None
    values = torch.stack(given)
    if on_cpu(values):
        values = values.contiguous(memory_format=torch.channels_last)  # while an element is a byte
    scales = [scale[level] for _, scale in images if scale is not None]
    return dequantize(values, torch.stack(scales) if scales else None)
