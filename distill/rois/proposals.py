"""Proposals out of dense predictions, as an RPN makes them: the best of each level, and NMS."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torchvision.ops import batched_nms

# Those of mmdet's RPN in training (`train_cfg.rpn_proposal`).
PER_LEVEL, PER_IMAGE, NMS_IOU = 2000, 1000, 0.7


@torch.no_grad()
def propose(
    objectness: Sequence[Tensor], boxes_of: Callable[[Sequence[Tensor]], Tensor], per_image: int = PER_IMAGE
) -> tuple[Tensor, Tensor]:
    """The proposals of one image.

    On each level the 2,000 predictions that are most likely an object; without boxes that have no area; of those of one
    level that overlap by an IoU above 0.7 the likeliest; of what is left the likeliest of all levels. Boxes are decoded
    of the former only, so that time and memory do not grow with the size of the image beyond a pass over the scores.

    Args:
        objectness: Per level Tensor[n_l] in [0, 1].
        boxes_of: Gives the boxes Tensor[sum m_l, 4] (x1, y1, x2, y2) of rows Tensor[m_l] of each level.
        per_image: How many at most.

    Returns:
        M boxes, Tensor[M, 4], the likeliest first; and Tensor[M] int64, which of the predictions of all levels, one
        level after the other, they are.
    """
    best = [scores.topk(min(PER_LEVEL, len(scores))) for scores in objectness]
    rows = [level.indices for level in best]
    boxes, scores = boxes_of(rows), torch.cat([level.values for level in best])
    starts = [0, *accumulate(map(len, objectness[:-1]))]
    predictions = torch.cat([of + start for of, start in zip(rows, starts, strict=True)])
    levels = torch.cat([torch.full_like(of, level) for level, of in enumerate(rows)])
    whole = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).nonzero().squeeze(1)
    kept = whole[batched_nms(boxes[whole], scores[whole], levels[whole], NMS_IOU)[:per_image]]
    return boxes[kept], predictions[kept]
