"""What is stored of some only: RoI features of the best boxes of each object, and deltas of the likely classes."""

import torch
from torch import Tensor
from torchvision.ops import box_iou

from kdpipe.cache.spec import MAX_OBJECTS

# A box with this IoU with an annotation is one of the positives, in the losses as here.
POSITIVE_IOU = 0.5


def choose_objects(boxes: Tensor, num_gt: int, limit: int = MAX_OBJECTS) -> Tensor:
    """Rows of the boxes whose RoI features are stored: the ground truth, and the best positive boxes of each object.

    A box belongs to the object that it overlaps most, and is positive where their IoU is at least 0.5. Objects take
    turns: first the best box of each, then the second best, until there are `limit` rows, the ground truth among them.

    Args:
        boxes: [R, 4] (x1, y1, x2, y2).
        num_gt: how many rows, the last ones, are ground truth. All of these are chosen, even if they are more.
        limit: how many rows at most.

    Returns:
        [P] int64, ascending.
    """
    count = len(boxes) - num_gt
    truth = torch.arange(count, len(boxes), device=boxes.device)
    if not num_gt or not count:
        return truth
    overlap, of_object = box_iou(boxes[:count].double(), boxes[count:].double()).max(dim=1)
    rows = (overlap >= POSITIVE_IOU).nonzero().squeeze(1)
    rows = rows[overlap[rows].argsort(descending=True, stable=True)]  # best first
    by_object = of_object[rows].argsort(stable=True)
    sizes = torch.bincount(of_object[rows], minlength=num_gt)
    first = (sizes.cumsum(0) - sizes)[of_object[rows[by_object]]]
    turn = torch.empty_like(rows)
    turn[by_object] = torch.arange(len(rows), device=rows.device) - first
    best = rows[turn.argsort(stable=True)][: max(0, limit - num_gt)]
    return torch.cat([best.sort().values, truth])


def merge_unlikely(deltas: Tensor, logits: Tensor, boxes: Tensor, gt_labels: Tensor, floor: float) -> Tensor:
    """Box deltas in which the classes that the teacher thinks unlikely share one, which compresses to next to nothing.

    It is their mean, weighted by the probabilities of the logits as they are stored: a loss that weighs the deltas of
    all classes by these does not change, beyond rounding. The classes of all objects that a box overlaps by an IoU of
    at least 0.5 are kept: some loss looks at these however unlikely the teacher thinks them.

    Args:
        deltas: [R, K, 4].
        logits: [R, K + 1], background last.
        boxes: [R, 4] (x1, y1, x2, y2), the last ones ground truth.
        gt_labels: [G] int64, of the ground truth.
        floor: the least probability that is likely.
    """
    probabilities = logits.half().float().softmax(dim=1)[:, :-1]  # [R, K]
    merged = probabilities < floor
    overlap = box_iou(boxes.double(), boxes[len(boxes) - len(gt_labels) :].double())  # [R, G]
    rows, objects = (overlap >= POSITIVE_IOU).nonzero(as_tuple=True)
    merged[rows, gt_labels.to(rows.device)[objects]] = False
    weights = probabilities * merged
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    mean = torch.einsum("rk,rkd->rd", weights, deltas.float())
    return torch.where(merged[..., None], mean[:, None], deltas.float())
