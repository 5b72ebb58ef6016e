"""Which transforms of a student's pipeline are refused, and which the user may let through."""

import copy
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmdet.datasets.transforms as mmdet_transforms
import numpy as np
import pytest
from mmdet.registry import TRANSFORMS
from mmdet.utils import register_all_modules

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.training.transform_types import check_named, check_names, quote_names
from kdpipe.pipelines.training.transforms import set_scale, with_teacher_targets

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

ADD = {"type": "AddTeacherTargets"}
READ = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}]
RESIZE = {"type": "Resize", "scale": (96, 80), "keep_ratio": True}
PACK = {"type": "PackDetInputs"}

WRONG: list[tuple[Any, str]] = [
    *(
        ({"type": kind}, "Expand")
        for kind in ("Expand", "mmdet.Expand", "mmdet.datasets.transforms.Expand", mmdet_transforms.Expand)
    ),
    ({"type": "Expand", "_scope_": "mmdet"}, "Expand"),
    *(
        ({"type": name}, name)
        for name in (
            *("RandomAffine", "MinIoURandomCrop", "RandomShift", "RandomCenterCropPad", "CenterCrop", "Albu", "Rotate"),
            *("Mosaic", "MixUp", "CachedMosaic", "CachedMixUp", "CopyPaste", "InstaBoost", "ShearX", "ShearY"),
            *("RandomFlip_GLIP", "LoadImageFromNDArray", "LoadMultiChannelImageFromFiles", "GeomTransform", "Nowhere"),
            *("mmengine.Resize", "mmcv.transforms.processing.Resize", "mmengine.RandomFlip", "TransformBroadcaster"),
        )
    ),
    ({"type": "RandomFlip", "prob": 0.5, "direction": "vertical"}, "RandomFlip with direction='vertical'"),
    ({"type": "RandomFlip", "prob": [0.5, 0.1], "direction": ["horizontal", "diagonal"]}, "diagonal"),
    ({"type": "Corrupt", "corruption": "elastic_transform"}, "elastic_transform"),
    ({"type": "AutoAugment"}, "ShearY"),  # by default
    ({"type": "RandAugment"}, "Rotate"),
    ({"type": "RandAugment", "aug_space": [[{"type": "mmdet.Rotate"}]]}, "mmdet.Rotate"),
    ({"type": "RandomApply", "transforms": [{"type": "mmdet.RandomShift"}]}, "mmdet.RandomShift"),
    ({"type": "RandomApply", "transforms": {"type": "RandomShift"}}, "RandomShift"),
    (
        {
            "type": "RandomChoice",
            "transforms": [[RESIZE], [{"type": "RandomApply", "transforms": [{"type": "MixUp"}]}]],
        },
        "MixUp",
    ),
    ({"type": "TransformBroadcaster", "transforms": [{"type": "mmdet.Expand"}]}, "mmdet.Expand"),
    ({"type": "RandomChoiceResize", "scales": [(1, 1)], "resize_type": "mmengine.Resize"}, "mmengine.Resize"),
    ([[{"type": "mmdet.Expand"}]], "mmdet.Expand"),
    (mmdet_transforms.RandomFlip(prob=1.0, direction="vertical"), "RandomFlip"),  # no config
    (np.ascontiguousarray, "ascontiguousarray"),
]


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register_all_modules(init_default_scope=True)


