"""`train-student` in two processes on the CPU: no parameter is missed, and the ranks agree."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kdpipe.pipelines.detectors.checkpoints import register_safe_types

if TYPE_CHECKING:
    from tests.conftest import Forked, Forks
    from tests.pipelines.conftest import Kit

SCRIPT = Path(sys.executable).with_name("kdpipe")
PAPER = ("--recipe", "paper")


def torchrun(work: Path, *args: object) -> "subprocess.CompletedProcess[str]":
    """Two processes of `kdpipe`, in a clone of mmdetection."""
    (work / "mmdet").mkdir()
    (work / "mmdet" / "__init__.py").write_text("raise RuntimeError('the mmdet of the current folder')")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    return subprocess.run(
        [*command, SCRIPT, *map(str, args)],
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def two_processes(forks: "Forks", work: Path, port: int, code: str, *args: object) -> "list[Forked]":
    """Two processes with the variables that torchrun sets."""
    ranks = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [forks.start(code, *args, cwd=work, **ranks, RANK=rank, LOCAL_RANK=rank) for rank in range(2)]


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
        pytest.param("torchrun", marks=pytest.mark.slow),
    ],
)
def test_two_processes(kit: "Kit", work: Path, forks: "Forks", closed_port: int, options: Any) -> None:
    recipe = ("--epochs", 2, "--batch-size", 1, "--workers", 0, "--student", kit.student, "--work-dir", "w", *PAPER)
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
    command = ("train-student", *source, *recipe, *log)
    if options == "torchrun":
        done = torchrun(work, *command)
        assert done.returncode == 0, done.stderr
        out = done.stdout
    else:
        processes = two_processes(forks, work, closed_port, kit.COMMAND, *command, *options)
        assert [process.wait() for process in processes] == [0, 0], [process.err for process in processes]
        out = "".join(process.out for process in processes)
    assert out.count("RoIs: those of the") == 1
    state, lines = trained(work / "w")
    assert all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())
    own_rois = sum(line["kd_positive"] + line["kd_negative"] for line in lines)  # of the first process
    assert own_rois < int(state["ckd.queue.count"]) <= 4096  # the queue has those of both
    assert len(lines) == 8
    assert all(0 < line["share_sgfi"] < 1 for line in lines if line["kd_positive"])


BUFFERS = """
import os
from types import SimpleNamespace
import torch
from mmengine.hooks import EMAHook
from kdpipe.pipelines.training.plain_checkpoints import SameBuffersHook

rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
torch.manual_seed(rank)
model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 3, 1))
ema = EMAHook(momentum=0.5)
runner = SimpleNamespace(model=model, hooks=[ema], iter=0)
ema.before_run(runner)
for _ in range(3):
    model(torch.randn(2, 3, 4, 4) + rank)
    ema.after_train_iter(runner, 0)
