"""Prediction distillation against loops written from the paper's equations."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdpipe.cache.errors import KdpipeError
from kdpipe.distill.losses.numeric import LossInputError
from kdpipe.distill.losses.prediction import (
    ClassAgnosticError,
    class_aware_regression_kd_loss,
    classification_kd_loss,
    dense_classification_kd_loss,
    recode_deltas,
    regression_kd_loss,
)

R, K = 6, 3


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student logits, teacher logits, student deltas, teacher deltas."""
    torch.manual_seed(0)
    shapes = ((R, K + 1), (R, K + 1), (R, K, 4), (R, K, 4))
    logits_s, logits_t, deltas_s, deltas_t = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return logits_s, logits_t, deltas_s, deltas_t


def naive_softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def naive_classification(student: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for row_s, row_t in zip(student.tolist(), teacher.tolist(), strict=True):
        for p_s, p_t in zip(naive_softmax(row_s), naive_softmax(row_t), strict=True):
            total -= p_t * math.log(p_s)
    return total / len(student)


def naive_dense_classification(student: Tensor, teacher: Tensor) -> float:
    """Appendix D: softmax, divided by its maximum, object classes only, cross entropy."""
    total = 0.0
    for row_s, row_t in zip(student.tolist(), teacher.tolist(), strict=True):
        softmax = naive_softmax(row_s)
        converted = [p / max(softmax) for p in softmax]
        for c in range(len(row_s) - 1):
            total -= naive_softmax(row_t)[c] * math.log(converted[c])
    return total / len(student)


def naive_class_aware(student: Tensor, teacher: Tensor, logits: Tensor) -> float:
    total = 0.0
    for i in range(len(student)):
        p = naive_softmax(logits[i].tolist())
        for coordinate in range(4):
            inner = 0.0
            for c in range(student.shape[1]):
                inner += p[c] * (float(teacher[i, c, coordinate]) - float(student[i, c, coordinate]))
            total += abs(inner)
    return total / len(student)


def naive_regression(student: Tensor, teacher: Tensor, labels: list[int], num_classes: int) -> float:
    total = 0.0
    for i, label in enumerate(labels):
        if label == num_classes:
            continue
        s, t = (x[i, label if x.shape[1] > 1 else 0] for x in (student, teacher))
        total += sum(abs(float(a) - float(b)) for a, b in zip(s, t, strict=True))
    return total / len(labels)


def test_classification_is_the_equation() -> None:
    student, teacher, _, _ = inputs()
    assert classification_kd_loss(student, teacher).item() == pytest.approx(naive_classification(student, teacher))


def test_classification_of_dense_students_is_the_equation() -> None:
    student, teacher, _, _ = inputs()
    actual = dense_classification_kd_loss(student, teacher).item()
    assert actual == pytest.approx(naive_dense_classification(student, teacher))


def test_closed_forms_of_dense_students() -> None:
    """The class that the student prefers costs nothing, and neither does what the teacher takes for background."""
    sure = torch.tensor([[1e4, 0.0, 0.0, 0.0]])
    student = torch.tensor([[2.0, 1.0, -1.0, 0.5]])
    assert dense_classification_kd_loss(student, sure).item() == 0.0
    assert dense_classification_kd_loss(student.flip(1), sure).item() == pytest.approx(1.5)
    background = torch.tensor([[0.0, 0.0, 0.0, 1e4]])
    assert dense_classification_kd_loss(student, background).item() == 0.0


def test_class_aware_regression_is_the_equation() -> None:
    _, logits, student, teacher = inputs()
    actual = class_aware_regression_kd_loss(student, teacher, logits).item()
    assert actual == pytest.approx(naive_class_aware(student, teacher, logits))


@pytest.mark.parametrize("student_classes", [1, K])
@pytest.mark.parametrize("teacher_classes", [1, K])
@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 3, 1], [3] * R, [2] * R])
def test_regression_is_the_equation(student_classes: int, teacher_classes: int, labels: list[int]) -> None:
    _, _, student, teacher = inputs()
    student, teacher = student[:, :student_classes], teacher[:, :teacher_classes]
    actual = regression_kd_loss(student, teacher, torch.tensor(labels), num_classes=K).item()
    assert actual == pytest.approx(naive_regression(student, teacher, labels, K))
    if max(student_classes, teacher_classes) == K:
        assert regression_kd_loss(student, teacher, torch.tensor(labels)).item() == actual


