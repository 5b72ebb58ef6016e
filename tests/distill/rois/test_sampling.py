"""Sampling of RoIs, levels and RoI features, against plain loops and mmdet's own extractor."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align

from kdpipe.distill.losses.numeric import LossInputError
from kdpipe.distill.rois.align_cpu import roi_windows
from kdpipe.distill.rois.sampling import (
    SampledRois,
    assign_levels,
    roi_align_assigned,
    roi_align_levels,
    sample_rois,
)

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
    num = int(options.pop("num", 16))
    generator = torch.Generator().manual_seed(seed)
    return sample_rois(boxes, num_proposals, gt, labels, num=num, num_classes=K, generator=generator, **options)


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
    found = sample(boxes, len(proposals), seed=seed, num=num, positive_fraction=fraction, positive_iou=iou)
    overlaps = [[naive_iou(box, gt) for gt in GT.tolist()] for box in boxes.tolist()]
    positives = {row for row, values in enumerate(overlaps) if max(values) >= iou}
    negatives = set(range(len(proposals))) - positives
    rows = found.rows.tolist()
    assert len(set(rows)) == len(rows), "without replacement"
    expected_positives = min(len(positives), int(num * fraction))
    assert int(found.positive.sum()) == expected_positives
    assert len(rows) == expected_positives + min(len(negatives), num - expected_positives)
    assert found.boxes.equal(boxes[found.rows])
    assert sorted(found.positive.tolist(), reverse=True) == found.positive.tolist(), "positives first"
    for row, label, positive, gt in zip(
        rows, found.labels.tolist(), found.positive.tolist(), found.gt_index.tolist(), strict=True
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
    found = sample(boxes, len(boxes), num=100, positive_fraction=1.0, eligible=eligible)
    assert found.rows[found.positive].tolist() == [row for row in every.rows[every.positive].tolist() if row % 2 == 0]
    assert found.rows[~found.positive].equal(every.rows[~every.positive]), "negatives are"
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
    found = sample(boxes_near(GT, 10, 0), 30, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert found.labels.tolist() == [K] * 16
    assert found.gt_index.tolist() == [-1] * 16
    assert not found.positive.any()


def test_an_object_that_the_student_has_no_annotation_of_is_not_background() -> None:
    boxes = torch.cat([GT + 500.0, GT])
    found = sample(boxes, 3, GT[:1], LABELS[:1], num=100, positive_fraction=0.5)
    assert found.rows.tolist() == [3, 0, 1, 2]
    assert found.labels.tolist() == [2, K, K, K]


def test_nothing_to_draw_from() -> None:
    found = sample(torch.zeros(0, 4), 0)
    assert found.rows.shape == found.labels.shape == found.positive.shape == found.gt_index.shape == (0,)
    assert found.boxes.shape == (0, 4)


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


def naive_roi_align(x: Tensor, stride: int, box: list[float], size: int, ratio: int, aligned: bool) -> Tensor:
    """RoIAlign from its definition (Mask R-CNN, section 3); for boxes whose samples lie inside the map."""
    half = 0.5 if aligned else 0.0
    left, top, right, bottom = (value / stride - half for value in box)
    out = torch.zeros(len(x), size, size, dtype=torch.float64)
    ny = ratio or math.ceil((bottom - top) / size)
    nx = ratio or math.ceil((right - left) / size)
    for i in range(size):
        for j in range(size):
            for a in range(ny):
                for b in range(nx):
                    y = top + (i + (a + 0.5) / ny) * (bottom - top) / size
                    z = left + (j + (b + 0.5) / nx) * (right - left) / size
                    y0, z0 = math.floor(y), math.floor(z)
                    for yy, wy in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
                        for zz, wz in ((z0, 1 - (z - z0)), (z0 + 1, z - z0)):
                            out[:, i, j] += wy * wz * x[:, yy, zz] / (ny * nx)
    return out


STRIDES = (4, 8, 16)


def pyramid(batch: int = 2, channels: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, channels, 160 // s, 192 // s, dtype=torch.float64).to(dtype) for s in STRIDES]


ROIS = torch.tensor(
    [[0, 20.0, 24.0, 50.0, 41.0], [1, 30.0, 17.0, 151.0, 130.0], [0, 17.5, 40.2, 77.7, 90.1]], dtype=torch.float64
)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [1, 2])
def test_roi_features_of_every_level(aligned: bool, ratio: int) -> None:
    levels = pyramid()
    found = roi_align_levels(levels, STRIDES, ROIS, size=3, sampling_ratio=ratio, aligned=aligned)
    assert found.shape == (3, 3, 2, 3, 3)
    for r, (index, *box) in enumerate(ROIS.tolist()):
        for level, stride in enumerate(STRIDES):
            expected = naive_roi_align(levels[level][int(index)], stride, box, 3, ratio, aligned)
            torch.testing.assert_close(found[r, level], expected)


@pytest.mark.parametrize("aligned", [True, False])
def test_roi_features_and_gradients_are_those_of_torchvision_at_and_over_the_edge(aligned: bool) -> None:
    boxes = [
        [-9.0, -30.0, 40.0, 20.0],
        [150.0, 100.0, 260.0, 190.0],
        [3.0, 4.0, 3.2, 4.1],
        [-50.0, -50.0, -30.0, -20.0],
    ]
    rois = torch.tensor([[i % 2, *box] for i, box in enumerate(boxes)], dtype=torch.float64)
    ours, theirs = ([level.requires_grad_() for level in pyramid()] for _ in range(2))
    found = roi_align_levels(ours, STRIDES, rois, size=5, sampling_ratio=3, aligned=aligned)
    expected = torch.stack([roi_align(x, rois, 5, 1 / s, 3, aligned) for x, s in zip(theirs, STRIDES, strict=True)], 1)
    torch.testing.assert_close(found, expected)
    weights = torch.rand(found.shape, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def large_rois() -> Tensor:
    """Tall, wide and large ones, also over the edge, and one that is small: of the map's pixels they touch few."""
    boxes = [
        [2.0, 3.0, 190.0, 157.0],
        [0.0, 0.0, 192.0, 160.0],
        [20.0, 10.0, 31.0, 150.0],
        [10.0, 90.0, 185.0, 99.0],
        [-70.0, -60.0, 230.0, 191.0],
        [50.0, 50.0, 60.0, 61.0],
    ]
    return torch.tensor([[i % 2, *box] for i, box in enumerate(boxes)], dtype=torch.float64)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("size", "ratio"), [(3, 1), (3, 2), (7, 1)])
