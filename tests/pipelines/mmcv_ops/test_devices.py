"""Every op on each device, in each precision and layout, forward and backward, against float64 on the CPU."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mmcv.ops as mmcv_ops  # of the bridge, which `tests/conftest.py` put in
import pytest
import torch
from torch import Tensor, nn

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
PRECISIONS = ["float32", "float16", "autocast"]


def random(*shape: int, seed: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


class Case(NamedTuple):
    """An op: a function of `inputs`, which get gradients, and then of `constants`, which get none."""

    op: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...] = ()


def roi_align_case(count: int, ratio: int, aligned: bool, size: int = 7) -> Case:
    """RoIs inside, over the border, and outside of two maps of 20 x 24 at stride 4."""
    corner = random(count, 2, seed=1, low=-10, high=90)
    image = torch.arange(count, dtype=torch.float64)[:, None] % 2
    side = random(count, 2, seed=2, low=1, high=60)
    # a half type holds such numbers, and no side is a multiple of 28 pixels, where the number of samples changes
    corner, side = (corner * 4).round() / 4, (side * 4).round() / 4 + 1 / 8
    rois = torch.cat([image, corner, corner + side], dim=1)

    def op(x: Tensor, rois: Tensor) -> Tensor:
        pooled: Tensor = mmcv_ops.roi_align(x, rois, size, 0.25, ratio, "avg", aligned)
        return pooled

    return Case(op, (random(2, 8, 20, 24, seed=3),), (rois,))


def deform_case(modulated: bool, stride: int, padding: int, dilation: int, groups: int, deform_groups: int) -> Case:
    """Three images of 9 x 10 with 4 channels, and a 3 x 2 kernel."""
    reach = dilation * 2 + 1, dilation + 1
    size = [(n + 2 * padding - r) // stride + 1 for n, r in zip((9, 10), reach, strict=True)]
    taps = deform_groups * 6
    x, weight = random(3, 4, 9, 10, seed=1), random(6, 4 // groups, 3, 2, seed=4)
    offset = (random(3, 2 * taps, *size, seed=2) * 1.9 * 64).round() / 64 + 1 / 128  # at whole numbers it has a kink
    options = stride, padding, dilation, groups, deform_groups
    if not modulated:
        return Case(lambda *tensors: mmcv_ops.deform_conv2d(*tensors, *options), (x, offset, weight))
    mask, bias = random(3, taps, *size, seed=3, low=0), random(6, seed=5)
    return Case(lambda *tensors: mmcv_ops.modulated_deform_conv2d(*tensors, *options), (x, offset, mask, weight, bias))


def focal_case(count: int, reduction: str, weighted: bool) -> Case:
    labels = torch.arange(count) % 6  # 5 is the background
    weight = (random(5, seed=2, low=0.5, high=2),) if weighted else ()

    def op(logits: Tensor, *weight: Tensor) -> Tensor:
        given = weight[0] if weight else None
        loss: Tensor = mmcv_ops.sigmoid_focal_loss(logits, labels.to(logits.device), 2.0, 0.25, given, reduction)
        return loss

    return Case(op, (random(count, 5, seed=1, low=-6, high=6),), weight)


CASES = {
    "roi_align": roi_align_case(20, 2, True),
    "roi_align, adaptive": roi_align_case(20, 0, True),
    "roi_align, not aligned": roi_align_case(20, 0, False),
    "roi_align, many": roi_align_case(400, 0, True),  # on a CPU, window by window
    "roi_align, no boxes": roi_align_case(0, 2, True),
    "deform_conv2d": deform_case(False, 1, 0, 1, 1, 1),
    "deform_conv2d, groups": deform_case(False, 2, 2, 2, 2, 1),
    "deform_conv2d, deformable groups": deform_case(False, 2, 1, 1, 1, 2),
    "modulated_deform_conv2d": deform_case(True, 1, 0, 1, 1, 1),
    "modulated_deform_conv2d, groups": deform_case(True, 2, 2, 2, 2, 1),
    "modulated_deform_conv2d, deformable groups": deform_case(True, 2, 1, 1, 1, 2),
    "sigmoid_focal_loss": focal_case(40, "none", False),
    "sigmoid_focal_loss, weighted": focal_case(40, "none", True),
    "sigmoid_focal_loss, mean": focal_case(40, "mean", True),
    "sigmoid_focal_loss, sum of nothing": focal_case(0, "sum", False),
}


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The same values, in memory as asked for."""
    if layout == "contiguous":
        return x.contiguous()
    apart = x.new_zeros(*x.shape, 2)  # every second element
    apart[..., 0] = x
    return apart[..., 0]


