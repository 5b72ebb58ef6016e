"""Average precision as Pascal VOC measures it, in both ways, from mmdet's own parts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mmdet.evaluation.functional import average_precision
from mmdet.evaluation.functional.mean_ap import tpfp_default

__all__ = ["VOC_IOUS", "VOC_MODES", "Detections", "VocObjects", "read_objects", "voc_ap", "voc_name"]

VOC_IOUS = (0.5, 0.7, 0.9)  # table 8 of G-DetKD
VOC_MODES = ("11points", "area")  # mmdet's names: of VOC2007, and of VOC2010 and later


@dataclass(frozen=True, eq=False)
class VocObjects:
    """The objects of an image.

    Attributes:
        boxes: ``[M, 4]`` (x1, y1, x2, y2) in pixels.
        labels: ``[M]`` in [0, classes).
        difficult: ``[M]`` bool: neither found nor missed.
    """

    boxes: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    difficult: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector finds in an image.

    Attributes:
        boxes: ``[N, 4]`` (x1, y1, x2, y2) in pixels.
        scores: ``[N]``.
        labels: ``[N]`` in [0, classes).
    """

    boxes: npt.NDArray[Any]
    scores: npt.NDArray[Any]
    labels: npt.NDArray[Any]


def voc_name(iou: float, mode: str) -> str:
    """Name of a metric, such as ``AP50_11points``."""
    return f"AP{round(100 * iou)}_{mode}"


def read_objects(path: Path | str) -> dict[int, VocObjects]:
    """Reads the copy of a VOC folder that `write_coco` wrote, in which difficult objects are crowds; by image id."""
    content = json.loads(Path(path).read_bytes())
    labels = {category["id"]: label for label, category in enumerate(content["categories"])}
    entries_of: dict[int, list[Mapping[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        entries_of[entry["image_id"]].append(entry)
    return {image_id: _objects(entries, labels) for image_id, entries in entries_of.items()}


def _objects(entries: Sequence[Mapping[str, Any]], labels: Mapping[int, int]) -> VocObjects:
    boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return VocObjects(
        boxes,
        np.array([labels[entry["category_id"]] for entry in entries], dtype=np.int64),
        np.array([bool(entry["iscrowd"]) for entry in entries], dtype=np.bool_),
    )


def voc_ap(objects: Mapping[int, VocObjects], detections: Mapping[int, Detections]) -> dict[str, float]:
    """AP at three overlaps, over 11 points of recall and as the area under the curve.

    A detection belongs to the object of its class with which it overlaps most, in whole pixels (a box from 3 to 5 is
    3 wide); the first of several is right, the others are wrong; one that belongs to a difficult object does not count.

    Args:
        objects: by image id.
        detections: of the same images; those of images that are missing here are none.

    Returns:
        `voc_name` -> mean over the classes of which there is an object that is not difficult; 0 where there is none.
    """
    classes = {label for each in objects.values() for label in each.labels[~each.difficult].tolist()}
    precision: dict[str, list[float]] = {voc_name(iou, mode): [] for iou in VOC_IOUS for mode in VOC_MODES}
    for label in sorted(classes):
        images = list(_of_class(label, objects, detections))
        count = sum(len(counted) for _, counted, _ in images)
        scores = np.concatenate([scored[:, 4] for scored, _, _ in images])
        order = np.argsort(-scores, kind="stable")
        for iou in VOC_IOUS:
            right, wrong = _matches(images, iou, order)
            recalls = right / count
            precisions = right / np.maximum(right + wrong, np.finfo(np.float32).eps)
            for mode in VOC_MODES:
                precision[voc_name(iou, mode)].append(float(average_precision(recalls, precisions, mode)))
    return {name: float(np.mean(values)) if values else 0.0 for name, values in precision.items()}


_Image = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]


def _of_class(label: int, objects: Mapping[int, VocObjects], detections: Mapping[int, Detections]) -> Iterator[_Image]:
    """Detections ``[N, 5]``, objects ``[M, 4]`` and difficult objects of a class, of the images that have any."""
    for image_id, each in objects.items():
        boxes = each.boxes[each.labels == label]
        difficult = each.difficult[each.labels == label]
        of_image, scored = detections.get(image_id), np.zeros((0, 5))
        if of_image is not None:
            is_of_class = of_image.labels == label
            scored = np.column_stack([of_image.boxes[is_of_class], of_image.scores[is_of_class]]).astype(np.float64)
        if len(boxes) or len(scored):
            yield scored, boxes[~difficult], boxes[difficult]


def _matches(
    images: Sequence[_Image], iou: float, order: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """How many detections are right and wrong among the best 1, 2, ..., each ``[N]``."""
    matches = [
        tpfp_default(scored, counted, difficult, iou, use_legacy_coordinate=True)
        for scored, counted, difficult in images
        if len(scored)
    ]
    if not matches:
        return np.zeros(0), np.zeros(0)
    right, wrong = (np.hstack(each)[0][order].astype(np.float64) for each in zip(*matches, strict=True))
    return np.cumsum(right), np.cumsum(wrong)
