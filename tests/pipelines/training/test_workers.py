"""Loader workers: what the fork server has imported for them."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from kdpipe.pipelines.training.workers import default_workers

if TYPE_CHECKING:
    from tests.conftest import Forks

WORKER = """
import multiprocessing
from kdpipe.pipelines.training.workers import preload_workers
preload_workers()
code = '''
import sys
assert "kdpipe.pipelines.training.wrapping" in sys.modules
before = set(sys.modules)
import mmdet.datasets
from kdpipe.cache.read import reader
from kdpipe.pipelines.data import checked_dataset, images
from kdpipe.pipelines.training import parcel, seeding, transforms
late = {name for name in set(sys.modules) - before if name.startswith(("kdpipe.", "mmdet.", "mmcv.", "torch."))}
assert not late, late
'''
worker = multiprocessing.get_context("forkserver").Process(target=exec, args=(code,))
worker.start()
worker.join()
assert worker.exitcode == 0
"""


def test_workers_import_nothing_for_themselves(tmp_path: Path, forks: "Forks") -> None:
    """Three seconds each, otherwise."""
    training = forks.start(WORKER, cwd=tmp_path)
    assert training.wait() == 0, training.err


@pytest.mark.parametrize(
    ("cores", "on_gpu", "processes", "expected"),
    [
        (1, False, "", 1),
        (4, False, "", 2),
        (16, False, "", 4),
        (16, True, "", 8),
        (128, True, "8", 8),
        (16, True, "4", 2),
    ],
)
def test_default_workers(
    monkeypatch: pytest.MonkeyPatch, cores: int, on_gpu: bool, processes: str, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert default_workers() == expected
