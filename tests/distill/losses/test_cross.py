"""The student's features through the teacher's head: the equation in a loop, and where its gradient goes."""

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdpipe.distill.detector import DistilledDetector
from kdpipe.distill.losses.cross import Cross, cross_loss
from kdpipe.distill.losses.numeric import LossInputError
from kdpipe.distill.outputs import BatchRois
from kdpipe.distill.pairs import RoiPairs
from kdpipe.distill.teacher.any_box import TeacherView, apply_teacher_head
from kdpipe.distill.teacher.heads.build import FrozenTeacher

if TYPE_CHECKING:
    from tests.distill.conftest import Pair

R, K = 6, 3


def inputs(classes: int = K, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (R, K + 1), (R, classes, 4), (R, K + 1), (R, classes, 4)
    a, b, c, d = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    return a, b, c, d


def naive(cross_logits: Tensor, cross_deltas: Tensor, teacher_logits: Tensor, teacher_deltas: Tensor) -> float:
    total = 0.0
    for i in range(R):
        p_x, p_t = (
            [math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (cross_logits[i], teacher_logits[i])
        )
        total += sum(t * (math.log(t) - math.log(x)) for t, x in zip(p_t, p_x, strict=True))
        for coordinate in range(4):
            inner = 0.0
            for c in range(K):
                of = c if cross_deltas.shape[1] > 1 else 0
                inner += p_t[c] * float(teacher_deltas[i, of, coordinate] - cross_deltas[i, of, coordinate])
            total += abs(inner)
    return total / R


@pytest.mark.parametrize("classes", [1, K])
def test_it_is_the_equation(classes: int) -> None:
    loss, cls, box = cross_loss(*inputs(classes))
    assert loss.item() == pytest.approx(naive(*inputs(classes)))
    assert loss.item() == pytest.approx((cls + box).item())


def test_gradients() -> None:
    tensors = [x.requires_grad_() for x in inputs()]
    assert torch.autograd.gradcheck(lambda a, b: cross_loss(a, b, *tensors[2:]).loss, tensors[:2])
    cross_loss(*tensors).loss.backward()
    assert [x.grad is None for x in tensors] == [False, False, True, True]


def test_half_precision_empty_and_huge() -> None:
    half = inputs(dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        actual = cross_loss(*half).loss
    assert torch.equal(actual, cross_loss(*(x.float() for x in half)).loss)
    empty = [x[:0].requires_grad_() for x in inputs()]
    loss = cross_loss(*empty).loss
    loss.backward()
    assert (loss.item(), empty[0].grad is None, empty[1].grad is None) == (0.0, False, False)
    assert torch.isfinite(cross_loss(*(x * 1e30 for x in inputs(dtype=torch.float32))).loss)
    with pytest.raises(LossInputError, match="teacher_deltas"):
        cross_loss(*inputs()[:3], inputs(1)[3])


def images(pair: "type[Pair]", channels: int) -> list[Tensor]:
    """Two pyramids, per level Tensor[2, C, h_l, w_l]."""
    g = torch.Generator().manual_seed(2)
    return [torch.randn(2, channels, 64 // stride, 64 // stride, generator=g) for stride in pair.spec.strides]


def rois() -> BatchRois:
    g = torch.Generator().manual_seed(3)
    corner = torch.rand(12, 2, generator=g) * 20
    boxes = torch.cat([corner, corner + 3 + 40 * torch.rand(12, 2, generator=g)], dim=1)
    return BatchRois(torch.cat([torch.arange(12)[:, None] // 6, boxes], dim=1), torch.zeros(12).long(), boxes[:, 0] > 5)


def pairs(pair: "type[Pair]", pyramid: list[Tensor]) -> RoiPairs:
    """A student with this pyramid beside a teacher that has `images`."""
    frozen = FrozenTeacher(pair.spec, frozenset({"logits", "deltas"}), lambda: pair.state(pair.head()))
    views = [
        TeacherView("exact", np.eye(3), tuple(level[i] for level in images(pair, pair.channels)), size=(64, 64))
        for i in range(2)
    ]
    answers = apply_teacher_head(views, rois(), frozen.head, pair.spec, frozen.needs)
    stage: Any = SimpleNamespace(index=0, pyramid=pyramid, strides=pair.spec.strides)
    samples = [SimpleNamespace(img_shape=(64, 64))] * 2
    return RoiPairs(stage, pair.spec, rois(), slice(None), None, answers, samples, frozen)


def crossed(loss: Cross, given: RoiPairs) -> Any:
    return loss(given.student_rois, given.box_head, given.all_teacher_logits, given.all_teacher_deltas)


def test_a_student_with_the_teachers_features_has_nothing_to_learn(pair: "type[Pair]") -> None:
    same = Cross(pair.channels, pair.channels)
    torch.nn.init.dirac_(same.adapt.weight)
    torch.nn.init.zeros_(same.get_parameter("adapt.bias"))
    given = pairs(pair, images(pair, pair.channels))
    assert crossed(same, given).loss.item() == pytest.approx(0, abs=1e-5)
    torch.nn.init.constant_(same.get_parameter("adapt.bias"), 0.5)
    assert crossed(same, given).loss.item() > 0.05


def test_it_is_the_teachers_head_on_adapted_features(pair: "type[Pair]") -> None:
    torch.manual_seed(0)
    loss, pyramid = Cross(5, pair.channels), [level.requires_grad_() for level in images(pair, 5)]
    given = pairs(pair, pyramid)
    result = crossed(loss, given)
    head = pair.head()
    logits, deltas = head(loss.adapt(given.student_rois.features))
    assert given.all_teacher_logits is not None
    assert given.all_teacher_deltas is not None
    expected = cross_loss(logits, deltas.unflatten(1, (-1, 4)), given.all_teacher_logits, given.all_teacher_deltas)
    torch.testing.assert_close(result.loss, expected.loss)
    learned = [pyramid[0], *loss.parameters()]
    for actual, wanted in zip(*(torch.autograd.grad(x.loss, learned) for x in (result, expected)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)
        assert wanted.any()


def test_the_students_own_head_is_left_alone(pair: "type[Pair]") -> None:
    model = DistilledDetector(pair.student(), pair.spec.to_json(), ("cross",), pair.source(pair.state(pair.head())))
    assert model.frozen_teacher.needs == {"logits", "deltas"}
    prepared = model.data_preprocessor.student(pair.batch(2), True)
    views = [
        TeacherView("exact", np.eye(3), tuple(level[i] for level in images(pair, pair.channels)), size=(64, 64))
        for i in range(2)
    ]
    losses = model.train()(prepared["inputs"], prepared["data_samples"], mode="loss", targets=views)
    assert losses["loss_cross"].item() == pytest.approx((losses["cross_cls"] + losses["cross_box"]).item())
    losses["loss_cross"].backward()
    learning = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"backbone", "neck", "adapt"}
