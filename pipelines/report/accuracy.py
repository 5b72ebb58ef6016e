"""AP of detections by class, object size and IoU, by pycocotools; and which objects an image's detections find."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdpipe.pipelines.report.detections import Results
from kdpipe.pipelines.runtime.console import silent_stdout

__all__ = ["IOUS", "SIZES", "Accuracy", "Verdict", "class_names", "judge", "mean_accuracy", "measure", "read_truth"]

IOUS = tuple(0.5 + 0.05 * step for step in range(10))
SIZES = ("all", "small", "medium", "large")


@dataclass(frozen=True, eq=False)
class Accuracy:
    """How well a detector finds objects.

    Attributes:
        precision: ``[10 IoUs, 101 recalls, K classes, 4 sizes]``, at most 100 detections per image; NaN without an
            object of that class and size.
    """

    precision: npt.NDArray[np.float64]

    @property
    def ap(self) -> float:
        """COCO's AP."""
        return _mean(self.precision[..., 0])

    def by_class(self) -> npt.NDArray[np.float64]:
        """AP of each class, ``[K]``; NaN without objects."""
        return np.array([_mean(self.precision[:, :, number, 0]) for number in range(self.precision.shape[2])])

    def by_size(self) -> list[float]:
        """AP of small, medium and large objects."""
        return [_mean(self.precision[..., size]) for size in range(1, len(SIZES))]

    def by_iou(self) -> list[float]:
        """AP at each of `IOUS`."""
        return [_mean(self.precision[number, :, :, 0]) for number in range(len(IOUS))]

    def precision_recall(self, iou: int = 0) -> npt.NDArray[np.float64]:
        """Mean precision of the classes at each of 101 recalls, at the IoU of that number."""
        values = self.precision[iou, :, :, 0]  # [101, K]
        there = ~np.isnan(values).all(axis=0)
        curve: npt.NDArray[np.float64] = np.nanmean(values[:, there], axis=1) if there.any() else np.full(101, np.nan)
        return curve


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def read_truth(ann_file: Path) -> COCO:
    """The annotations, for pycocotools."""
    with silent_stdout():
        return COCO(str(ann_file))


def measure(truth: COCO, results: Results) -> Accuracy:
    """COCO's evaluation of boxes.

    Args:
        truth: The annotations.
        results: The detections, of images of these.
    """
    with silent_stdout():
        found = truth.loadRes(results) if results else _nothing(truth)
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1].astype(np.float64)  # [T, R, K, A]
    return Accuracy(np.where(precision < 0, np.nan, precision))


def _nothing(truth: COCO) -> COCO:
    found = COCO()
    found.dataset = {**truth.dataset, "annotations": []}
    found.createIndex()
    return found


def mean_accuracy(accuracies: Sequence[Accuracy]) -> Accuracy:
    """The mean over trainings that differ in their seed."""
    return Accuracy(np.mean([each.precision for each in accuracies], axis=0))


@dataclass(frozen=True, eq=False)
class Verdict:
    """What of an image a detector finds, at IoU 0.5 and from a least score on.

    Attributes:
        boxes: ``[N, 4]`` (x, y, w, h), pixels, of the detections.
        right: ``[N]`` bool: of an object of that class, which no better detection found.
        found: ``[M]`` bool, of the objects.
    """

    boxes: npt.NDArray[np.float64]
    right: npt.NDArray[np.bool_]
    found: npt.NDArray[np.bool_]

    @property
    def text(self) -> str:
        """Such as `12 right, 1 wrong, 2 missed`."""
        return f"{self.right.sum()} right, {(~self.right).sum()} wrong, {(~self.found).sum()} missed"


def judge(objects: Sequence[Mapping[str, Any]], detections: Results, least_score: float) -> Verdict:
    """Match detections of an image with its objects, the most probable first, as COCO does.

    Args:
        objects: Annotations of the image, crowds left out.
        detections: Of the image.
        least_score: Less probable ones are left out.
    """
    kept = sorted((each for each in detections if each["score"] >= least_score), key=lambda each: -each["score"])
    boxes = np.array([each["bbox"] for each in kept], dtype=np.float64).reshape(-1, 4)
    right, found = np.zeros(len(kept), dtype=bool), np.zeros(len(objects), dtype=bool)
    if not kept or not objects:
        return Verdict(boxes, right, found)
    truth = np.array([each["bbox"] for each in objects], dtype=np.float64).reshape(-1, 4)
    iou = np.asarray(mask.iou(boxes, truth, [0] * len(objects)))  # [N, M]
    same = np.array([[a["category_id"] == b["category_id"] for b in objects] for a in kept])
    for row in range(len(kept)):
        candidates = np.where(same[row] & ~found, iou[row], 0)
        best = int(candidates.argmax())
        if candidates[best] >= IOUS[0]:
            right[row] = found[best] = True
    return Verdict(boxes, right, found)


def class_names(truth: COCO) -> list[str]:
    """Names of the classes, in the order of `Accuracy.precision`."""
    return [str(each["name"]) for each in truth.loadCats(sorted(truth.getCatIds()))]
