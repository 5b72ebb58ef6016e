"""Boxes near objects."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from kdpipe.pipelines.teacher.jitter import jittered_boxes

OBJECTS = torch.tensor([[10.0, 20, 60, 90], [0, 0, 200, 150], [100, 60, 103, 140]])
SIZE = (150, 200)


def test_overlaps_are_spread_evenly() -> None:
    boxes = jittered_boxes(OBJECTS[:1].repeat(40, 1), SIZE, 1280, seed=3)
    overlap = box_iou(boxes, OBJECTS[:1].double())[:, 0]
    assert len(boxes) == 1280
    assert overlap.min() > 0.29
    assert overlap.max() < 0.91
    shares = torch.histc(overlap, 6, 0.3, 0.9) / len(overlap)
    assert ((shares - 1 / 6).abs() < 0.04).all()
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - torch.tensor([35.0, 55.0])
    assert (centres.mean(0).abs() < 3).all()
    assert (centres.std(0) > 3).all()


@given(st.integers(0, 12), st.integers(0, 200), st.integers(0, 2**63 - 1))
def test_objects_share_the_budget(count: int, budget: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=g) * 100
    objects = torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=g) * 49], dim=1)
    boxes = jittered_boxes(objects, SIZE, budget, seed)
    each = min(32, max(1, budget // count)) if count else 0
    assert len(boxes) == min(budget, each * count)
    assert torch.equal(boxes, jittered_boxes(objects, SIZE, budget, seed))
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([200, 150, 200, 150])).all()
    of_object = objects.double().repeat_interleave(each, dim=0)[:budget]
    overlap = box_iou(boxes, of_object).diagonal() if len(boxes) else boxes[:, 0]
    assert (overlap > 0.29).all()


def test_other_seeds_give_other_boxes() -> None:
    first, second = (jittered_boxes(OBJECTS, SIZE, 30, seed) for seed in (0, 1))
    assert first.shape == second.shape == (30, 4)
    assert (first != second).any(1).all()


@pytest.mark.parametrize("box", [[0.0, 0, 200, 150], [5.0, 5, 5.01, 100]])
def test_objects_at_the_edges_of_what_is_possible(box: list[float]) -> None:
    boxes = jittered_boxes(torch.tensor([box]), SIZE, 32, seed=0)
    assert boxes.isfinite().all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
