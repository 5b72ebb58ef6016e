"""Boxes near annotated objects, held by a cache beside the best proposals, of which many are empty background.

About a third of the boxes drawn here overlap their object by less than an IoU of 0.5.
"""

import torch
from torch import Tensor

# A box overlaps its object by an IoU that is evenly distributed between these.
_LEAST, _MOST = 0.3, 0.9
_PER_OBJECT = 32
_STEPS = 16  # of the bisection that finds how far a box is moved
_FARTHEST = 2.5  # sides of the object


def jittered_boxes(objects: Tensor, size: tuple[int, int], budget: int, seed: int) -> Tensor:
    """Boxes near objects, as many of each: the corners of the object, moved in random directions as far as it takes.

    Args:
        objects: Tensor[G, 4] (x1, y1, x2, y2), pixels.
        size: (height, width) of the image, pixels; boxes stay inside.
        budget: How many boxes all objects share; an object has at least one while they last, and at most 32.
        seed: The same one gives the same boxes.

    Returns:
        Tensor[J, 4] float64, those of an object one after the other.
    """
    count = min(_PER_OBJECT, max(1, budget // max(1, len(objects))))
    base = objects.double().repeat_interleave(count, dim=0)[:budget]
    generator = torch.Generator().manual_seed(seed)
    direction = 2 * torch.rand(len(base), 4, generator=generator, dtype=torch.float64) - 1
    direction = direction / direction.abs().amax(dim=1, keepdim=True).clamp(min=1e-3)
    ious = _LEAST + (_MOST - _LEAST) * torch.rand(len(base), generator=generator, dtype=torch.float64)
    step = direction * (base[:, 2:] - base[:, :2]).repeat(1, 2)
    limit = base.new_tensor(size[::-1]).repeat(2)

    def moved(distance: Tensor) -> Tensor:
        return (base + distance[:, None] * step).clamp(min=0).minimum(limit)

    near, far = base.new_zeros(len(base)), base.new_full((len(base),), _FARTHEST)
    for _ in range(_STEPS):
        middle = (near + far) / 2
        is_near = _overlap(moved(middle), base) > ious
        near, far = torch.where(is_near, middle, near), torch.where(is_near, far, middle)
    return moved(near)


def _overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of row with row, Tensor[N]; 0 where corners have changed places."""
    inside = (torch.min(boxes[:, 2:], others[:, 2:]) - torch.max(boxes[:, :2], others[:, :2])).clamp(min=0).prod(dim=1)
    areas = [(x[:, 2:] - x[:, :2]).clamp(min=0).prod(dim=1) for x in (boxes, others)]
    return inside / (areas[0] + areas[1] - inside).clamp(min=1e-9)
