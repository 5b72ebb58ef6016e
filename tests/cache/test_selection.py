import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdpipe.cache.write.selection import choose_objects, merge_unlikely


def iou(first: list[float], second: list[float]) -> float:
    sides = [min(first[i + 2], second[i + 2]) - max(first[i], second[i]) for i in (0, 1)]
    if min(sides) <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return math.prod(sides) / (sum(areas) - math.prod(sides))


def naive_choice(boxes: Tensor, num_gt: int, limit: int) -> list[int]:
    """Objects take turns, as children choose their teams."""
    rows, count = boxes.double().tolist(), len(boxes) - num_gt
    waiting: list[list[tuple[float, int]]] = [[] for _ in range(num_gt)]
    for row in range(count):
        overlaps = [iou(rows[row], rows[count + k]) for k in range(num_gt)]
        if overlaps and max(overlaps) >= 0.5:
            waiting[overlaps.index(max(overlaps))].append((-max(overlaps), row))
    waiting = [sorted(candidates) for candidates in waiting]
    chosen_rows: list[int] = []
    turn = 0
    while any(len(candidates) > turn for candidates in waiting):
        chosen_rows += [row for _, row in sorted(candidates[turn] for candidates in waiting if len(candidates) > turn)]
        turn += 1
    return sorted(chosen_rows[: max(0, limit - num_gt)]) + list(range(count, len(boxes)))


@settings(max_examples=100)
@given(st.integers(0, 40), st.integers(0, 6), st.integers(1, 30), st.integers(0, 10_000))
def test_the_choice_is_that_of_taking_turns(proposals: int, num_gt: int, limit: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    truth = torch.cat([torch.rand(num_gt, 2, generator=g) * 30, 20 + torch.rand(num_gt, 2, generator=g) * 20], dim=1)
    truth[:, 2:] += truth[:, :2]
    near = torch.randint(0, max(num_gt, 1), (proposals,), generator=g)
    boxes = (truth[near] if num_gt else torch.rand(proposals, 4, generator=g)) + torch.randn(
        proposals, 4, generator=g
    ).mul(4)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    every = torch.cat([boxes, truth])
    assert choose_objects(every, num_gt, limit).tolist() == naive_choice(every, num_gt, limit)


def test_the_ground_truth_is_always_chosen() -> None:
    truth = torch.tensor([[0.0, 0, 10, 10], [50.0, 0, 60, 10], [90.0, 0, 99, 10]])
    boxes = torch.cat([truth[:1], truth[:1] + 1, truth[1:2], truth])
    assert choose_objects(boxes, 3, limit=1).tolist() == [3, 4, 5]
    assert choose_objects(boxes, 3, limit=5).tolist() == [0, 2, 3, 4, 5]  # the second of the first object is left out
    assert choose_objects(boxes, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert choose_objects(boxes, 0).tolist() == []
    assert choose_objects(truth, 3).tolist() == [0, 1, 2]
    assert choose_objects(boxes[:0], 0).tolist() == []


def test_half_is_positive() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 5], [0.0, 0, 10, 4.9], [0.0, 0, 10, 10]])
    assert choose_objects(boxes, 1).tolist() == [0, 2]


def test_unlikely_classes_share_their_mean() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 6], [40.0, 40, 50, 50], [0.0, 0, 10, 10]])
    probabilities = torch.tensor([[0.5, 0.0001, 0.0003, 0.0002, 0.4994]]).repeat(4, 1)
    deltas = torch.tensor([1.0, 2, 6, 10])[None, :, None].repeat(4, 1, 4)
    merged = merge_unlikely(deltas, probabilities.log(), boxes, torch.tensor([3]), 1e-3)
    # class 0 is likely everywhere; class 3 is that of an object, which all boxes but the third overlap
    overlapping = [1.0, *[(2 + 3 * 6) / 4] * 2, 10]
    alone = [1.0, *[(2 + 3 * 6 + 2 * 10) / 6] * 3]
    expected = torch.tensor([overlapping, overlapping, alone, overlapping])
    torch.testing.assert_close(merged[:, :, 0], expected, rtol=2e-3, atol=0)  # logits are rounded to float16
    assert (merged == merged[..., :1]).all()
    none = merge_unlikely(deltas, probabilities.log(), boxes, torch.zeros(0, dtype=torch.int64), 1e-3)
    torch.testing.assert_close(none[:, :, 0], expected[[2] * 4], rtol=2e-3, atol=0)


@pytest.mark.parametrize("floor", [1e-3, 0.01, 0.2])
def test_a_sum_weighted_by_probability_stays(floor: float) -> None:
    g = torch.Generator().manual_seed(0)
    logits, deltas = torch.randn(50, 9, generator=g) * 4, torch.randn(50, 8, 4, generator=g)
    boxes = torch.rand(50, 4, generator=g).sort(dim=1).values
    merged = merge_unlikely(deltas, logits, boxes, torch.tensor([1, 5]), floor)
    probabilities = logits.half().float().softmax(1)[:, :-1]
    likely = probabilities >= floor
    assert torch.equal(merged[likely], deltas[likely])
    assert 0.1 < likely.float().mean() < 1
    assert all(len(set(row[~is_kept, 0].tolist())) <= 1 + 2 for row, is_kept in zip(merged, likely, strict=True))
    sums = [torch.einsum("rk,rkd->rd", probabilities, x) for x in (merged, deltas)]
    torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-6)


def test_nothing_is_unlikely_without_a_floor() -> None:
    deltas = torch.randn(3, 4, 4)
    boxes = torch.rand(3, 4).sort(dim=1).values
    assert torch.equal(merge_unlikely(deltas, torch.randn(3, 5) * 30, boxes, torch.tensor([0]), 0.0), deltas)
