"""Pearson imitation against a loop written from its equation."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdpipe.distill.losses.numeric import LossInputError
from kdpipe.distill.losses.pkd import PKD, pearson_imitation_loss
from kdpipe.distill.outputs import TeacherMap

B, C, SHAPES = 2, 3, {8: (4, 5), 16: (2, 3)}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    student, teacher = ([3 + 5 * torch.randn(B, C, *shape).to(dtype) for shape in SHAPES.values()] for _ in range(2))
    return student, teacher, [(torch.rand(B, *shape) > 0.3).double() for shape in SHAPES.values()]


def normed(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / len(values)
    return [(x - mean) / math.sqrt(variance + 1e-6) for x in values]


def pearson(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(normed(a), normed(b), strict=True)) / len(a)


def cells(level: Tensor, mask: Tensor, channel: int) -> list[float]:
    return [
        float(level[b, channel, i, j])
        for b in range(B)
        for i in range(level.shape[2])
        for j in range(level.shape[3])
        if mask[b, i, j]
    ]


def test_it_is_the_equation() -> None:
    student, teacher, masks = inputs()
    expected = correlations = 0.0
    for s, t, mask in zip(student, teacher, masks, strict=True):
        for c in range(C):
            of_student, of_teacher = cells(s, mask, c), cells(t, mask, c)
            squares = [(x - y) ** 2 for x, y in zip(normed(of_student), normed(of_teacher), strict=True)]
            expected += sum(squares) / len(squares) / 2 / C
            correlations += (1 - pearson(of_student, of_teacher)) / C
    loss = pearson_imitation_loss(student, teacher, masks).item()
    assert loss == pytest.approx(expected, rel=1e-12)
    assert loss == pytest.approx(correlations, rel=1e-6)


def test_scale_and_shift_of_a_channel_cost_nothing_and_the_opposite_2_per_level() -> None:
    _, teacher, masks = inputs()
    scale, shift = torch.tensor([0.3, 2.0, 10.0]).view(1, C, 1, 1), torch.tensor([5.0, 0.0, -40.0]).view(1, C, 1, 1)
    assert pearson_imitation_loss([x * scale + shift for x in teacher], teacher, masks).item() < 1e-6
    assert pearson_imitation_loss([-x for x in teacher], teacher, masks).item() == pytest.approx(2 * len(SHAPES))


def test_cells_outside_of_the_mask_do_not_matter() -> None:
    student, teacher, masks = inputs()
    other = [torch.where(mask[:, None] > 0, s, 1e4) for s, mask in zip(student, masks, strict=True)]
    loss = pearson_imitation_loss(student, teacher, masks).item()
    assert pearson_imitation_loss(other, teacher, masks).item() == pytest.approx(loss, rel=1e-9)
    everywhere = [torch.ones_like(mask) for mask in masks]
    assert pearson_imitation_loss(student, teacher, everywhere).item() != pytest.approx(loss)


def test_gradients() -> None:
    student, teacher, masks = inputs()
    levels = [level.requires_grad_() for level in (*student, *teacher)]
    assert torch.autograd.gradcheck(lambda *s: pearson_imitation_loss(s, teacher, masks), levels[:2], fast_mode=True)
    pearson_imitation_loss(student, teacher, masks).backward()
    assert all(level.grad is None for level in teacher), "the teacher is a constant"


@pytest.mark.parametrize("channels", [C, 2])
def test_the_module_compares_levels_of_its_strides(channels: int) -> None:
    torch.manual_seed(0)
    module = PKD(channels, C, (16,)).double()
    _, teacher, masks = inputs()
    student = torch.randn(B, channels, *SHAPES[16]).double()
    adapt = module.adapt[0]
    assert isinstance(adapt, nn.Identity) is (channels == C)
    adapted = functional.conv2d(student, adapt.weight) if isinstance(adapt, nn.Conv2d) else student
    expected = pearson_imitation_loss([adapted], teacher[1:], masks[1:])
    loss = module({16: student, 8: student}, {16: TeacherMap(teacher[1], masks[1])})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_no_cells_and_constant_maps_give_no_nan() -> None:
    module = PKD(2, C, tuple(SHAPES))
    student = {stride: torch.ones(B, 2, *shape, requires_grad=True) for stride, shape in SHAPES.items()}
    for inside in (0.0, 1.0):
        ones = {stride: torch.ones(B, C, *shape) for stride, shape in SHAPES.items()}
        loss = module(student, {stride: TeacherMap(x, inside * x[:, 0]) for stride, x in ones.items()})
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert all(
            x.grad is not None and torch.isfinite(x.grad).all() for x in (*student.values(), *module.parameters())
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_and_autocast_change_no_arithmetic(dtype: torch.dtype) -> None:
    student, teacher, masks = inputs(dtype)
    student = [100 * level for level in student]
    expected = pearson_imitation_loss(
        [x.float() for x in student], [x.float() for x in teacher], [x.float() for x in masks]
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = pearson_imitation_loss(student, teacher, [x.to(dtype) for x in masks])
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item() > 0


def test_shapes_that_do_not_fit_are_named() -> None:
    student, teacher, masks = inputs()
    with pytest.raises(
        LossInputError, match=r"a level of the teacher has shape \[2, 2, 4, 5\]; expected \[2, 3, 4, 5\]"
    ):
        pearson_imitation_loss(student, [teacher[0][:, :2], teacher[1]], masks)
