"""What a training leaves in its work directory, for those that collect and draw it. Nothing is changed.

W/                                     of `kdpipe compare --work-dir W`
    compare.json, compare.csv          the table
    STUDENT/METHODS/seed-N.log         what the training printed
    STUDENT/METHODS/seed-N/            its work directory, as that of `kdpipe train-student`
        result.json                    when it is done: AP and all other metrics, seconds per step, peak memory
        student.pth                    the bare detector
        DATE_TIME/DATE_TIME.log        mmengine's log, one folder for each time that it was started
        DATE_TIME/vis_data/DATE_TIME.json, scalars.json    the figures of the log, a JSON line each
        kdpipe/recipe.json             what it was begun with: options, config, teacher, digests of the data
        kdpipe/val.json                the validation images, as COCO JSON with ids of kdpipe's own
        kdpipe/detections.bbox.json    the detections of the last validation, as COCO results for val.json
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.training.work_dir import DETECTIONS, WorkDir

__all__ = ["Progress", "find_trainings", "read_detections", "read_losses", "read_progress", "read_validations"]

_STEP = re.compile(r"Epoch\(train\)\s+\[(\d+)\]\[\s*(\d+)/(\d+)\]")
_TAIL = 1 << 14


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        epoch: That is being trained, from 1.
        step: Of the epoch, from 1.
        steps: Of an epoch.
        epochs: Of the training.
    """

    epoch: int
    step: int
    steps: int
    epochs: int

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return min(1.0, (self.epoch - 1 + self.step / self.steps) / self.epochs)


def find_trainings(folder: Path) -> list[Path]:
    """The work directories of trainings in a folder and below."""
    return sorted(
        path.parent.parent for path in folder.rglob("kdpipe/recipe.json") if WorkDir(path.parent.parent).record()
    )


def read_progress(work_dir: Path) -> Progress | None:
    """How far a training is, by mmengine's log (every 10 steps); None where it has no step yet."""
    logs = [log for log in work_dir.glob("*_*/*_*.log") if log.stem == log.parent.name]
    record = WorkDir(work_dir).record()
    if record is None or not isinstance(record.get("epochs"), int):
        return None
    for log in sorted(logs, reverse=True):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            matches = _STEP.findall(file.read().decode(errors="replace"))
        if matches:
            epoch, step, steps = map(int, matches[-1])
            return Progress(epoch, step, steps, record["epochs"])
    return None


def read_losses(work_dir: Path) -> list[dict[str, Any]]:
    """What the log has of steps, in their order: `step`, `epoch`, `lr`, every loss, `time`, `data_time`, ..."""
    steps = {int(line["step"]): line for line in _figures(work_dir) if "loss" in line}
    return [steps[step] for step in sorted(steps)]


def read_validations(work_dir: Path) -> list[dict[str, Any]]:
    """What validations gave, in the order of epochs: `epoch`, `coco/bbox_mAP`, `coco/bbox_mAP_50`, ..."""
    epochs = {int(line["step"]): line for line in _figures(work_dir) if any(name.endswith("bbox_mAP") for name in line)}
    return [{"epoch": epoch, **epochs[epoch]} for epoch in sorted(epochs)]


def _figures(work_dir: Path) -> Iterator[dict[str, Any]]:
    """Lines of the log, those of a training that was gone on with behind those of before."""
    for file in sorted(work_dir.glob("*_*/vis_data/scalars.json")):
        for text in file.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(text)
            except ValueError:  # the process was killed while it wrote its last line
                continue


def read_detections(work_dir: Path) -> list[dict[str, Any]] | None:
    """Detections of the last validation: `image_id`, `bbox` (x, y, w, h), `score`, `category_id` each; None before it.

    Raises:
        KdpipeError: They are cut off.
    """
    path = WorkDir(work_dir).folder / DETECTIONS
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise KdpipeError(
            f"{path} is cut off: the training ended while it wrote it. Go on with it, and the next validation will."
        ) from error
    return found
