import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from kdpipe.cache import CacheError, CacheSpec, TeacherTargets
from kdpipe.cache.records import decode_deltas, encode_boxes
from kdpipe.cache.views import view_matrix

if TYPE_CHECKING:
    from tests.cache.conftest import Kit


def make_targets(boxes: torch.Tensor, deltas: torch.Tensor, flip: bool) -> TeacherTargets:
    original, inputs = (100, 150), (60, 120)
    matrix = view_matrix(original, inputs, flip)
    return TeacherTargets(
        1, "hflip" if flip else "identity", "1.jpg", original, inputs, matrix, 3, 0, boxes, deltas=deltas
    )


def naive_boxes(targets: TeacherTargets, spec: CacheSpec, label: int, roi: int) -> list[float]:
    """One box, step by step: into the view, by the coder, back, clipped."""
    assert targets.deltas is not None
    (h, w), (input_h, input_w) = targets.original_size, targets.input_size
    sx, sy = input_w / w, input_h / h
    x1, y1, x2, y2 = targets.boxes[roi].double().tolist()
    x1, y1, x2, y2 = x1 * sx, y1 * sy, x2 * sx, y2 * sy
    if targets.view == "hflip":
        x1, x2 = input_w - x2, input_w - x1
    delta = targets.deltas[roi, 0 if spec.class_agnostic else label].double().tolist()
    dx, dy, dw, dh = (d * s + m for d, s, m in zip(delta, spec.box_stds, spec.box_means, strict=True))
    limit = abs(math.log(16 / 1000))
    cx, cy = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
    half_w = (x2 - x1) * math.exp(min(max(dw, -limit), limit)) / 2
    half_h = (y2 - y1) * math.exp(min(max(dh, -limit), limit)) / 2
    left, right = cx - half_w, cx + half_w
    if targets.view == "hflip":
        left, right = input_w - right, input_w - left
    corners = [left / sx, (cy - half_h) / sy, right / sx, (cy + half_h) / sy]
    return [min(max(c, 0.0), float(side)) for c, side in zip(corners, [w, h, w, h], strict=True)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_class_boxes_against_a_loop(kit: "type[Kit]", flip: bool, agnostic: bool, dtype: torch.dtype) -> None:
    spec = kit.spec(class_agnostic=agnostic, box_means=(0.05, -0.1, 0.2, 0.0))
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(20, 2, generator=g) * 60
    boxes = torch.cat([corner, corner + torch.rand(20, 2, generator=g) * 40], dim=1)
    deltas = torch.randn(20, 1 if agnostic else 3, 4, generator=g) * 2
    deltas[3, :, 2:] = 40.0  # beyond the clip
    targets = make_targets(boxes, deltas.to(dtype), flip)
    decoded = targets.class_boxes(spec)
    assert decoded.shape == (20, 3, 4)
    assert decoded.dtype == torch.float32
    expected = [[naive_boxes(targets, spec, label, roi) for label in range(3)] for roi in range(20)]
    torch.testing.assert_close(decoded, torch.tensor(expected), rtol=1e-5, atol=1e-3)


def test_zero_deltas_are_the_boxes_themselves(kit: "type[Kit]") -> None:
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    targets = make_targets(boxes, torch.zeros(1, 3, 4), flip=True)
    torch.testing.assert_close(targets.class_boxes(kit.spec()), boxes[:, None].expand(1, 3, 4))
    empty = make_targets(torch.zeros(0, 4), torch.zeros(0, 3, 4), flip=True)
    assert empty.class_boxes(kit.spec()).shape == (0, 3, 4)


def test_floats_of_int8(kit: "type[Kit]") -> None:
    targets = dataclasses.replace(
        make_targets(torch.zeros(2, 4), torch.zeros(2, 3, 4), flip=False),
        features=(None, torch.full((2, 1, 1), 5, dtype=torch.int8)),
        scale=torch.tensor([[9.0, 9.0], [0.5, 2.0]]),
        roi_features=torch.full((2, 2, 1, 1), 3, dtype=torch.int8),
        roi_scale=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    )
    first, second = targets.pyramid()
    assert first is None
    assert second is not None
    assert second.flatten().tolist() == [2.5, 10.0]
    assert targets.float_roi_features(dtype=torch.float16).flatten().tolist() == [3, 6, 9, 12]
    assert targets.float_roi_features(dtype=torch.float16).dtype == torch.float16


def test_what_was_not_read_is_named(kit: "type[Kit]") -> None:
    targets = dataclasses.replace(make_targets(torch.zeros(2, 4), torch.zeros(2, 3, 4), flip=False), deltas=None)
    for call in (targets.pyramid, targets.float_roi_features, lambda: targets.class_boxes(kit.spec())):
        with pytest.raises(CacheError, match="not read"):
            call()
    assert np.array_equal(targets.matrix, view_matrix((100, 150), (60, 120), False))


def test_encoded_boxes_decode_to_themselves() -> None:
    g = torch.Generator().manual_seed(0)
    low = torch.rand(40, 2, generator=g) * 300
    rois = torch.cat([low, low + 1 + torch.rand(40, 2, generator=g) * 100], dim=1)
    low = torch.rand(40, 3, 2, generator=g) * 300
    boxes = torch.cat([low, low + 2 + torch.rand(40, 3, 2, generator=g) * 60], dim=-1)
    coder = (0.05, -0.1, 0.2, 0.0), (0.1, 0.1, 0.2, 0.2)
    torch.testing.assert_close(decode_deltas(rois, encode_boxes(rois, boxes, *coder), *coder), boxes, rtol=0, atol=5e-3)
    (delta,) = encode_boxes(torch.tensor([[10.0, 10, 30, 20]]), torch.tensor([[[20.0, 5, 60, 15]]]), *coder)
    assert delta[0].tolist() == pytest.approx([(1 - 0.05) / 0.1, (-0.5 + 0.1) / 0.1, (math.log(2) - 0.2) / 0.2, 0.0])


def test_boxes_without_area_have_finite_deltas() -> None:
    rois = torch.tensor([[10.0, 10, 10, 20], [0.0, 0, 5, 5]])
    deltas = encode_boxes(rois, torch.tensor([[[10.0, 10, 10, 20]], [[3.0, 3, 3, 8]]]), (0.0,) * 4, (1.0,) * 4)
    assert deltas.isfinite().all()
    assert decode_deltas(rois, deltas, (0.0,) * 4, (1.0,) * 4)[1, 0, [0, 2]].tolist() == pytest.approx([3, 3], abs=0.05)