def test_a_single_class_needs_no_number_of_classes() -> None:
    student, teacher = torch.zeros(2, 1, 4), torch.tensor([1.0, 9.0])[:, None, None].expand(2, 1, 4)
    assert regression_kd_loss(student, teacher, torch.tensor([0, 1])).item() == 2.0  # (4 + 0) / 2


def test_closed_forms() -> None:
    uniform, student = torch.zeros(R, K + 1), torch.randn(R, K + 1)
    assert classification_kd_loss(uniform, uniform).item() == pytest.approx(math.log(K + 1))
    expected = -student.log_softmax(1).mean().item()
    assert classification_kd_loss(student, uniform).item() == pytest.approx(expected, rel=1e-6)
    sure = torch.zeros(R, K + 1)
    sure[:, 1] = 1e4
    expected = torch.nn.functional.cross_entropy(student, torch.ones(R, dtype=torch.int64)).item()
    assert classification_kd_loss(student, sure).item() == pytest.approx(expected, rel=1e-6)
    _, _, deltas, other = inputs(torch.float32)
    assert class_aware_regression_kd_loss(deltas, deltas, student).item() == 0.0
    assert regression_kd_loss(deltas, deltas, torch.zeros(R, dtype=torch.int64)).item() == 0.0
    only_one = (deltas[:, 1] - other[:, 1]).abs().sum(1).mean().item()
    assert class_aware_regression_kd_loss(deltas, other, sure).item() == pytest.approx(only_one)
    background = torch.zeros(R, K + 1)
    background[:, K] = 1e4
    assert class_aware_regression_kd_loss(deltas, other, background).item() == 0.0


def test_the_absolute_value_comes_after_the_sum_over_classes() -> None:
    teacher = torch.tensor([[[1.0] * 4, [-1.0] * 4]])  # two classes that disagree, and cancel
    logits = torch.tensor([[0.0, 0.0, -1e4]])
    assert class_aware_regression_kd_loss(torch.zeros(1, 2, 4), teacher, logits).item() == 0.0


def test_a_sum_over_coordinates_and_a_mean_over_rois() -> None:
    student, teacher = torch.zeros(2, 1, 4), torch.tensor([1.0, 3.0])[:, None, None].expand(2, 1, 4)
    logits = torch.tensor([[1e4, 0.0], [1e4, 0.0]])
    assert class_aware_regression_kd_loss(student, teacher, logits).item() == 8.0
    assert regression_kd_loss(student, teacher, torch.tensor([0, 0])).item() == 8.0


LABELS = torch.tensor([0, 1, 2, 3, 3, 1])
LOSSES: list[Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = [
    lambda ls, lt, ds, dt: classification_kd_loss(ls, lt),
    lambda ls, lt, ds, dt: regression_kd_loss(ds, dt, LABELS[: len(ds)]),
    lambda ls, lt, ds, dt: class_aware_regression_kd_loss(ds, dt, lt),
    lambda ls, lt, ds, dt: dense_classification_kd_loss(ls, lt),
]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=["classification", "regression", "class-aware", "dense"])


@every_loss
def test_gradients(loss: Callable[..., Tensor]) -> None:
    tensors = [tensor.requires_grad_() for tensor in inputs()]
    assert torch.autograd.gradcheck(lambda ls, ds: loss(ls, tensors[1], ds, tensors[3]), (tensors[0], tensors[2]))
    loss(*tensors).backward()
    assert tensors[1].grad is None, "the teacher's logits are constants"
    assert tensors[3].grad is None, "the teacher's deltas are constants"


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[2]], ids=["classification", "class-aware"])
def test_the_order_of_rois_does_not_matter(loss: Callable[..., Tensor]) -> None:
    tensors, order = inputs(), torch.randperm(R)
    assert loss(*(tensor[order] for tensor in tensors)).item() == pytest.approx(loss(*tensors).item())


