"""Each op through mmcv's own wrappers, against a plain loop written from its definition."""

import math
from collections.abc import Callable
from typing import Any

import mmcv.ops as mmcv_ops  # of the bridge, which `tests/conftest.py` put in
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.mmcv_ops.roi import _in_windows

Array = npt.NDArray[Any]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def random(*shape: int, seed: int = 0, low: float = -1.0, high: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


def some_rois() -> Tensor:
    """Inside, over the border, smaller than a pixel, and outside, of two images of 40 x 48 pixels at stride 4."""
    rows = [
        [0, 3.3, 4.1, 30.7, 25.2],
        [1, -6.0, -7.5, 20.0, 50.0],
        [1, 10.2, 11.3, 10.9, 11.8],
        [0, 41.0, 20.0, 47.0, 39.0],
        [0, 60.0, 60.0, 70.0, 64.0],
    ]
    return torch.tensor(rows, dtype=torch.float64)


# RoIAlign


def at(plane: Array, y: float, x: float) -> float:
    """Bilinear value at (y, x) as RoIAlign defines it: up to one pixel outside, the border's value; further, zero."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    upper = (1 - u) * plane[top, left] + u * plane[top, right]
    lower = (1 - u) * plane[bottom, left] + u * plane[bottom, right]
    return float((1 - v) * upper + v * lower)


def naive_roi_align(x: Array, rois: Array, size: int, scale: float, ratio: int, aligned: bool) -> Array:
    out = np.zeros((len(rois), x.shape[1], size, size))
    for r, (image, *corners) in enumerate(rois):
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0.0) for c in corners)
        w, h = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1.0), max(y2 - y1, 1.0))
        ny, nx = (ratio, ratio) if ratio > 0 else (math.ceil(h / size), math.ceil(w / size))
        for c in range(x.shape[1]):
            for i in range(size):
                for j in range(size):
                    values = [
                        at(x[int(image), c], y1 + (i + (b + 0.5) / ny) * h / size, x1 + (j + (a + 0.5) / nx) * w / size)
                        for b in range(ny)
                        for a in range(nx)
                    ]
                    out[r, c, i, j] = sum(values) / max(len(values), 1)
    return out


@pytest.fixture(params=["fast", "torchvision"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU RoIAlign has two implementations, of which the size of the input chooses one."""
    fewest = 1 if request.param == "fast" else math.inf
    monkeypatch.setattr("kdpipe.pipelines.mmcv_ops.roi._FEWEST_VALUES", fewest)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_equals_a_loop(device: str, ratio: int, aligned: bool) -> None:
    x, rois = random(2, 2, 10, 12), some_rois()
    actual = mmcv_ops.roi_align(x.to(device), rois.to(device), 3, 0.25, ratio, "avg", aligned)
    expected = naive_roi_align(x.numpy(), rois.numpy(), 3, 0.25, ratio, aligned)
    np.testing.assert_allclose(actual.cpu().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_gradient(device: str, ratio: int, aligned: bool) -> None:
    x, rois = random(2, 2, 5, 6).to(device).requires_grad_(), some_rois().to(device)
    # on CUDA the order of the additions varies
    assert torch.autograd.gradcheck(
        lambda t: mmcv_ops.roi_align(t, rois, 3, 0.125, ratio, "avg", aligned), x, nondet_tol=1e-12
    )


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_of_degenerate_boxes(ratio: int) -> None:
    x = random(1, 2, 6, 6).requires_grad_()
    rois = torch.tensor([[0.0, 9, 9, 3, 3], [0, 4, 4, 4, 4], [0, 400, 400, 500, 500]], dtype=torch.float64)
    actual = mmcv_ops.roi_align(x, rois, 2, 0.25, ratio, "avg", True)
    actual.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert not actual[2].any()
    if ratio == 0:
        assert not actual.any()  # no sample points where there is no area


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_roi_align_in_slices_is_the_same(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdpipe.pipelines.mmcv_ops.roi._FEWEST_VALUES", 1)
    x, rois = random(2, 3, 10, 12).requires_grad_(), some_rois().repeat(3, 1)
    whole = mmcv_ops.roi_align(x, rois, 3, 0.25, 0, "avg", True)
    (expected,) = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr("kdpipe.distill.rois.align_cpu._CHUNK", chunk)
    monkeypatch.setattr("kdpipe.distill.rois.align_cpu._VALUES", 500)
    sliced = mmcv_ops.roi_align(x, rois, 3, 0.25, 0, "avg", True)
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(sliced.square().sum(), x)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("box", [[0, 0, 0, 1e9, 1e9], [0, 0, 0, math.nan, 5]])
def test_roi_align_leaves_boxes_out_of_all_bounds_to_torchvision(box: list[float]) -> None:
    ordinary = torch.tensor([[0.0, 3, 4, 90, 80]])
    assert _in_windows(1 << 20, 1 << 20, ordinary, 0.25)
    assert not _in_windows(1 << 20, 1 << 20, torch.cat([ordinary, torch.tensor([box])]), 0.25)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_roi_align_of_boxes_that_are_not_finite_is_refused(value: float) -> None:
    """On a CPU, torchvision ends the process."""
    rois = torch.tensor([[0.0, 3, 4, 9, 8], [0, value, 4, 9, 8]], dtype=torch.float64)
    with pytest.raises(KdpipeError, match="not finite"):
        mmcv_ops.roi_align(random(1, 2, 6, 6), rois, 2, 0.25, 0, "avg", True)


@pytest.mark.cuda
def test_roi_align_is_deterministic_on_cuda_when_asked_to_be() -> None:
    x, rois = random(2, 8, 20, 24).float().cuda(), some_rois().float().cuda()
    gradients: list[Tensor] = []
    torch.use_deterministic_algorithms(True)
    try:
        with torch.compiler.set_stance("force_eager"):  # torchvision compiles it, to save memory
            for _ in range(3):
                leaf = x.clone().requires_grad_()
                mmcv_ops.roi_align(leaf, rois, 7, 0.5, 0, "avg", True).square().sum().backward()
                assert leaf.grad is not None
                gradients.append(leaf.grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roi_align_takes_half_types(dtype: torch.dtype) -> None:
    x, rois = random(2, 2, 10, 12).to(dtype).requires_grad_(), some_rois().to(dtype)
    actual = mmcv_ops.roi_align(x, rois, 3, 0.25, 2, "avg", True)
    actual.sum().backward()
    expected = naive_roi_align(x.detach().double().numpy(), rois.double().numpy(), 3, 0.25, 2, True)
    assert actual.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    np.testing.assert_allclose(actual.detach().double().numpy(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_roi_align_without_boxes_keeps_the_graph() -> None:
    x = random(1, 2, 4, 4).requires_grad_()
    actual = mmcv_ops.roi_align(x, torch.zeros(0, 5, dtype=torch.float64), 7, 1.0, 0, "avg", True)
    actual.sum().backward()
    assert actual.shape == (0, 2, 7, 7)
    assert x.grad is not None
    assert not x.grad.any()


def test_roi_align_by_maximum_is_refused() -> None:
    with pytest.raises(KdpipeError, match="pool_mode='avg'"):
        mmcv_ops.roi_align(random(2, 2, 10, 12), some_rois(), 3, 0.25, 2, "max", True)


# NMS


def some_boxes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    corners = random(count, 2, seed=seed, low=0, high=30)
    boxes = torch.cat([corners, corners + random(count, 2, seed=seed + 1, low=5, high=25)], dim=1).float()
    scores = (random(count, seed=seed + 2, low=0, high=1) * 20).round().float() / 20  # with equal scores among them
    return boxes, scores


def iou(a: Array, b: Array, offset: int) -> np.float32:
    w = max(np.float32(0), min(a[2], b[2]) - max(a[0], b[0]) + np.float32(offset))
    h = max(np.float32(0), min(a[3], b[3]) - max(a[1], b[1]) + np.float32(offset))
    area = [(box[2] - box[0] + np.float32(offset)) * (box[3] - box[1] + np.float32(offset)) for box in (a, b)]
    return np.float32(w * h / (area[0] + area[1] - w * h))


def naive_nms(boxes: Array, scores: Array, threshold: float, offset: int) -> list[int]:
    keep: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(iou(boxes[k], boxes[i], offset) <= np.float32(threshold) for k in keep):
            keep.append(i)
    return keep


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_nms_equals_a_loop(device: str, offset: int, seed: int) -> None:
    boxes, _ = some_boxes(40, seed)
    scores = torch.linspace(0, 1, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(seed))]
    dets, keep = mmcv_ops.nms(boxes.to(device), scores.to(device), 0.4, offset=offset)
    assert keep.tolist() == naive_nms(boxes.numpy(), scores.numpy(), 0.4, offset)
    assert torch.equal(dets.cpu(), torch.cat([boxes, scores[:, None]], dim=1)[keep.cpu()])


def test_nms_keeps_a_box_at_the_threshold_and_drops_one_above() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 3]])  # their IoU is 0.3, rounded to float32
    scores = torch.tensor([0.9, 0.8])
    assert mmcv_ops.nms(boxes, scores, 0.3)[1].tolist() == [0, 1]
    assert mmcv_ops.nms(boxes, scores, 0.2999)[1].tolist() == [0]


def test_nms_breaks_ties_by_position_and_takes_nothing() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(5, 1)
    assert mmcv_ops.nms(boxes, torch.ones(5), 0.5)[1].tolist() == [0]
    assert mmcv_ops.nms(boxes[:0], torch.ones(0), 0.5)[1].shape == (0,)


def test_nms_of_half_boxes() -> None:
    boxes, _ = some_boxes(30, 5)
    scores = torch.linspace(0, 1, 30)
    actual = mmcv_ops.nms(boxes.half(), scores.half(), 0.4)[1].tolist()
    assert actual == naive_nms(boxes.half().float().numpy(), scores.half().float().numpy(), 0.4, 0)


def test_batched_nms_keeps_classes_apart() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [0, 0, 10, 10]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 0, 1])
    assert mmcv_ops.batched_nms(boxes, scores, labels, {"type": "nms", "iou_threshold": 0.5})[1].tolist() == [0, 2]