@pytest.mark.parametrize(("step", "name_in_message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_other_transforms_are_refused_by_name(step: Any, name_in_message: str) -> None:
    for pipeline in ([*READ, step, PACK], [*READ, {"type": "mmdet.RandomOrder", "transforms": [step]}, PACK]):
        with pytest.raises(KdpipeError, match=re.escape(name_in_message)) as caught:
            with_teacher_targets(pipeline, ADD)
        assert "distill.transforms=[MyJitter]" in str(caught.value)


class MyJitter:
    """A transform of a user."""


class MyFlip(mmdet_transforms.RandomFlip):  # type: ignore[misc]
    """Not what its parent is."""


@pytest.mark.parametrize("kind", ["MyJitter", "mmdet.MyJitter", "of.me.MyJitter", MyJitter, MyFlip])
def test_a_transform_of_the_user_passes_if_they_answer_for_it(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRANSFORMS.module_dict, "MyJitter", MyJitter)
    name = getattr(kind, "__name__", kind).rpartition(".")[2]
    pipeline = [*READ, {"type": "RandomApply", "transforms": [{"type": kind, "scale": 2}]}, PACK]
    with pytest.raises(KdpipeError, match=name):
        with_teacher_targets(pipeline, ADD)
    for names in ([name], ["Other", getattr(kind, "__name__", kind)]):
        assert with_teacher_targets(pipeline, ADD, names)[-1] is ADD
    pipeline.insert(2, {"type": "mmdet.RandomShift"})
    with pytest.raises(KdpipeError, match=r"uses mmdet\.RandomShift\."):
        with_teacher_targets(pipeline, ADD, [name])


def test_what_is_let_through_may_hold_transforms_of_its_own() -> None:
    albu = {"type": "Albu", "transforms": [{"type": "OneOf", "transforms": [{"type": "Blur"}, {"type": "RGBShift"}]}]}
    with pytest.raises(KdpipeError, match=r"uses Albu\. "):
        with_teacher_targets([*READ, albu, PACK], ADD)
    assert with_teacher_targets([*READ, albu, PACK], ADD, ["Albu"])[-1] is ADD
    mapped = {"type": "KeyMapper", "transforms": [{"type": "Expand"}], "mapping": {"img": "img"}}
    with pytest.raises(KdpipeError, match=r"uses Expand\. "):
        with_teacher_targets([*READ, mapped, PACK], ADD, ["KeyMapper"])


def test_names_of_the_option_need_no_quotes() -> None:
    options = ["a.b=[c]", "distill.transforms=[MyJitter, 'other',mine.Third]", "distill.transforms=[]"]
    expected = ["a.b=[c]", "distill.transforms=['MyJitter', 'other','mine.Third']", "distill.transforms=[]"]
    assert quote_names(options) == expected


def test_names_of_the_option_are_those_of_transforms_in_the_pipeline() -> None:
    pipelines = [[*READ, {"type": "RandomApply", "transforms": [{"type": "mmdet.Expand"}]}, PACK], [{"type": "a.Mine"}]]
    for names in ([], ["Expand", "a.Mine"], ["mmdet.Expand"], ["Mine"]):
        check_names(names)
        check_named(names, pipelines)
    for wrong in ("MyJitter", [1], {"a": 1}, None):
        with pytest.raises(KdpipeError, match="expected a list of names"):
            check_names(wrong)
    with pytest.raises(KdpipeError, match=r"names Expnad, which .* PackDetInputs"):
        check_named(["Expand", "Expnad"], pipelines)


@pytest.mark.parametrize("last", [PACK, {"type": "mmdet.PackDetInputs"}, {"type": mmdet_transforms.PackDetInputs}])
def test_the_pack_at_the_end_keeps_what_targets_need(last: Any) -> None:
    before: list[Any] = copy.deepcopy([*READ, {**last, "meta_keys": ("img_id", "mine")}])
    pack, add = with_teacher_targets(before, ADD)[-2:]
    assert pack["meta_keys"][:2] == ("img_id", "mine")
    assert {"homography_matrix", "img_path", "ori_shape", "img_shape"} < set(pack["meta_keys"])
    assert add is ADD
    assert before[-1]["meta_keys"] == ("img_id", "mine")
    for pipeline in ([*READ], []):
        with pytest.raises(KdpipeError, match="expected PackDetInputs"):
            with_teacher_targets(pipeline, ADD)


@pytest.mark.parametrize(
    "kind", ["Resize", "mmdet.Resize", mmdet_transforms.Resize, "mmdet.RandomChoiceResize", "ResizeShortestEdge"]
)
def test_a_scale_replaces_the_resizing_step_however_it_is_written(kind: Any) -> None:
    step = {"type": kind, "scale": (1, 2), "interpolation": "nearest"}
    actual = set_scale([*READ, step, PACK], (640, 480))
    expected = {"type": "Resize", "scale": (640, 480), "keep_ratio": True, "interpolation": "nearest"}
    assert actual == [*READ, expected, PACK]
    (actual,) = (x for x in set_scale([*READ, step, PACK], (640, 480), (0.8, 1.0)) if x["type"] == "RandomResize")
    assert actual == {**expected, "type": "RandomResize", "ratio_range": (0.8, 1.0)}
    for pipeline in ([*READ, PACK], [step, step]):
        with pytest.raises(KdpipeError, match="Expected exactly one"):
            set_scale(pipeline, (640, 480))


def test_a_training_runs_through_a_transform_of_the_user(
    kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = []

    class Jitter(MyJitter):
        def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
            passed.append(results["img_id"])
            return results

    monkeypatch.setitem(TRANSFORMS.module_dict, "MyJitter", Jitter)
    config = kit.config(channels=8, fc=24)
    config.train_dataloader.dataset.pipeline.insert(2, {"type": "mmdet.MyJitter"})
    (work / "student.py").write_text(config.pretty_text)
    command = kit.student_command(work / "w", "--student", "student.py", "--methods", "cls")
    assert "mmdet.MyJitter" in kit.refused(*command)
    assert not (work / "w").exists()
    kit.run(*command, "-o", "distill.transforms=[mmdet.MyJitter]")
    assert passed


def test_a_pipeline_that_a_hook_switches_to_has_targets_too(kit: "Kit", work: Path) -> None:
    config = kit.config(channels=8, fc=24)
    later = [step for step in config.train_dataloader.dataset.pipeline if step["type"] != "RandomFlip"]
    hook = {"type": "PipelineSwitchHook", "switch_epoch": 1, "switch_pipeline": later}
    config.custom_hooks = [hook]
    (work / "student.py").write_text(config.pretty_text)
    config.custom_hooks = [{**hook, "switch_pipeline": [*later[:2], {"type": "mmdet.Expand"}, *later[2:]]}]
    (work / "moving.py").write_text(config.pretty_text)
    options = ("--methods", "cls", "--epochs", 2)
    assert "mmdet.Expand" in kit.refused(*kit.student_command(work / "w", "--student", "moving.py", *options))
    kit.train_student(work / "w", "--student", "student.py", *options)
    lines = [json.loads(line) for line in next((work / "w").rglob("scalars.json")).read_text().splitlines()]
    assert {line["epoch"] for line in lines if "loss_kd_cls" in line} == {1, 2}
