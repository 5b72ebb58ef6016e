"""Sampling of RoIs, against plain loops."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdpipe.distill.losses.numeric import LossInputError
from kdpipe.distill.rois.sampling import RoiSampling, SampledRois, sample_rois

K = 5


def naive_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0.0) * max(height, 0.0)
    return inside / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside)


def boxes_near(anchors: Tensor, each: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    boxes = anchors.repeat_interleave(each, 0)
    return boxes + torch.randn(boxes.shape, generator=generator).mul(5.0).clamp(-9, 9)


GT = torch.tensor([[10.0, 10.0, 50.0, 60.0], [30.0, 30.0, 90.0, 70.0], [120.0, 20.0, 160.0, 50.0]])
LABELS = torch.tensor([2, 0, 4])


def sample(boxes: Tensor, num_proposals: int, gt: Tensor = GT, labels: Tensor = LABELS, **options: Any) -> SampledRois:
    seed = int(options.pop("seed", 0))
    eligible = options.pop("eligible", None)
    sampling = RoiSampling(**{"num": 16, **options})
    generator = torch.Generator().manual_seed(seed)
    return sample_rois(
        boxes, num_proposals, gt, labels, sampling=sampling, num_classes=K, generator=generator, eligible=eligible
    )


@given(
    seed=st.integers(0, 1000),
    each=st.integers(0, 8),
    num=st.integers(0, 40),
    fraction=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    iou=st.sampled_from([0.3, 0.5, 0.7]),
)
def test_a_sample_is_what_it_says(seed: int, each: int, num: int, fraction: float, iou: float) -> None:
    proposals = boxes_near(GT, each, seed)
    boxes = torch.cat([proposals, GT])
    drawn = sample(boxes, len(proposals), seed=seed, num=num, positive_fraction=fraction, positive_iou=iou)
    overlaps = [[naive_iou(box, gt) for gt in GT.tolist()] for box in boxes.tolist()]
    positives = {row for row, values in enumerate(overlaps) if max(values) >= iou}
    negatives = set(range(len(proposals))) - positives
    rows = drawn.rows.tolist()
    assert len(set(rows)) == len(rows), "without replacement"
    expected_positives = min(len(positives), int(num * fraction))
    assert int(drawn.positive.sum()) == expected_positives
    assert len(rows) == expected_positives + min(len(negatives), num - expected_positives)
    assert drawn.boxes.equal(boxes[drawn.rows])
    assert sorted(drawn.positive.tolist(), reverse=True) == drawn.positive.tolist(), "positives first"
    for row, label, positive, gt in zip(
        rows, drawn.labels.tolist(), drawn.positive.tolist(), drawn.gt_index.tolist(), strict=True
    ):
        if positive:
            assert row in positives
            assert overlaps[row][gt] == max(overlaps[row])
            assert label == LABELS[gt]
        else:
            assert row in negatives
            assert gt == -1
            assert label == K


def test_the_threshold_itself_is_positive() -> None:
    gt = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 5.0], [0.0, 0.0, 10.0, 4.9]])
    assert sample(boxes, 2, gt, LABELS[:1], positive_fraction=1.0).positive.tolist() == [True, False]


def test_positives_are_drawn_from_those_that_are_eligible() -> None:
    boxes = torch.cat([boxes_near(GT, 6, seed=1), GT, GT + 300])
    every = sample(boxes, len(boxes), num=100, positive_fraction=1.0)
    eligible = torch.arange(len(boxes)) % 2 == 0
    drawn = sample(boxes, len(boxes), num=100, positive_fraction=1.0, eligible=eligible)
    assert drawn.rows[drawn.positive].tolist() == [row for row in every.rows[every.positive].tolist() if row % 2 == 0]
    assert drawn.rows[~drawn.positive].equal(every.rows[~every.positive]), "negatives are"
    same = sample(boxes, len(boxes), num=5, positive_fraction=1.0, eligible=torch.ones(len(boxes), dtype=torch.bool))
    assert same.rows.equal(sample(boxes, len(boxes), num=5, positive_fraction=1.0).rows)


def test_the_generator_alone_decides() -> None:
    boxes = boxes_near(GT, 40, 0)
    first, again, other = (sample(boxes, len(boxes), seed=seed, num=20) for seed in (3, 3, 4))
    torch.manual_seed(99)
    assert first.rows.equal(again.rows)
    assert not first.rows.equal(other.rows)


def test_all_candidates_are_equally_likely() -> None:
    boxes = torch.cat([GT[:1].expand(12, 4), GT[:1].expand(20, 4) + 500.0])
    counts = torch.zeros(32)
    for seed in range(600):
        counts[sample(boxes, 32, seed=seed, num=16).rows] += 1
    # 4 of 12 positives and 12 of 20 negatives: 200 and 360 times each, five standard deviations of leeway
    assert (counts[:12] - 200).abs().max() < 5 * math.sqrt(200 * 2 / 3)
    assert (counts[12:] - 360).abs().max() < 5 * math.sqrt(360 * 0.4)


def test_without_ground_truth_everything_is_background() -> None:
    drawn = sample(boxes_near(GT, 10, 0), 30, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert drawn.labels.tolist() == [K] * 16
    assert drawn.gt_index.tolist() == [-1] * 16
    assert not drawn.positive.any()


def test_an_object_that_the_student_has_no_annotation_of_is_not_background() -> None:
    boxes = torch.cat([GT + 500.0, GT])
    drawn = sample(boxes, 3, GT[:1], LABELS[:1], num=100, positive_fraction=0.5)
    assert drawn.rows.tolist() == [3, 0, 1, 2]
    assert drawn.labels.tolist() == [2, K, K, K]


def test_nothing_to_draw_from() -> None:
    drawn = sample(torch.zeros(0, 4), 0)
    assert drawn.rows.shape == drawn.labels.shape == drawn.positive.shape == drawn.gt_index.shape == (0,)
    assert drawn.boxes.shape == (0, 4)


def test_what_cannot_be_sampled_is_named() -> None:
    boxes = boxes_near(GT, 2, 0)
    with pytest.raises(LossInputError, match="6 boxes of which 7 are proposals"):
        sample(boxes, 7)
    with pytest.raises(LossInputError, match=r"positive_fraction 1\.5"):
        sample(boxes, 6, positive_fraction=1.5)
    with pytest.raises(LossInputError, match=r"gt_boxes has shape \[3, 4\]; expected \[2, 4\]"):
        sample(boxes, 6, GT, LABELS[:2])
    with pytest.raises(LossInputError, match=r"boxes has shape \[6, 5\]"):
        sample(torch.zeros(6, 5), 6)
