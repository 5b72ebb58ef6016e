"""Pairs of boxes that overlap by half: those of a comparison of all with all."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou

from kdpipe.distill.losses.numeric import LossInputError
from kdpipe.distill.rois import pairing, pairing_cpu
from kdpipe.distill.rois.pairing import pair_boxes
from kdpipe.distill.rois.sampling import best_overlap


def check(boxes: Tensor, others: Tensor, iou: float = 0.5) -> int:
    """Compare with all overlaps, ties included; returns how many boxes have a partner."""
    partners, partner = pair_boxes(boxes, others, iou)
    plain = pairing._pair(boxes, others, iou)  # on other devices than a CPU
    assert torch.equal(partners, plain[0])
    assert torch.equal(partner, plain[1])
    overlap, _ = best_overlap(boxes, others)
    assert torch.equal(partners, overlap >= iou)
    every = best_of_all(boxes, others)
    assert torch.equal(partner[partners], every[partners])
    assert not partner[~partners].any()
    return int(partners.sum())


def best_of_all(boxes: Tensor, others: Tensor) -> Tensor:
    """The first of the others that overlap a box most."""
    if not len(boxes) or not len(others):
        return torch.zeros(len(boxes), dtype=torch.int64)
    overlaps: Tensor = box_iou(boxes, others)
    return (overlaps == overlaps.amax(dim=1, keepdim=True)).int().argmax(dim=1)


def random_boxes(count: int, seed: int, size: float = 500.0, smallest: float = 0.01) -> Tensor:
    """Sides of all orders of magnitude, anywhere, clipped to a square of the size as predictions are."""
    g = torch.Generator().manual_seed(seed)
    sides = smallest * (size / smallest) ** torch.rand(count, 2, generator=g, dtype=torch.float64)
    corner = (torch.rand(count, 2, generator=g, dtype=torch.float64) * 1.2 - 0.1) * size
    return torch.cat([corner, corner + sides], dim=1).clamp(0, size).float()


# few coordinates: equal boxes, equal overlaps, overlaps of exactly 1/2, and boxes without area
coordinates = st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0])
on_a_grid = st.tuples(coordinates, coordinates, coordinates, coordinates)
sides = st.floats(0, 2000, width=32)
anywhere = st.tuples(sides, sides, sides, sides)


def ordered(corners: Sequence[Sequence[float]]) -> Tensor:
    points = torch.tensor(corners, dtype=torch.float32).reshape(-1, 2, 2)
    return points.sort(dim=1).values.flatten(1)


@given(
    boxes=st.lists(on_a_grid, max_size=12) | st.lists(anywhere, max_size=8),
    others=st.lists(on_a_grid, max_size=30) | st.lists(anywhere, max_size=8),
    shift=st.sampled_from([0.0, -7.0, 1000.5, 1e6]),
    scale=st.sampled_from([1.0, 0.01, 0.3, 100.0]),
)
def test_partners_are_those_of_all_overlaps(
    boxes: list[Sequence[float]], others: list[Sequence[float]], shift: float, scale: float
) -> None:
    check(ordered(boxes) * scale + shift, ordered(others) * scale + shift)


@given(seed=st.integers(0, 10**6), near=st.sampled_from([0.02, 0.2, 0.5]), iou=st.sampled_from([0.5, 0.7, 1.0]))
def test_partners_of_boxes_that_were_moved(seed: int, near: float, iou: float) -> None:
    """Every box has candidates, many of which overlap it by about a half."""
    others = random_boxes(300, seed, smallest=1.0)
    g = torch.Generator().manual_seed(seed)
    partners = others[torch.randint(0, 300, (60,), generator=g)]
    sides = (partners[:, 2:] - partners[:, :2]).repeat(1, 2)
    boxes = (partners + near * sides * torch.randn(60, 4, generator=g)).clamp(0, 500)
    check(ordered(boxes.tolist()), others, iou)


@pytest.mark.parametrize("iou", [0.49, 1.01, float("nan")])
def test_overlaps_of_less_than_a_half_are_not_looked_for(iou: float) -> None:
    with pytest.raises(LossInputError, match=r"at least 0\.5"):
        pair_boxes(torch.zeros(0, 4), torch.zeros(0, 4), iou)


@pytest.mark.parametrize("place", [(0.0, 0.0), (1.0, 1.0), (0.5, 1.0)])
@pytest.mark.parametrize("part", [(0.5, 1.0), (1.0, 0.5), (0.5**0.5, 0.5**0.5), (0.4999999, 1.0)])
def test_boxes_within_others_of_twice_their_area(part: tuple[float, float], place: tuple[float, float]) -> None:
    """An IoU of 1/2, or hardly less, of boxes as unlike, and as far apart, as they can be; any size and place."""
    g = torch.Generator().manual_seed(0)
    corner = 5000 * torch.rand(500, 2, generator=g)
    big = 2 ** (11 * torch.rand(500, 2, generator=g) - 1)
    small = big * torch.tensor(part)
    at = corner + (big - small) * torch.tensor(place)
    boxes, others = torch.cat([corner, corner + big], 1), torch.cat([at, at + small], 1)
    assert min(check(boxes, others), check(others, boxes)) > 30


def test_boxes_of_one_size_and_a_third_of_it_apart() -> None:
    g = torch.Generator().manual_seed(0)
    corner, sides = 5000 * torch.rand(500, 2, generator=g), 2 ** (11 * torch.rand(500, 2, generator=g) - 1)
    for axis in torch.eye(2):
        moved = corner + sides / 3.001 * axis
        assert check(torch.cat([corner, corner + sides], 1), torch.cat([moved, moved + sides], 1)) > 400


def test_very_many_boxes_and_equal_ones() -> None:
    others = random_boxes(20000, 1, size=1333.0, smallest=4.0)
    boxes = torch.cat([random_boxes(200, 2, size=1333.0, smallest=8.0), others[5:50]])
    assert 50 < check(boxes, others) < 245
    same = torch.tensor([[10.0, 10.0, 12.0, 12.0]])
    actual, partner = pair_boxes(same.repeat(7, 1), torch.cat([same + 5, same.repeat(3000, 1)]))
    assert actual.all()
    assert partner.tolist() == [1] * 7


@pytest.mark.parametrize("pairs", [1, 7, 100])
def test_slices_change_nothing(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    others = random_boxes(60, 3, size=40.0, smallest=5.0)
    boxes = others[::2] + 0.5
    whole = pair_boxes(boxes, others)
    assert whole[0].sum() > 10
    monkeypatch.setattr(pairing_cpu, "_SLICE_PAIRS", pairs)
    for actual, expected in zip(pair_boxes(boxes, others), whole, strict=True):
        assert torch.equal(actual, expected)


def test_nothing_to_pair() -> None:
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0], [3.0, 3.0, 3.0, 3.0]])
    assert [x.tolist() for x in pair_boxes(boxes, boxes[:0])] == [[False, False], [0, 0]]
    assert [x.tolist() for x in pair_boxes(boxes[:0], boxes)] == [[], []]
    assert [x.tolist() for x in pair_boxes(boxes, boxes)] == [[True, False], [0, 0]]  # no area, no overlap


def test_far_fewer_pairs_are_looked_at_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all of the others are alike, never more than a slice at a time."""
    sizes: list[int] = []
    iou = pairing_cpu._iou

    def watch(boxes: Tensor, others: Tensor) -> Tensor:
        sizes.append(len(boxes))
        return iou(boxes, others)

    monkeypatch.setattr(pairing_cpu, "_iou", watch)
    pair_boxes(random_boxes(100, 1, smallest=8.0), random_boxes(20000, 2, smallest=8.0))
    assert sum(sizes) < 100 * 20000 / 20
    sizes.clear()
    monkeypatch.setattr(pairing_cpu, "_SLICE_PAIRS", 5000)
    pair_boxes(torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(10, 1), torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(2000, 1))
    assert sum(sizes) == 10 * 2000
    assert max(sizes) == 5000
