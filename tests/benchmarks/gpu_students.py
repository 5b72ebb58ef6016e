"""Rows of gpu.py about students: training steps, what they are made of, and the loaders that feed them."""

import json
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gpu_inputs  # type: ignore[import-not-found]
from gpu_stages import profile_cells, profiled_steps  # type: ignore[import-not-found]
from mmengine.runner import Runner

from kdpipe.pipelines.cli.main import cli
from kdpipe.pipelines.commands import train_student as train_student_module
from kdpipe.pipelines.training import run as plain_training_module
from kdpipe.pipelines.training.workers import end_workers, preload_workers

METHODS = {"embeddings": "ckd,pred"}  # of a tier that does not serve all; the others have the default


class Stopped(Exception):  # noqa: N818
    """Thrown where a command has got as far as is wanted of it."""


class Students:
    """Trainings of students.

    Args:
        teachers: The `Teachers` that they learn from.
        out: Where tables of operators go.
    """

    def __init__(self, teachers: Any, out: Path) -> None:
        self.teachers, self.out, self.device, self.size = teachers, out, teachers.device, teachers.size
        self.steps: dict[str, float] = {}  # seconds per step by the name of the row
        self._runs = 0

    def training(
        self, family: str, teacher: str, rois: str, steps: int, *, amp: bool = False, workers: int | None = None
    ) -> list[str]:
        """A training command: `train-teacher` without a teacher, else `train-student`.

        Args:
            family: One of `STUDENTS`.
            teacher: `plain`, `live`, or the tier of a cache.
            rois: Whose RoIs.
            steps: Of the training.
            amp: Mixed precision.
            workers: Of its loader.
        """
        self._runs += 1
        size = self.size
        times = -(-steps * size.batch // size.images)
        config = gpu_inputs.student(self.teachers.folder / f"{family}-{self._runs}.py", family, size, times)
        images = ["--ann-file", str(self.teachers.ann_file), "--img-dir", str(self.teachers.img_dir)]
        if teacher == "plain":
            command = ["train-teacher", "--config", str(config), *images]
        elif teacher == "live":
            checkpoint = self.teachers.checkpoint("x101")
            command = ["train-student", "--student", str(config), "--teacher-ckpt", str(checkpoint), *images]
        else:
            command = ["train-student", "--student", str(config), "--cache", str(self.teachers.cache(teacher))]
        if teacher != "plain":
            command += ["--no-report", "--rois", rois, *(["--methods", METHODS[teacher]] if teacher in METHODS else [])]
            if size.rois is not None and (rois == "teacher" or family != "faster-rcnn"):
                command += ["-o", f"distill.rois.num={size.rois}"]
        command += ["--recipe", "paper", "--epochs", "1", "--lr", "1e-5", *(["--amp"] if amp else [])]
        command += ["--batch-size", str(size.batch), "--workers", str(size.workers if workers is None else workers)]
        command += ["--scale", "x".join(map(str, size.scale))]
        return [*command, "--work-dir", str(self.teachers.folder / f"run{self._runs}")]

    def train(
        self, name: str, family: str, teacher: str = "plain", rois: str = "student", *, amp: bool = False
    ) -> dict[str, object]:
        """Seconds per step of a training, as mmengine logs them, and the most memory that it had on the GPU."""
        steps = self.size.live_steps if teacher == "live" else self.size.steps
        command = self.training(family, teacher, rois, steps, amp=amp)
        before = self.device.watch_memory()
        with hubs() as seen:
            peak = self._run_training(command)
        first = min(self.size.left_out, steps - 1)
        taken, waiting = (_logged(seen[-1], f"train/{key}")[first:steps] for key in ("time", "data_time"))
        seconds = sum(taken) / len(taken)
        self.steps[name] = seconds
        plain = self.steps.get("/".join([*name.split("/")[:3], "plain"]))
        cells: dict[str, object] = {"s/step": seconds, "median": statistics.median(taken)}
        cells["x plain"] = seconds / plain if plain else "-"
        cells["waiting for data, %"] = 100 * sum(waiting) / sum(taken)
        cells["GPU memory, GiB"] = (peak - before) / 2**30 if self.device.is_gpu else "-"
        if teacher != "plain":
            positive, negative = (_mean(seen[-1], f"train/kd_{x}") / self.size.batch for x in ("positive", "negative"))
            cells |= {"RoIs per image": positive + negative, "positive": positive}
        return {**cells, "steps": len(taken)}

    def _run_training(self, command: list[str]) -> int:
        """Train; returns the most memory that was taken at a time, in bytes."""
        work_dir = Path(command[command.index("--work-dir") + 1])
        try:
            run(command)
            return int(json.loads((work_dir / "result.json").read_text())["peak_memory"])
        finally:
            shutil.rmtree(work_dir, ignore_errors=True)

    def profile(self, family: str, teacher: str, rois: str, *, amp: bool = False) -> dict[str, object]:
        """What a few steps of a training are made of."""
        first, count = self.size.left_out, 1 if self.size.tiny else 5
        command = self.training(family, teacher, rois, first + count + 1, amp=amp)
        with profiled_steps(first, count, self.device.is_gpu) as done:
            self._run_training(command)
        file = self.out / f"profile-{family}-{teacher}-{rois}{'-amp' if amp else ''}.txt"
        cells: dict[str, object] = profile_cells(done, count, file)
        return cells

    def loading(self, tier: str, rois: str, workers: int, needed_by: Sequence[str]) -> dict[str, object]:
        """Samples per second of a training's loader, when nothing is done with them."""
        batches = 5 * workers  # two for each worker lie ready when the first is asked for
        family = "faster-rcnn"
        command = self.training(family, tier, rois, batches, workers=workers)
        caught: list[Any] = []

        def stop(cfg: Any, recorded: Any, data: Any, work: Any, *rest: Any, **options: Any) -> None:
            work.path.mkdir(parents=True, exist_ok=True)
            for each in data:
                each.coco_file.parent.mkdir(parents=True, exist_ok=True)
                each.write_copy()
            caught.append(cfg)
            raise Stopped

        with (
            suppress(Stopped),
            patch.object(train_student_module, "run_training", stop),
            patch.object(plain_training_module, "run_training", stop),
        ):
            run(command)
        preload_workers()
        loader = Runner.build_dataloader(caught[0].train_dataloader, seed=0)
        times = []
        try:
            for _ in loader:
                times.append(time.perf_counter())
        finally:
            end_workers([loader])
        warm = min(2 * workers, len(times) // 2)
        rate = (len(times) - 1 - warm) * self.size.batch / (times[-1] - times[warm])
        cells: dict[str, object] = {"samples/s": rate}
        for name in needed_by:
            label = f"needed by {name.removeprefix('train/')}"
            cells[label] = self.size.batch / self.steps[name] if name in self.steps else "-"
        return cells


def run(command: list[str]) -> None:
    """A command of kdpipe, whose errors come as they are; texts of configs are not laid out, which takes a second."""
    print("kdpipe", *command, flush=True)
    with patch("mmengine.config.config.FormatCode", lambda text, **options: (text, False)):
        cli.main(command, prog_name="kdpipe", standalone_mode=False)


@contextmanager
def hubs() -> Iterator[list[Any]]:
    """What mmengine logs of each training."""
    seen: list[Any] = []
    train = Runner.train

    def watched(self: Any) -> Any:
        seen.append(self.message_hub)
        return train(self)

    with patch.object(Runner, "train", watched):
        yield seen


def _logged(hub: Any, name: str) -> list[float]:
    values: list[float] = hub.get_scalar(name).data[0].tolist()
    return values


def _mean(hub: Any, name: str) -> float:
    if name not in hub.log_scalars:
        return float("nan")
    values = _logged(hub, name)
    return sum(values) / len(values)
