"""`train-student` in two processes on the CPU: no parameter is missed, and the ranks agree."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kdpipe.pipelines.checkpoints import register_safe_types

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


def two_processes(work: Path, *args: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, "-m", "kdpipe.pipelines.cli", *map(str, args)],
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def trained(work_dir: Path) -> tuple[Any, list[dict[str, float]]]:
    """The last checkpoint to resume from, and the log."""
    register_safe_types()
    (file,) = work_dir.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return torch.load(work_dir / "epoch_2.pth", weights_only=True)["state_dict"], lines


@pytest.mark.parametrize(
    "options",
    [
        (),
        pytest.param(("--rois", "teacher"), marks=pytest.mark.slow),
        pytest.param(("--missing-view", "skip"), marks=pytest.mark.slow),
        pytest.param("live", marks=pytest.mark.slow),
    ],
)
def test_two_processes(kit: "Kit", work: Path, options: Any) -> None:
    recipe = ("--epochs", 2, "--batch-size", 1, "--workers", 0, "--student", kit.student, "--work-dir", "w")
    log = (
        "-o",
        "distill.ckd.queue_size=4096",
        "-o",
        "distill.share_interval=1",
        "-o",
        "default_hooks.logger.interval=1",
    )
    source: tuple[object, ...] = ("--cache", kit.cache)
    if options == "live":
        source, options = ("--teacher-ckpt", kit.teacher, *kit.data, "--scale", "128x96"), ()
    done = two_processes(work, "train-student", *source, *recipe, *log, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RoIs: those of the") == 1
    state, lines = trained(work / "w")
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
    own = sum(line["kd_positive"] + line["kd_negative"] for line in lines)  # of the first process
    assert own < int(state["ckd.queue.count"]) <= 4096  # the queue has those of both
    assert len(lines) == 8
    assert all(0 < line["share_sgfi"] < 1 for line in lines if line["kd_positive"])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_processes(kit: "Kit", work: Path) -> None:
    recipe = ("--epochs", 2, "--batch-size", 1, "--workers", 0, "--student", kit.student, "--work-dir", "w")
    options = ("-o", "distill.weights.ckd=1e38", "-o", "distill.ckd.queue_size=64")
    done = two_processes(work, "train-student", "--cache", kit.cache, *recipe, *options)
    assert done.returncode == 1
    assert "loss_ckd is inf" in done.stderr
    assert not list((work / "w").glob("*.pth"))
