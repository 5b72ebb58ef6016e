"""The control without a teacher is the loss of mmdet's box head."""

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from kdpipe.distill.losses.hard import hard_label_loss
from kdpipe.distill.losses.numeric import LossInputError

if TYPE_CHECKING:
    from tests.distill.conftest import Pair

N, K = 6, 3
LABELS = [0, 1, 2, 3, 3, 1]


def inputs(classes: int = K, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (N, K + 1), (N, classes, 4), (N, 4)
    logits, deltas, true = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    return logits, deltas, torch.tensor(LABELS), true


def naive(logits: Tensor, deltas: Tensor, labels: Tensor, true: Tensor) -> float:
    total = 0.0
    for i, label in enumerate(labels.tolist()):
        total -= math.log(math.exp(logits[i, label]) / sum(math.exp(x) for x in logits[i]))
        if label < K:
            box = deltas[i, label if deltas.shape[1] > 1 else 0]
            total += sum(abs(float(a) - float(b)) for a, b in zip(box, true[i], strict=True))
    return total / len(labels)


@pytest.mark.parametrize("classes", [1, K])
def test_it_is_the_equation(classes: int) -> None:
    assert hard_label_loss(*inputs(classes)).item() == pytest.approx(naive(*inputs(classes)))


def test_it_is_the_loss_of_mmdets_box_head(pair: "type[Pair]") -> None:
    logits, deltas, labels, true = inputs(dtype=torch.float32)
    head = pair.head(loss_bbox={"type": "L1Loss", "loss_weight": 1.0})  # as in Faster R-CNN
    weights = (labels < K).float()
    ones = torch.ones(N)
    losses = head.loss(logits, deltas.flatten(1), torch.zeros(N, 5), labels, ones, true, weights[:, None].expand(N, 4))
    expected = losses["loss_cls"] + losses["loss_bbox"]
    torch.testing.assert_close(hard_label_loss(logits, deltas, labels, true), expected)


def test_gradients() -> None:
    logits, deltas, labels, true = inputs()
    logits.requires_grad_()
    deltas.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: hard_label_loss(a, b, labels, true), (logits, deltas))


def test_no_rois_and_half_precision() -> None:
    logits, deltas, labels, true = (x[:0] for x in inputs(dtype=torch.float32))
    loss = hard_label_loss(logits.requires_grad_(), deltas.requires_grad_(), labels, true)
    loss.backward()
    assert (loss.item(), logits.grad is None) == (0.0, False)
    half = inputs(dtype=torch.float16)
    expected = hard_label_loss(half[0].float(), half[1].float(), half[2], half[3])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(hard_label_loss(*half), expected)


def test_shapes_that_do_not_fit_are_named() -> None:
    logits, deltas, labels, true = inputs()
    with pytest.raises(LossInputError, match=r"true_deltas has shape \[5, 4\]; expected \[6, 4\]"):
        hard_label_loss(logits, deltas, labels, true[:5])
    with pytest.raises(LossInputError, match=r"student_deltas has shape \[6, 2, 4\]; expected \[6, 3, 4\]"):
        hard_label_loss(logits, deltas[:, :2], labels, true)