@every_loss
def test_half_precision_and_autocast_change_no_arithmetic(loss: Callable[..., Tensor]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensors = inputs(dtype)
        plain = loss(*(tensor.float() for tensor in tensors))
        with torch.autocast("cpu", torch.bfloat16):
            actual = loss(*tensors)
        assert actual.dtype == torch.float32
        assert actual.item() == plain.item()


@every_loss
def test_no_rois_give_a_zero_in_the_graph(loss: Callable[..., Tensor]) -> None:
    empty = [tensor[:0].requires_grad_() for tensor in inputs(torch.float32)]
    actual = loss(*empty)
    actual.backward()
    assert actual.item() == 0.0
    assert (empty[0].grad is not None) or (empty[2].grad is not None)


def test_only_background_gives_a_zero_in_the_graph() -> None:
    _, _, student, teacher = inputs(torch.float32)
    actual = regression_kd_loss(student.requires_grad_(), teacher, torch.full((R,), K))
    actual.backward()
    assert actual.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()


@every_loss
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e4, 1e30])
def test_huge_and_tiny_values_stay_finite(loss: Callable[..., Tensor], size: float) -> None:
    tensors = [(tensor * size).requires_grad_() for tensor in inputs(torch.float32)]
    actual = loss(*tensors)
    actual.backward()
    assert torch.isfinite(actual)
    for tensor in (tensors[0], tensors[2]):
        assert tensor.grad is None or torch.isfinite(tensor.grad).all()


def test_class_agnostic_regression_cannot_be_class_aware() -> None:
    _, logits, student, teacher = inputs()
    with pytest.raises(ClassAgnosticError, match=r"student_deltas has shape \[6, 1, 4\].*3 classes"):
        class_aware_regression_kd_loss(student[:, :1], teacher, logits)
    with pytest.raises(ClassAgnosticError, match="teacher_deltas"):
        class_aware_regression_kd_loss(student, teacher[:, :1], logits)
    class_aware_regression_kd_loss(student[:, :1], teacher[:, :1], logits[:, :2])  # a single class is class-wise
    assert issubclass(ClassAgnosticError, KdpipeError)


def test_shapes_that_do_not_fit_are_named() -> None:
    logits, _, deltas, _ = inputs()
    with pytest.raises(LossInputError, match=r"\[6, 3\]; expected \[6, 4\]"):
        classification_kd_loss(logits, logits[:, :3])
    with pytest.raises(LossInputError, match=r"\[24\]; expected \[R, K \+ 1\]"):
        classification_kd_loss(logits.flatten(), logits)
    with pytest.raises(LossInputError, match=r"teacher_deltas has shape \[5, 3, 4\]; expected \[6, 3, 4\]"):
        class_aware_regression_kd_loss(deltas, deltas[:5], logits)
    with pytest.raises(LossInputError, match=r"\[6, 2, 4\]; expected \[6, 3, 4\]"):
        regression_kd_loss(deltas, deltas[:, :2], LABELS)
    with pytest.raises(LossInputError, match=r"labels has shape \[5\]; expected \[6\]"):
        regression_kd_loss(deltas, deltas, LABELS[:5])
    with pytest.raises(LossInputError, match=r"in \[0, 3\].*found 0 to 4"):
        regression_kd_loss(deltas, deltas, LABELS + (LABELS == 3))
    with pytest.raises(LossInputError, match="give num_classes"):
        regression_kd_loss(deltas[:, :1], deltas[:, :1], LABELS)


def test_recoding_keeps_the_box() -> None:
    torch.manual_seed(0)
    deltas = torch.randn(5, 3, 4, dtype=torch.float64)
    means, stds = (0.1, -0.2, 0.0, 0.3), (0.1, 0.1, 0.2, 0.2)
    other_means, other_stds = (0.0, 0.0, 0.5, 0.0), (0.05, 0.07, 0.1, 1.0)
    recoded = recode_deltas(deltas, means, stds, other_means, other_stds)
    for i in range(4):
        offset = deltas[..., i] * stds[i] + means[i]
        torch.testing.assert_close(recoded[..., i] * other_stds[i] + other_means[i], offset)
    torch.testing.assert_close(recode_deltas(recoded, other_means, other_stds, means, stds), deltas)
    assert recode_deltas(deltas.half(), means, stds, other_means, other_stds).dtype == torch.float32
    for wrong in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(LossInputError, match="above 0"):
            recode_deltas(deltas, means, stds, means, (0.1, wrong, 0.1, 0.1))
    with pytest.raises(LossInputError, match="finite"):
        recode_deltas(deltas, (0.0, math.nan, 0.0, 0.0), stds, means, stds)
    with pytest.raises(LossInputError, match="4 means"):
        recode_deltas(deltas, means[:3], stds, means, stds)
