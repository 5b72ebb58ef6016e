"""Losses of whole feature maps in the detector: any student, any source of RoIs, and what they need."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.detector import DistilledDetector
from kdpipe.distill.methods import LOSSES, ContractError, check_contract, expand_methods, map_levels, needed_fields
from kdpipe.distill.outputs import TeacherMap
from kdpipe.distill.students.build import student_of
from kdpipe.distill.teacher.any_box import TeacherView
from kdpipe.distill.teacher.maps import StoredMaps
from kdpipe.distill.teacher.targets import RoiTargets, no_rois

if TYPE_CHECKING:
    from tests.distill.conftest import Pair

MAP_LOSSES = tuple(name for name, loss in LOSSES.items() if loss.of_maps)
LOG = {name: LOSSES[name].log_name for name in MAP_LOSSES}
P7 = 128

# mmdet's own heads use what is deprecated
pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{what}:UserWarning") for what in ("num_anchors", "meshgrid")]


def detector(pair: "type[Pair]", family: str, *methods: str, **options: Any) -> DistilledDetector:
    torch.manual_seed(0)
    spec: CacheSpec = options.pop("spec", pair.spec)
    source = pair.source(pair.state(pair.head()))
    model = DistilledDetector(pair.student_of(family), spec.to_json(), methods, source, **options)
    model.init_weights()
    return model.train()


def pyramid(pair: "type[Pair]", seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(pair.channels, 64 // x, 64 // x, generator=g) for x in pair.spec.strides)


def view(pair: "type[Pair]", seed: int) -> TeacherView:
    return TeacherView("exact", np.eye(3), pyramid(pair, seed), size=(64, 64))


def roi_targets(pair: "type[Pair]", seed: int) -> RoiTargets:
    return no_rois(pair.spec, ("features",), "exact", StoredMaps(np.eye(3), pyramid(pair, seed), None, (64, 64)))


def step(pair: "type[Pair]", model: DistilledDetector, targets: list[Any]) -> dict[str, Tensor]:
    prepared = model.data_preprocessor.student(pair.batch(len(targets)), True)
    torch.manual_seed(5)
    result: dict[str, Tensor] = model(prepared["inputs"], prepared["data_samples"], mode="loss", targets=targets)
    return result


@pytest.mark.parametrize("family", ["faster_rcnn", "retinanet", "fcos", "atss"])
@pytest.mark.parametrize("source", [view, roi_targets])
def test_they_compare_the_levels_that_both_have(pair: "type[Pair]", family: str, source: Any) -> None:
    model = detector(pair, family, *MAP_LOSSES)
    losses = step(pair, model, [source(pair, 1), source(pair, 2)])
    prepared = model.data_preprocessor.student(pair.batch(2), True)
    of_student = student_of(model.student)
    with torch.no_grad():
        levels = model.student.extract_feat(prepared["inputs"])
    student_maps = dict(zip(of_student.strides, levels, strict=True))
    common = (4, 8, 16, 32, 64) if family == "faster_rcnn" else (8, 16, 32, 64)
    ones = {stride: torch.ones(2, 64 // stride, 64 // stride) for stride in common}
    teacher_maps = {
        stride: TeacherMap(torch.stack([pyramid(pair, seed)[level] for seed in (1, 2)]), ones[stride])
        for level, stride in enumerate(pair.spec.strides)
        if stride in common
    }
    watch = model._watched_student().watch()
    with watch as forward:
        model.student.loss(prepared["inputs"], prepared["data_samples"])
    boxes = [sample.gt_instances.bboxes for sample in prepared["data_samples"]]
    given = {"gt_boxes": boxes, "base_anchors": forward.stages[0].base_anchors}
    for name in MAP_LOSSES:
        module: Any = getattr(model, name)
        strides = module.strides if name == "pkd" else module.imitate.strides
        assert strides == (common if name != "pkd" else (8, 16, 32, 64))
        extra = {key: value for key, value in given.items() if key in LOSSES[name].inputs(dense=False)}
        expected = LOSSES[name].weight * module(student_maps, teacher_maps, **extra)
        assert losses[LOG[name]].item() > 0, name
        assert losses[LOG[name]].item() == pytest.approx(expected.item(), rel=1e-4), name
    total, _ = model.parse_losses({name: losses[name] for name in LOG.values()})
    total.backward()
    backbone = [p.grad for name, p in model.named_parameters() if name.startswith("student.backbone.layer1")]
    assert any(grad is not None and grad.any() for grad in backbone)
    for name in MAP_LOSSES:
        assert all(p.grad is not None for p in getattr(model, name).parameters())
    assert int(losses["kd_positive"]) == int(losses["kd_negative"]) == 0
    assert int(losses["kd_exact"]) == 2


def test_the_masks_differ(pair: "type[Pair]") -> None:
    """The same initial f_adapt for all of them, so that only the masks are left."""
    model = detector(pair, "faster_rcnn", *MAP_LOSSES)
    masked = [name for name in MAP_LOSSES if name != "pkd"]
    for name in masked:
        getattr(model, name).load_state_dict(model.whole.state_dict())
    losses = step(pair, model, [view(pair, 1), view(pair, 2)])
    assert len({losses[LOG[name]].item() for name in masked}) == len(masked) == 4


def test_beside_losses_at_rois(pair: "type[Pair]") -> None:
    model = detector(pair, "faster_rcnn", "sgfi", "pkd", "cls")
    losses = step(pair, model, [view(pair, 1), view(pair, 2)])
    assert {"loss_sgfi", "loss_pkd", "loss_kd_cls"} <= losses.keys()
    alone = step(pair, detector(pair, "faster_rcnn", "pkd"), [view(pair, 1), view(pair, 2)])
    assert losses["kd_positive"] > 0
    assert losses.keys() - alone.keys() >= {"loss_sgfi", "loss_kd_cls"}


def test_images_that_are_left_out_count_nothing(pair: "type[Pair]") -> None:
    skipped = TeacherView("skipped", np.eye(3))
    one = step(pair, detector(pair, "faster_rcnn", *MAP_LOSSES), [view(pair, 1), skipped])
    both = step(pair, detector(pair, "faster_rcnn", *MAP_LOSSES), [view(pair, 1), view(pair, 2)])
    model = detector(pair, "faster_rcnn", *MAP_LOSSES)
    none = step(pair, model, [skipped, skipped])
    for name in LOG.values():
        assert one[name].item() != both[name].item() > 0
        assert one[name].item() > 0
        assert none[name].item() == 0
    total, _ = model.parse_losses(none)
    total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None and "student" not in name] == []


def test_a_cascade_compares_its_pyramid_once(pair: "type[Pair]") -> None:
    model = detector(pair, "cascade_rcnn", "whole", "sgfi")
    losses = step(pair, model, [view(pair, 1), view(pair, 2)])
    module = model.whole
    prepared = model.data_preprocessor.student(pair.batch(2), True)
    levels = model.student.extract_feat(prepared["inputs"])
    maps = {
        stride: TeacherMap(
            torch.stack([pyramid(pair, seed)[level] for seed in (1, 2)]), torch.ones(2, *levels[level].shape[2:])
        )
        for level, stride in enumerate(pair.spec.strides)
    }
    expected = 0.01 * module(dict(zip(pair.spec.strides, levels, strict=True)), maps)
    assert losses["loss_whole"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_weight_of_the_user_is_in_place_of_the_default(pair: "type[Pair]") -> None:
    assert detector(pair, "faster_rcnn", "gt-mask", "pkd", "cls", weights={"pkd": 2.0}).weights == {
        "gt-mask": 0.01,
        "pkd": 2.0,
        "cls": 1.0,
    }


def test_what_is_needed_of_a_cache(pair: "type[Pair]") -> None:
    assert MAP_LOSSES == ("whole", "gt-mask", "anchor-mask", "gaussian-mask", "pkd")
    for name in MAP_LOSSES:
        assert needed_fields([name]) == {"features"}
        assert expand_methods([name], dense=True) == (name,)
        with pytest.raises(ContractError, match=f"{name}.*needs the teacher's features.*--targets pyramid"):
            check_contract(replace(pair.spec, tier="objects"), (name,))
    retinanet = (8, 16, 32, 64, P7)
    assert map_levels(["whole"], pair.spec) == (0, 1, 2, 3, 4)
    assert map_levels(["whole"], pair.spec, retinanet) == map_levels(["pkd"], pair.spec) == (1, 2, 3, 4)
    assert map_levels(["pkd", "gt-mask"], replace(pair.spec, levels=(0, 2))) == (0, 2)
    assert map_levels(["sgfi", "cls"], pair.spec) == ()
    check_contract(replace(pair.spec, levels=(1, 2, 3, 4)), MAP_LOSSES)


def test_nothing_in_common_is_refused(pair: "type[Pair]") -> None:
    only_p2 = replace(pair.spec, levels=(0,))
    with pytest.raises(ContractError, match=r"'pkd' compares levels of the same stride from stride 8 up.*\[4\]"):
        detector(pair, "faster_rcnn", "pkd", spec=only_p2)
    with pytest.raises(ContractError, match=r"'whole' compares levels of the same stride, .*\[8, 16, 32, 64, 128\]"):
        detector(pair, "retinanet", "whole", spec=only_p2)
    detector(pair, "faster_rcnn", "whole", spec=only_p2)


def test_anchors_are_the_students_own_or_those_of_an_rpn(pair: "type[Pair]") -> None:
    anchors = {}
    for family, count in (("faster_rcnn", 3), ("retinanet", 9), ("fcos", 3), ("atss", 1)):
        student = student_of(detector(pair, family).student)
        with student.watch() as forward:
            anchors[family] = forward.stages[0].base_anchors
        assert list(anchors[family]) == list(student.strides)
        assert {len(level) for level in anchors[family].values()} == {count}
    for stride in (8, 64):
        assert anchors["fcos"][stride] == anchors["faster_rcnn"][stride]
    assert list(anchors["fcos"]) == [8, 16, 32, 64, P7]
