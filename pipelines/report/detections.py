"""What students and teacher find in the validation images: kept by the training, or found once for the report."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.read.reader import TeacherCache
from kdpipe.pipelines.commands.evaluate import evaluate
from kdpipe.pipelines.commands.options import EvaluateOptions, ReportOptions
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.data.provenance import recorded_entry, recorded_path
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.detectors.configs import config_from_checkpoint
from kdpipe.pipelines.report.trainings import Training
from kdpipe.pipelines.teacher.compare import load_recorded_teacher
from kdpipe.pipelines.training.work_dir import DETECTIONS, WorkDir

__all__ = ["Results", "ValidationImages", "student_results", "teacher_results", "validation_images"]

# Detections as COCO has them: image_id, category_id, bbox (x, y, w, h) in pixels, score.
Results = list[dict[str, Any]]

_ANNOTATIONS = "kdpipe/val.json"


@dataclass(frozen=True, eq=False)
class ValidationImages:
    """The validation images of a training.

    Attributes:
        ann_file: Their annotations, as mmdet and pycocotools read them.
        img_dir: Where they are; None where that is not known.
        digest: Of the data, as the record of a training has it.
    """

    ann_file: Path
    img_dir: Path | None
    digest: str

    @property
    def folder(self) -> Path:
        """Where the images are.

        Raises:
            KdpipeError: They are not there.
        """
        if self.img_dir is None or not self.img_dir.is_dir():
            raise KdpipeError(f"the validation images are not there ({self.img_dir}): say where they are (--img-dir)")
        return self.img_dir

    @property
    def data(self) -> DataOptions:
        """The same for a command; raises as `folder` does."""
        return DataOptions(self.ann_file, self.folder)


def validation_images(training: Training, img_dir: Path | None) -> ValidationImages | None:
    """The images that AP of a training was measured on; None where it was not measured.

    Args:
        training: The training.
        img_dir: Where they moved; None takes what its checkpoint says.
    """
    ann_file, digest = training.path / _ANNOTATIONS, training.record.get("validation")
    if not isinstance(digest, str) or not ann_file.is_file():
        return None
    if img_dir is None and training.checkpoint.is_file():
        config = config_from_checkpoint(load_checkpoint(training.checkpoint, trust=False))
        values = {} if config is None else config.to_dict()
        img_dir = recorded_path(values, "val_dataloader", "dataset", "data_prefix", "img")
    return ValidationImages(ann_file, img_dir, digest)


def student_results(training: Training, images: ValidationImages, options: ReportOptions, console: Console) -> Results:
    """What a student finds: at the last validation of its training; where that is not kept, it runs once more.

    Args:
        training: The training.
        images: Its validation images.
        options: Whether it may run.
        console: Where progress is shown.

    Raises:
        KdpipeError: It cannot run; says why.
    """
    kept = WorkDir(training.path).folder / DETECTIONS
    checkpoint = training.checkpoint
    if not kept.is_file() or (checkpoint.is_file() and kept.stat().st_mtime < checkpoint.stat().st_mtime):
        if not checkpoint.is_file():
            raise KdpipeError(f"{checkpoint} is not there")
        _check_inference(options)
        console.print(f"{training.name}: its detections were not kept; it looks at the validation images once more.")
        _keep(EvaluateOptions(checkpoint, data=images.data, batch_size=4), kept, console)
    return _read(kept)


def teacher_results(
    cache: TeacherCache, options: ReportOptions, training: Training, images: ValidationImages, console: Console
) -> Results:
    """What the teacher of a cache finds in validation images; kept in the work directory of a training.

    Args:
        cache: Records which teacher that is.
        options: Where its checkpoint is, if not where the cache says, and whether it may run.
        training: In whose work directory the detections are kept.
        images: The images.
        console: Where progress is shown.

    Raises:
        KdpipeError: The teacher is not there, or is another one.
    """
    weights = recorded_entry(cache.identity, "teacher", "weights")
    kept = training.path / "kdpipe" / f"teacher-{str(weights)[:12]}-{images.digest[:12]}.bbox.json"
    if not kept.is_file():
        path = options.teacher_ckpt or recorded_path(cache.metadata, "teacher", "checkpoint")
        if path is None or not path.is_file():
            raise KdpipeError(f"the teacher's checkpoint is not there ({path}): name it (--teacher-ckpt)")
        _check_inference(options)
        load_recorded_teacher(cache, path, config=None, device=torch.device("cpu"), trust=False)
        console.print("The teacher looks at the validation images once.")
        _keep(EvaluateOptions(path, data=images.data, scale=cache.spec.scale), kept, console)
    return _read(kept)


def _check_inference(options: ReportOptions) -> None:
    if options.no_inference:
        raise KdpipeError("they are not kept, and no detector may run; kdpipe report makes them")


def _keep(options: EvaluateOptions, kept: Path, console: Console) -> None:
    """Run a detector, and keep what it finds; whole or not at all."""
    aside = kept.with_name(f".{kept.name}.{time.time_ns():x}")
    written = aside.with_name(f"{aside.name}.bbox.json")
    try:
        evaluate(options, console, outfile_prefix=aside)
        written.replace(kept)
    finally:
        written.unlink(missing_ok=True)


def _read(path: Path) -> Results:
    try:
        results = json.loads(path.read_bytes())
        if not all(isinstance(each, Mapping) and each.keys() >= {"image_id", "bbox", "score"} for each in results):
            raise TypeError("these are no detections of COCO")
    except (OSError, ValueError, TypeError) as error:
        raise KdpipeError(f"{path} cannot be read ({error}): delete it, and it is made anew") from error
    return list(results)
