"""Pearson's correlation over classes and over RoIs, against a loop."""

import math

import pytest
import torch
from torch import Tensor

from kdpipe.distill.losses.numeric import LossInputError
from kdpipe.distill.losses.relations import relation_kd_loss

N, K = 6, 3


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, K + 1, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    return student, teacher


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def pearson(a: list[float], b: list[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return covariance / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def test_it_is_the_equation() -> None:
    student, teacher = inputs()
    p_s, p_t = ([softmax(row) for row in x.tolist()] for x in (student, teacher))
    inter = sum(1 - pearson(a, b) for a, b in zip(p_s, p_t, strict=True)) / N
    columns = [([row[c] for row in p_s], [row[c] for row in p_t]) for c in range(K + 1)]
    intra = sum(1 - pearson(a, b) for a, b in columns) / (K + 1)
    assert relation_kd_loss(student, teacher).item() == pytest.approx(inter + intra)


def test_gradients() -> None:
    student, teacher = (x.requires_grad_() for x in inputs())
    assert torch.autograd.gradcheck(lambda x: relation_kd_loss(x, teacher), (student,))
    relation_kd_loss(student, teacher).backward()
    assert teacher.grad is None


def test_closed_forms() -> None:
    student, teacher = inputs()
    assert relation_kd_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    assert relation_kd_loss(teacher + torch.randn(N, 1).double(), teacher).item() == pytest.approx(0, abs=1e-12)
    opposite = torch.tensor([[5.0, -5.0], [-5.0, 5.0]])
    assert relation_kd_loss(opposite, -opposite).item() == pytest.approx(4)
    order = torch.randperm(N)
    assert relation_kd_loss(student[order], teacher[order]).item() == pytest.approx(
        relation_kd_loss(student, teacher).item()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_change_no_arithmetic(dtype: torch.dtype) -> None:
    student, teacher = inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        actual = relation_kd_loss(student, teacher)
    assert torch.equal(actual, relation_kd_loss(student.float(), teacher.float()))


@pytest.mark.parametrize("count", [0, 1])
def test_few_rois(count: int) -> None:
    student, teacher = (x[:count] for x in inputs(torch.float32))
    loss = relation_kd_loss(student.requires_grad_(), teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert (loss.item() == 0) == (count == 0)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e4, 1e30])
def test_huge_and_tiny_values_stay_finite(size: float) -> None:
    student, teacher = ((x * size).requires_grad_() for x in inputs(torch.float32))
    loss = relation_kd_loss(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_shapes_that_do_not_fit_are_named() -> None:
    student, teacher = inputs()
    with pytest.raises(LossInputError, match=r"\[6, 3\]; expected \[6, 4\]"):
        relation_kd_loss(student, teacher[:, :3])