def naive_soft_nms(
    boxes: Array, scores: Array, threshold: float, sigma: float, min_score: float, method: str, offset: int
) -> tuple[list[int], list[float]]:
    """Element by element, as mmcv does it: a box that falls below is replaced by the last one."""
    index, worth = list(range(len(boxes))), [np.float32(s) for s in scores]
    i = 0
    while i < len(index):
        best = max(range(i, len(index)), key=lambda p: (worth[p], -p))
        for values in (index, worth):
            values[i], values[best] = values[best], values[i]  # type: ignore[assignment]
        p = i + 1
        while p < len(index):
            overlap = iou(boxes[index[i]], boxes[index[p]], offset)
            if method == "gaussian":
                worth[p] *= np.exp(-(overlap * overlap) / np.float32(sigma))
            elif overlap >= np.float32(threshold):
                worth[p] *= np.float32(0) if method == "naive" else 1 - overlap
            if worth[p] < np.float32(min_score):
                index[p], worth[p] = index[-1], worth[-1]
                index.pop()
                worth.pop()
            else:
                p += 1
        i += 1
    return index, [float(w) for w in worth]


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("seed", range(5))
def test_soft_nms_equals_a_loop(method: str, offset: int, seed: int) -> None:
    boxes, scores = some_boxes(30, seed)
    dets, kept_boxes = mmcv_ops.soft_nms(boxes, scores, 0.3, 0.5, 0.2, method, offset)
    index, worth = naive_soft_nms(boxes.numpy(), scores.numpy(), 0.3, 0.5, 0.2, method, offset)
    assert kept_boxes.tolist() == index
    np.testing.assert_array_equal(dets[:, :4].numpy(), boxes[index].numpy())
    np.testing.assert_allclose(dets[:, 4].numpy(), worth, rtol=1e-6)


