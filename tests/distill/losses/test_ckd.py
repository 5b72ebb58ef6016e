"""CKD against a loop written from equation 2 of the paper, its sliced form, and the module around them."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdpipe.distill.losses import ckd_sliced
from kdpipe.distill.losses.ckd import CKD, ckd_loss, mean_cosine
from kdpipe.distill.losses.ckd_negatives import same_object
from kdpipe.distill.losses.ckd_queue import TeacherKeys
from kdpipe.distill.losses.ckd_sliced import sliced_ckd_loss
from kdpipe.distill.losses.numeric import LossInputError, unit_rows

N, M, D = 6, 9, 5


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Student, keys, exclude (its diagonal True in places, which must not matter)."""
    torch.manual_seed(0)
    student, keys = (torch.randn(n, D, dtype=torch.float64).to(dtype) for n in (N, N + M))
    return student, keys, torch.rand(N, N + M) < 0.4


def naive(student: Tensor, keys: Tensor, exclude: Tensor | None, temperature: float = 0.07) -> float:
    """Equation 2 in plain Python."""

    def g(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return math.exp(dot / math.hypot(*a) / math.hypot(*b) / temperature)

    s, t = student.tolist(), keys.tolist()
    total = 0.0
    for i in range(len(s)):
        denominator = sum(g(s[i], t[j]) for j in range(len(t)) if j == i or exclude is None or not exclude[i, j])
        total -= math.log(g(s[i], t[i]) / denominator)
    return total / len(s)


def sliced(student: Tensor, keys: Tensor, exclude: Tensor | None = None, temperature: float = 0.07) -> Tensor:
    return sliced_ckd_loss(unit_rows(student), unit_rows(keys), exclude, temperature)[0]


@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("with_exclude", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_it_is_the_equation(with_queue: bool, with_exclude: bool, temperature: float) -> None:
    student, keys, exclude = inputs()
    count = N + M if with_queue else N
    some = exclude[:, :count] if with_exclude else None
    expected = pytest.approx(naive(student, keys[:count], some, temperature), rel=1e-10)
    assert ckd_loss(student, keys[:count], some, temperature).item() == expected


@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("with_exclude", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("rows", [1, 2, 4, 100])
def test_in_slices_it_is_the_same(
    with_queue: bool, with_exclude: bool, temperature: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradients of the cross-entropy by autograd, whatever the number of rows at a time."""
    student, keys, exclude = inputs()
    keys = keys if with_queue else keys[:N]
    monkeypatch.setattr(ckd_sliced, "_SLICE_ELEMENTS", rows * len(keys))
    some = exclude[:, : len(keys)] if with_exclude else None
    sides = student.requires_grad_(), keys.requires_grad_()
    plain, actual = ckd_loss(*sides, some, temperature), sliced(*sides, some, temperature)
    torch.testing.assert_close(actual, plain, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(actual, sides), torch.autograd.grad(plain, sides), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_keys_that_get_no_gradient_cost_none() -> None:
    student, keys, exclude = inputs()
    student.requires_grad_()
    (alone,) = torch.autograd.grad(sliced(student, keys, exclude), student)
    (beside,) = torch.autograd.grad(sliced(student, keys.requires_grad_(), exclude), student)
    assert torch.equal(alone, beside)


def test_the_default_temperature_is_007() -> None:
    student, keys, exclude = inputs()
    assert ckd_loss(student, keys, exclude).item() == ckd_loss(student, keys, exclude, temperature=0.07).item()


@pytest.mark.parametrize("loss", [ckd_loss, sliced])
def test_closed_forms(loss: Any) -> None:
    one = torch.randn(1, D)
    assert loss(one, torch.randn(1, D)).item() == 0.0, "nothing but the positive in the denominator"
    actual = loss(one.expand(4, D), one.expand(4 + M, D)).item()
    assert actual == pytest.approx(math.log(4 + M), rel=1e-6)
    exclude = torch.ones(4, 4, dtype=torch.bool)
    assert loss(one.expand(4, D), one.expand(4, D), exclude).item() == pytest.approx(0.0, abs=1e-6)
    basis = torch.eye(4)
    expected = math.log(math.e**2 + 3) - 2
    assert loss(basis, basis, None, 0.5).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", [ckd_loss, sliced])
def test_the_diagonal_of_exclude_is_ignored(loss: Any) -> None:
    student, keys, exclude = inputs()
    on, off = exclude.clone().fill_diagonal_(True), exclude.clone().fill_diagonal_(False)
    assert loss(student, keys, on).item() == loss(student, keys, off).item()
    assert exclude.equal(inputs()[2]), "the caller's mask is not changed"


def test_lengths_do_not_matter() -> None:
    student, keys, exclude = inputs()
    scaled = ckd_loss(student * 3, keys * torch.rand(N + M, 1).add(0.1), exclude)
    assert scaled.item() == pytest.approx(ckd_loss(student, keys, exclude).item())


def test_the_order_of_boxes_and_of_the_queue_does_not_matter() -> None:
    student, keys, exclude = inputs()
    order, rest = torch.randperm(N), N + torch.randperm(M)
    columns = torch.cat([order, rest])
    shuffled = ckd_loss(student[order], keys[columns], exclude[order][:, columns])
    assert shuffled.item() == pytest.approx(ckd_loss(student, keys, exclude).item())


@pytest.mark.parametrize("loss", [ckd_loss, sliced])
def test_gradients_on_both_sides(loss: Any) -> None:
    student, keys, exclude = inputs()
    sides = student.requires_grad_(), keys.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, exclude, 0.3), sides)
    assert torch.autograd.gradcheck(lambda s, t: loss(s, t, None, 0.3), sides)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_the_similarities_are_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the mask of pairs that are no negatives."""
    monkeypatch.setattr(ckd_sliced, "_SLICE_ELEMENTS", 8 * 1064)
    module = CKD(4, 4, dim=4, queue_size=1000).train()
    module.queue.push(teacher_keys(1000, 4))
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        module(torch.randn(64, 4, requires_grad=True), teacher_keys(64, 4)).loss.backward()
    assert largest.numel == 8 * 1064  # 8 of 64 rows


def test_half_precision_and_autocast_change_no_arithmetic() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        student, keys, exclude = inputs(dtype)
        plain = ckd_loss(student.float(), keys.float(), exclude)
        with torch.autocast("cpu", torch.bfloat16):
            actual = ckd_loss(student, keys, exclude)
        assert actual.dtype == torch.float32
        assert actual.item() == plain.item()
    module, teacher = CKD(D, D, dim=4, queue_size=8).eval(), teacher_keys(N, D)
    module.queue.push(teacher_keys(4, D, seed=1))
    result = module(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(student, teacher).loss.item() == result.loss.item()


@pytest.mark.parametrize("size", [1e-3, 1e6, 1e30])
def test_huge_and_tiny_values_count_as_much_as_others(size: float) -> None:
    student, keys, exclude = inputs(torch.float32)
    large = (student * size).requires_grad_()
    actual = ckd_loss(large, keys * size, exclude)
    actual.backward()
    assert actual.item() == pytest.approx(ckd_loss(student, keys, exclude).item(), rel=1e-5)
    assert large.grad is not None
    assert torch.isfinite(large.grad).all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-10, 1e-5])
def test_a_vanishing_representation_has_a_gradient_that_a_student_survives(size: float) -> None:
    student, keys, _ = inputs(torch.float32)
    student[0], keys[1], keys[N + 2] = student[0] * size, keys[1] * size, keys[N + 2] * size
    sides = student.requires_grad_(), keys.requires_grad_()
    for loss in (ckd_loss, sliced):
        value = loss(*sides)
        assert torch.isfinite(value)
        for gradient in torch.autograd.grad(value, sides):
            assert torch.isfinite(gradient).all()
            assert gradient.abs().max() < 1e4 / 0.07


def test_rows_of_length_one() -> None:
    rows = unit_rows(torch.tensor([[3.0, 4.0], [-1e30, 0.0], [1e-3, 0.0], [0.0, 0.0], [6e-6, 8e-6]]))
    expected = torch.tensor([[0.6, 0.8], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.06, 0.08]])
    torch.testing.assert_close(rows, expected)
    assert unit_rows(torch.zeros(0, 3)).shape == (0, 3)
    assert unit_rows(torch.tensor([[math.nan, 1.0]])).isnan().any(), "what is not finite stays so: the training ends"
    near = torch.tensor([[1.01e-4, 0.0], [0.99e-4, 0.0], [0.8e-4, 0.9e-4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unit_rows(x) * 1e-4, (near,), eps=1e-9)


@pytest.mark.parametrize("loss", [ckd_loss, sliced])
@pytest.mark.parametrize("others", [0, M])
def test_no_boxes_give_a_zero_in_the_graph(loss: Any, others: int) -> None:
    student, keys = torch.zeros(0, D, requires_grad=True), torch.randn(others, D, requires_grad=True)
    value = loss(student, keys, torch.zeros(0, others, dtype=torch.bool))
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None
    assert keys.grad is not None
    assert not keys.grad.any()


def test_what_does_not_fit_is_named() -> None:
    student, keys, exclude = inputs()
    with pytest.raises(LossInputError, match=r"keys has shape \[5, 5\]; expected \[6, 5\]"):
        ckd_loss(student, keys[:5])
    with pytest.raises(LossInputError, match=r"keys has shape \[15, 4\]; expected \[15, 5\]"):
        ckd_loss(student, keys[:, :4])
    with pytest.raises(LossInputError, match=r"exclude has shape \[6, 14\]; expected \[6, 15\]"):
        ckd_loss(student, keys, exclude[:, 1:])
    with pytest.raises(LossInputError, match="bool"):
        ckd_loss(student, keys, exclude.float())
    with pytest.raises(LossInputError, match=r"teacher's embeddings has shape \[6, 4\]; expected \[6, 5\]"):
        CKD(D, D)(student, teacher_keys(N, 4))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(LossInputError, match="above 0"):
        ckd_loss(*inputs()[:2], temperature=temperature)
    with pytest.raises(LossInputError, match="above 0"):
        CKD(D, D, temperature=temperature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": "cubic"}, "linear, nonlinear"),
        ({"exclude_iou": math.nan}, "exclude_iou is nan"),
        ({"queue_size": 0}, "positive"),
    ],
)
def test_options_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LossInputError, match=message):
        CKD(D, D, **options)


def test_which_pairs_are_no_negatives() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 5], [0, 0, 10, 10], [50, 50, 60, 60]]).float()
    image = torch.tensor([7, 7, 7, 9, 7])
    expected = torch.eye(5, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = True  # IoU 0.6
    expected[1, 2] = expected[2, 1] = True  # IoU 5/6; boxes 0 and 2 have exactly 0.5; box 3 is in another image
    assert same_object(boxes, image, boxes, image).equal(expected)
    assert same_object(boxes[:2], image[:2], boxes, image).equal(expected[:2])
    assert same_object(boxes, image, boxes, image, iou=0.7).sum() == 5 + 2
    assert same_object(torch.zeros(0, 4), torch.zeros(0), boxes, image).shape == (0, 5)
    with pytest.raises(LossInputError, match="image_ids"):
        same_object(boxes, image[:3], boxes, image)
    with pytest.raises(LossInputError, match="0 to 1"):
        same_object(boxes, image, boxes, image, math.nan)


def teacher_keys(count: int, dim: int, seed: int = 0) -> TeacherKeys:
    """Small boxes in one of three images, of which many overlap by half or more."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 3, (count, 2), generator=g).float()
    return TeacherKeys(
        torch.randn(count, dim, generator=g),
        torch.cat([corner, corner + torch.randint(4, 7, (count, 2), generator=g)], dim=1),
        torch.randint(0, 3, (count,), generator=g),
    )


def overlap(a: list[float], b: list[float]) -> float:
    wide, high = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return wide * high / (areas[0] + areas[1] - wide * high)


def no_negatives(own_keys: TeacherKeys, keys: TeacherKeys) -> Tensor:
    """Pairs of one object, by a loop."""
    excluded = torch.zeros(len(own_keys.boxes), len(keys.boxes), dtype=torch.bool)
    for i, box in enumerate(own_keys.boxes.tolist()):
        for j, other in enumerate(keys.boxes.tolist()):
            excluded[i, j] = own_keys.image_ids[i] == keys.image_ids[j] and overlap(box, other) > 0.5
    return excluded


@pytest.mark.parametrize("projection", ["linear", "nonlinear"])
def test_the_module_is_the_equation_over_batch_and_queue(projection: str) -> None:
    """Embeddings of earlier steps are projected by the present f_theta; the same object, then, is left out."""
    torch.manual_seed(0)
    module = CKD(student_dim=3, teacher_dim=4, dim=2, queue_size=7, projection=projection).double()
    p = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def f_theta(x: Tensor) -> Tensor:
        layers = ["f_theta"] if projection == "linear" else ["f_theta.0", "f_theta.2"]
        for index, layer in enumerate(layers):
            x = (x.relu() if index else x) @ p[f"{layer}.weight"].T + p[f"{layer}.bias"]
        return x

    earlier: list[TeacherKeys] = []
    for step in range(4):
        student, teacher = torch.randn(3, 3).double(), teacher_keys(3, 4, seed=step)
        teacher = TeacherKeys(teacher.embeddings.double(), teacher.boxes, teacher.image_ids)
        queue = TeacherKeys.join(earlier)[-7:] if earlier else teacher[:0]
        keys = TeacherKeys.join([teacher, queue])
        exclude = no_negatives(teacher, keys)
        student_projected = f_theta(student @ p["lift.weight"].T + p["lift.bias"])
        keys_projected = f_theta(keys.embeddings)
        result = module(student, teacher)
        assert result.loss.item() == pytest.approx(naive(student_projected, keys_projected, exclude), rel=1e-9)
        cosines = unit_rows(student_projected) @ unit_rows(keys_projected).T
        nearest = [
            all(cosines[i, i] > cosines[i, j] or exclude[i, j] for j in range(len(keys_projected)) if j != i)
            for i in range(3)
        ]
        assert result.top1.item() == pytest.approx(sum(nearest) / 3)
        pairs = unit_rows(keys_projected) @ unit_rows(keys_projected).T
        others = ~torch.eye(len(keys_projected), dtype=torch.bool)
        assert result.spread.item() == pytest.approx(pairs[others].mean().item())
        earlier.append(teacher)
        with torch.no_grad():  # f_theta learns; its parameters are those of `p`
            p[next(name for name in p if name.startswith("f_theta"))].mul_(-0.7).add_(0.1)
    assert int(module.queue.count) == 7
    assert any(no_negatives(earlier[-1], TeacherKeys.join(earlier[:-1])).flatten())


def test_an_object_of_an_earlier_epoch_is_no_negative() -> None:
    """Again in the queue by the same box, and by one that overlaps it by half or less."""
    module = CKD(2, 2, dim=2, queue_size=8).eval()
    box, half, beside = [0.0, 0, 10, 10], [0.0, 0, 10, 6], [0.0, 0, 10, 4]
    own_key = TeacherKeys(torch.ones(1, 2), torch.tensor([box]), torch.tensor([5]))

    def loss_beside(boxes: list[list[float]], image: int) -> float:
        module.queue.count.zero_()
        module.queue.cursor.zero_()
        count = len(boxes)
        module.queue.push(TeacherKeys(torch.randn(count, 2), torch.tensor(boxes), torch.full((count,), image)))
        return module(torch.ones(1, 2), own_key).loss.item()  # type: ignore[no-any-return]

    assert loss_beside([box, half], 5) == 0.0
    assert loss_beside([box, half], 6) > 0
    assert loss_beside([beside], 5) > 0


def test_a_collapsed_projection_shows() -> None:
    """Chance in the loss, no box whose own key is nearest, and a mean cosine of 1."""
    module = CKD(4, 4, dim=2, queue_size=50).eval()
    torch.nn.init.zeros_(module.f_theta.weight)  # type: ignore[arg-type]
    module.queue.push(teacher_keys(50, 4, seed=1))
    spread_out = TeacherKeys(torch.randn(9, 4), torch.zeros(9, 4), torch.arange(9) + 10)
    result = module(torch.randn(9, 4), spread_out)
    assert result.loss.item() == pytest.approx(math.log(59), rel=1e-5)
    assert result.top1.item() == 0
    assert result.spread.item() == pytest.approx(1.0, abs=1e-5)
    torch.nn.init.normal_(module.f_theta.weight)  # type: ignore[arg-type]
    result = module(spread_out.embeddings, spread_out)
    assert result.top1.item() == 1
    assert result.spread.item() < 0.5


def test_mean_cosine() -> None:
    rows = unit_rows(torch.randn(7, 3, dtype=torch.float64))
    expected = (rows @ rows.T)[~torch.eye(7, dtype=torch.bool)].mean().item()
    assert mean_cosine(rows).item() == pytest.approx(expected)
    assert mean_cosine(rows[:1]).item() == pytest.approx(0.0, abs=1e-12)
    assert mean_cosine(rows[:0]).item() == 0


def test_f_theta_learns_from_the_queue_too() -> None:
    torch.manual_seed(0)
    module = CKD(4, 4, dim=3, queue_size=8).double().eval()
    module.queue.push(teacher_keys(8, 4, seed=1))
    student, teacher = torch.randn(5, 4).double(), teacher_keys(5, 4)
    module(student, teacher).loss.backward()
    weight, bias = (p.detach().clone().requires_grad_() for p in module.f_theta.parameters())
    keys = TeacherKeys.join([teacher, module.queue.keys()])
    projected = keys.embeddings.double() @ weight.T + bias
    ckd_loss(student @ weight.T + bias, projected, no_negatives(teacher, keys)).backward()
    for actual, expected in zip(module.f_theta.parameters(), (weight, bias), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_all_parameters_learn_and_the_teacher_does_not() -> None:
    torch.manual_seed(0)
    module = CKD(3, 4, dim=2, queue_size=7)
    student, teacher = torch.randn(5, 3, requires_grad=True), teacher_keys(5, 4)
    teacher.embeddings.requires_grad_()
    for _ in range(2):  # the second time with a queue, which is fed before backward
        module(student, teacher).loss.backward()
    assert teacher.embeddings.grad is None
    assert student.grad is not None
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert {name for name, _ in CKD(4, 4).named_parameters()} == {"f_theta.weight", "f_theta.bias"}


def test_evaluation_leaves_the_queue_alone() -> None:
    module = CKD(3, 3, dim=2, queue_size=7).eval()
    before = copy.deepcopy(module.state_dict())
    module(torch.randn(5, 3), teacher_keys(5, 3))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_no_boxes_still_touch_every_parameter() -> None:
    module = CKD(3, 4, dim=2, queue_size=7)
    module.queue.push(teacher_keys(3, 4))
    result = module(torch.zeros(0, 3), teacher_keys(0, 4))
    result.loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert int(module.queue.count) == 3
    assert result.top1.item() == 0
