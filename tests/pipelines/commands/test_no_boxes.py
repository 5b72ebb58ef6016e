"""Images of which the teacher proposes nothing and nobody annotated anything: zero rows, everywhere."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kdpipe.cache.read.reader import open_cache
from kdpipe.distill.outputs import BatchRois
from kdpipe.distill.teacher.any_box import apply_teacher_head, read_teacher_view
from kdpipe.distill.teacher.heads.build import frozen_head
from kdpipe.distill.teacher.heads.fc import TeacherHeadError
from kdpipe.distill.teacher.source import check_serves_student_rois
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.teacher.live import LiveTeacher
from kdpipe.pipelines.teacher.teacher import load_teacher, teacher_config

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

FAMILIES = {
    "faster": "faster-rcnn_r50_fpn_1x_coco",
    "cascade": "cascade-rcnn_r50_fpn_1x_coco",
    "htc": "htc_r50_fpn_1x_coco",
    "c4": "faster-rcnn_r50-caffe-c4_ms-1x_coco",
}
SEMANTIC = pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``:UserWarning")


def silent_teacher(kit: "Kit", path: Path, family: str = "faster") -> Path:
    """A teacher whose RPN proposes nothing."""
    config = kit.config() if family == "faster" else kit.tiny(FAMILIES[family])
    config.model.test_cfg.rpn.min_bbox_size = 10_000
    return kit.save_detector(path, config)


def some_empty(kit: "Kit", work: Path) -> Path:
    """The training annotations, of which the first three images have none."""
    content = json.loads(kit.ann.read_text())
    empty = {image["id"] for image in content["images"][:3]}
    boxes = [box for box in content["annotations"] if box["image_id"] not in empty]
    return kit.annotations(work / "some.json", annotations=boxes)


@SEMANTIC
@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_says_nothing_of_no_boxes(kit: "Kit", work: Path, family: str) -> None:
    checkpoint = load_checkpoint(silent_teacher(kit, work / "teacher.pth", family))
    teacher = load_teacher(checkpoint, teacher_config(checkpoint, None), proposals=8, device=torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        pyramid, sample = teacher.pyramid_of_input(torch.randint(0, 256, (3, 96, 128), generator=g, dtype=torch.uint8))
        assert len(teacher.proposals(pyramid, sample)) == 0
        none, none_features = teacher.box_outputs(pyramid, torch.zeros(0, 4), sample)
        some, some_features = teacher.box_outputs(pyramid, torch.tensor([[8.0, 8, 60, 50]]), sample)
    answers = (*vars(none).values(), none_features), (*vars(some).values(), some_features)
    for empty, one in zip(*answers, strict=True):
        assert empty.shape == (0, *one.shape[1:])


@SEMANTIC
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_head_says_nothing_of_no_boxes(kit: "Kit", work: Path, family: str) -> None:
    """Of a batch in which no image has a box, from a cache and beside the teacher."""
    ckpt, out = silent_teacher(kit, work / "teacher.pth", family), work / "x.zarr"
    kit.run("cache-teacher", "--ckpt", ckpt, *kit.data, *kit.VIEW, "--out", out, "--limit", 2)
    cache, checkpoint = open_cache(out), load_checkpoint(ckpt)
    teacher = load_teacher(checkpoint, teacher_config(checkpoint, None), proposals=8, device=torch.device("cpu"))
    matrix = cache.targets(int(cache.image_ids[0])).matrix
    views = {
        "cached": read_teacher_view(cache, int(cache.image_ids[0]), matrix, missing_view="mirror"),
        "live": LiveTeacher(teacher, cache.spec).view(torch.zeros(3, 96, 128, dtype=torch.uint8)),
    }
    needs = ("logits", "deltas", "embeddings", "roi_features")
    none = BatchRois(torch.zeros(0, 5), torch.zeros(0).long(), torch.zeros(0).bool())
    one = BatchRois(torch.tensor([[0.0, 8, 8, 60, 50]]), torch.zeros(1).long(), torch.ones(1).bool())
    for view in views.values():
        empty, some = (
            apply_teacher_head([view, view], rois, frozen_head(cache.head(), cache.spec), cache.spec, needs)
            for rois in (none, one)
        )
        for name in needs:
            assert getattr(empty, name).shape == (0, *getattr(some, name).shape[1:]), name


@pytest.mark.parametrize("tier", ["pyramid", "objects"])
def test_images_without_a_box_are_cached_with_no_rows(kit: "Kit", work: Path, tier: str) -> None:
    ckpt, ann = silent_teacher(kit, work / "teacher.pth"), some_empty(kit, work)
    data = ("--ann-file", ann, "--img-dir", kit.img)
    command = ("cache-teacher", "--ckpt", ckpt, *data, *kit.VIEW, "--targets", tier, "--out", work / "x.zarr")
    kit.run(*command, "--dry-run")
    assert "nan" not in kit.run(*command).out
    cache = open_cache(work / "x.zarr")
    assert len(cache) == 8
    counts = [len(cache.targets(int(image_id)).boxes) for image_id in cache.image_ids]
    assert counts[:3] == [0, 0, 0]
    assert min(counts[3:]) > 0
    targets = cache.targets(int(cache.image_ids[0]))
    assert targets.class_boxes(cache.spec).shape == (0, cache.spec.num_classes, 4)
    ended = kit.run("verify", work / "x.zarr", "--ckpt", ckpt, "--ap")
    assert "no faults" in ended.out
    assert "nan" not in ended.out
    live = kit.run("evaluate", "--ckpt", ckpt, *data, "--scale", "128x96").out
    assert live.splitlines()[-4:] == ended.out.splitlines()[-4:], "the same AP"
    printed = kit.run("inspect", work / "x.zarr", "--image", cache.image_ids[0])
    assert "0 proposals, 0 annotated" in printed.out
    as_json: dict[str, Any] = json.loads(
        kit.run("inspect", work / "x.zarr", "--image", cache.image_ids[0], "--json").out
    )
    assert as_json["image"]["boxes"] == []


@pytest.mark.parametrize(
    ("student", "rois"), [("two-stage", "student"), ("two-stage", "teacher"), ("retinanet", "student")]
)
def test_training_with_images_without_a_box(kit: "Kit", work: Path, student: str, rois: str) -> None:
    """From a cache and beside the teacher; of some batches no image has a box."""
    ckpt, ann = silent_teacher(kit, work / "teacher.pth"), some_empty(kit, work)
    data = ("--ann-file", ann, "--img-dir", kit.img)
    kit.run("cache-teacher", "--ckpt", ckpt, *data, *kit.VIEW, "--out", work / "x.zarr")
    config = kit.config() if student == "two-stage" else kit.dense(student)
    (work / "student.py").write_text(config.pretty_text)
    options = ("--student", work / "student.py", "--rois", rois, "--methods", "ckd,cls", "--batch-size", 1)
    empty = ("-o", "train_dataloader.dataset.filter_cfg.filter_empty_gt=False")
    queue = ("-o", "distill.ckd.queue_size=64", "-o", "default_hooks.logger.interval=1")
    runs = {"w": ("--cache", work / "x.zarr"), "online": ("--teacher-ckpt", ckpt, *data)}
    for folder, source in runs.items():
        training = ("--scale", "128x96", "--epochs", 1, "--workers", 0, "--work-dir", work / folder)
        ended = kit.run("train-student", *source, *training, *options, *queue, *empty)
        assert f"RoIs: those of the {rois} (asked for)" in ended.out
        (file,) = (work / folder).glob("*/vis_data/scalars.json")
        steps = [json.loads(line) for line in file.read_text().splitlines() if '"loss"' in line]
        assert len(steps) == 8
        assert "NaN" not in file.read_text()
        assert any(step["kd_positive"] for step in steps)


def test_the_head_is_checked_at_an_image_with_boxes(kit: "Kit", work: Path) -> None:
    """Another head in a cache whose first images have no boxes."""
    ckpt, ann = silent_teacher(kit, work / "teacher.pth"), some_empty(kit, work)
    kit.run("cache-teacher", "--ckpt", ckpt, "--ann-file", ann, "--img-dir", kit.img, *kit.VIEW, "--out", work / "x")
    cache = open_cache(work / "x")
    check_serves_student_rois(cache)
    wrong = {name: value * (2 if "fc_cls" in name else 1) for name, value in cache.head().items()}
    cache.head = lambda: wrong  # type: ignore[method-assign]
    with pytest.raises(TeacherHeadError, match="does not give the logits"):
        check_serves_student_rois(cache)
