"""What the teacher said of one image: as it comes from the teacher, and as it is read back from a cache."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdpipe.cache.errors import CacheError
from kdpipe.cache.quantize import dequantize, dequantize_rows
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.views import map_boxes

# mmdet's DeltaXYWHBBoxCoder: boxes grow or shrink at most by this factor.
WH_RATIO_CLIP = 16 / 1000


@dataclass(frozen=True)
class TeacherRecord:
    """What the teacher said of one image in one view, to be written. Float tensors on any device.

    R boxes, K classes, D embedding, C channels, S cells. Fields that the cache does not store may be None.

    Attributes:
        image_id: id in the annotation file.
        view: "identity" or "hflip".
        file_name: path relative to the image folder.
        original_size: (height, width) of the image file, pixels.
        input_size: (height, width) of the network input without padding, pixels.
        num_proposals: rows [0, num_proposals) are proposals, the rest are jittered and ground-truth boxes.
        boxes: [R, 4] (x1, y1, x2, y2) in original, unflipped pixels.
        logits: [R, K + 1], background last.
        deltas: [R, K, 4], or [R, 1, 4] from a class-agnostic head, regressed in the frame of the network input.
        embeddings: [R, D], input of the classifier layer.
        roi_features: [R, C, S, S].
        features: one tensor [C, h_l, w_l] per level of the pyramid.
        gt_labels: [G] int64, of the ground-truth boxes; not stored, but looked at where `spec.delta_floor` is above 0.
        num_jittered: the rows that follow the proposals and are boxes near objects, no proposals; the rest are
            ground-truth boxes.
        file_digest: `digest_file` of the image file; 0 where it is not known.
    """

    image_id: int
    view: str
    file_name: str
    original_size: tuple[int, int]
    input_size: tuple[int, int]
    num_proposals: int
    boxes: Tensor
    logits: Tensor | None = None
    deltas: Tensor | None = None
    embeddings: Tensor | None = None
    roi_features: Tensor | None = None
    features: Sequence[Tensor] | None = None
    gt_labels: Tensor | None = None
    num_jittered: int = 0
    file_digest: int = 0

    @property
    def num_gt(self) -> int:
        """How many rows, the last ones, are ground-truth boxes."""
        return len(self.boxes) - self.num_proposals - self.num_jittered


@dataclass(frozen=True)
class TargetIndex:
    """The row of the index of one image in one view: sizes, no data.

    Attributes:
        level_shapes: (height, width) of each pyramid level in cells; empty in tiers without features.
        num_rois: number of boxes: proposals, jittered boxes and ground truth, in this order.
        num_objects: number of boxes with RoI features; 0 in tiers without these.
        file_digest: `digest_file` of the image file that the teacher saw; 0 where it was not known.
    """

    image_id: int
    view: str
    file_name: str
    original_size: tuple[int, int]
    input_size: tuple[int, int]
    num_proposals: int
    num_jittered: int
    num_rois: int
    level_shapes: tuple[tuple[int, int], ...]
    file_digest: int
    num_objects: int = 0


@dataclass(frozen=True)
class TeacherTargets:
    """Everything the teacher said of one image in one view, in the types it is stored in. Absent fields are None.

    Attributes:
        image_id: id in the annotation file.
        view: "identity" or "hflip".
        file_name: path relative to the image folder.
        original_size: (height, width) of the image file, pixels.
        input_size: (height, width) of the network input without padding, pixels.
        matrix: [3, 3] float64, original pixels -> this view's network input.
        num_proposals: rows [0, num_proposals) are proposals.
        num_jittered: so many rows that follow are boxes near objects, the rest are ground-truth boxes.
        boxes: [R, 4] float32 (x1, y1, x2, y2) in original, unflipped pixels.
        logits: [R, K + 1], background last.
        deltas: [R, K, 4] or [R, 1, 4], in the frame of the network input, normalised by the coder's means and stds;
            those of classes less probable than `spec.delta_floor` may be their mean.
        embeddings: [R, D] in the storage type.
        embedding_scale: [R] float32, of int8 `embeddings`.
        roi_rows: [P] int32, ascending, rows of the boxes with RoI features, within all R boxes of the image.
        roi_features: [P, C, S, S] in the storage type, [P, ceil(C / 2), S, S] uint8 for int4, of these boxes, whichever
            boxes were asked for.
        roi_scale: [P, C] float16, of int8 and int4 `roi_features`.
        features: one [C, h_l, w_l] in the storage type per level, [ceil(C / 2), h_l, w_l] uint8 for int4; None for
            levels that are not stored or were not asked for.
        scale: [L, C] float32, of int8 and int4 `features`.
    """

    image_id: int
    view: str
    file_name: str
    original_size: tuple[int, int]
    input_size: tuple[int, int]
    matrix: npt.NDArray[np.float64]
    num_proposals: int
    num_jittered: int
    boxes: Tensor
    logits: Tensor | None = None
    deltas: Tensor | None = None
    embeddings: Tensor | None = None
    embedding_scale: Tensor | None = None
    roi_rows: Tensor | None = None
    roi_features: Tensor | None = None
    roi_scale: Tensor | None = None
    features: tuple[Tensor | None, ...] | None = None
    scale: Tensor | None = None

    def class_boxes(self, spec: CacheSpec) -> Tensor:
        """The teacher's box of every class for every RoI, in original pixels, clipped to the image.

        Args:
            spec: of the cache these targets come from.

        Returns:
            [R, K, 4] float32 (x1, y1, x2, y2). A class-agnostic teacher gives each class the same box.

        Raises:
            CacheError: the deltas were not read.
        """
        if self.deltas is None:
            raise CacheError(
                f"The deltas of image {self.image_id} were not read: ask targets() for the field 'deltas'."
            )
        rois = map_boxes(self.boxes, self.matrix)  # the frame in which the deltas were regressed
        decoded = decode_deltas(rois, self.deltas, spec.box_means, spec.box_stds)
        boxes = map_boxes(decoded.reshape(-1, 4), np.linalg.inv(self.matrix)).reshape(decoded.shape)
        height, width = self.original_size
        limit = boxes.new_tensor([width, height, width, height])
        return boxes.clamp(min=0).minimum(limit).expand(-1, spec.num_classes, -1)

    def pyramid(
        self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor | None, ...]:
        """The levels as float tensors, moved to the device in their storage type and dequantised there.

        Args:
            device: to compute on; None leaves the levels where they are.
            dtype: of the result.

        Returns:
            One [C, h_l, w_l] per level, None for levels that were not read.

        Raises:
            CacheError: the features were not read.
        """
        if self.features is None:
            raise CacheError(
                f"The features of image {self.image_id} were not read: ask targets() for the field 'features', which "
                "only the 'pyramid' tier has."
            )
        levels: list[Tensor | None] = []
        for number, level in enumerate(self.features):
            scale = None if self.scale is None else self.scale[number]
            levels.append(None if level is None else _to_float(level, scale, device, dtype))
        return tuple(levels)

    def float_roi_features(
        self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The RoI features as a float tensor, as `pyramid` does for the levels.

        Returns:
            [P, C, S, S], of the boxes `roi_rows`.

        Raises:
            CacheError: the RoI features were not read.
        """
        if self.roi_features is None:
            raise CacheError(
                f"The RoI features of image {self.image_id} were not read: ask targets() for the field 'roi_features', "
                "which only the 'objects' tier has."
            )
        return _to_float(self.roi_features, self.roi_scale, device, dtype)

    def float_embeddings(self) -> Tensor:
        """The embeddings as a float32 tensor, [R, D].

        Raises:
            CacheError: the embeddings were not read.
        """
        if self.embeddings is None:
            raise CacheError(
                f"The embeddings of image {self.image_id} were not read: ask targets() for the field 'embeddings'."
            )
        return dequantize_rows(self.embeddings, self.embedding_scale)


