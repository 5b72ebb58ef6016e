"""What a training chooses where its options leave it open."""

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from mmengine.config import Config
from rich.console import Console

from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.detectors.configs import find_config
from kdpipe.pipelines.training.options import TrainingOptions
from kdpipe.pipelines.training.student_choices import choose_methods, choose_scale
from kdpipe.pipelines.training.teachers import CachedTrainingTeacher
from kdpipe.pipelines.training.transforms import resizing_steps

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

R50, CASCADE, DENSE = "faster-rcnn_r50_fpn_1x_coco", "cascade-mask-rcnn_r50_fpn_1x_coco", "retinanet_r50_fpn_1x_coco"
AGNOSTIC = ("model.roi_head.bbox_head.reg_class_agnostic=True",)
AWARE = tuple(f"model.roi_head.bbox_head.{stage}.reg_class_agnostic=False" for stage in range(3))
PRED, REG = ("sgfi", "ckd", "pred"), ("sgfi", "ckd", "cls", "reg")


# of a head that gives one box for all classes
ONE_BOX = {
    f"roi_head.bbox_head.fc_reg.{name}": torch.zeros(4, *shape) for name, shape in (("weight", (8,)), ("bias", ()))
}


def cached_teacher(kit: "Kit", **known: Any) -> CachedTrainingTeacher:
    """That of a cache, of which something else is known."""
    cache = open_cache(kit.cache)
    cache.spec = replace(cache.spec, **known)
    return CachedTrainingTeacher(cache)


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
    ],
)
def test_methods_that_suit_teacher_and_student(
    kit: "Kit", student: str, options: tuple[str, ...], agnostic_teacher: bool, methods: tuple[str, ...], who: str
) -> None:
    out = io.StringIO()
    teacher = cached_teacher(kit, class_agnostic=agnostic_teacher)
    config, console = find_config(student), Console(file=out, width=500)
    assert choose_methods(None, config, options, teacher, console) == methods
    assert (f"that of {who} is for all classes" in out.getvalue()) == bool(who)
    assert bool(out.getvalue()) == bool(who)
    for requested in (["pred"], [], ["sgfi", "careg"]):  # what was asked for stays, and is refused where it cannot be
        assert choose_methods(requested, config, options, teacher, console) == requested


@pytest.mark.parametrize("student", ["fcos_r50-caffe_fpn_gn-head_1x_coco", DENSE, "atss_r50_fpn_1x_coco"])
@pytest.mark.parametrize(
    ("known", "head", "methods", "reason"),
    [
        ({}, {}, ("sgfi", "cross"), ""),
        ({"class_agnostic": True}, ONE_BOX, ("sgfi", "cross"), ""),
        ({"semantic": (1, 14)}, {}, ("sgfi",), "The head of HTC cannot serve it."),
        ({}, {"roi_head.bbox_head.shared_convs.0.conv.weight": torch.zeros(1)}, ("sgfi",), "cannot be rebuilt"),
    ],
)
def test_methods_of_dense_students(
    kit: "Kit",
    monkeypatch: pytest.MonkeyPatch,
    student: str,
    known: dict[str, Any],
    head: dict[str, torch.Tensor],
    methods: tuple[str, ...],
    reason: str,
) -> None:
    out, teacher = io.StringIO(), cached_teacher(kit, **known)
    state = teacher.cache.head() | head
    monkeypatch.setattr(teacher.cache, "head", lambda: state)
    assert choose_methods(None, find_config(student), (), teacher, Console(file=out, width=500)) == methods
    assert out.getvalue().startswith(f"Methods: {','.join(methods)}, which suit a dense student.")
    assert reason in out.getvalue()
    assert ("Without cross" in out.getvalue()) == bool(reason)


SQUARES = ("test_dataloader.dataset.pipeline.1.keep_ratio=False",)


@pytest.mark.parametrize(
    ("student", "options", "stays"),
    [
        (R50, {}, False),
        ("cascade-rcnn_r50_fpn_1x_coco", {"overrides": ("test_dataloader.dataset.pipeline.1.scale=(640,480)",)}, False),
        ("faster-rcnn_r50_fpn_ms-3x_coco", {}, True),  # RandomChoiceResize, and others
        ("rtmdet_s_8xb32-300e_coco", {}, True),
        ("detr_r50_8xb2-150e_coco", {}, True),  # resized in branches
        ("ssd300_coco", {}, True),  # to squares
        (R50, {"overrides": SQUARES}, True),
        ("rtmdet_s_8xb32-300e_coco", {"scale": (320, 240)}, False),
        ("faster-rcnn_r50_fpn_ms-3x_coco", {"schedule": "2x-ms"}, False),
    ],
)
def test_network_input_of_a_training(kit: "Kit", student: str, options: dict[str, Any], stays: bool) -> None:
    """The teacher's, unless the config's pipelines resize to other than one size with the ratio kept."""
    out = io.StringIO()
    teacher, console = cached_teacher(kit), Console(file=out, width=500)
    scale = choose_scale(TrainingOptions(**options), find_config(student), teacher, console)
    assert scale == (None if stays else options.get("scale", (128, 96)))
    assert ("as the config's pipelines resize images" in out.getvalue()) == stays
    assert ("--scale 128x96 takes that" in out.getvalue()) == stays


def test_several_sizes_of_a_config_stay(kit: "Kit", work: Path) -> None:
    config = kit.config(channels=8, fc=24)
    sizes = {"type": "RandomChoiceResize", "scales": [(96, 72), (128, 96)], "keep_ratio": True}
    config.train_dataloader.dataset.pipeline[2] = sizes
    (work / "student.py").write_text(config.pretty_text)
    start = ("--student", work / "student.py", "--methods", "sgfi,cls", *kit.val)
    for options, resizing in (((), "RandomChoiceResize"), (("--scale", "96x72"), "Resize")):
        printed = kit.train_student(work / resizing, *start, *options).out.replace("\n", " ")
        (used,) = (work / resizing).glob("*/vis_data/config.py")
        (step,) = resizing_steps(Config.fromfile(used).train_dataloader.dataset)
        assert step["type"] == resizing
        replaced = "resizing RandomChoiceResize 96x72 128x96 -> Resize 96x72"
        assert (replaced in printed) == bool(options)
        assert ("Network input: as the config's pipelines" in printed) == (not options)