def test_large_rois_are_those_of_torchvision(aligned: bool, size: int, ratio: int) -> None:
    """Forward and backward, where sample points lie so far apart that the pixels between them are left out."""
    ours, theirs = (torch.randn(2, 3, 160, 192, dtype=torch.float64) for _ in range(2))
    theirs.copy_(ours)
    rois = large_rois()
    found = roi_align_levels([ours.requires_grad_()], [1], rois, size, ratio, aligned)[:, 0]
    expected = roi_align(theirs.requires_grad_(), rois, size, 1.0, ratio, aligned)
    torch.testing.assert_close(found, expected)
    weights = torch.rand(found.shape, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_a_large_roi_costs_no_more_than_its_sample_points(ratio: int) -> None:
    """Pixels gathered per RoI: the four around each point, from a map of any size; two points per cell: 28 x 28."""
    shape, whole = (1, 1, 1000, 1000), torch.tensor([[0.0, 0.0, 0.0, 1000.0, 1000.0]])
    boxes = torch.cat([whole, whole * torch.tensor([1.0, 1, 1, 0.5, 0.02]), whole * 0.1])
    for windows in (
        roi_windows(boxes, 1.0, (7, 7), shape, ratio, True),
        roi_windows(boxes, 0.1, (7, 7), shape, ratio, True),
    ):
        gathered = sum(len(window.pixels) for window in windows)
        assert gathered <= 3 * (2 * 7 * ratio) ** 2
        assert sorted(row for window in windows for row in window.rois.tolist()) == [0, 1, 2]


def test_every_level_needs_a_fixed_number_of_samples() -> None:
    with pytest.raises(LossInputError, match="sampling_ratio"):
        roi_align_levels(pyramid(), STRIDES, ROIS, sampling_ratio=0)


def test_the_default_is_two_samples_per_cell() -> None:
    levels = pyramid()
    expected = roi_align_levels(levels, STRIDES, ROIS, size=7, sampling_ratio=2, aligned=True)
    assert roi_align_levels(levels, STRIDES, ROIS).equal(expected)


def test_the_assigned_level_is_one_of_all() -> None:
    levels = pyramid()
    found = roi_align_assigned(levels, STRIDES, ROIS, finest_scale=14, size=7, sampling_ratio=2)
    every = roi_align_levels(levels, STRIDES, ROIS)
    assigned = assign_levels(ROIS[:, 1:], 14, 3)
    assert assigned.tolist() == [0, 2, 1]
    torch.testing.assert_close(found, every[torch.arange(3), assigned])


@pytest.mark.filterwarnings("ignore:.*has been moved:ImportWarning")  # mmcv, while mmdet is imported
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_levels_and_features_are_those_of_mmdet(sampling_ratio: int, aligned: bool) -> None:
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

    import kdpipe.pipelines  # noqa: F401  (makes mmdet importable without a compiled mmcv)

    roi_layer = {"type": "RoIAlign", "output_size": 7, "sampling_ratio": sampling_ratio, "aligned": aligned}
    extractor = SingleRoIExtractor(roi_layer, out_channels=2, featmap_strides=list(STRIDES), finest_scale=14)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, 2, generator=generator).sort(1).values * torch.tensor([192.0, 160.0])
    rois = torch.cat([torch.randint(0, 2, (200, 1), generator=generator).float(), corners.flatten(1)], 1)
    rois[0, 1:] = torch.tensor([5.0, 5.0, 33.0, 33.0])  # exactly on the border between two levels
    assert assign_levels(rois[:, 1:], 14, 3).equal(extractor.map_roi_levels(rois, 3))
    levels = pyramid(dtype=torch.float32)
    expected = extractor(tuple(levels), rois)
    found = roi_align_assigned(levels, STRIDES, rois, 14, 7, sampling_ratio, aligned)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_levels_by_hand() -> None:
    sides = torch.tensor([1.0, 56.0, 111.9, 112.0, 223.0, 224.0, 448.0, 5000.0])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], 1)
    assert assign_levels(boxes, 56, 4).tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert assign_levels(boxes, 56, 1).tolist() == [0] * 8
    assert assign_levels(torch.zeros(1, 4), 56, 4).tolist() == [0]
    assert assign_levels(torch.zeros(0, 4), 56, 4).shape == (0,)