def decode_deltas(boxes: Tensor, deltas: Tensor, means: Sequence[float], stds: Sequence[float]) -> Tensor:
    """Boxes that class-wise deltas turn RoIs into: the coder of Faster R-CNN, as mmdet's `DeltaXYWHBBoxCoder`.

    Args:
        boxes: [R, 4] (x1, y1, x2, y2), in the frame of the deltas.
        deltas: [R, K, 4] (dx, dy, dw, dh), normalised by `means` and `stds`.
        means: of the four numbers.
        stds: of the four numbers.

    Returns:
        [R, K, 4] float32 (x1, y1, x2, y2), not clipped.
    """
    boxes, deltas = boxes.float(), deltas.float()
    deltas = deltas * _beside(deltas, stds) + _beside(deltas, means)
    limit = abs(math.log(WH_RATIO_CLIP))
    corner, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]  # [R, 1, 2]
    centre = corner + 0.5 * size + deltas[..., :2] * size  # [R, K, 2]
    half = 0.5 * size * deltas[..., 2:].clamp(-limit, limit).exp()
    return torch.cat([centre - half, centre + half], dim=-1)


def encode_boxes(rois: Tensor, boxes: Tensor, means: Sequence[float], stds: Sequence[float]) -> Tensor:
    """Class-wise deltas that `decode_deltas` turns into these boxes, which it can make at most 62.5 times the RoI.

    Args:
        rois: [R, 4] (x1, y1, x2, y2).
        boxes: [R, K, 4] (x1, y1, x2, y2), in the frame of the RoIs.
        means: of the four numbers.
        stds: of the four numbers.

    Returns:
        [R, K, 4] float32 (dx, dy, dw, dh), normalised by `means` and `stds`.
    """
    rois, boxes = rois.float()[:, None], boxes.float()
    size = (rois[..., 2:] - rois[..., :2]).clamp(min=1e-6)  # [R, 1, 2]
    shift = (boxes[..., :2] + boxes[..., 2:] - rois[..., :2] - rois[..., 2:]) / 2 / size  # [R, K, 2]
    limit = abs(math.log(WH_RATIO_CLIP))
    growth = ((boxes[..., 2:] - boxes[..., :2]) / size).clamp(math.exp(-limit), math.exp(limit)).log()
    deltas = torch.cat([shift, growth], dim=-1)
    return (deltas - _beside(deltas, means)) / _beside(deltas, stds)


def _beside(tensor: Tensor, numbers: Sequence[float]) -> Tensor:
    """Numbers of the type of a tensor, where it is; a GPU is not waited for."""
    return torch.tensor(numbers, dtype=tensor.dtype).to(tensor.device, non_blocking=True)


def _to_float(values: Tensor, scale: Tensor | None, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
    values = values if device is None else values.to(device)
    return dequantize(values, scale, dtype)
