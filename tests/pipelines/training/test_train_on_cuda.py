"""`train-student` on a GPU has the losses that it has on the CPU, and nearly these in half precision."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from kdpipe.pipelines.teacher.arithmetic import full_precision

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:.*meshgrid:UserWarning"),  # of mmdet's FCOS head
    pytest.mark.filterwarnings("ignore:.*torch.cuda.amp:FutureWarning"),  # mmengine's names of torch's functions
    pytest.mark.filterwarnings("ignore:.*get_autocast_gpu_dtype:DeprecationWarning"),
]

FAMILIES = ("faster", "cascade", "retinanet", "fcos")
ROIS = ("student", "teacher")
INITIAL = ("--methods", "sgfi,ckd", "-o", "load_from=None", "--lr", 1e-12)  # weights stay as they were drawn
# Every command of a list, in a process in which there is no GPU; the layout of config text costs more than a step.
_COMMANDS = """
import json, sys
import mmengine.config.config
mmengine.config.config.FormatCode = lambda text, **options: (text, False)
from kdpipe.pipelines.cli.main import main
for command in json.loads(sys.argv[1]):
    try:
        main(command)
    except SystemExit as end:
        if end.code:
            raise
"""


class Trainings:
    """Trainings of two steps of four images, whose students start from weights in a file.

    Args:
        kit: Of the commands.
        folder: Where all of them lie.
    """

    def __init__(self, kit: "Kit", folder: Path) -> None:
        self._kit, self._folder = kit, folder
        self._configs = {
            "faster": kit.config(channels=8, fc=24),
            "cascade": kit.tiny("cascade-rcnn_r50_fpn_1x_coco"),
            **{family: kit.dense(family) for family in kit.DENSE},
        }
        self._starts = {name: self._save(name, config) for name, config in self._configs.items()}

    def _save(self, name: str, config: Config) -> Path:
        """Weights of a student whose proposals differ enough for rounding not to change their order."""
        (self._folder / f"{name}.py").write_text(config.pretty_text)
        register_all_modules(init_default_scope=True)
        torch.manual_seed(0)
        model = MODELS.build(config.model)
        model.init_weights()
        for parameter, weight in model.named_parameters():
            if parameter.endswith(("rpn_cls.weight", "retina_cls.weight", "conv_cls.weight")):
                torch.nn.init.normal_(weight, std=0.5)
        path = self._folder / f"{name}.pth"
        torch.save({"state_dict": model.state_dict()}, path)
        return path

    def command(self, work_dir: str, family: str, *options: object) -> tuple[object, ...]:
        each_step = ("-o", "default_hooks.logger.interval=1", "-o", "distill.ckd.queue_size=256")
        student = ("--student", self._folder / f"{family}.py", "-o", f"load_from={self._starts[family]}")
        return self._kit.student_command(self._folder / work_dir, "--no-report", *each_step, *student, *options)

    def run(self, work_dir: str, family: str, *options: object) -> dict[str, float]:
        """Train in this process; what was logged of the first step."""
        self._kit.run(*self.command(work_dir, family, *options))
        return self.first_step(work_dir)

    def first_step(self, work_dir: str) -> dict[str, float]:
        (file,) = (self._folder / work_dir).glob("*/vis_data/scalars.json")
        row: dict[str, float] = json.loads(file.read_text().splitlines()[0])
        return row

    def start_without_gpu(self, commands: list[tuple[object, ...]]) -> "subprocess.Popen[bytes]":
        text = json.dumps([[str(part) for part in command] for command in commands])
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with (self._folder / "cpu.log").open("wb") as log:
            arguments = [sys.executable, "-c", _COMMANDS, text]
            return subprocess.Popen(arguments, cwd=self._folder, env=environment, stdout=log, stderr=log)

    def wait(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.wait(300) == 0, (self._folder / "cpu.log").read_text()[-4000:]

    def weights(self, work_dir: str) -> dict[str, torch.Tensor]:
        path = self._folder / work_dir / "student.pth"
        state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        return state


@pytest.fixture(scope="module")
def trainings(kit: "Kit", tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(kit, tmp_path_factory.mktemp("on_cuda"))


@pytest.fixture(scope="module")
def cpu_process(trainings: Trainings) -> Iterator["subprocess.Popen[bytes]"]:
    """The trainings without a GPU, which run beside those with one."""
    commands = [trainings.command(f"cpu_{f}_{rois}", f, "--rois", rois) for f in FAMILIES for rois in ROIS]
    commands.append(trainings.command("cpu_initial", "faster", *INITIAL))
    process = trainings.start_without_gpu(commands)
    yield process
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """Convolutions of a training have ten bits of mantissa by torch's default."""
    with full_precision(torch.device("cuda")):
        yield


@pytest.mark.parametrize("rois", ROIS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_has_the_losses_of_the_cpu(
    trainings: Trainings, cpu_process: "subprocess.Popen[bytes]", family: str, rois: str
) -> None:
    on_gpu = trainings.run(f"gpu_{family}_{rois}", family, "--rois", rois)
    trainings.wait(cpu_process)
    on_cpu = trainings.first_step(f"cpu_{family}_{rois}")
    names = [name for name in on_cpu if "loss" in name or name.startswith("kd_")]
    assert {"loss", "loss_sgfi", "loss_ckd", "loss_kd_cls", "kd_positive"} <= set(names)
    assert on_cpu["kd_positive"] > 0
    assert {name: on_gpu[name] for name in names} == pytest.approx({name: on_cpu[name] for name in names}, rel=1e-3)


def test_a_seed_gives_the_initial_weights_of_the_cpu(
    trainings: Trainings, cpu_process: "subprocess.Popen[bytes]"
) -> None:
    trainings.run("gpu_initial", "faster", *INITIAL)
    trainings.wait(cpu_process)
    on_gpu, on_cpu = trainings.weights("gpu_initial"), trainings.weights("cpu_initial")
    for name, weight in on_cpu.items():
        if name.endswith((".weight", ".bias")):
            torch.testing.assert_close(on_gpu[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["faster", "retinanet"])
def test_mixed_precision_has_nearly_the_losses_of_full_precision(
    trainings: Trainings, cpu_process: "subprocess.Popen[bytes]", family: str, amp: str
) -> None:
    half = trainings.run(f"{amp}_{family}", family, "--rois", "teacher", "--amp", amp)
    trainings.wait(cpu_process)
    full = trainings.first_step(f"cpu_{family}_teacher")
    # the order of proposals, and which boxes overlap enough for a pair, follow the precision
    changing = {"loss", "kd_unpaired", *(("loss_cls", "loss_bbox") if family == "faster" else ())}
    # float16's first scale of the loss may be too large for the gradient: torch then lowers it and leaves the step out
    unscaled = {name: value for name, value in half.items() if name != "grad_norm"}
    assert {name: value for name, value in unscaled.items() if not math.isfinite(value)} == {}
    assert {"loss_sgfi", "loss_ckd", "loss_kd_cls"} <= half.keys()
    for name, value in full.items():
        if ("loss" in name or name.startswith("kd_")) and name not in changing:
            assert half[name] == pytest.approx(value, rel=0.02), name
