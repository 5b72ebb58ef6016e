"""What a training chooses where its options leave it open."""

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.detectors.configs import find_config
from kdpipe.pipelines.training.student_choices import choose_methods

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

R50, CASCADE, DENSE = "faster-rcnn_r50_fpn_1x_coco", "cascade-mask-rcnn_r50_fpn_1x_coco", "retinanet_r50_fpn_1x_coco"
AGNOSTIC = ("model.roi_head.bbox_head.reg_class_agnostic=True",)
AWARE = tuple(f"model.roi_head.bbox_head.{stage}.reg_class_agnostic=False" for stage in range(3))
PRED, REG = ("sgfi", "ckd", "pred"), ("sgfi", "ckd", "cls", "reg")


@pytest.mark.parametrize(
    ("student", "options", "agnostic_teacher", "methods", "who"),
    [
        (R50, (), False, PRED, ""),
        (R50, (), True, REG, "the teacher"),
        (R50, AGNOSTIC, False, REG, "the student"),
        (R50, ("train_dataloader.num_workers=0", "distill.rois.num=8"), False, PRED, ""),
        (CASCADE, (), False, REG, "the student"),
        (CASCADE, (), True, REG, "the teacher and the student"),
        (CASCADE, AWARE, False, PRED, ""),
        (CASCADE, AWARE[:2], False, REG, "the student"),
        (DENSE, (), True, PRED, ""),  # its pred is cls
    ],
)
def test_methods_that_suit_teacher_and_student(
    kit: "Kit", student: str, options: tuple[str, ...], agnostic_teacher: bool, methods: tuple[str, ...], who: str
) -> None:
    out = io.StringIO()
    spec = replace(open_cache(kit.cache).spec, class_agnostic=agnostic_teacher)
    config, console = find_config(student), Console(file=out, width=500)
    assert choose_methods(None, config, options, spec, console) == methods
    assert (f"that of {who} is for all classes" in out.getvalue()) == bool(who)
    assert bool(out.getvalue()) == bool(who)
    for requested in (["pred"], [], ["sgfi", "careg"]):  # what was asked for stays, and is refused where it cannot be
        assert choose_methods(requested, config, options, spec, console) == requested


@pytest.mark.parametrize(
    ("student", "semantic", "methods"),
    [
        ("fcos_r50-caffe_fpn_gn-head_1x_coco", (), ("sgfi", "cross")),
        ("fcos_r50-caffe_fpn_gn-head_1x_coco", (1, 14), ("sgfi",)),  # the head of HTC cannot serve cross
        ("atss_r50_fpn_1x_coco", (), PRED),
        (DENSE, (1, 14), PRED),
    ],
)
def test_methods_of_dense_students(
    kit: "Kit", student: str, semantic: tuple[int, ...], methods: tuple[str, ...]
) -> None:
    out = io.StringIO()
    spec = replace(open_cache(kit.cache).spec, semantic=semantic)
    assert choose_methods(None, find_config(student), (), spec, Console(file=out, width=500)) == methods
    assert ("without anchors" in out.getvalue()) == (methods != PRED)
    assert ("HTC" in out.getvalue()) == (methods == ("sgfi",))
