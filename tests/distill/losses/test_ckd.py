"""CKD against a loop written from equation 2 of the paper; its queue, also over two processes."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdpipe.distill.losses import ckd
from kdpipe.distill.losses.ckd import CKD, ContrastiveQueue, ckd_loss, exclude_pairs
from kdpipe.distill.losses.numeric import LossInputError

N, M, D = 6, 9, 5


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher, queue, exclude (its diagonal True in places, which must not matter)."""
    torch.manual_seed(0)
    student, teacher, queue = (torch.randn(n, D, dtype=torch.float64).to(dtype) for n in (N, N, M))
    return student, teacher, queue, torch.rand(N, N) < 0.4


def naive(
    student: Tensor, teacher: Tensor, queue: Tensor | None, exclude: Tensor | None, temperature: float = 0.07
) -> float:
    """Equation 2 in plain Python."""

    def g(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return math.exp(dot / math.hypot(*a) / math.hypot(*b) / temperature)

    s, t, q = student.tolist(), teacher.tolist(), [] if queue is None else queue.tolist()
    total = 0.0
    for i in range(len(s)):
        denominator = sum(g(s[i], negative) for negative in q)
        for j in range(len(t)):
            if j == i or exclude is None or not exclude[i, j]:
                denominator += g(s[i], t[j])
        total -= math.log(g(s[i], t[i]) / denominator)
    return total / len(s)


@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("with_exclude", [False, True])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_it_is_the_equation(with_queue: bool, with_exclude: bool, temperature: float) -> None:
    student, teacher, all_queue, all_exclude = inputs()
    queue, exclude = all_queue if with_queue else None, all_exclude if with_exclude else None
    found = ckd_loss(student, teacher, queue=queue, exclude=exclude, temperature=temperature)
    assert found.item() == pytest.approx(naive(student, teacher, queue, exclude, temperature), rel=1e-10)


def test_the_default_temperature_is_007() -> None:
    student, teacher, queue, exclude = inputs()
    explicit = ckd_loss(student, teacher, queue=queue, exclude=exclude, temperature=0.07)
    assert ckd_loss(student, teacher, queue=queue, exclude=exclude).item() == explicit.item()


def test_closed_forms() -> None:
    one = torch.randn(1, D)
    assert ckd_loss(one, torch.randn(1, D)).item() == 0.0, "nothing but the positive in the denominator"
    same = one.expand(4, D)
    found = ckd_loss(same, same, queue=one.expand(M, D)).item()
    assert found == pytest.approx(math.log(4 + M), rel=1e-6)
    exclude = torch.ones(4, 4, dtype=torch.bool)
    assert ckd_loss(same, same, exclude=exclude).item() == pytest.approx(0.0, abs=1e-6)
    basis = torch.eye(4)
    expected = math.log(math.e**2 + 3) - 2
    assert ckd_loss(basis, basis, temperature=0.5).item() == pytest.approx(expected, rel=1e-6)


def test_the_diagonal_of_exclude_is_ignored() -> None:
    student, teacher, queue, exclude = inputs()
    on, off = exclude.clone().fill_diagonal_(True), exclude.clone().fill_diagonal_(False)
    found = ckd_loss(student, teacher, queue=queue, exclude=on)
    assert found.item() == ckd_loss(student, teacher, queue=queue, exclude=off).item()
    assert exclude.equal(inputs()[3]), "the caller's mask is not changed"


def test_lengths_do_not_matter() -> None:
    student, teacher, queue, exclude = inputs()
    plain = ckd_loss(student, teacher, queue=queue, exclude=exclude)
    scaled = ckd_loss(student * 3, teacher * torch.rand(N, 1).add(0.1), queue=queue * 7, exclude=exclude)
    assert scaled.item() == pytest.approx(plain.item())


def test_the_order_of_boxes_and_of_the_queue_does_not_matter() -> None:
    student, teacher, queue, exclude = inputs()
    plain = ckd_loss(student, teacher, queue=queue, exclude=exclude)
    order = torch.randperm(N)
    shuffled = ckd_loss(
        student[order], teacher[order], queue=queue[torch.randperm(M)], exclude=exclude[order][:, order]
    )
    assert shuffled.item() == pytest.approx(plain.item())


def test_gradients_on_both_sides_and_none_for_the_queue() -> None:
    student, teacher, queue, exclude = inputs()
    for tensor in (student, teacher, queue):
        tensor.requires_grad_()

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return ckd_loss(s, t, queue=queue, exclude=exclude, temperature=0.3)

    assert torch.autograd.gradcheck(loss, (student, teacher))
    assert torch.autograd.gradcheck(lambda s, t: ckd_loss(s, t, temperature=0.3), (student, teacher))
    loss(student, teacher).backward()
    assert queue.grad is None


@pytest.mark.parametrize("elements", [1, 2 * (N + M), 4 * (N + M)])
def test_slices_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, queue, exclude = inputs()
    student.requires_grad_()
    teacher.requires_grad_()
    whole = ckd_loss(student, teacher, queue=queue, exclude=exclude)
    grads = torch.autograd.grad(whole, (student, teacher))
    monkeypatch.setattr(ckd, "_SLICE_ELEMENTS", elements)
    sliced = ckd_loss(student, teacher, queue=queue, exclude=exclude)
    torch.testing.assert_close(sliced, whole)
    for found, expected in zip(torch.autograd.grad(sliced, (student, teacher)), grads, strict=True):
        torch.testing.assert_close(found, expected)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_the_similarities_are_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckd, "_SLICE_ELEMENTS", 8 * 1064)
    student, teacher = torch.randn(64, 4, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    exclude = torch.zeros(64, 64, dtype=torch.bool)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        ckd_loss(student, teacher, queue=torch.randn(1000, 4), exclude=exclude).backward()
    assert largest.numel == 8 * 1064  # 8 of 64 rows


def test_half_precision_and_autocast_change_no_arithmetic() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        student, teacher, queue, exclude = inputs(dtype)
        plain = ckd_loss(student.float(), teacher.float(), queue=queue.float(), exclude=exclude)
        with torch.autocast("cpu", torch.bfloat16):
            found = ckd_loss(student, teacher, queue=queue, exclude=exclude)
        assert found.dtype == torch.float32
        assert found.item() == plain.item()
    module = CKD(D, D, dim=4, queue_size=8).eval()
    plain = module(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(student, teacher).item() == plain.item()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_huge_and_tiny_values_count_as_much_as_others(size: float) -> None:
    student, teacher, queue, exclude = inputs(torch.float32)
    plain = ckd_loss(student, teacher, queue=queue, exclude=exclude)
    large = (student * size).requires_grad_()
    found = ckd_loss(large, teacher * size, queue=queue * size, exclude=exclude)
    found.backward()
    assert found.item() == pytest.approx(plain.item(), rel=1e-5)
    assert large.grad is not None
    assert torch.isfinite(large.grad).all()


def test_a_representation_of_zeros_is_finite() -> None:
    student, teacher, queue, _ = inputs(torch.float32)
    student[0], teacher[1], queue[2] = 0.0, 0.0, 0.0
    student.requires_grad_()
    loss = ckd_loss(student, teacher, queue=queue)
    loss.backward()
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e3


def test_no_boxes_give_a_zero_in_the_graph() -> None:
    student, teacher = torch.zeros(0, D, requires_grad=True), torch.zeros(0, D, requires_grad=True)
    loss = ckd_loss(student, teacher, queue=torch.randn(M, D), exclude=torch.zeros(0, 0, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None
    assert teacher.grad is not None


def test_what_does_not_fit_is_named() -> None:
    student, teacher, queue, exclude = inputs()
    with pytest.raises(LossInputError, match=r"teacher has shape \[5, 5\]; expected \[6, 5\]"):
        ckd_loss(student, teacher[:5])
    with pytest.raises(LossInputError, match=r"queue has shape \[9, 4\]; expected \[9, 5\]"):
        ckd_loss(student, teacher, queue=queue[:, :4])
    with pytest.raises(LossInputError, match=r"exclude has shape \[6, 5\]; expected \[6, 6\]"):
        ckd_loss(student, teacher, exclude=exclude[:, :5])
    with pytest.raises(LossInputError, match="bool"):
        ckd_loss(student, teacher, exclude=exclude.float())
    with pytest.raises(LossInputError, match="above 0"):
        ckd_loss(student, teacher, temperature=0.0)
    with pytest.raises(LossInputError, match=r"teacher_embeddings has shape \[6, 4\]; expected \[6, 5\]"):
        CKD(D, D)(student, teacher[:, :4])


def test_which_pairs_are_no_negatives() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 5], [0, 0, 10, 10], [50, 50, 60, 60]]).float()
    image = torch.tensor([0, 0, 0, 1, 0])
    expected = torch.eye(5, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = True  # IoU 0.6
    expected[1, 2] = expected[2, 1] = True  # IoU 5/6; boxes 0 and 2 have exactly 0.5; box 3 is in another image
    assert exclude_pairs(boxes, image).equal(expected)
    assert exclude_pairs(boxes, image, iou=0.7).sum() == 5 + 2
    assert exclude_pairs(torch.zeros(0, 4), torch.zeros(0)).shape == (0, 0)
    with pytest.raises(LossInputError, match="image_index"):
        exclude_pairs(boxes, image[:3])


def rows(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, 2)


def held(queue: ContrastiveQueue) -> list[int]:
    return sorted(int(value) for value in queue.negatives()[:, 0])


def test_the_queue_drops_the_oldest_first() -> None:
    queue = ContrastiveQueue(dim=2, size=5)
    assert queue.negatives().shape == (0, 2)
    for new, expected in [
        ((1, 2), [1, 2]),
        ((), [1, 2]),
        ((3, 4), [1, 2, 3, 4]),
        ((5, 6), [2, 3, 4, 5, 6]),
        ((7, 8, 9, 10), [6, 7, 8, 9, 10]),
        (tuple(range(11, 24)), [19, 20, 21, 22, 23]),
        ((24,), [20, 21, 22, 23, 24]),
    ]:
        queue.push(rows(*new))
        assert held(queue) == expected
    with pytest.raises(LossInputError, match=r"\[1, 3\]; expected \[1, 2\]"):
        queue.push(torch.zeros(1, 3))
    with pytest.raises(LossInputError, match="positive"):
        ContrastiveQueue(2, 0)


def test_a_loaded_queue_goes_on_where_it_was() -> None:
    queue, other = ContrastiveQueue(2, 4), ContrastiveQueue(2, 4)
    queue.push(rows(1, 2, 3, 4, 5))
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.push(rows(6))
    assert held(other) == held(queue) == [3, 4, 5, 6]


def test_the_module_projects_both_sides_and_then_feeds_the_queue() -> None:
    torch.manual_seed(0)
    module = CKD(student_dim=3, teacher_dim=4, dim=2, queue_size=7).double()
    p = {name: parameter.detach() for name, parameter in module.named_parameters()}
    assert set(p) == {"lift.weight", "lift.bias", "f_theta.weight", "f_theta.bias"}
    earlier = torch.zeros(0, 2, dtype=torch.float64)
    for _ in range(3):
        student, teacher = torch.randn(3, 3).double(), torch.randn(3, 4).double()
        exclude = torch.rand(3, 3) < 0.5
        projected_student = (student @ p["lift.weight"].T + p["lift.bias"]) @ p["f_theta.weight"].T + p["f_theta.bias"]
        projected = teacher @ p["f_theta.weight"].T + p["f_theta.bias"]
        found = module(student, teacher, exclude).item()
        assert found == pytest.approx(naive(projected_student, projected, earlier[-7:], exclude))
        earlier = torch.cat([earlier, projected / projected.norm(dim=1, keepdim=True)])
    ring = module.queue.negatives()
    torch.testing.assert_close(ring[ring[:, 0].argsort()], earlier[-7:][earlier[-7:][:, 0].argsort()])
    assert not ring.requires_grad


def test_all_parameters_learn_and_the_teacher_does_not() -> None:
    torch.manual_seed(0)
    module = CKD(3, 4, dim=2, queue_size=7)
    student, teacher = torch.randn(5, 3, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    for _ in range(2):  # the second time with a queue, which is fed before backward
        module(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert {name for name, _ in CKD(4, 4).named_parameters()} == {"f_theta.weight", "f_theta.bias"}


def test_evaluation_leaves_the_queue_alone() -> None:
    module = CKD(3, 3, dim=2, queue_size=7).eval()
    module(torch.randn(5, 3), torch.randn(5, 3))
    assert module.queue.negatives().shape == (0, 2)


def test_no_boxes_still_touch_every_parameter() -> None:
    module = CKD(3, 4, dim=2, queue_size=7)
    module.queue.push(torch.randn(3, 2))
    module(torch.zeros(0, 3), torch.zeros(0, 4), torch.zeros(0, 0, dtype=torch.bool)).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert len(module.queue.negatives()) == 3


WORKER = """
import os, sys, torch, torch.distributed as dist
from kdpipe.distill.losses.ckd import CKD, ContrastiveQueue

torch.set_num_threads(1)
child = os.fork()  # one import serves both ranks
rank = 0 if child else 1
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)

def rows(*numbers):
    return torch.tensor(numbers, dtype=torch.float32).reshape(-1, 1).expand(-1, 2)

queue = ContrastiveQueue(2, size=6)
for per_rank, expected in [
    ([(1, 2, 3), ()], [1, 2, 3]),
    ([(), ()], [1, 2, 3]),
    ([(4,), (5, 6)], [1, 2, 3, 4, 5, 6]),
    ([(), (7, 8)], [3, 4, 5, 6, 7, 8]),
    ([(9, 10, 11, 12), (13, 14, 15, 16)], [11, 12, 13, 14, 15, 16]),
]:
    queue.push(rows(*per_rank[rank]))
    assert sorted(queue.negatives()[:, 0].tolist()) == expected, (rank, queue.negatives())

torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(CKD(3, 4, dim=2, queue_size=8))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for step, count in enumerate([(3, 0), (0, 0), (2, 0)]):
    generator = torch.Generator().manual_seed(step)
    n = count[rank]
    optimizer.zero_grad()
    model(torch.randn(n, 3, generator=generator), torch.randn(n, 4, generator=generator)).backward()
    optimizer.step()
for tensor in model.module.state_dict().values():
    seen = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(seen, tensor)
    assert torch.equal(seen[0], seen[1])
assert len(model.module.queue.negatives()) == 5
dist.destroy_process_group()
if child:
    assert os.waitpid(child, 0)[1] == 0, "rank 1 failed"
    print("done")
else:
    os._exit(0)  # a forked child has not all threads of its parent, which what runs at the end may miss
"""


def test_ranks_with_different_numbers_of_boxes_share_one_queue(tmp_path: Path) -> None:
    """Two processes, one of them without RoIs in every step: nothing hangs, parameters and queues stay equal."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, str(script), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "done"
