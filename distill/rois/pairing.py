"""Which of very many boxes overlaps a given one most."""

import torch
from torch import Tensor

from kdpipe.distill.losses.numeric import LossInputError
from kdpipe.distill.rois.pairing_cpu import pair_near_boxes
from kdpipe.distill.rois.sampling import best_overlap
from kdpipe.distill.rows import on_cpu


def pair_boxes(boxes: Tensor, others: Tensor, iou: float = 0.5) -> tuple[Tensor, Tensor]:
    """The partner of each box: of the others whose IoU with it is at least `iou`, the one with the largest.

    Of several with the same IoU it is the first.

    Args:
        boxes: Tensor[R, 4] (x1, y1, x2, y2), finite, x1 <= x2, y1 <= y2.
        others: Tensor[M, 4] in the same frame, M < 2^32.
        iou: in [0.5, 1].

    Returns:
        Which of the boxes have a partner, Tensor[R] bool, and which of the others it is, Tensor[R] int64, 0 where none.

    Raises:
        LossInputError: `iou` is outside [0.5, 1].
    """
    if not 0.5 <= iou <= 1:
        raise LossInputError(f"Boxes are paired by an IoU of at least 0.5 and at most 1, found {iou}.")
    return pair_near_boxes(boxes, others, iou) if on_cpu(boxes) else _pair(boxes, others, iou)


def _pair(boxes: Tensor, others: Tensor, iou: float) -> tuple[Tensor, Tensor]:
    overlap, best = best_overlap(boxes.float(), others.float())
    return overlap >= iou, torch.where(overlap >= iou, best, 0)