def test_soft_nms_leaves_its_input_alone_and_takes_nothing() -> None:
    boxes, scores = some_boxes(10, 0)
    copies = boxes.clone(), scores.clone()
    mmcv_ops.soft_nms(boxes, scores)
    assert torch.equal(boxes, copies[0])
    assert torch.equal(scores, copies[1])
    dets, kept_boxes = mmcv_ops.soft_nms(boxes[:0], scores[:0])
    assert dets.shape == (0, 5)
    assert kept_boxes.shape == (0,)


# Focal loss


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss_equals_its_definition(device: str, weighted: bool) -> None:
    logits, labels = random(6, 3, low=-8, high=8), torch.tensor([0, 1, 2, 3, 1, 3])  # 3 is the background
    weight = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64) if weighted else None
    moved = None if weight is None else weight.to(device)
    actual = mmcv_ops.sigmoid_focal_loss(logits.to(device), labels.to(device), 2.0, 0.25, moved, "none").cpu()
    for n in range(6):
        for c in range(3):
            p = 1 / (1 + math.exp(-float(logits[n, c])))
            expected = -0.25 * (1 - p) ** 2 * math.log(p) if labels[n] == c else -0.75 * p**2 * math.log(1 - p)
            expected *= 1.0 if weight is None or labels[n] == 3 else float(weight[labels[n]])
            assert float(actual[n, c]) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)])
