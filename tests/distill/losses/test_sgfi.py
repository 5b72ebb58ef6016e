"""SGFI against a loop written from equation 1 of the paper."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kdpipe.distill.losses.numeric import LossInputError
from kdpipe.distill.losses.sgfi import SGFI, sgfi_loss

R, L, C = 5, 3, 4


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(R, L, C, 7, 7, dtype=dtype), torch.randn(R, C, 7, 7, dtype=dtype)


class Pool(nn.Module):
    """Keys that are easy to compute by hand: the mean of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def naive(student: Tensor, teacher: Tensor, temperature: float) -> tuple[float, list[list[float]]]:
    """Equation 1 with `Pool` as f_embed, in plain Python."""
    all_weights, total = [], 0.0
    for i in range(len(student)):
        teacher_key = [sum(channel.flatten().tolist()) / 49 for channel in teacher[i]]
        logits = []
        for level in student[i]:
            key = [sum(channel.flatten().tolist()) / 49 for channel in level]
            logits.append(sum(a * b for a, b in zip(key, teacher_key, strict=True)) / temperature)
        exps = [math.exp(x) for x in logits]
        weights = [x / sum(exps) for x in exps]
        error = 0.0
        for c in range(teacher.shape[1]):
            for y in range(7):
                for x in range(7):
                    mixed = sum(w * float(student[i, l, c, y, x]) for l, w in enumerate(weights))  # noqa: E741
                    error += (mixed - float(teacher[i, c, y, x])) ** 2
        total += error / teacher[i].numel()
        all_weights.append(weights)
    return total / len(student), all_weights


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0, 7.0])
def test_it_is_the_equation(temperature: float) -> None:
    student, teacher = inputs()
    loss, weights = sgfi_loss(student, teacher, Pool(), temperature)
    expected, expected_weights = naive(student, teacher, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(weights, torch.tensor(expected_weights, dtype=torch.float64))
    as_tensor, _ = sgfi_loss(student, teacher, Pool(), torch.tensor(temperature, dtype=torch.float64))
    assert as_tensor.item() == pytest.approx(expected, rel=1e-10)


def test_equal_features_on_every_level_cost_nothing() -> None:
    _, teacher = inputs()
    loss, weights = sgfi_loss(teacher[:, None].expand(R, L, C, 7, 7), teacher, Pool(), 1.0)
    assert loss.item() == pytest.approx(0.0, abs=1e-20)
    torch.testing.assert_close(weights, torch.full((R, L), 1 / L, dtype=torch.float64))


def test_one_level_is_plain_imitation() -> None:
    student, teacher = inputs()
    loss, weights = sgfi_loss(student[:, :1], teacher, Pool(), 1.0)
    assert weights.tolist() == [[1.0]] * R
    assert loss.item() == pytest.approx(functional.mse_loss(student[:, 0], teacher).item())


def test_a_cold_softmax_takes_the_level_that_the_teacher_resembles() -> None:
    _, teacher = inputs()
    student = torch.stack([torch.zeros_like(teacher), teacher, -teacher], dim=1)
    loss, weights = sgfi_loss(student, teacher, Pool(), 1e-6)
    assert weights.argmax(1).tolist() == [1] * R
    assert loss.item() == pytest.approx(0.0, abs=1e-12)


def test_weights_are_over_levels_and_rois_do_not_touch_each_other() -> None:
    student, teacher = inputs()
    loss, weights = sgfi_loss(student, teacher, Pool(), 0.1)
    torch.testing.assert_close(weights.sum(1), torch.ones(R, dtype=torch.float64))
    alone = [sgfi_loss(student[i : i + 1], teacher[i : i + 1], Pool(), 0.1) for i in range(R)]
    torch.testing.assert_close(torch.cat([w for _, w in alone]), weights)
    assert sum(one.item() for one, _ in alone) / R == pytest.approx(loss.item())


def test_the_order_of_rois_and_levels_does_not_matter() -> None:
    student, teacher = inputs()
    loss, weights = sgfi_loss(student, teacher, Pool(), 0.1)
    rois, levels = torch.randperm(R), torch.randperm(L)
    shuffled, shuffled_weights = sgfi_loss(student[rois][:, levels], teacher[rois], Pool(), 0.1)
    assert shuffled.item() == pytest.approx(loss.item())
    torch.testing.assert_close(shuffled_weights, weights[rois][:, levels])


def test_gradients() -> None:
    torch.manual_seed(1)
    student = torch.randn(2, 2, 2, 7, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 7, 7, dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    module = SGFI(2, 2).double()
    assert torch.autograd.gradcheck(
        lambda s, t: sgfi_loss(s, teacher, module.embed, t)[0], (student, temperature), fast_mode=True
    )
    sgfi_loss(student, teacher, Pool(), temperature)[0].backward()
    assert teacher.grad is None, "the teacher is a constant"


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_module_is_adapt_then_embed_then_the_loss(kernel: int) -> None:
    torch.manual_seed(0)
    module = SGFI(student_channels=6, teacher_channels=8, kernel_size=kernel).double()
    student, teacher = torch.randn(R, L, 6, 7, 7).double(), torch.randn(R, 8, 7, 7).double()
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert shapes == {
        "adapt.weight": (8, 6, kernel, kernel),
        "adapt.bias": (8,),
        "embed.0.weight": (4, 8, 3, 3),
        "embed.0.bias": (4,),
        "embed.2.weight": (2, 4, 3, 3),
        "embed.2.bias": (2,),
        "log_temperature": (),
    }
    with torch.no_grad():
        module.log_temperature.fill_(-0.3)
    p = dict(module.named_parameters())

    def key(x: Tensor) -> Tensor:
        x = functional.conv2d(x, p["embed.0.weight"], p["embed.0.bias"], stride=2).clamp(min=0)
        x = functional.conv2d(x, p["embed.2.weight"], p["embed.2.bias"], stride=2).clamp(min=0)
        assert x.shape[2:] == (1, 1)
        return x[:, :, 0, 0]

    total = 0.0
    for i in range(R):
        adapted = [
            functional.conv2d(level[None], p["adapt.weight"], p["adapt.bias"], padding=kernel // 2)[0]
            for level in student[i]
        ]
        logits = torch.stack([key(level[None])[0] @ key(teacher[i : i + 1])[0] for level in adapted])
        weights = functional.softmax(logits / math.exp(-0.3), dim=0)
        mixed = sum(w * level for w, level in zip(weights, adapted, strict=True))
        total += functional.mse_loss(mixed, teacher[i]).item() / R
    assert module(student, teacher).loss.item() == pytest.approx(total)


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_module_has_the_gradients_of_the_loss_at_adapted_features(kernel: int) -> None:
    torch.manual_seed(0)
    module = SGFI(student_channels=6, teacher_channels=8, kernel_size=kernel).double()
    student, teacher = torch.randn(R, L, 6, 7, 7).double().requires_grad_(), torch.randn(R, 8, 7, 7).double()
    inputs = [student, *module.parameters()]
    adapted = module.adapt(student.flatten(0, 1)).unflatten(0, (R, L))
    expected, expected_weights = sgfi_loss(adapted, teacher, module.embed, module.temperature)
    result = module(student, teacher)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.level, expected_weights.mean(dim=0))
    torch.testing.assert_close(torch.autograd.grad(result.loss, inputs), torch.autograd.grad(expected, inputs))


def test_normalized_it_is_the_loss_at_features_of_zero_mean_and_unit_variance() -> None:
    torch.manual_seed(0)
    module = SGFI(student_channels=6, teacher_channels=8, normalize=True).double()
    student, teacher = torch.randn(R, L, 6, 7, 7).double(), 3 + 2 * torch.randn(R, 8, 7, 7).double()
    result = module(student, teacher)
    adapted = module.adapt(student.flatten(0, 1)).unflatten(0, (R, L)).detach()
    for c in range(8):
        for features in (adapted[:, :, c], teacher[:, c]):
            features.copy_((features - features.mean()) / (features.var(correction=0) + 1e-6).sqrt())
    expected, weights = sgfi_loss(adapted, teacher, module.embed, module.temperature)
    assert result.loss.item() == pytest.approx(expected.item())
    torch.testing.assert_close(result.level, weights.mean(dim=0))


@pytest.mark.parametrize("scale", [0.3, 10.0])
def test_normalized_it_does_not_depend_on_the_scale_of_the_teacher(scale: float) -> None:
    torch.manual_seed(0)
    module, plain = SGFI(6, 8, normalize=True).double(), SGFI(6, 8).double()
    student, teacher = torch.randn(R, L, 6, 7, 7).double(), torch.randn(R, 8, 7, 7).double()
    for one, alike in ((module, True), (plain, False)):
        first, second = one(student, teacher), one(student, scale * teacher - 5)
        assert (first.loss.item() == pytest.approx(second.loss.item(), rel=1e-4)) is alike
        assert torch.allclose(first.level, second.level, rtol=1e-4) is alike
    assert 0 < module(student, teacher).loss.item() < 4


def test_normalized_all_parameters_learn_and_constant_features_stay_finite() -> None:
    torch.manual_seed(0)
    module = SGFI(3, 16, normalize=True)
    student = torch.randn(R, L, 3, 7, 7, requires_grad=True)
    for teacher in (torch.ones(R, 16, 7, 7), torch.randn(R, 16, 7, 7)):
        module.zero_grad()
        module(student, teacher).loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
    assert all(p.grad is not None and p.grad.any() for name, p in module.named_parameters() if name != "adapt.bias")
    none = module(torch.zeros(0, L, 3, 7, 7), torch.zeros(0, 16, 7, 7))
    assert none.loss.item() == 0


def test_all_parameters_learn_and_the_temperature_stays_positive() -> None:
    torch.manual_seed(0)
    module = SGFI(3, 4)
    assert module.temperature.item() == 1.0
    student = torch.randn(R, L, 3, 7, 7, requires_grad=True)
    teacher = torch.randn(R, 4, 7, 7, requires_grad=True)
    result = module(student, teacher)
    assert result.level.shape == (L,)
    assert result.temperature.item() == 1.0
    result.loss.backward()
    assert teacher.grad is None
    for name, tensor in [("student", student), *module.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.any(), name
    with torch.no_grad():
        module.log_temperature.fill_(-50.0)
    assert module.temperature.item() > 0


def test_narrow_teachers_and_wide_kernels() -> None:
    result = SGFI(2, 1, kernel_size=3)(torch.randn(R, L, 2, 7, 7), torch.randn(R, 1, 7, 7))
    assert torch.isfinite(result.loss)
    with pytest.raises(LossInputError, match="odd"):
        SGFI(2, 1, kernel_size=2)


def test_half_precision_and_autocast_change_no_arithmetic() -> None:
    torch.manual_seed(0)
    module = SGFI(C, C)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        student, teacher = (tensor.to(dtype) for tensor in inputs())
        plain = module(student.float(), teacher.float())
        with torch.autocast("cpu", torch.bfloat16):
            result = module(student, teacher)
        assert result.loss.dtype == result.level.dtype == torch.float32
        assert result.loss.item() == plain.loss.item()
        assert torch.equal(result.level, plain.level)


def test_no_rois_give_a_zero_in_the_graph_of_every_parameter() -> None:
    module = SGFI(3, 4)
    student = torch.zeros(0, L, 3, 7, 7, requires_grad=True)
    result = module(student, torch.zeros(0, 4, 7, 7))
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert result.level.tolist() == [0.0] * L
    for name, tensor in [("student", student), *module.named_parameters()]:
        assert tensor.grad is not None, name
        assert not tensor.grad.any(), name


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e15])
def test_huge_and_tiny_values_stay_finite(size: float) -> None:
    student, teacher = (tensor * size for tensor in inputs(torch.float32))
    module = SGFI(C, C)
    result = module(student.requires_grad_(), teacher)
    result.loss.backward()
    for tensor in (result.loss, result.level, student.grad, *(p.grad for p in module.parameters())):
        assert tensor is not None
        assert torch.isfinite(tensor).all()


def test_shapes_that_do_not_fit_are_named() -> None:
    student, teacher = inputs()
    with pytest.raises(LossInputError, match=r"teacher_roi_features has shape \[4, 4, 7, 7\]; expected \[5, 4, 7, 7\]"):
        sgfi_loss(student, teacher[:4], Pool(), 1.0)
    with pytest.raises(LossInputError, match=r"\[5, 4, 7, 7\]; expected \[R, L, C, H, W\]"):
        sgfi_loss(teacher, teacher, Pool(), 1.0)
    for temperature in (0.0, math.nan, math.inf):
        with pytest.raises(LossInputError, match="temperature above 0"):
            sgfi_loss(student, teacher, Pool(), temperature)
    with pytest.raises(LossInputError, match="0 levels"):
        sgfi_loss(student[:, :0], teacher, Pool(), 1.0)
    with pytest.raises(LossInputError, match=r"\[5, 3, 4, 7, 7\]; expected \[5, 3, 6, 7, 7\]"):
        SGFI(6, C)(student, teacher)


@pytest.mark.parametrize("normalize", [False, True])
def test_level_weights_are_those_of_the_loss(normalize: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(4, 3, 6, 7, 7, generator=generator), torch.randn(4, 8, 7, 7, generator=generator)
    sgfi = SGFI(6, 8, normalize=normalize)
    weights = sgfi.level_weights(student, teacher)
    assert weights.shape == (4, 3)
    assert torch.allclose(weights.mean(dim=0), sgfi(student, teacher).level)


@pytest.mark.parametrize("size", [10, 14])
def test_larger_roi_features_are_the_plain_loss_too(size: int) -> None:
    """Of teachers whose RoIAlign has more cells; beyond 10 x 10, a key has several numbers per channel."""
    torch.manual_seed(3)
    module = SGFI(6, 8).double()
    student, teacher = torch.randn(R, L, 6, size, size).double(), torch.randn(R, 8, size, size).double()
    adapted = torch.stack([module.adapt(student[:, level]) for level in range(L)], dim=1)
    expected, weights = sgfi_loss(adapted, teacher, module.embed, module.temperature)
    torch.testing.assert_close(module(student, teacher).loss, expected)
    torch.testing.assert_close(module.level_weights(student, teacher), weights)
