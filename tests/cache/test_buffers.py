"""Memory that is used again: never while somebody has it, and not too much of it."""

import gc
import multiprocessing
import random
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kdpipe.cache import TeacherTargets, buffers, open_cache
from kdpipe.cache.buffers import take

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cache.conftest import Kit

SIZE = 1 << 20


@pytest.fixture(autouse=True)
def nothing_free() -> Iterator[None]:
    gc.collect()
    buffers._free.clear()
    yield
    buffers._free.clear()


def address(block: Any) -> int:
    return int(block.__array_interface__["data"][0])


# Parts of a block, each the only thing that keeps it alive.
KEEP: dict[str, Callable[[Any], Any]] = {
    "slice": lambda block: block[10:20],
    "slice of a slice": lambda block: block[5:][5:][::3],
    "array of another type": lambda block: block.view(np.float32).reshape(4, -1)[1:],
    "tensor": torch.from_numpy,
    "level": lambda block: torch.from_numpy(block[64:].reshape(2, -1))[1].view(torch.int16)[3:9],
    "array of a tensor": lambda block: torch.from_numpy(block)[7:].numpy()[1:],
    "detached": lambda block: torch.from_numpy(block).detach()[5:],
    "bytes": memoryview,
}


@pytest.mark.parametrize("kind", KEEP)
def test_memory_is_used_again_when_the_last_part_of_it_is_gone(kind: str) -> None:
    block = take(SIZE)
    where = address(block)
    part = KEEP[kind](block)
    del block
    others = [take(SIZE) for _ in range(3)]
    assert where not in [address(other) for other in others]
    del part
    assert address(take(SIZE)) == where


def test_blocks() -> None:
    for size in (1, 5000, (128 << 10) - 1, 128 << 10, SIZE, SIZE + 1, 19 * SIZE):
        block = take(size)
        assert block.shape == (size,)
        assert block.dtype == np.uint8
        assert block.flags.writeable
        assert address(block) % 4096 == 0
        block[:] = 1


def take_and_check(seed: int, rounds: int = 400) -> None:
    """Has some blocks at any time, each with a number of its own at both ends and in the middle."""
    chance = random.Random(seed)
    mine: list[tuple[int, torch.Tensor]] = []
    for number in range(rounds):
        size = chance.choice([200_000, 230_000, 300_000])
        block = take(size)
        mark = (seed * 1009 + number) % 251
        block[:] = mark
        mine.append((mark, torch.from_numpy(block[chance.randrange(1000) :])))
        while len(mine) > chance.randrange(6):
            mark, tensor = mine.pop(chance.randrange(len(mine)))
            assert bool((tensor == mark).all())


def run_threads(seeds: range) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            take_and_check(seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_threads() -> None:
    run_threads(range(4))
    assert buffers._free_bytes() <= buffers._MOST_FREE


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 says so of fork
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_children(method: str) -> None:
    """What is free and what is not in the parent is its own; the child does as it likes."""
    kept = [take(SIZE) for _ in range(3)]
    for number, block in enumerate(kept):
        block[:] = number
    free = [take(SIZE) for _ in range(3)]
    del free
    context: Any = multiprocessing.get_context(method)
    children = [context.Process(target=run_threads, args=(range(n, n + 2),)) for n in (1, 7)]
    for child in children:
        child.start()
    take_and_check(99)
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    for number, block in enumerate(kept):
        assert bool((block == number).all())


def test_what_is_free_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_MOST_FREE", 10 * SIZE)
    many = [take(SIZE) for _ in range(40)]
    del many
    assert buffers._free_bytes() == 10 * SIZE
    take(2 * SIZE)  # makes room for its size
    assert list(buffers._free) == [2 * SIZE]


def levels(targets: TeacherTargets) -> list[torch.Tensor]:
    return [level for level in targets.features or () if level is not None]


def test_targets_stay_as_they_were(tmp_path: "Path", kit: "type[Kit]") -> None:
    """Of many images read, parts of some are kept."""
    cache = open_cache(kit.make(tmp_path / "x.zarr", kit.spec(channels=1024, dtype="float16", codec="none")))
    expected = {n: [level.clone() for level in levels(cache.targets(n))] for n in cache.image_ids.tolist()}
    assert buffers._free_bytes()
    chance = random.Random(0)
    kept: list[tuple[int, int, torch.Tensor]] = []
    for _ in range(150):
        image_id, level = chance.choice(list(expected)), chance.randrange(4)
        kept.append((image_id, level, levels(cache.targets(image_id))[level][chance.randrange(3) :]))
        while len(kept) > chance.randrange(8):
            image_id, level, values = kept.pop(chance.randrange(len(kept)))
            assert torch.equal(values, expected[image_id][level][-len(values) :])