@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_sigmoid_focal_loss_gradient(reduction: str, weight: Tensor | None, gamma: float) -> None:
    logits, labels = random(5, 3, low=-4, high=4).requires_grad_(), torch.tensor([0, 1, 2, 3, 1])
    loss = mmcv_ops.sigmoid_focal_loss
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, gamma, 0.25, weight, reduction), logits)


@pytest.mark.parametrize("value", [-200.0, -60.0, 60.0, 200.0])
def test_sigmoid_focal_loss_is_exact_far_out(value: float) -> None:
    logits = torch.full((1, 2), value, requires_grad=True)
    loss = mmcv_ops.sigmoid_focal_loss(logits, torch.tensor([0]), 2.0, 0.25, None, "none")
    loss.sum().backward()
    assert logits.grad is not None
    right, wrong = (0.25 * max(-value, 0.0), 0.75 * max(value, 0.0))
    assert loss[0].tolist() == pytest.approx([right, wrong], abs=1e-20)
    assert logits.grad[0].tolist() == pytest.approx([-0.25 * (value < 0), 0.75 * (value > 0)], abs=1e-20)


# Deformable convolutions


def naive_deform_conv(
    x: Array, offset: Array, weight: Array, mask: Array | None, bias: Array | None, options: dict[str, int]
) -> Array:
    """Sum over channels and taps of weight x mask x value at the shifted place, zero outside of the image."""
    stride, padding, dilation = options["stride"], options["padding"], options["dilation"]
    groups, deform_groups = options["groups"], options["deform_groups"]
    images, channels, height, width = x.shape
    filters, per_group, kh, kw = weight.shape
    out = np.zeros((images, filters, *offset.shape[2:]))

    def value(plane: Array, y: float, z: float) -> float:
        total, top, left = 0.0, math.floor(y), math.floor(z)
        for a in (top, top + 1):
            for b in (left, left + 1):
                if 0 <= a < height and 0 <= b < width:
                    total += (1 - abs(y - a)) * (1 - abs(z - b)) * plane[a, b]
        return total

    for n, f, i, j in np.ndindex(out.shape):
        out[n, f, i, j] = 0.0 if bias is None else bias[f]
        for k, a, b in np.ndindex(per_group, kh, kw):
            c = f // (filters // groups) * per_group + k
            tap = c // (channels // deform_groups) * kh * kw + a * kw + b
            y = i * stride - padding + a * dilation + offset[n, 2 * tap, i, j]
            z = j * stride - padding + b * dilation + offset[n, 2 * tap + 1, i, j]
            m = 1.0 if mask is None else mask[n, tap, i, j]
            out[n, f, i, j] += weight[f, k, a, b] * m * value(x[n, c], y, z)
    return out


DEFORM = [
    {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "deform_groups": 1},
    {"stride": 2, "padding": 2, "dilation": 2, "groups": 2, "deform_groups": 1},
    {"stride": 2, "padding": 1, "dilation": 1, "groups": 1, "deform_groups": 2},
]