def test_no_rois_keep_every_level_in_the_graph() -> None:
    for use in ("levels", "assigned"):
        levels = [level.requires_grad_() for level in pyramid(dtype=torch.float32)]
        if use == "levels":
            found = roi_align_levels(levels, STRIDES, torch.zeros(0, 5))
            assert found.shape == (0, 3, 2, 7, 7)
        else:
            found = roi_align_assigned(levels, STRIDES, torch.zeros(0, 5), 14)
            assert found.shape == (0, 2, 7, 7)
        found.sum().backward()
        for level in levels:
            assert level.grad is not None
            assert not level.grad.any()


def test_gradients_reach_the_pyramid() -> None:
    levels = [level.requires_grad_() for level in pyramid()]
    roi_align_assigned(levels, STRIDES, ROIS, 14).sum().backward()
    for level in levels:  # one RoI on each: the weights of its 49 cells sum to 1 per channel
        assert level.grad is not None
        assert level.grad.sum().item() == pytest.approx(49 * 2)
    small = [level[:, :1, :6, :6].detach().clone().requires_grad_() for level in pyramid(batch=1)]
    rois = torch.tensor([[0, 1.0, 2.0, 20.0, 17.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: roi_align_levels(x, STRIDES, rois, size=2), tuple(small), fast_mode=True)


def test_a_level_that_nobody_needs_may_be_missing() -> None:
    levels = pyramid()
    whole = roi_align_assigned(levels, STRIDES, ROIS[1:], 14)
    assert roi_align_assigned([None, *levels[1:]], STRIDES, ROIS[1:], 14).equal(whole)
    with pytest.raises(LossInputError, match="1 of 3 RoIs are assigned to level 0"):
        roi_align_assigned([None, *levels[1:]], STRIDES, ROIS, 14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coordinates_stay_exact_under_half_precision(dtype: torch.dtype) -> None:
    levels = pyramid(dtype=dtype)
    expected = roi_align_levels([level.float() for level in levels], STRIDES, ROIS.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = roi_align_levels(levels, STRIDES, ROIS.float())
    assert found.dtype == torch.float32
    assert found.equal(expected)


def test_pyramids_that_do_not_fit_are_named() -> None:
    levels = pyramid()
    with pytest.raises(LossInputError, match="one stride per level"):
        roi_align_levels(levels, STRIDES[:2], ROIS)
    with pytest.raises(LossInputError, match="same batch and channels"):
        roi_align_levels([levels[0][:, :1], *levels[1:]], STRIDES, ROIS)
    with pytest.raises(LossInputError, match=r"rois has shape \[3, 4\]; expected \[3, 5\]"):
        roi_align_levels(levels, STRIDES, ROIS[:, 1:])
    with pytest.raises(LossInputError, match="at least one level"):
        roi_align_assigned([None], STRIDES[:1], ROIS, 14)
    with pytest.raises(LossInputError, match=r"expected \[B, C, h, w\]"):
        roi_align_levels([levels[0][0]], STRIDES[:1], ROIS)
