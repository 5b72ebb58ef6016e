"""AP by class, size and IoU, and which objects are found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from kdpipe.pipelines.report.accuracy import class_names, judge, mean_accuracy, measure, read_truth

BOXES = [[10, 10, 20, 20], [50, 10, 40, 40], [10, 60, 30, 30]]  # small, medium, small


@pytest.fixture
def truth(tmp_path: Path) -> COCO:
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 9, "name": "nowhere"}]
    annotations = [
        {"id": number, "image_id": 1, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, (box, category) in enumerate(zip(BOXES, (3, 3, 7), strict=True), 1)
    ]
    images = [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 100}]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    return read_truth(path)


def found(box: list[int], category: int, score: float) -> dict[str, Any]:
    return {"image_id": 1, "category_id": category, "bbox": box, "score": score}


def test_detections_that_are_the_objects_have_ap_1(truth: COCO) -> None:
    accuracy = measure(truth, [found(box, category, 0.9) for box, category in zip(BOXES, (3, 3, 7), strict=True)])
    assert accuracy.ap == pytest.approx(1)
    assert accuracy.by_iou() == pytest.approx([1] * 10)
    assert accuracy.by_class()[:2] == pytest.approx([1, 1])
    assert np.isnan(accuracy.by_class()[2])
    assert accuracy.by_size()[:2] == pytest.approx([1, 1])
    assert np.isnan(accuracy.by_size()[2])
    assert accuracy.precision_recall() == pytest.approx(np.ones(101))
    assert class_names(truth) == ["cat", "dog", "nowhere"]


def test_half_of_the_objects_of_a_class(truth: COCO) -> None:
    accuracy = measure(truth, [found(BOXES[0], 3, 0.9), found(BOXES[2], 7, 0.8)])
    assert accuracy.by_class()[:2] == pytest.approx([51 / 101, 1])  # recalls 0, 0.01, ..., 0.5 have precision 1
    assert accuracy.ap == pytest.approx((51 / 101 + 1) / 2)


def test_a_box_that_fits_loosely_counts_at_low_iou_only(truth: COCO) -> None:
    loose = [10, 60, 30, 21]  # IoU 0.7
    by_iou = measure(truth, [found(loose, 7, 0.9)]).by_iou()
    assert by_iou[:4] == pytest.approx([0.5] * 4)
    assert by_iou[5:] == pytest.approx([0] * 5)


def test_no_detection_has_ap_0(truth: COCO) -> None:
    accuracy = measure(truth, [])
    assert accuracy.ap == 0
    assert accuracy.precision_recall() == pytest.approx(np.zeros(101))


def test_the_mean_of_seeds(truth: COCO) -> None:
    all_found = [found(box, category, 0.9) for box, category in zip(BOXES, (3, 3, 7), strict=True)]
    assert mean_accuracy([measure(truth, all_found), measure(truth, [])]).ap == pytest.approx(0.5)


def test_verdict(truth: COCO) -> None:
    objects = truth.dataset["annotations"]
    detections = [
        found(BOXES[0], 3, 0.9),
        found(BOXES[0], 3, 0.8),  # again: wrong
        found(BOXES[2], 3, 0.7),  # of another class: wrong
        found(BOXES[1], 3, 0.2),  # not probable enough
    ]
    verdict = judge(objects, detections, 0.3)
    assert verdict.right.tolist() == [True, False, False]
    assert verdict.found.tolist() == [True, False, False]
    assert verdict.text == "1 right, 2 wrong, 2 missed"
    assert judge(objects, detections, 0.1).found.tolist() == [True, True, False]
    assert judge([], detections, 0.3).text == "0 right, 3 wrong, 0 missed"
    assert judge(objects, [], 0.3).text == "0 right, 0 wrong, 3 missed"
