"""RoI feature imitation against a loop written from its equation."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kdpipe.distill.losses.numeric import LossInputError
from kdpipe.distill.losses.roifi import RoIFI, roi_imitation_loss
from kdpipe.distill.losses.sgfi import SGFI

R, C = 5, 4


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(R, C, 7, 7).to(dtype), torch.randn(R, C, 7, 7).to(dtype)


def test_it_is_the_equation() -> None:
    student, teacher = inputs()
    total = 0.0
    for i in range(R):
        squares = [
            (float(student[i, c, y, x]) - float(teacher[i, c, y, x])) ** 2
            for c in range(C)
            for y in range(7)
            for x in range(7)
        ]
        total += sum(squares) / len(squares)
    assert roi_imitation_loss(student, teacher).item() == pytest.approx(total / R, rel=1e-12)


def test_equal_features_cost_nothing_and_a_constant_difference_its_square() -> None:
    _, teacher = inputs()
    assert roi_imitation_loss(teacher, teacher).item() == 0
    assert roi_imitation_loss(teacher + 3, teacher).item() == pytest.approx(9)


def test_gradients() -> None:
    student, teacher = (x[:2, :2, :2, :2].clone().requires_grad_() for x in inputs())
    assert torch.autograd.gradcheck(lambda s: roi_imitation_loss(s, teacher), (student,))
    roi_imitation_loss(student, teacher).backward()
    assert teacher.grad is None, "the teacher is a constant"


def test_the_module_adapts_first() -> None:
    torch.manual_seed(0)
    module, student, teacher = RoIFI(6, C).double(), torch.randn(R, 6, 7, 7).double(), inputs()[1]
    adapted = functional.conv2d(student, module.adapt.weight, module.adapt.bias)
    assert module(student, teacher).item() == pytest.approx(functional.mse_loss(adapted, teacher).item())
    module(student, teacher).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


def test_with_one_level_it_is_sgfi() -> None:
    module, sgfi = RoIFI(6, C).double(), SGFI(6, C).double()
    module.adapt.load_state_dict(sgfi.adapt.state_dict())
    student, teacher = torch.randn(R, 6, 7, 7).double(), inputs()[1]
    assert module(student, teacher).item() == pytest.approx(sgfi(student[:, None], teacher).loss.item())


def test_no_rois_give_a_zero_in_the_graph_of_every_parameter() -> None:
    module, student = RoIFI(3, 4), torch.zeros(0, 3, 7, 7, requires_grad=True)
    loss = module(student, torch.zeros(0, 4, 7, 7))
    loss.backward()
    assert loss.item() == 0
    assert all(tensor.grad is not None for tensor in (student, *module.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_and_autocast_change_no_arithmetic(dtype: torch.dtype) -> None:
    module, (student, teacher) = RoIFI(C, C), inputs(dtype)
    plain = module(student.float() * 300, teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(student.float() * 300, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == plain.item() > 1000


def test_shapes_that_do_not_fit_are_named() -> None:
    student, teacher = inputs()
    with pytest.raises(LossInputError, match=r"teacher_roi_features has shape \[4, 4, 7, 7\]; expected \[5, 4, 7, 7\]"):
        roi_imitation_loss(student, teacher[:4])
