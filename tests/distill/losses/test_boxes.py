"""GIoU of boxes weighted by the teacher's classes, against a loop and against torchvision."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from kdpipe.distill.losses.boxes import box_kd_loss, generalized_iou
from kdpipe.distill.losses.numeric import LossInputError

N, K = 6, 3


def inputs(student: int = K, teacher: int = K, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(2, N, K, 2, generator=g, dtype=torch.float64) * 20
    sides = 5 + 20 * torch.rand(2, N, K, 2, generator=g, dtype=torch.float64)
    boxes = torch.cat([corner, corner + sides], dim=3).to(dtype)
    logits = torch.randn(N, K + 1, generator=g, dtype=torch.float64).to(dtype)
    return boxes[0, :, :student], boxes[1, :, :teacher], logits


def naive_giou(a: list[float], b: list[float]) -> float:
    def area(x: list[float]) -> float:
        return max(x[2] - x[0], 0) * max(x[3] - x[1], 0)

    common = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    union = area(a) + area(b) - common
    around = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    return common / union - (around - union) / around


@pytest.mark.parametrize(("student", "teacher"), [(K, K), (1, K), (K, 1), (1, 1)])
def test_it_is_the_equation(student: int, teacher: int) -> None:
    boxes, others, logits = inputs(student, teacher)
    total = 0.0
    for i in range(N):
        scores = [math.exp(x) for x in logits[i].tolist()]
        for c in range(K):
            one, two = boxes[i, c % student].tolist(), others[i, c % teacher].tolist()
            total += scores[c] / sum(scores) * (1 - naive_giou(one, two))
    assert box_kd_loss(boxes, others, logits).item() == pytest.approx(total / N, rel=1e-6)


def test_giou_is_that_of_torchvision() -> None:
    boxes, others, _ = inputs()
    far = others + torch.tensor([100.0, 0, 100, 0])
    for other in (others, far, boxes):
        torch.testing.assert_close(1 - generalized_iou(boxes, other), generalized_box_iou_loss(boxes, other))


def test_gradients() -> None:
    boxes, others, logits = (x.requires_grad_() for x in inputs())
    assert torch.autograd.gradcheck(lambda x: box_kd_loss(x, others, logits), (boxes,))
    box_kd_loss(boxes, others, logits).backward()
    assert others.grad is None
    assert logits.grad is None


def test_closed_forms() -> None:
    boxes, others, logits = inputs()
    assert box_kd_loss(others, others, logits).item() == pytest.approx(0, abs=1e-8)
    background = torch.tensor([[0.0] * K + [1e4]]).expand(N, K + 1)
    assert box_kd_loss(boxes, others, background).item() == 0
    point = torch.zeros(N, 1, 4, requires_grad=True)
    loss = box_kd_loss(point, torch.zeros(N, 1, 4), logits)
    loss.backward()
    assert torch.isfinite(loss)
    assert point.grad is not None
    assert torch.isfinite(point.grad).all()


def test_half_precision_autocast_and_no_rois() -> None:
    half = inputs(dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        actual = box_kd_loss(*half)
    assert torch.equal(actual, box_kd_loss(*(x.float() for x in half)))
    empty = [x[:0].requires_grad_() for x in inputs()]
    loss = box_kd_loss(*empty)
    loss.backward()
    assert (loss.item(), empty[0].grad is None) == (0.0, False)


def test_shapes_that_do_not_fit_are_named() -> None:
    boxes, others, logits = inputs()
    with pytest.raises(LossInputError, match=r"student_boxes has shape \[6, 2, 4\]; expected \[6, 3, 4\]"):
        box_kd_loss(boxes[:, :2], others, logits)
    with pytest.raises(LossInputError, match=r"teacher_boxes has shape \[5, 3, 4\]; expected \[6, 3, 4\]"):
        box_kd_loss(boxes, others[:5], logits)
