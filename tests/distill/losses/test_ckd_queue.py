"""The queue of CKD: what it keeps, over steps, processes and checkpoints."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from kdpipe.distill.losses.ckd_queue import TeacherKeys, TeacherQueue
from kdpipe.distill.losses.numeric import LossInputError

if TYPE_CHECKING:
    from tests.conftest import Forks


def keys(*numbers: int) -> TeacherKeys:
    """Keys that are told apart by a number in everything they hold."""
    values = torch.tensor(numbers, dtype=torch.float32)[:, None]
    ids = torch.tensor(numbers, dtype=torch.int64)
    return TeacherKeys(values.expand(-1, 2), values.expand(-1, 4) * 10, ids + 100)


def held(queue: TeacherQueue) -> list[int]:
    kept_keys = queue.keys()
    numbers = sorted(int(value) for value in kept_keys.embeddings[:, 0])
    order = kept_keys.embeddings[:, 0].argsort()
    expected = keys(*numbers)
    assert torch.equal(kept_keys.boxes[order], expected.boxes)
    assert torch.equal(kept_keys.image_ids[order], expected.image_ids)
    return numbers


def test_the_queue_drops_the_oldest_first() -> None:
    queue = TeacherQueue(dim=2, size=5)
    assert queue.keys().embeddings.shape == (0, 2)
    for new, expected in [
        ((1, 2), [1, 2]),
        ((), [1, 2]),
        ((3, 4), [1, 2, 3, 4]),
        ((5, 6), [2, 3, 4, 5, 6]),
        ((7, 8, 9, 10), [6, 7, 8, 9, 10]),
        (tuple(range(11, 24)), [19, 20, 21, 22, 23]),
        ((24,), [20, 21, 22, 23, 24]),
    ]:
        queue.push(keys(*new))
        assert held(queue) == expected
    with pytest.raises(LossInputError, match=r"\[1, 3\]; expected \[1, 2\]"):
        queue.push(TeacherKeys(torch.zeros(1, 3), torch.zeros(1, 4), torch.zeros(1)))
    for dim, size in ((2, 0), (0, 2)):
        with pytest.raises(LossInputError, match="positive"):
            TeacherQueue(dim, size)


def test_embeddings_are_kept_in_half_precision_and_stay_finite() -> None:
    queue = TeacherQueue(dim=3, size=4)
    new = torch.tensor([[1.0009765625, -1e9, 1e30]])
    queue.push(TeacherKeys(new, torch.zeros(1, 4), torch.zeros(1)))
    assert queue.keys().embeddings.dtype == torch.float16
    assert queue.keys().embeddings.tolist() == [[1.0009765625, -65504.0, 65504.0]]
    assert sum(buffer.nbytes for buffer in TeacherQueue(1024, 40960).buffers()) == 40960 * (2 * 1024 + 24) + 16


def test_image_ids_and_pixels_are_exact() -> None:
    queue = TeacherQueue(dim=1, size=2)
    box = torch.tensor([[0.1, 12345.678, 54321.9, 65432.1]])
    queue.push(TeacherKeys(torch.zeros(1, 1), box, torch.tensor([2**53 + 1])))
    assert torch.equal(queue.keys().boxes, box)
    assert queue.keys().image_ids.tolist() == [2**53 + 1]


def test_a_loaded_queue_goes_on_where_it_was() -> None:
    queue, other = TeacherQueue(2, 4), TeacherQueue(2, 4)
    queue.push(keys(1, 2, 3, 4, 5))
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.push(keys(6))
    assert held(other) == held(queue) == [3, 4, 5, 6]


@pytest.mark.parametrize(("size", "expected", "then"), [(3, [4, 5, 6], [5, 6, 7]), (6, [3, 4, 5, 6], [3, 4, 5, 6, 7])])
def test_a_queue_of_another_size_gives_its_newest(size: int, expected: list[int], then: list[int]) -> None:
    """As after a resumption with another batch size, or another number of processes."""
    queue, other = TeacherQueue(2, 4), TeacherQueue(2, size)
    for new in ((1, 2, 3), (4, 5, 6)):
        queue.push(keys(*new))
    other.load_state_dict(queue.state_dict())
    assert held(other) == expected
    other.push(keys(7))
    assert held(other) == then
    empty = TeacherQueue(2, 4)
    other.load_state_dict(empty.state_dict())
    assert held(other) == []


def test_a_queue_of_projections_begins_anew_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """Checkpoints of versions that kept projections of an earlier f_theta."""
    queue = TeacherQueue(2, 4)
    queue.push(keys(1, 2))
    older = {"reps": torch.randn(9, 128), "count": torch.tensor(9), "cursor": torch.tensor(0)}
    with caplog.at_level(logging.WARNING, logger="kdpipe"):
        queue.load_state_dict(older)
    assert held(queue) == []
    assert "begins empty" in caplog.text


WORKER = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from kdpipe.distill.losses.ckd import CKD, ckd_loss
from kdpipe.distill.losses.ckd_negatives import same_object
from kdpipe.distill.losses.ckd_queue import TeacherKeys, TeacherQueue, of_all_ranks

torch.set_num_threads(1)
child = os.fork()  # one import serves both ranks
rank = 0 if child else 1
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)

def keys(*numbers):
    values = torch.tensor(numbers, dtype=torch.float32).reshape(-1, 1)
    ids = torch.tensor(numbers, dtype=torch.int64)
    return TeacherKeys(values.expand(-1, 2), values.expand(-1, 4) / 3, ids + 2**52)

queue = TeacherQueue(2, size=6)
for per_rank, expected in [
    ([(1, 2, 3), ()], [1, 2, 3]),
    ([(), ()], [1, 2, 3]),
    ([(4,), (5, 6)], [1, 2, 3, 4, 5, 6]),
    ([(), (7, 8)], [3, 4, 5, 6, 7, 8]),
    ([(9, 10, 11, 12), (13, 14, 15, 16)], [11, 12, 13, 14, 15, 16]),
]:
    others, every = of_all_ranks(keys(*per_rank[rank]))
    assert (others.image_ids - 2**52).tolist() == list(per_rank[1 - rank])
    wanted = keys(*per_rank[0], *per_rank[1])
    assert torch.equal(every.boxes, wanted.boxes) and torch.equal(every.image_ids, wanted.image_ids)
    queue.push(every)
    assert sorted((queue.keys().image_ids - 2**52).tolist()) == expected, (rank, queue.keys())

# losses and gradients are those of one process that sees the boxes of both
def batch(step):
    g = torch.Generator().manual_seed(step)
    counts = [(3, 0), (0, 0), (2, 4), (4, 3)][step]
    total = sum(counts)
    student, embeddings = torch.randn(total, 3, generator=g), torch.randn(total, 4, generator=g).half().float()
    corner = torch.randint(0, 2, (total, 2), generator=g).float()
    boxes = torch.cat([corner, corner + 4], dim=1)
    image = torch.randint(0, 2, (total,), generator=g)
    rows = slice(0, counts[0]) if rank == 0 else slice(counts[0], total)
    teacher = TeacherKeys(embeddings, boxes, image)
    return counts, student, teacher, rows

torch.manual_seed(0)
model = DistributedDataParallel(CKD(3, 4, dim=2, queue_size=8))
alone = CKD(3, 4, dim=2, queue_size=8).eval()
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for step in range(4):
    counts, student, teacher, rows = batch(step)
    alone.load_state_dict(model.module.state_dict())
    alone.zero_grad()
    every = TeacherKeys.join([teacher, alone.queue.keys()])
    ours, theirs = alone.f_theta(alone.lift(student)), alone.f_theta(every.embeddings.float())
    exclude = same_object(teacher.boxes, teacher.image_ids, every.boxes, every.image_ids)
    expected = []
    for part in (slice(0, counts[0]), slice(counts[0], sum(counts))):  # the mean of each rank's mean
        of = torch.arange(len(every.boxes))
        order = torch.cat([of[part], of[: part.start], of[part.stop :]])
        expected.append(ckd_loss(ours[part], theirs[order], exclude[part][:, order]))
    (sum(expected) / 2).backward()
    optimizer.zero_grad()
    result = model(student[rows], teacher[rows])
    torch.testing.assert_close(result.loss.detach(), expected[rank].detach())
    result.loss.backward()
    for found, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)
    optimizer.step()
for tensor in model.module.state_dict().values():
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor)
    assert torch.equal(both[0], both[1])
assert int(model.module.queue.count) == 8
dist.destroy_process_group()
if child:
    assert os.waitpid(child, 0)[1] == 0, "rank 1 failed"
    print("done")
else:
    os._exit(0)  # a forked child has not all threads of its parent, which what runs at the end may miss
"""


def test_ranks_with_different_numbers_of_boxes_share_negatives_and_queue(tmp_path: Path, forks: "Forks") -> None:
    """Two processes, in some steps without boxes: losses and gradients are those of one with the boxes of both."""
    ranks = forks.start(WORKER, tmp_path / "store", cwd=tmp_path)
    assert ranks.wait() == 0, ranks.err
    assert ranks.out.strip() == "done"
