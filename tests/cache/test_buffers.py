"""Memory that is used again: never while somebody has it, and not too much of it."""

import multiprocessing
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kdpipe.cache import TeacherTargets, array_reader, open_cache
from kdpipe.cache.read.buffers import Buffers

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cache.conftest import Kit

SIZE = 1 << 20


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
    buffers = Buffers()
    block = buffers.take(SIZE)
    where = address(block)
    part = KEEP[kind](block)
    del block
    others = [buffers.take(SIZE) for _ in range(3)]
    assert where not in [address(other) for other in others]
    del part
    assert address(buffers.take(SIZE)) == where


def test_blocks() -> None:
    buffers = Buffers()
    for size in (1, 5000, (128 << 10) - 1, 128 << 10, SIZE, SIZE + 1, 19 * SIZE):
        block = buffers.take(size)
        assert block.shape == (size,)
        assert block.dtype == np.uint8
        assert block.flags.writeable
        assert address(block) % 4096 == 0
        block[:] = 1


def take_and_check(buffers: Buffers, seed: int, rounds: int = 400) -> None:
    """Has some blocks at any time, each with a number of its own at both ends and in the middle."""
    chance = random.Random(seed)
    mine: list[tuple[int, torch.Tensor]] = []
    for number in range(rounds):
        size = chance.choice([200_000, 230_000, 300_000])
        block = buffers.take(size)
        mark = (seed * 1009 + number) % 251
        block[:] = mark
        mine.append((mark, torch.from_numpy(block[chance.randrange(1000) :])))
        while len(mine) > chance.randrange(6):
            mark, tensor = mine.pop(chance.randrange(len(mine)))
            assert bool((tensor == mark).all())


def run_threads(buffers: Buffers, seeds: range) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            take_and_check(buffers, seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_threads() -> None:
    buffers = Buffers(most=1_000_000)
    run_threads(buffers, range(4))
    assert buffers.free_bytes() <= 1_000_000


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 says so of fork
def test_forked_children() -> None:
    """What is free and what is not in the parent is its own; the child does as it likes."""
    buffers = Buffers()
    kept = [buffers.take(SIZE) for _ in range(3)]
    for number, block in enumerate(kept):
        block[:] = number
    free = [buffers.take(SIZE) for _ in range(3)]
    del free
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=run_threads, args=(buffers, range(n, n + 2))) for n in (1, 7)]
    for child in children:
        child.start()
    take_and_check(buffers, 99)
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    for number, block in enumerate(kept):
        assert bool((block == number).all())


def test_what_is_free_has_a_limit() -> None:
    buffers = Buffers(most=10 * SIZE)
    many = [buffers.take(SIZE) for _ in range(40)]
    del many
    assert buffers.free_bytes() == 10 * SIZE
    buffers.take(2 * SIZE)  # makes room for its size
    assert buffers.free_bytes() == 2 * SIZE


AT_EXIT = """
import sys, types
import torch
from kdpipe.cache.read.buffers import Buffers
kept = [Buffers().take(1 << 20)]
kept.append(kept)
early = torch.from_numpy(Buffers().take(1 << 20))
torch.kept_by_the_test = early[5:]
sys.modules["late"] = types.ModuleType("late")
sys.modules["late"].kept = early.numpy()[3:]
"""


def test_memory_in_use_at_exit() -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""


def levels(targets: TeacherTargets) -> list[torch.Tensor]:
    return [level for level in targets.features or () if level is not None]


def test_targets_stay_as_they_were(tmp_path: "Path", kit: "type[Kit]") -> None:
    """Of many images read, parts of some are kept."""
    cache = open_cache(kit.make(tmp_path / "x.zarr", kit.spec(channels=1024, dtype="float16", codec="none")))
    expected = {n: [level.clone() for level in levels(cache.targets(n))] for n in cache.image_ids.tolist()}
    assert array_reader._BUFFERS.free_bytes()
    chance = random.Random(0)
    kept: list[tuple[int, int, torch.Tensor]] = []
    for _ in range(150):
        image_id, level = chance.choice(list(expected)), chance.randrange(4)
        kept.append((image_id, level, levels(cache.targets(image_id))[level][chance.randrange(3) :]))
        while len(kept) > chance.randrange(8):
            image_id, level, values = kept.pop(chance.randrange(len(kept)))
            assert torch.equal(values, expected[image_id][level][-len(values) :])
