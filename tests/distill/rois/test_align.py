"""Levels and RoI features, against plain loops, torchvision and mmdet's own extractor."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from kdpipe.distill.losses.numeric import LossInputError
from kdpipe.distill.rois.align import assign_levels, roi_align_assigned, roi_align_levels
from kdpipe.distill.rois.align_cpu import roi_windows


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
    actual = roi_align_levels(levels, STRIDES, ROIS, size=3, sampling_ratio=ratio, aligned=aligned)
    assert actual.shape == (3, 3, 2, 3, 3)
    for r, (index, *box) in enumerate(ROIS.tolist()):
        for level, stride in enumerate(STRIDES):
            expected = naive_roi_align(levels[level][int(index)], stride, box, 3, ratio, aligned)
            torch.testing.assert_close(actual[r, level], expected)


@pytest.mark.parametrize("aligned", [True, False])
def test_roi_features_and_gradients_are_those_of_torchvision_at_and_over_the_edge(aligned: bool) -> None:
    boxes = [
        [-9.0, -30.0, 40.0, 20.0],
        [150.0, 100.0, 260.0, 190.0],
        [3.0, 4.0, 3.2, 4.1],
        [-50.0, -50.0, -30.0, -20.0],
    ]
    rois = torch.tensor([[i % 2, *box] for i, box in enumerate(boxes)], dtype=torch.float64)
    levels_here, reference_levels = ([level.requires_grad_() for level in pyramid()] for _ in range(2))
    actual = roi_align_levels(levels_here, STRIDES, rois, size=5, sampling_ratio=3, aligned=aligned)
    expected = torch.stack(
        [roi_align(x, rois, 5, 1 / s, 3, aligned) for x, s in zip(reference_levels, STRIDES, strict=True)], 1
    )
    torch.testing.assert_close(actual, expected)
    weights = torch.rand(actual.shape, dtype=torch.float64)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(levels_here, reference_levels, strict=True):
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
    level, reference_level = (torch.randn(2, 3, 160, 192, dtype=torch.float64) for _ in range(2))
    reference_level.copy_(level)
    rois = large_rois()
    actual = roi_align_levels([level.requires_grad_()], [1], rois, size, ratio, aligned)[:, 0]
    expected = roi_align(reference_level.requires_grad_(), rois, size, 1.0, ratio, aligned)
    torch.testing.assert_close(actual, expected)
    weights = torch.rand(actual.shape, dtype=torch.float64)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(level.grad, reference_level.grad)


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
        assert sorted(row for window in windows for row in window.rows.tolist()) == [0, 1, 2]


def test_every_level_needs_a_fixed_number_of_samples() -> None:
    with pytest.raises(LossInputError, match="sampling_ratio"):
        roi_align_levels(pyramid(), STRIDES, ROIS, sampling_ratio=0)


def test_the_default_is_two_samples_per_cell() -> None:
    levels = pyramid()
    expected = roi_align_levels(levels, STRIDES, ROIS, size=7, sampling_ratio=2, aligned=True)
    assert roi_align_levels(levels, STRIDES, ROIS).equal(expected)


def test_the_assigned_level_is_one_of_all() -> None:
    levels = pyramid()
    actual = roi_align_assigned(levels, STRIDES, ROIS, finest_scale=14, size=7, sampling_ratio=2)
    every = roi_align_levels(levels, STRIDES, ROIS)
    assigned = assign_levels(ROIS[:, 1:], 14, 3)
    assert assigned.tolist() == [0, 2, 1]
    torch.testing.assert_close(actual, every[torch.arange(3), assigned])


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
    actual = roi_align_assigned(levels, STRIDES, rois, 14, 7, sampling_ratio, aligned)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


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
            actual = roi_align_levels(levels, STRIDES, torch.zeros(0, 5))
            assert actual.shape == (0, 3, 2, 7, 7)
        else:
            actual = roi_align_assigned(levels, STRIDES, torch.zeros(0, 5), 14)
            assert actual.shape == (0, 2, 7, 7)
        actual.sum().backward()
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
        actual = roi_align_levels(levels, STRIDES, ROIS.float())
    assert actual.dtype == torch.float32
    assert actual.equal(expected)


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


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "box", [[NAN, 2.0, 30.0, 40.0], [1.0, 2.0, INF, 40.0], [30.0, 2.0, 1.0, 40.0], [1.0, 5.0, 9.0, 4.0]]
)
def test_rois_that_are_no_boxes_are_named(box: list[float]) -> None:
    """A box of NaN would end the process where torchvision aligns it, and have no level; so would an inverted one."""
    rois = torch.cat([ROIS, torch.tensor([[0.0, *box]], dtype=torch.float64)])
    message = "1 of 4 RoIs are no boxes, the first of them"
    with pytest.raises(LossInputError, match=message):
        roi_align_levels(pyramid(), STRIDES, rois)
    with pytest.raises(LossInputError, match=message):
        roi_align_assigned(pyramid(), STRIDES, rois, 14)
    with pytest.raises(LossInputError, match=message):
        assign_levels(rois[:, 1:], 14, 3)


@pytest.mark.parametrize("image", [-1.0, 2.0, NAN])
def test_rois_of_images_that_are_not_in_the_batch_are_refused(image: float) -> None:
    rois = ROIS.clone()
    rois[1, 0] = image
    with pytest.raises(LossInputError, match="images"):
        roi_align_levels(pyramid(batch=2), STRIDES, rois)
    with pytest.raises(LossInputError, match="images"):
        roi_align_assigned(pyramid(batch=2), STRIDES, rois, 14)


@pytest.mark.parametrize(("scale", "levels"), [(0.0, 4), (NAN, 4), (INF, 4), (56.0, 0)])
def test_levels_need_a_scale(scale: float, levels: int) -> None:
    with pytest.raises(LossInputError, match="scale above 0"):
        assign_levels(ROIS[:, 1:], scale, levels)


def test_boxes_without_area_have_features() -> None:
    rois = torch.tensor([[0, 20.0, 24.0, 20.0, 24.0]], dtype=torch.float64)
    assert torch.isfinite(roi_align_levels(pyramid(), STRIDES, rois)).all()
    assert roi_align_assigned(pyramid(), STRIDES, rois, 14).shape == (1, 2, 7, 7)
