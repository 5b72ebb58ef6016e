"""`pair_boxes` on a CPU: each box is compared only with those that are near it in size and place.

An acceleration of one comparison of all with all, whose result it gives bit for bit.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Two boxes with an IoU of at least 1/2 differ at most by a factor of 2 in width, and in height, and their centres are
# at most half the smaller width, and half the smaller height, apart: the intersection is at least half the area of the
# larger one. So sizes are put into octaves a little wider than a factor of 2, and the centres of those in an octave
# into cells a little larger than half its largest size: partners are in the same or in neighbouring octaves and cells.
_OCTAVE, _CELL = 2.1, 0.51
_FINEST = -5  # octave of all that is smaller still
_CELLS = 2**24  # per axis, the origin in the middle; those at the ends have all that is beyond
_NEAR = (-1, 0, 1)

# Pairs looked at a time: about 30 MiB while their overlaps are computed.
_SLICE_PAIRS = 2**18
_LAST = 2**32 - 1


def pair_near_boxes(boxes: Tensor, others: Tensor, iou: float) -> tuple[Tensor, Tensor]:
    """As `pair_boxes`, in a time and memory that do not grow with R x M, unless all others are alike.

    Args:
        boxes: Tensor[R, 4] (x1, y1, x2, y2).
        others: Tensor[M, 4] in the same frame.
        iou: From which on two boxes are partners, at least 0.5.

    Returns:
        Tensor[R] bool and Tensor[R] int64, as `pair_boxes` gives them.
    """
    boxes, others = boxes.float(), others.float()
    best = torch.full_like(boxes[:, 0], -1, dtype=torch.int64)
    for box, other in _candidates(boxes, others):
        overlap = _iou(boxes[box], others[other])
        # the order of positive floats is that of their bits; of equal ones, the first box counts as the largest
        rank = overlap.view(torch.int32).long() << 32 | (_LAST - other)
        best.scatter_reduce_(0, box, torch.where(overlap >= iou, rank, -1), "amax")
    has_partner = best >= 0
    return has_partner, torch.where(has_partner, _LAST - (best & _LAST), 0)


def _candidates(boxes: Tensor, others: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Slices of all pairs that are near: row in `boxes`, row in `others`, Tensor[P] int64 each."""
    centres, octaves = _place(others)
    keys, order = _key(octaves, _cells(centres, octaves)).sort(stable=True)
    centres, octaves = _place(boxes)
    steps = torch.tensor(list(itertools.product(_NEAR, _NEAR)), device=boxes.device)  # [9, 2]
    octaves = (octaves[:, None] + steps)[:, :, None]  # [R, 9, 1, 2]
    cells = _cells(centres[:, None, None], octaves)
    cells = cells + cells.new_tensor([[0, step] for step in _NEAR])  # [R, 9, 3, 2]: a row of cells is a run of keys
    across = cells.new_tensor([1, 0])
    start = torch.searchsorted(keys, _key(octaves, cells - across).flatten())
    end = torch.searchsorted(keys, _key(octaves, cells + across).flatten(), right=True)
    runs = (end > start).nonzero().squeeze(1)
    box, start, counts = runs // (9 * len(_NEAR)), start[runs], (end - start)[runs]
    ends = counts.cumsum(0)
    shift = start - (ends - counts)
    total = int(counts.sum())
    for first in range(0, total, _SLICE_PAIRS):
        pairs = torch.arange(first, min(first + _SLICE_PAIRS, total), device=boxes.device)
        run = torch.searchsorted(ends, pairs, right=True)
        yield box[run], order[pairs + shift[run]]


def _place(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres, Tensor[N, 2] float64, and octaves of width and height, Tensor[N, 2] int64, of which 0 is empty."""
    low, high = boxes.double().split(2, dim=1)
    octaves = ((high - low).clamp(min=1e-9).log() / math.log(_OCTAVE)).floor().clamp(min=_FINEST).long()
    return (low + high) / 2, octaves - _FINEST + 1


def _cells(centres: Tensor, octaves: Tensor) -> Tensor:
    """Cell of each centre among those of the octaves, Tensor[..., 2] int64."""
    size = _CELL * _OCTAVE ** (octaves + _FINEST).double()
    return (centres / size).floor().clamp(-_CELLS, _CELLS).long()


def _key(octaves: Tensor, cells: Tensor) -> Tensor:
    """Octaves and cells as one number, Tensor[...] int64; neighbours in x follow one another."""
    x, y = (cells + _CELLS // 2).clamp(0, _CELLS - 1).unbind(-1)
    return ((octaves[..., 0] * 128 + octaves[..., 1]) * _CELLS + y) * _CELLS + x


def _iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of row with row, Tensor[N], by the arithmetic of torchvision's `box_iou`."""
    sides = (torch.min(boxes[:, 2:], others[:, 2:]) - torch.max(boxes[:, :2], others[:, :2])).clamp(min=0)
    inside = sides[:, 0] * sides[:, 1]
    areas = [(x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (boxes, others)]
    return inside / (areas[0] + areas[1] - inside)
