"""Pascal VOC's AP: closed forms, and the development kit's loops written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import METRICS
from mmengine.evaluator import Evaluator
from mmengine.structures import InstanceData

from kdpipe.pipelines.data.datasets import load_coco, load_voc
from kdpipe.pipelines.data.voc_ap import VOC_IOUS, VOC_MODES, Detections, VocObjects, read_objects, voc_ap, voc_name
from kdpipe.pipelines.training.voc_metric import with_voc_metric
from tests.pipelines.data.test_datasets import SIZE, voc_folder, voc_object

Row = tuple[float, float, float, float]


def objects(boxes: list[Row], labels: list[int] | None = None, difficult: list[int] | None = None) -> VocObjects:
    return VocObjects(
        np.array(boxes, dtype=float).reshape(-1, 4),
        np.array(labels or [0] * len(boxes), dtype=np.int64),
        np.array(difficult or [0] * len(boxes), dtype=bool),
    )


def detections(boxes: list[Row], scores: list[float], labels: list[int] | None = None) -> Detections:
    corners = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return Detections(corners, np.array(scores), np.array(labels or [0] * len(boxes)))


BOX, OTHER, AWAY = (0, 0, 9, 9), (20, 0, 29, 9), (50, 50, 59, 59)


@pytest.mark.parametrize(
    ("truth", "boxes_found", "points", "area"),
    [
        (objects([BOX, OTHER]), detections([BOX, OTHER], [0.9, 0.8]), 1, 1),
        (objects([BOX, OTHER]), detections([BOX], [0.9]), 6 / 11, 0.5),
        (objects([BOX]), detections([AWAY, BOX], [0.9, 0.8]), 0.5, 0.5),
        (objects([BOX, OTHER]), detections([BOX, AWAY, OTHER], [0.9, 0.8, 0.7]), (6 + 5 * 2 / 3) / 11, 5 / 6),
        (objects([BOX, OTHER]), detections([BOX, BOX, OTHER], [0.9, 0.8, 0.7]), (6 + 5 * 2 / 3) / 11, 5 / 6),
        (objects([BOX, OTHER], difficult=[0, 1]), detections([OTHER, OTHER, BOX], [0.9, 0.8, 0.7]), 1, 1),
        (objects([BOX, OTHER], difficult=[0, 1]), detections([BOX], [0.9]), 1, 1),
        (objects([BOX], difficult=[1]), detections([BOX], [0.9]), 0, 0),
        (objects([BOX]), detections([], []), 0, 0),
        (objects([BOX]), detections([BOX], [0.9], labels=[1]), 0, 0),
        (objects([BOX, OTHER], labels=[0, 3]), detections([BOX], [0.9]), 0.5, 0.5),
    ],
    ids=[
        *("all found", "one missed", "wrong one first", "wrong one between", "found twice", "difficult ones found"),
        *("difficult ones missed", "only difficult ones", "nothing found", "another class", "mean over classes"),
    ],
)
def test_closed_forms(truth: VocObjects, boxes_found: Detections, points: float, area: float) -> None:
    ap = voc_ap({7: truth}, {7: boxes_found})
    assert ap[voc_name(0.5, "11points")] == pytest.approx(points, abs=1e-6)
    assert ap[voc_name(0.5, "area")] == pytest.approx(area, abs=1e-6)


def test_boxes_are_whole_pixels() -> None:
    """Boxes from 0 to 9 and from 0 to 8 overlap by 9 / 10 of their pixels."""
    truth, scored = objects([BOX]), detections([(0, 0, 8, 9)], [0.9])
    ap = voc_ap({1: truth}, {1: scored})
    assert [ap[voc_name(iou, "area")] for iou in VOC_IOUS] == [1, 1, 1]


def test_images_without_detections_or_objects() -> None:
    ap = voc_ap(
        {1: objects([BOX]), 2: objects([]), 3: objects([BOX])},
        {1: detections([BOX], [0.5]), 2: detections([BOX], [0.9])},
    )
    assert ap[voc_name(0.5, "area")] == pytest.approx(0.25)
    assert set(voc_ap({}, {}).values()) == {0.0}


def devkit_ap(
    truth: dict[int, VocObjects], predictions: dict[int, Detections], label: int, iou_threshold: float, mode: str
) -> float | None:
    """VOCevaldet.m and VOCap.m, loop by loop; None where there is no object."""
    rows = [
        (score, image_id, box)
        for image_id, each in predictions.items()
        for box, score, of in zip(each.boxes.tolist(), each.scores.tolist(), each.labels.tolist(), strict=True)
        if of == label
    ]
    truth_boxes = {
        image_id: [(b, d) for b, of, d in zip(o.boxes.tolist(), o.labels, o.difficult, strict=True) if of == label]
        for image_id, o in truth.items()
    }
    count = sum(not difficult for each in truth_boxes.values() for _, difficult in each)
    if not count:
        return None
    taken: set[tuple[int, int]] = set()
    right = wrong = 0
    curve: list[tuple[float, float]] = []
    for _, image_id, box in sorted(rows, key=lambda row: -row[0]):
        best, place = -1.0, -1
        for number, (other, _) in enumerate(truth_boxes[image_id]):
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            if width > 0 and height > 0:
                areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, other)]
                overlap = width * height / (sum(areas) - width * height)
                if overlap > best:
                    best, place = overlap, number
        if best >= iou_threshold:
            if not truth_boxes[image_id][place][1]:
                right += (image_id, place) not in taken
                wrong += (image_id, place) in taken
                taken.add((image_id, place))
        else:
            wrong += 1
        if right + wrong:
            curve.append((right / count, right / (right + wrong)))
    if mode == "11points":
        points = [max((p for r, p in curve if r >= number * 0.1), default=0) for number in range(11)]
        return sum(points) / 11
    total = last = 0.0
    for recall in sorted({r for r, _ in curve}):
        total += (recall - last) * max(p for r, p in curve if r >= recall)
        last = recall
    return total


@pytest.mark.parametrize("seed", range(6))
def test_is_that_of_the_development_kit(seed: int) -> None:
    draw = np.random.default_rng(seed)
    truth, predictions = {}, {}
    for image_id in range(8):
        count, more = int(draw.integers(0, 5)), int(draw.integers(0, 4))
        corners = draw.integers(0, 60, (count + more, 2))
        boxes = np.concatenate([corners, corners + draw.integers(5, 30, (count + more, 2))], axis=1).astype(float)
        labels = draw.integers(0, 3, count + more)
        truth[image_id] = VocObjects(boxes[:count], labels[:count], draw.random(count) < 0.3)
        moved = np.tile(boxes + draw.integers(-1, 2, boxes.shape), (2, 1))
        predictions[image_id] = Detections(moved, draw.permutation(1000)[: len(moved)] / 1000, np.tile(labels, 2))
    ap = voc_ap(truth, predictions)
    for iou in VOC_IOUS:
        for mode in VOC_MODES:
            each = [devkit_ap(truth, predictions, label, iou, mode) for label in range(3)]
            counted = [value for value in each if value is not None]
            assert ap[voc_name(iou, mode)] == pytest.approx(sum(counted) / len(counted), abs=1e-6)
    assert ap[voc_name(0.5, "area")] > ap[voc_name(0.9, "area")] > 0


def test_the_metric_reads_the_folder(tmp_path: Path) -> None:
    """What a folder says of difficult objects and of corners arrives; other data are measured as before."""
    body = SIZE + voc_object("cat", (1, 1, 10, 10)) + voc_object("cat", (31, 1, 40, 10), difficult=1)
    root = voc_folder(tmp_path / "voc", {"a": body, "b": SIZE + voc_object("dog", (5, 5, 20, 20))})
    data = load_voc(root, "train").copied_to(tmp_path / "a.json")
    data.write_copy()
    assert {name: each.difficult.tolist() for name, each in read_objects(tmp_path / "a.json").items()} == {
        1: [False, True],
        2: [False],
    }
    (first, metric) = with_voc_metric({"type": "CocoMetric"}, data)
    assert first == {"type": "CocoMetric"}
    evaluator = Evaluator([METRICS.build(metric)])
    predictions = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 9, 9], [30, 0, 39, 9]]),
        scores=torch.tensor([0.5, 0.9]),
        labels=torch.tensor([7, 7]),
    )
    for image_id, instances in ((1, predictions), (2, predictions[:0])):
        evaluator.process([{"img_id": image_id, "pred_instances": instances}])
    metrics = evaluator.evaluate(2)
    assert metrics == {f"voc/{voc_name(iou, mode)}": pytest.approx(0.5) for iou in VOC_IOUS for mode in VOC_MODES}
    coco = load_coco(tmp_path / "a.json", root / "JPEGImages")
    assert with_voc_metric({"type": "CocoMetric"}, coco) == {"type": "CocoMetric"}
    assert with_voc_metric(None, data) is None
