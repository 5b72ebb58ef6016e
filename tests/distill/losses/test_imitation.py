"""Imitation of whole feature maps against a loop written from its equation (section 3 of the paper)."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kdpipe.distill.losses import imitation
from kdpipe.distill.losses.imitation import BoxMaskImitation, WholeImitation, masked_imitation_loss
from kdpipe.distill.losses.masks import anchor_mask, box_mask, gaussian_mask
from kdpipe.distill.losses.numeric import LossInputError
from kdpipe.distill.outputs import TeacherMap

B, C, SHAPES = 2, 3, {8: (4, 5), 16: (2, 3)}
ANCHORS = {8: [(-12.0, -12.0, 12.0, 12.0), (-8.0, -16.0, 8.0, 16.0)], 16: [(-60.0, -4.0, 60.0, 4.0)]}
GT_BOXES = [torch.tensor([[2.0, 3.0, 30.0, 21.0], [15, 10, 39, 31]]), torch.zeros(0, 4)]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    student, teacher = ([torch.randn(B, C, *shape).to(dtype) for shape in SHAPES.values()] for _ in range(2))
    return student, teacher, [(torch.rand(B, *shape) * (torch.rand(B, *shape) > 0.4)) for shape in SHAPES.values()]


def maps(channels: int = 2) -> tuple[dict[int, Tensor], dict[int, TeacherMap]]:
    torch.manual_seed(1)
    student = {stride: torch.randn(B, channels, *shape).double() for stride, shape in SHAPES.items()}
    inside = {stride: torch.ones(B, *shape) for stride, shape in SHAPES.items()}
    inside[8][:, -1] = 0
    teacher = {
        stride: TeacherMap(torch.randn(B, C, *shape).double(), inside[stride]) for stride, shape in SHAPES.items()
    }
    return student, teacher


def test_it_is_the_equation() -> None:
    student, teacher, masks = inputs()
    total = positive = 0.0
    for s, t, mask in zip(student, teacher, masks, strict=True):
        for b in range(B):
            for i in range(mask.shape[1]):
                for j in range(mask.shape[2]):
                    positive += float(mask[b, i, j])
                    for c in range(C):
                        total += float(mask[b, i, j]) * (float(s[b, c, i, j]) - float(t[b, c, i, j])) ** 2
    assert masked_imitation_loss(student, teacher, masks).item() == pytest.approx(total / (2 * positive), rel=1e-6)


def test_equal_maps_cost_nothing_and_a_constant_difference_half_its_square_per_channel() -> None:
    _, teacher, masks = inputs()
    assert masked_imitation_loss(teacher, teacher, masks).item() == 0
    shifted = [level + 3 for level in teacher]
    assert masked_imitation_loss(shifted, teacher, masks).item() == pytest.approx(C * 9 / 2)


def test_gradients() -> None:
    student, teacher, masks = inputs()
    levels = [level.requires_grad_() for level in (*student, *teacher)]
    assert torch.autograd.gradcheck(lambda *s: masked_imitation_loss(s, teacher, masks), levels[:2], fast_mode=True)
    masked_imitation_loss(student, teacher, masks).backward()
    assert all(level.grad is None for level in teacher), "the teacher is a constant"


MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "whole": ("WholeImitation", {}),
    "gt-mask": ("BoxMaskImitation", {"gt_boxes": GT_BOXES}),
    "gaussian-mask": ("GaussianMaskImitation", {"gt_boxes": GT_BOXES}),
    "anchor-mask": ("AnchorMaskImitation", {"gt_boxes": GT_BOXES, "base_anchors": ANCHORS}),
}


def mask_of(name: str, stride: int, shape: tuple[int, int]) -> Tensor:
    of_image = {
        "whole": lambda boxes: torch.ones(shape),
        "gt-mask": lambda boxes: box_mask(boxes, shape, stride),
        "gaussian-mask": lambda boxes: gaussian_mask(boxes, shape, stride),
        "anchor-mask": lambda boxes: anchor_mask(boxes, shape, stride, ANCHORS[stride]),
    }
    return torch.stack([of_image[name](boxes) for boxes in GT_BOXES])


@pytest.mark.parametrize("name", MODULES)
def test_the_modules_adapt_each_level_and_imitate_under_their_mask(name: str) -> None:
    kind, given = MODULES[name]
    torch.manual_seed(0)
    module: Any = getattr(imitation, kind)(2, C, tuple(SHAPES)).double()
    student, teacher = maps()
    adapted = [
        functional.conv2d(student[stride], convolution.weight, convolution.bias, padding=1)
        for stride, convolution in zip(SHAPES, module.imitate.adapt, strict=True)
    ]
    masks = [mask_of(name, stride, shape) * teacher[stride].inside for stride, shape in SHAPES.items()]
    assert all(mask.any() for mask in masks)
    expected = masked_imitation_loss(adapted, [x.values for x in teacher.values()], masks)
    loss = module(student, teacher, **given)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert {name: tuple(x.shape) for name, x in module.named_parameters()} == {
        f"imitate.adapt.{level}.{part}": shape
        for level in range(2)
        for part, shape in (("weight", (C, 2, 3, 3)), ("bias", (C,)))
    }
    assert all(parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("name", MODULES)
def test_an_empty_mask_gives_a_zero_in_the_graph_of_every_parameter(name: str) -> None:
    kind, given = MODULES[name]
    module: Any = getattr(imitation, kind)(2, C, tuple(SHAPES)).double()
    student, teacher = maps()
    nothing = {stride: TeacherMap(x.values, torch.zeros_like(x.inside)) for stride, x in teacher.items()}
    loss = module(student, nothing, **given)
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_and_autocast_change_no_arithmetic(dtype: torch.dtype) -> None:
    module = BoxMaskImitation(2, C, tuple(SHAPES))
    student, teacher = maps()
    student = {stride: (500 * level).to(dtype) for stride, level in student.items()}
    plain = module({stride: level.float() for stride, level in student.items()}, teacher, GT_BOXES)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(student, teacher, [boxes.to(dtype) for boxes in GT_BOXES])
    assert loss.item() == plain.item() > 1000


def test_only_the_levels_of_its_strides_are_looked_at() -> None:
    module = WholeImitation(2, C, (16,)).double()
    student, teacher = maps()
    loss = module(student, teacher)
    assert loss.item() == module({16: student[16]}, {16: teacher[16]}).item()


def test_shapes_that_do_not_fit_are_named() -> None:
    student, teacher, masks = inputs()
    with pytest.raises(
        LossInputError, match=r"a level of the teacher has shape \[2, 3, 4, 4\]; expected \[2, 3, 4, 5\]"
    ):
        masked_imitation_loss(student, [teacher[0][..., :4], teacher[1]], masks)
    with pytest.raises(LossInputError, match=r"a mask has shape \[1, 4, 5\]; expected \[2, 4, 5\]"):
        masked_imitation_loss(student, teacher, [masks[0][:1], masks[1]])


@pytest.mark.parametrize("scale", [1.0, 655.36, 1e9])
def test_an_empty_mask_has_finite_gradients_under_any_loss_scale(scale: float) -> None:
    """Of a batch without objects, or whose images are all left out; float16 scales losses by 65,536."""
    student = torch.randn(1, 2, 3, 4, requires_grad=True)
    for mask in (torch.zeros(1, 3, 4), torch.full((1, 3, 4), 1e-12)):
        loss = masked_imitation_loss([student], [torch.randn(1, 2, 3, 4)], [mask])
        (gradient,) = torch.autograd.grad(loss * scale, student)
        assert torch.isfinite(gradient).all()
        assert (loss.item() == 0) == (not mask.any())