def deform_inputs(options: dict[str, int], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(input, offset, mask, weight, bias) of two images of 4 x 5 with 4 channels, and a 3 x 2 kernel."""
    reach = options["dilation"] * 2 + 1, options["dilation"] + 1
    size = [(n + 2 * options["padding"] - r) // options["stride"] + 1 for n, r in zip((4, 5), reach, strict=True)]
    taps = options["deform_groups"] * 6
    made = (
        random(2, 4, 4, 5, seed=1),
        random(2, 2 * taps, *size, seed=2, low=-1.9, high=1.9),
        random(2, taps, *size, seed=3, low=0, high=1),
        random(2, 4 // options["groups"], 3, 2, seed=4),
        random(2, seed=5),
    )
    return tuple(t.to(device) for t in made)  # type: ignore[return-value]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", DEFORM)
def test_deform_conv_equals_a_loop(device: str, options: dict[str, int]) -> None:
    x, offset, _, weight, _ = deform_inputs(options)
    actual = mmcv_ops.deform_conv2d(*(t.to(device) for t in (x, offset, weight)), *options.values())
    expected = naive_deform_conv(x.numpy(), offset.numpy(), weight.numpy(), None, None, options)
    np.testing.assert_allclose(actual.cpu().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", DEFORM)
@pytest.mark.parametrize("with_bias", [True, False])
def test_modulated_deform_conv_equals_a_loop(device: str, options: dict[str, int], with_bias: bool) -> None:
    x, offset, mask, weight, bias = deform_inputs(options)
    tensors = (t.to(device) for t in (x, offset, mask, weight))
    actual = mmcv_ops.modulated_deform_conv2d(*tensors, bias.to(device) if with_bias else None, *options.values())
    arrays = (x.numpy(), offset.numpy(), weight.numpy(), mask.numpy(), bias.numpy() if with_bias else None)
    np.testing.assert_allclose(actual.cpu().numpy(), naive_deform_conv(*arrays, options), rtol=0, atol=1e-12)


def fixed(function: Callable[..., Tensor], options: dict[str, int]) -> Callable[..., Tensor]:
    return lambda *tensors: function(*tensors, *options.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", DEFORM)
def test_deform_conv_gradient(device: str, options: dict[str, int]) -> None:
    x, offset, _, weight, _ = (t.requires_grad_() for t in deform_inputs(options, device))
    function = fixed(mmcv_ops.deform_conv2d, options)
    assert torch.autograd.gradcheck(function, (x, offset, weight), nondet_tol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", DEFORM)
def test_modulated_deform_conv_gradient(device: str, options: dict[str, int]) -> None:
    inputs = [t.requires_grad_() for t in deform_inputs(options, device)]
    assert torch.autograd.gradcheck(fixed(mmcv_ops.modulated_deform_conv2d, options), inputs, nondet_tol=1e-12)


def test_deform_conv_weights_have_their_gradient_whatever_else_was_asked_for() -> None:
    x, offset, _, weight, _ = (t.requires_grad_() for t in deform_inputs(DEFORM[0]))
    out = mmcv_ops.deform_conv2d(x, offset, weight, *DEFORM[0].values())
    (first,) = torch.autograd.grad(out.sum(), weight, retain_graph=True)
    torch.autograd.grad(out.sum(), x, retain_graph=True)
    (third,) = torch.autograd.grad(3 * out.sum(), weight)
    torch.testing.assert_close(third, 3 * first)


def test_deform_conv_of_half_tensors() -> None:
    x, offset, mask, weight, bias = (t.half().requires_grad_() for t in deform_inputs(DEFORM[0]))
    actual = mmcv_ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *DEFORM[0].values())
    actual.sum().backward()
    arrays = [t.detach().double().numpy() for t in (x, offset, weight, mask, bias)]
    expected = naive_deform_conv(arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], DEFORM[0])
    assert actual.dtype == torch.float16
    assert weight.grad is not None
    np.testing.assert_allclose(actual.detach().double().numpy(), expected, rtol=2e-3, atol=2e-3)


# The rest


def test_an_op_that_is_not_there_says_so_when_called() -> None:
    with pytest.raises(KdpipeError, match=r"'box_iou_rotated' exists only in compiled form.*Use a config without it"):
        mmcv_ops.box_iou_rotated(torch.rand(2, 5), torch.rand(3, 5))


def test_private_names_are_missing() -> None:
    import mmcv._ext

    assert not hasattr(mmcv._ext, "_missing")