SameBuffersHook().after_train_epoch(runner)
torch.save({"model": model.state_dict(), "ema": ema.ema_model.state_dict()}, f"rank{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_processes_agree_on_statistics_before_they_are_measured(work: Path, forks: "Forks", closed_port: int) -> None:
    processes = two_processes(forks, work, closed_port, BUFFERS)
    assert [process.wait() for process in processes] == [0, 0], [process.err for process in processes]
    ranks = [torch.load(work / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name in ("0.running_mean", "0.running_var", "0.num_batches_tracked"):
        mine, others = (rank["model"][name] for rank in ranks)
        assert torch.equal(mine, others)
        assert torch.equal(mine, ranks[1]["ema"][f"module.{name}"])
    assert abs(ranks[1]["model"]["0.running_mean"]).max() < 0.2  # of the first process, whose images have mean 0
    assert not torch.equal(ranks[0]["model"]["1.weight"], ranks[1]["model"]["1.weight"])


SILENT = """
import io, os, sys
from types import SimpleNamespace
import torch
from rich.console import Console
from kdpipe.pipelines.training.guard import UsefulLossesHook
from kdpipe.pipelines.training.runner import RunnerError

rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
hook = UsefulLossesHook(Console(file=io.StringIO()))
runner = SimpleNamespace(model=SimpleNamespace(weights={"sgfi": 1.0, "cls": 1.0}, dense=False))
try:
    for step in range(100):
        heard = float(rank == 1 and sys.argv[1] == "one" and step == 7)
        outputs = {"loss_sgfi": heard, "loss_kd_cls": 1.0, "kd_positive": heard, "kd_negative": 3.0}
        hook.after_train_iter(runner, step, None, {name: torch.tensor(value) for name, value in outputs.items()})
    print("goes on")
except RunnerError as error:
    print(error)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("heard_by", ["one", "none"])
def test_a_loss_contributes_where_it_does_so_in_any_process(
    work: Path, forks: "Forks", closed_port: int, heard_by: str
) -> None:
    processes = two_processes(forks, work, closed_port, SILENT, heard_by)
    assert [process.wait() for process in processes] == [0, 0], [process.err for process in processes]
    for process in processes:
        if heard_by == "one":
            assert process.out == "goes on\n"
        else:
            assert process.out.startswith("loss_sgfi was 0 in every step so far")
            assert "0 positive, 600 negative" in process.out


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_processes(kit: "Kit", work: Path, forks: "Forks", closed_port: int) -> None:
    recipe = ("--epochs", 2, "--batch-size", 1, "--workers", 0, "--student", kit.student, "--work-dir", "w", *PAPER)
    options = ("-o", "distill.weights.ckd=1e38", "-o", "distill.ckd.queue_size=64")
    command = ("train-student", "--cache", kit.cache, *recipe, *options)
    processes = two_processes(forks, work, closed_port, kit.COMMAND, *command)
    assert [process.wait() for process in processes] == [1, 1]
    assert "loss_ckd is inf" in "".join(process.err for process in processes)
    assert not list((work / "w").glob("*.pth"))


KEEP = """
import sys, torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from kdpipe.pipelines.cli.main import main

class Keep(Hook):
    positives = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.positives.append(int(outputs["kd_positive"]))

    def after_train(self, runner):
        kept = {"state": runner.model.module.state_dict(), "positives": self.positives}
        kept["unused"] = runner.model.find_unused_parameters
        torch.save(kept, f"rank{runner.rank}.pt")

train = Runner.train

def kept(self):
    self.register_hook(Keep())
    return train(self)

Runner.train = kept
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [("retinanet", ("--amp",)), ("fcos", ()), ("retinanet", ("--rois", "teacher"))],
)
def test_dense_students_in_two_processes(
    kit: "Kit", work: Path, forks: "Forks", closed_port: int, family: str, options: Any
) -> None:
    """Also where one of them has no RoI: a flipped image."""
    (work / "student.py").write_text(kit.dense(family).pretty_text)
    recipe = ("--cache", kit.cache, "--student", "student.py", "--epochs", 2, "--batch-size", 1, "--workers", 0, *PAPER)
    options = (*options, "--missing-view", "skip")
    more = ("--methods", "sgfi,ckd,pred", "--work-dir", "w", "-o", "distill.ckd.queue_size=4096", "--seed", 1)
    processes = two_processes(forks, work, closed_port, KEEP, "train-student", *recipe, *more, *options)
    assert [process.wait() for process in processes] == [0, 0], [process.err for process in processes]
    ranks = [torch.load(work / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert not any(rank["unused"] for rank in ranks)
    pairs = list(zip(*(rank["positives"] for rank in ranks), strict=True))
    assert len(pairs) == 8
    assert sum((a == 0) != (b == 0) for a, b in pairs) >= 1, pairs
    states = [rank["state"] for rank in ranks]
    assert 0 < int(states[0]["ckd.queue.count"]) <= 4096
    assert {name.split(".")[0] for name in states[0]} == {"student", "sgfi", "ckd"}
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert different == []
    started = torch.load(work / "w" / "epoch_1.student.pth", weights_only=True)["state_dict"]
    ended = torch.load(work / "w" / "student.pth", weights_only=True)["state_dict"]
    assert any(not torch.equal(started[name], ended[name]) for name in started)
