"""What a trained student sees, and how it compares with what its teacher says."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from kdpipe.cache import open_cache
from kdpipe.cache.errors import KdpipeError
from kdpipe.distill.losses.sgfi import SGFI
from kdpipe.pipelines.report.paper_figures import correlation
from kdpipe.pipelines.report.student_view import (
    TrainedStudent,
    level_differences,
    load_sgfi,
    positive_rows,
    without_padding,
)
from kdpipe.pipelines.report.trainings import Training, find_trainings

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


def test_a_two_stage_student_answers_for_boxes(kit: "Kit", trainings: Path) -> None:
    cache = open_cache(kit.cache)
    targets = cache.targets(int(cache.image_ids[0]))
    view = TrainedStudent(find_trainings(trainings / "plain")[0]).look(kit.img / targets.file_name)
    answered, logits = view.logits(targets.boxes)
    assert answered.all()
    assert logits.shape == (len(targets.boxes), len(kit.classes) + 1)
    assert view.levels[8].shape[1:] == (96 // 8, 128 // 8)
    assert view.rois(targets.boxes[:1])[0, 1:].tolist() == pytest.approx(targets.boxes[0].tolist(), abs=1e-3)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of mmdet
@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_a_dense_student_has_the_boxes_that_it_predicts(kit: "Kit", tmp_path: Path, family: str) -> None:
    """Its head decodes boxes otherwise in training than in prediction."""
    kit.save_detector(tmp_path / "student.pth", kit.dense(family))
    student = TrainedStudent(Training(tmp_path, "a", {"training": "student"}, {}, True))
    cache = open_cache(kit.cache)
    targets = cache.targets(int(cache.image_ids[0]))
    view = student.look(kit.img / targets.file_name)
    stage = view.stage
    boxes = student.student.boxes(stage.regression, 0, (96, 128))  # type: ignore[attr-defined]
    with torch.inference_mode():
        metas = [stage.metas[0]]  # type: ignore[attr-defined]
        outputs = student.model.bbox_head(tuple(stage.pyramid))
        (found,) = student.model.bbox_head.predict_by_feat(*outputs, batch_img_metas=metas, rescale=False)
    nearest = torch.cdist(found.bboxes, boxes, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
    assert len(found.bboxes)
    assert nearest.max() < 1e-3
    answered, logits = view.logits(boxes[:50])
    assert len(logits) == int(answered.sum()) > 0


def test_positive_rows(kit: "Kit") -> None:
    cache = open_cache(kit.cache)
    targets = cache.targets(int(cache.image_ids[0]))
    rows = positive_rows(targets).tolist()
    first = targets.num_proposals + targets.num_jittered
    assert set(range(first, len(targets.boxes))) <= set(rows)
    for row, (x1, y1, x2, y2) in enumerate(targets.boxes.tolist()):
        ious = []
        for a1, b1, a2, b2 in targets.boxes[first:].tolist():
            inner = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
            ious.append(inner / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - inner))
        assert (row in rows) == (max(ious) >= 0.5)


def test_levels_are_those_that_sgfi_weighs_most(kit: "Kit", trainings: Path) -> None:
    (training,) = find_trainings(trainings / "distilled")
    cache, sgfi = open_cache(kit.cache), load_sgfi(training)
    targets = cache.targets(int(cache.image_ids[0]))
    view = TrainedStudent(training).look(kit.img / targets.file_name)
    count = len(positive_rows(targets))
    assert len(level_differences(targets, cache.spec, view, sgfi)) == count

    class Coarsest(SGFI):
        def level_weights(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            assert student.shape[:2] == (count, 5)
            assert len(teacher) == count
            return torch.eye(5)[[4] * count]

    small = [float((box[2:] - box[:2]).prod().sqrt()) < 56 for box in targets.boxes[positive_rows(targets)]]
    found = level_differences(targets, cache.spec, view, Coarsest(8, 16))
    assert [step == 4 for step in found] == small  # stride 64 against 4: boxes below 56 pixels are of the finest level


def test_the_parameters_of_sgfi_are_those_of_the_checkpoint(trainings: Path) -> None:
    (training,) = find_trainings(trainings / "distilled")
    state = torch.load(training.path / "epoch_2.pth", weights_only=False)["state_dict"]
    assert torch.equal(load_sgfi(training).adapt.weight, state["sgfi.adapt.weight"])
    with pytest.raises(KdpipeError, match="does not hold the parameters of sgfi"):
        load_sgfi(find_trainings(trainings / "plain")[0])


def test_correlation_is_that_of_numpy() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(4, 4)
    assert correlation(logits) == pytest.approx(np.corrcoef(logits.numpy(), rowvar=False), abs=1e-5)
    logits[:, 1] = 2.0
    assert np.isnan(correlation(logits)[1]).all()
    assert not np.isnan(correlation(logits)[0, 2])


def test_padding_is_cut_off() -> None:
    assert without_padding(torch.zeros(3, 20, 24), 8, (144, 190)).shape == (3, 18, 24)
