"""`kdpipe demo --train-teacher`: makes the teacher that comes with kdpipe."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console

from kdpipe.pipelines.commands.evaluate import evaluate
from kdpipe.pipelines.commands.options import EvaluateOptions
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.demo.run import ORIGIN, RunCommand, data_words, draw, write_config
from kdpipe.pipelines.demo.settings import DemoSettings, detector_config
from kdpipe.pipelines.demo.teacher import DemoTeacher
from kdpipe.pipelines.detectors.checkpoints import class_names, load_checkpoint
from kdpipe.pipelines.detectors.configs import config_from_checkpoint
from kdpipe.pipelines.training.progress import AP_NAMES
from kdpipe.pipelines.training.work_dir import WorkDir

__all__ = ["train_teacher"]

_PACKAGES = ("kdpipe", "mmdet", "torch", "torchvision", "opencv-python")


def train_teacher(out: Path, run: RunCommand, *, console: Console, settings: DemoSettings | None = None) -> DemoTeacher:
    """Draw pictures, train a teacher on them, and write its weights in float16 and how it was made.

    Interrupted, the same call goes on.

    Args:
        out: Folder for all of it; a part of its own is used, `out/teacher`.
        run: Runs a command.
        console: Where progress is shown.
        settings: Of the demo.

    Raises:
        KdpipeError: There is something else in `out/teacher`.
    """
    settings = settings or DemoSettings()
    folder = out / "teacher"
    shapes, work = folder / "shapes", WorkDir(folder / "training")
    config = detector_config(ORIGIN, settings.teacher, settings.teacher_epochs, settings.teacher_train, settings)
    draw(shapes, settings.teacher_train, settings, console)
    write_config(folder / "teacher.py", config)
    if not work.is_finished:
        words = ["train-teacher", "--config", str(folder / "teacher.py"), "--seed", str(settings.seed)]
        words += ["--scale", f"{settings.size[1]}x{settings.size[0]}"]
        words += [*data_words(shapes, "train"), *data_words(shapes, "val"), "--work-dir", str(work.path)]
        run([*words, "--resume"] if work.has_checkpoint else words)
    teacher = DemoTeacher(folder)
    torch.save(_small_checkpoint(work.path / "teacher.pth"), teacher.checkpoint)
    data = DataOptions(shapes / "annotations" / "val.json", shapes / "val")
    metrics = evaluate(EvaluateOptions(teacher.checkpoint, data=data), console)
    record = {
        "command": "kdpipe demo --train-teacher",
        "seed": settings.seed,
        "train": settings.teacher_train,
        "val": settings.val,
        "size": list(settings.size),
        "epochs": settings.teacher_epochs,
        "ap": round(metrics[AP_NAMES[0]], 4),
        "versions": {name: version(name) for name in _PACKAGES},
    }
    teacher.record_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    console.print(f"{teacher.checkpoint}, {teacher.record_file}: AP {teacher.ap:.3f}")
    return teacher


def _small_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint in float16, whose config says how the detector is built and sees images, and no more."""
    checkpoint = load_checkpoint(path)
    config = config_from_checkpoint(checkpoint)
    assert config is not None
    kept = {
        "default_scope": "mmdet",
        "model": config.model,
        "test_dataloader": {
            "batch_size": 1,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "dataset": {"type": "CocoDataset", "test_mode": True, "pipeline": config.test_dataloader.dataset.pipeline},
        },
    }
    weights = {
        name: value.half() if value.is_floating_point() else value for name, value in checkpoint.state_dict.items()
    }
    meta = {"cfg": Config(kept).pretty_text, "dataset_meta": {"classes": class_names(checkpoint)}}
    return {"state_dict": weights, "meta": meta}
