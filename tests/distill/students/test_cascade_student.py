"""A cascade as a student: every stage is told what the teacher says at the RoIs of that stage."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from torch import Tensor

from kdpipe.distill.detector import DistilledDetector
from kdpipe.distill.losses.prediction import classification_kd_loss, regression_kd_loss
from kdpipe.distill.students.two_stage import StudentError, TwoStageStudent
from kdpipe.distill.teacher.any_box import TeacherView
from kdpipe.distill.teacher.heads.build import FrozenTeacher
from kdpipe.distill.teacher.heads.fc import TeacherHeadError
from kdpipe.distill.teacher.targets import RoiTargets

if TYPE_CHECKING:
    from tests.distill.conftest import Pair

METHODS = ("sgfi", "ckd", "cls", "reg")
WEIGHTS = (0.8, 0.5, 0.25)


def config(pair: "type[Pair]") -> Any:
    model = pair.student_of("cascade_rcnn")
    model.roi_head.stage_loss_weights = list(WEIGHTS)
    for stage in model.train_cfg.rcnn:
        stage.sampler.num = 16
    return model


def detector(pair: "type[Pair]", *methods: str, **options: Any) -> DistilledDetector:
    torch.manual_seed(0)
    options.setdefault("ckd", {"dim": 8, "queue_size": 64})
    source = pair.source(pair.state(pair.head()))
    model = DistilledDetector(config(pair), pair.spec.to_json(), methods, source, **options)
    model.init_weights()
    for stage in model.student.roi_head.bbox_head:  # new heads move boxes by next to nothing
        torch.nn.init.normal_(stage.fc_reg.weight, std=0.3)
    return model


def view(pair: "type[Pair]", seed: int) -> TeacherView:
    g = torch.Generator().manual_seed(seed)
    sizes = [64 // stride for stride in pair.spec.strides[: pair.spec.roi_levels]]
    levels = tuple(torch.randn(pair.channels, size, size, generator=g) for size in sizes)
    return TeacherView("exact", np.eye(3), levels, size=(64, 64))


def step(pair: "type[Pair]", model: DistilledDetector, targets: list[Any]) -> dict[str, Tensor]:
    prepared = model.data_preprocessor.student(pair.batch(len(targets)), True)
    torch.manual_seed(5)
    result: dict[str, Tensor] = model(prepared["inputs"], prepared["data_samples"], mode="loss", targets=targets)
    return result


def stage_heads(pair: "type[Pair]") -> list[Any]:
    """Box heads of three stages of a teacher, which say different things."""
    heads = [pair.head() for _ in range(3)]
    for index, head in enumerate(heads):
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    return heads


@pytest.mark.parametrize("stagewise", [False, True])
def test_losses_are_the_weighted_sum_over_the_stages(
    pair: "type[Pair]", monkeypatch: pytest.MonkeyPatch, stagewise: bool
) -> None:
    model, heads, units = detector(pair, "cls", "reg"), [pair.head()] * 3, [pair.spec.box_stds] * 3
    if stagewise:
        heads, units = stage_heads(pair), [pair.spec.box_stds, (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)]
        spec = replace(pair.spec, cascade_stds=tuple(units))
        state = {f"roi_head.bbox_head.{i}.{k}": v for i, head in enumerate(heads) for k, v in head.state_dict().items()}
        frozen = FrozenTeacher(spec, model.frozen_teacher.needs, lambda: state, stagewise=True)
        frozen.check_stages(3)
        model.frozen_teacher = frozen
    roi_head = model.student.roi_head
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    original = roi_head.bbox_loss

    def watched(stage: int, x: Any, sampling_results: Any) -> Any:
        stage_losses = original(stage, x, sampling_results)
        labels = [
            torch.cat([result.pos_gt_labels, torch.full((len(result.neg_priors),), pair.classes)])
            for result in sampling_results
        ]
        rois = bbox2roi([result.priors for result in sampling_results])
        calls.append((rois, torch.cat(labels), stage_losses["cls_score"], stage_losses["bbox_pred"]))
        return stage_losses

    monkeypatch.setattr(roi_head, "bbox_loss", watched)
    views = [view(pair, 1), view(pair, 2)]
    losses = step(pair, model, views)
    assert len(calls) == 3
    assert not torch.equal(calls[0][0], calls[2][0])
    extractor = MODELS.build(
        {
            "type": "SingleRoIExtractor",
            "roi_layer": {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0},
            "out_channels": pair.channels,
            "featmap_strides": list(pair.spec.strides[: pair.spec.roi_levels]),
            "finest_scale": pair.spec.finest_scale,
        }
    )
    levels = pair.levels(views)
    cls, reg = torch.zeros(()), torch.zeros(())
    stds = [stage.bbox_coder.stds for stage in roi_head.bbox_head]
    assert len({tuple(x) for x in stds}) == 3
    for weight, std, head, of_head, call in zip(WEIGHTS, stds, heads, units, calls, strict=True):
        rois, labels, scores, deltas = call
        logits, expected = head(extractor(levels, rois.detach()))
        cls = cls + weight * classification_kd_loss(scores, logits.detach())
        unit = torch.tensor(std) / torch.tensor(pair.spec.box_stds)  # the student's units in those of the teacher
        expected = (
            expected.detach().reshape(len(rois), -1, 4) * torch.tensor(of_head) / torch.tensor(pair.spec.box_stds)
        )
        reg = reg + weight * regression_kd_loss(deltas[:, None] * unit, expected, labels, pair.classes)
    torch.testing.assert_close(losses["loss_kd_cls"], cls)
    torch.testing.assert_close(losses["loss_kd_reg"], reg)


def test_stages_are_compared_one_by_one_where_there_are_as_many(pair: "type[Pair]") -> None:
    source = pair.source(pair.state(pair.head()))
    with pytest.raises(TeacherHeadError, match="the teacher has 1 and the student 3"):
        DistilledDetector(config(pair), pair.spec.to_json(), ("cls",), source, stagewise=True)
    spec = replace(pair.spec, cascade_stds=(pair.spec.box_stds,) * 2)
    for student, count in ((config(pair), 3), (pair.student(), 1)):
        with pytest.raises(TeacherHeadError, match=f"the teacher has 2 and the student {count}"):
            DistilledDetector(student, spec.to_json(), ("cls",), source, stagewise=True)


def test_every_parameter_of_every_stage_learns(pair: "type[Pair]") -> None:
    model = detector(pair, *METHODS)
    losses = step(pair, model, [view(pair, 1), view(pair, 2)])
    for name in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_reg"):
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(losses[name], list(parameters.values()), retain_graph=True, allow_unused=True)
        reached = {
            x for x, gradient in zip(parameters, gradients, strict=True) if gradient is not None and gradient.any()
        }
        for stage in range(3):
            layer = {"loss_kd_reg": "fc_reg", "loss_kd_cls": "fc_cls"}.get(name, "shared_fcs.1")
            assert (f"student.roi_head.bbox_head.{stage}.{layer}.weight" in reached) == (name != "loss_sgfi"), name
    counts = [int(ckd.queue.count) for ckd in (model.ckd, *model.later_ckd)]
    assert all(count > 0 for count in counts)
    assert all(count <= 2 * 16 for count in counts)  # each queue has the RoIs of its stage only


def test_with_weights_zero_the_gradients_are_those_of_plain_mmdet(pair: "type[Pair]") -> None:
    model = detector(pair, *METHODS, weights=dict.fromkeys(METHODS, 0.0))
    total, _ = model.parse_losses(step(pair, model, [view(pair, 1), view(pair, 2)]))
    total.backward()
    plain = MODELS.build(config(pair))
    plain.load_state_dict(model.student.state_dict())
    prepared = plain.data_preprocessor(pair.batch(2), True)
    torch.manual_seed(5)
    total, _ = plain.parse_losses(plain.loss(prepared["inputs"], prepared["data_samples"]))
    total.backward()
    parameters = dict(model.student.named_parameters())
    assert all(torch.equal(parameters[name].grad, parameter.grad) for name, parameter in plain.named_parameters())


def test_at_the_teachers_rois_every_stage_sees_the_same_boxes(pair: "type[Pair]") -> None:
    model = detector(pair, "cls")
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(8, 2, generator=g) * 30
    boxes, logits = torch.cat([corner, corner + 20], dim=1), torch.randn(8, pair.classes + 1, generator=g)
    roi_targets = RoiTargets(boxes, torch.full((8,), pair.classes), 2, "exact", logits=logits)
    actual = step(pair, model, [roi_targets])["loss_kd_cls"]
    student = model.student
    prepared = student.data_preprocessor(pair.batch(1), True)
    pyramid = student.extract_feat(prepared["inputs"])
    outputs = [student.roi_head._bbox_forward(stage, pyramid, bbox2roi([boxes]))["cls_score"] for stage in range(3)]
    losses = [weight * classification_kd_loss(x, logits) for weight, x in zip(WEIGHTS, outputs, strict=True)]
    torch.testing.assert_close(actual, sum(losses))


def test_losses_of_the_same_rois_are_computed_once_for_all_stages(pair: "type[Pair]") -> None:
    """`sgfi` and `roifi` read the pyramid at the teacher's RoIs, and that is the same for each stage."""
    model = detector(pair, "sgfi", "roifi", "cls", weights={"sgfi": 2.0})
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(8, 2, generator=g) * 30
    boxes, logits = torch.cat([corner, corner + 20], dim=1), torch.randn(8, pair.classes + 1, generator=g)
    features = torch.randn(2, pair.channels, 7, 7, generator=g)
    labels = torch.tensor([0, 0, *[pair.classes] * 6])
    roi_targets = RoiTargets(boxes, labels, 2, "exact", logits=logits, roi_features=features)
    results: dict[str, list[Any]] = {"sgfi": [], "roifi": []}
    for name, of_loss in results.items():
        getattr(model, name).register_forward_hook(lambda module, inputs, result, to=of_loss: to.append(result))
    losses = step(pair, model, [roi_targets])
    (sgfi,), (roifi,) = results["sgfi"], results["roifi"]
    torch.testing.assert_close(losses["loss_sgfi"], 2.0 * sum(WEIGHTS) * sgfi.loss)
    torch.testing.assert_close(losses["loss_roifi"], sum(WEIGHTS) * roifi)


def test_stages_without_rois_add_nothing(pair: "type[Pair]", monkeypatch: pytest.MonkeyPatch) -> None:
    """mmdet leaves a cascade where a batch has no box."""
    model = detector(pair, *METHODS)
    monkeypatch.setattr(model.student.roi_head.bbox_head[0], "refine_bboxes", lambda *args: None)
    losses = step(pair, model, [view(pair, 1)])
    first = detector(pair, *METHODS, weights={})
    total, _ = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total)
    assert model.student.roi_head.bbox_head[2].fc_cls.weight.grad is not None
    assert "s2.loss_cls" not in losses
    assert losses["loss_kd_cls"] < step(pair, first, [view(pair, 1)])["loss_kd_cls"]


def test_hybrid_cascades_are_refused(pair: "type[Pair]") -> None:
    model = config(pair)
    model.roi_head.type = "HybridTaskCascadeRoIHead"
    with pytest.raises(StudentError, match="Faster or Cascade R-CNN"):
        TwoStageStudent(MODELS.build(model))