def run(case: Case, device: str, precision: str, layout: str = "contiguous") -> list[Tensor]:
    """The output, and the gradients by all inputs for an output gradient that is fixed, float64 on the CPU."""
    dtype = {"float16": torch.float16, "float64": torch.float64}.get(precision, torch.float32)
    inputs = [in_layout(x.to(device, dtype), layout).requires_grad_() for x in case.inputs]
    constants = [in_layout(x.to(device, dtype), layout) for x in case.constants]
    with torch.autocast(device, torch.float16, enabled=precision == "autocast"):
        out = case.op(*inputs, *constants)
        grad = random(out.numel(), seed=9).reshape(out.shape).to(out)
        gradients = torch.autograd.grad(out, inputs, in_layout(grad, layout) if out.dim() else grad)
    assert {x.dtype for x in (out, *gradients)} == {dtype}
    assert {x.device.type for x in (out, *gradients)} == {device}
    return [x.detach().cpu().double() for x in (out, *gradients)]


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """The same op of inputs as a type holds them."""
    inputs, constants = (tuple(x.to(dtype).double() for x in part) for part in case[1:])
    return Case(case.op, inputs, constants)


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Equal to a share of the largest number of each tensor."""
    for a, b in zip(actual, expected, strict=True):
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("name", CASES)
def test_op_equals_float64_on_the_cpu(device: str, precision: str, layout: str, name: str) -> None:
    case = rounded(CASES[name], torch.float16 if precision == "float16" else torch.float32)
    actual = run(case, device, precision, layout)
    assert_close(actual, run(case, "cpu", "float64"), 2e-3 if precision == "float16" else 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_roi_align_of_half_features_keeps_the_pixels_of_its_boxes(device: str) -> None:
    """As mmdet's extractors call it in mixed precision: boxes in float32, of coordinates that float16 does not hold."""
    x, rois = random(1, 4, 40, 300, seed=1).half(), torch.tensor([[0.0, 1100.3, 20.1, 1163.9, 99.7]])
    actual = mmcv_ops.roi_align(x.to(device), rois.to(device), 7, 0.25, 2, "avg", True)
    expected = mmcv_ops.roi_align(x.double(), rois.double(), 7, 0.25, 2, "avg", True)
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [mmcv_ops.DeformConv2dPack, mmcv_ops.ModulatedDeformConv2dPack])
def test_layers_with_offsets_train_in_mixed_precision(device: str, kind: Any) -> None:
    """The convolution in such a layer gives offsets in float16, beside weights in float32."""
    torch.manual_seed(0)
    layer: nn.Module = kind(4, 6, 3, padding=1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            # offsets of about half a pixel: the gradient jumps at whole ones
            size, mean = {"conv_offset.weight": (0.02, 0.0), "conv_offset.bias": (0.2, 0.5)}.get(name, (0.3, 0.0))
            parameter.copy_(random(*parameter.shape, seed=parameter.dim()) * size + mean)
    x = random(2, 4, 9, 10, seed=1)
    results = []
    for place, dtype in ((device, torch.float32), ("cpu", torch.float64)):
        layer = layer.to(place, dtype)
        layer.zero_grad()
        with torch.autocast(place, torch.float16, enabled=dtype == torch.float32):
            out = layer(x.to(place, dtype))
        assert out.dtype == (torch.float16 if dtype == torch.float32 else dtype)
        out.float().square().sum().backward()
        results.append([out, *(present_grad(parameter) for parameter in layer.parameters())])
    actual, expected = ([t.detach().cpu().double().clone() for t in result] for result in results)
    assert_close(actual, expected, 2e-2)


def present_grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()


# NMS: the same boxes, in the same order, on every device

THRESHOLD = 0.4137  # that no overlap of round boxes is equal to


def some_boxes(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes that overlap, scores of which no two are equal, and classes."""
    corner = random(count, 2, seed=1, low=0, high=100).float()
    boxes = torch.cat([corner, corner + random(count, 2, seed=2, low=5, high=60).float()], dim=1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    return boxes, (order.float() + 1) / (count + 1), order % 4


NMS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "nms": lambda b, s, c: mmcv_ops.nms(b, s, THRESHOLD),
    "nms, one pixel more": lambda b, s, c: mmcv_ops.nms(b, s, THRESHOLD, offset=1),
    "nms, the best": lambda b, s, c: mmcv_ops.nms(b, s, THRESHOLD, score_threshold=0.3, max_num=20),
    "batched_nms": lambda b, s, c: mmcv_ops.batched_nms(b, s, c, {"type": "nms", "iou_threshold": THRESHOLD}),
    "batched_nms, class by class": lambda b, s, c: mmcv_ops.batched_nms(
        b, s, c, {"type": "nms", "iou_threshold": THRESHOLD, "split_thr": 10, "max_num": 30}
    ),
    "batched_nms, soft": lambda b, s, c: mmcv_ops.batched_nms(
        b, s, c, {"type": "soft_nms", "iou_threshold": THRESHOLD}
    ),
    "soft_nms": lambda b, s, c: mmcv_ops.soft_nms(b, s, THRESHOLD, 0.5, 0.05, "linear"),
    "soft_nms, Gaussian": lambda b, s, c: mmcv_ops.soft_nms(b, s, THRESHOLD, 0.5, 0.05, "gaussian"),
}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 300])
@pytest.mark.parametrize("name", NMS)
def test_nms_on_cuda_equals_the_cpu(name: str, count: int, dtype: torch.dtype) -> None:
    boxes, scores, classes = some_boxes(count)
    if count == 0 and "batched" in name:
        pytest.skip("mmcv takes the largest coordinate of no boxes")
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    for layout in ("contiguous", "strided"):
        dets, keep = NMS[name](in_layout(boxes.cuda(), layout), in_layout(scores.cuda(), layout), classes.cuda())
        expected_dets, expected_keep = NMS[name](boxes, scores, classes)
        assert keep.is_cuda
        assert dets.is_cuda
        assert torch.equal(keep.cpu(), expected_keep)
        assert torch.equal(dets.cpu(), expected_dets)


@pytest.mark.parametrize("device", DEVICES)
def test_nms_of_equal_scores_keeps_the_first(device: str) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]], device=device).repeat(200, 1)
    apart = torch.arange(200, device=device)[:, None] // 50 * 100
    assert mmcv_ops.nms(boxes + apart, torch.ones(200, device=device), 0.5)[1].tolist() == [0, 50, 100, 150]
