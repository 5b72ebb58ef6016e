"""RoIs that the student chose: taken from its own loss, which does not notice."""

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from mmdet.models.utils import unpack_gt_instances
from mmdet.registry import MODELS
from torch import Tensor

from kdpipe.distill.detector import DistilledDetector
from kdpipe.distill.losses.ckd import ckd_loss
from kdpipe.distill.losses.ckd_negatives import same_object
from kdpipe.distill.losses.prediction import class_aware_regression_kd_loss, classification_kd_loss, regression_kd_loss
from kdpipe.distill.outputs import BatchRois
from kdpipe.distill.students.two_stage import StudentError, TwoStageStage, TwoStageStudent
from kdpipe.distill.teacher.any_box import TeacherView

if TYPE_CHECKING:
    from tests.distill.conftest import Pair

METHODS = ("sgfi", "ckd", "cls", "reg", "careg")


def detector(pair: "type[Pair]", *methods: str, **options: Any) -> DistilledDetector:
    torch.manual_seed(0)
    options.setdefault("ckd", {"dim": 8, "queue_size": 64})
    model = DistilledDetector(
        pair.student(), pair.spec.to_json(), methods, pair.source(pair.state(pair.head())), **options
    )
    model.init_weights()
    return model


def view(pair: "type[Pair]", seed: int, kind: str = "exact") -> TeacherView:
    g = torch.Generator().manual_seed(seed)
    if kind == "skipped":
        return TeacherView(kind, np.eye(3))
    matrix = np.array([[-1.0, 0, 64], [0, 1, 0], [0, 0, 1]]) if kind == "mirrored" else np.eye(3)
    sizes = [64 // stride for stride in pair.spec.strides[: pair.spec.roi_levels]]
    return TeacherView(kind, matrix, tuple(torch.randn(pair.spec.channels, size, size, generator=g) for size in sizes))


def step(pair: "type[Pair]", model: DistilledDetector, views: list[TeacherView]) -> dict[str, Tensor]:
    prepared = model.data_preprocessor.student(pair.batch(len(views)), True)
    torch.manual_seed(5)
    result: dict[str, Tensor] = model(prepared["inputs"], prepared["data_samples"], mode="loss", targets=views)
    return result


def mmdets_choice(pair: "type[Pair]", model: DistilledDetector, count: int) -> tuple[list[Tensor], BatchRois]:
    """Pyramid, and RoIs as mmdet's own code samples them with the random numbers of `step`."""
    prepared = model.data_preprocessor.student(pair.batch(count), True)
    student = model.student
    torch.manual_seed(5)
    pyramid = student.extract_feat(prepared["inputs"])
    samples = prepared["data_samples"]
    proposals = student.train_cfg.rpn_proposal
    _, rpn_result = student.rpn_head.loss_and_predict(pyramid, _one_class(samples), proposal_cfg=proposals)
    truths = unpack_gt_instances(samples)[0]
    rois, labels, positive = [], [], []
    for index, (proposed, truth) in enumerate(zip(rpn_result, truths, strict=True)):
        proposed.priors = proposed.pop("bboxes")
        assigned = student.roi_head.bbox_assigner.assign(proposed, truth)
        sampled = student.roi_head.bbox_sampler.sample(assigned, proposed, truth)
        rois.append(torch.cat([sampled.priors.new_full((len(sampled.priors), 1), index), sampled.priors], dim=1))
        labels += [*sampled.pos_gt_labels.tolist(), *[pair.classes] * len(sampled.neg_inds)]
        positive += [*[True] * len(sampled.pos_inds), *[False] * len(sampled.neg_inds)]
    return list(pyramid), BatchRois(torch.cat(rois), torch.tensor(labels), torch.tensor(positive))


def _one_class(samples: Any) -> Any:
    copies = copy.deepcopy(samples)
    for sample in copies:
        sample.gt_instances.labels = torch.zeros_like(sample.gt_instances.labels)
    return copies


def test_losses_are_those_at_the_rois_of_the_students_own_sampler(pair: "type[Pair]") -> None:
    model = detector(pair, *METHODS)
    losses = step(pair, model, [view(pair, 1), view(pair, 2)])
    pyramid, rois = mmdets_choice(pair, model, 2)
    assert 0 < int(rois.positive.sum()) < len(rois.rois)
    assert int(losses["kd_positive"]) == int(rois.positive.sum())
    assert int(losses["kd_negative"]) == int((~rois.positive).sum())
    _, outputs = TwoStageStage(TwoStageStudent(model.student), 0, pyramid).outputs_at(rois.rois)
    assert outputs.deltas is not None
    extractor = MODELS.build(
        {
            "type": "SingleRoIExtractor",
            "roi_layer": {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0},
            "out_channels": pair.spec.channels,
            "featmap_strides": list(pair.spec.strides[: pair.spec.roi_levels]),
            "finest_scale": pair.spec.finest_scale,
        }
    )
    levels = pair.levels([view(pair, 1), view(pair, 2)])
    head = pair.head()
    recorded: list[Tensor] = []
    head.fc_cls.register_forward_pre_hook(lambda layer, inputs: recorded.append(inputs[0]))
    logits, deltas = head(extractor(levels, rois.rois))
    deltas = deltas.reshape(-1, pair.classes, 4)
    close = torch.testing.assert_close
    close(losses["loss_kd_cls"], classification_kd_loss(outputs.logits, logits))
    close(losses["loss_kd_reg"], regression_kd_loss(outputs.deltas, deltas, rois.labels))
    close(losses["loss_kd_careg"], class_aware_regression_kd_loss(outputs.deltas, deltas, logits))
    project = model.ckd.f_theta
    place = rois.rois[:, 1:], rois.rois[:, 0].long()
    expected = ckd_loss(project(model.ckd.lift(outputs.embeddings)), project(recorded[0]), same_object(*place, *place))
    close(losses["loss_ckd"], expected)


def test_the_control_is_the_students_own_loss(pair: "type[Pair]") -> None:
    """At its own RoIs, the box head's loss with the annotations is the one that it has anyway."""
    losses = step(pair, detector(pair, "hard"), [view(pair, 1), view(pair, 2)])
    torch.testing.assert_close(losses["loss_hard"], losses["loss_cls"] + losses["loss_bbox"])


def test_with_weights_zero_the_gradients_are_those_of_plain_mmdet(pair: "type[Pair]") -> None:
    model = detector(pair, *METHODS, weights=dict.fromkeys(METHODS, 0.0))
    total, _ = model.parse_losses(step(pair, model, [view(pair, 1), view(pair, 2, "mirrored")]))
    total.backward()
    drawn = torch.rand(1)
    plain = MODELS.build(pair.student())
    plain.load_state_dict(model.student.state_dict())
    prepared = plain.data_preprocessor(pair.batch(2), True)
    torch.manual_seed(5)
    total, _ = plain.parse_losses(plain.loss(prepared["inputs"], prepared["data_samples"]))
    total.backward()
    assert torch.equal(drawn, torch.rand(1))  # not one random number more
    parameters = dict(model.student.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameters[name].grad, parameter.grad), name


def test_every_parameter_learns_and_none_is_the_teachers(pair: "type[Pair]") -> None:
    model = detector(pair, *METHODS)
    total, _ = model.parse_losses(step(pair, model, [view(pair, 1), view(pair, 2)]))
    total.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert {name.split(".")[0] for name in model.state_dict()} == {"student", "sgfi", "ckd"}


def test_skipped_images_are_left_out(pair: "type[Pair]") -> None:
    model = detector(pair, *METHODS)
    both = step(pair, model, [view(pair, 1), view(pair, 2)])
    model = detector(pair, *METHODS)
    one = step(pair, model, [view(pair, 1), view(pair, 2, "skipped")])
    assert int(one["kd_skipped"]) == 1
    assert 0 < int(one["kd_positive"]) < int(both["kd_positive"])
    assert int(model.ckd.queue.count) == int(one["kd_positive"]) + int(one["kd_negative"])
    none = step(pair, detector(pair, *METHODS), [view(pair, 1, "skipped"), view(pair, 2, "skipped")])
    total, _ = model.parse_losses(none)
    total.backward()
    assert torch.isfinite(total)
    assert all(none[name].item() == 0 for name in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_careg"))


def test_mirrored_targets_are_those_of_the_mirror_image(pair: "type[Pair]") -> None:
    """A teacher that is its own mirror image says the same, mirrored."""
    plain = view(pair, 1)
    pyramid = tuple(level.flip(-1)[0] for level in pair.levels([plain]))
    flipped = TeacherView("mirrored", view(pair, 1, "mirrored").matrix, pyramid)
    exact = step(pair, detector(pair, "sgfi"), [plain, plain])
    mirrored = step(pair, detector(pair, "sgfi"), [flipped, flipped])
    torch.testing.assert_close(exact["loss_sgfi"], mirrored["loss_sgfi"])
    assert int(mirrored["kd_mirrored"]) == 2
    unlike = step(pair, detector(pair, "sgfi"), [TeacherView("exact", flipped.matrix, flipped.pyramid)] * 2)
    assert abs(unlike["loss_sgfi"].item() - exact["loss_sgfi"].item()) > 1e-4


def test_the_student_is_as_it_was_also_after_an_error(pair: "type[Pair]") -> None:
    model = detector(pair, "cls")
    head = model.student.roi_head.bbox_head
    for wrong in (False, True):
        if wrong:
            with pytest.raises(RuntimeError, match="stop"), TwoStageStudent(model.student).watch():
                raise RuntimeError("stop")
        else:
            step(pair, model, [view(pair, 1)])
        assert "loss_and_target" not in vars(head)
        assert not model.student.neck._forward_hooks
        assert not head.fc_cls._forward_pre_hooks


def test_a_loss_that_does_not_show_its_rois_is_refused(pair: "type[Pair]") -> None:
    model = detector(pair, "cls")
    prepared = model.data_preprocessor.student(pair.batch(1), True)
    with TwoStageStudent(model.student).watch() as forward:
        model.student.extract_feat(prepared["inputs"])
    with pytest.raises(StudentError, match="--rois teacher"):
        forward.stages[0].sampled()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 3e4])
def test_losses_are_finite_in_full_precision_beside_a_student_in_half(
    pair: "type[Pair]", dtype: torch.dtype, size: float
) -> None:
    """Also where the outputs of its head are nearly as large as float16 can hold."""
    model = detector(pair, *METHODS)
    head = model.student.roi_head.bbox_head
    for layer in (head.fc_cls, head.fc_reg):
        layer.register_forward_hook(lambda _, inputs, output: output / output.abs().max().clamp(min=1e-3) * size)
    with torch.autocast("cpu", dtype=dtype):
        losses = step(pair, model, [view(pair, 1), view(pair, 2, "mirrored")])
    values = {name: value for name, value in losses.items() if name in ("loss_sgfi", "loss_ckd") or "loss_kd" in name}
    assert len(values) == len(METHODS)
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in values.values())
    assert {f"share_{name.removeprefix('loss_')}" for name in values} <= losses.keys()
    torch.stack(list(values.values())).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 50
    assert size > 1 or all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_student_that_resizes_whole_batches_is_refused(pair: "type[Pair]") -> None:
    config = pair.student()
    size = {"type": "BatchFixedSizePad", "size": (64, 64)}
    config.data_preprocessor.batch_augments = [size]
    TwoStageStudent(MODELS.build(config))
    resize = {"type": "BatchSyncRandomResize", "random_size_range": (32, 64)}
    config.data_preprocessor.batch_augments = [size, resize]
    with pytest.raises(StudentError, match="BatchSyncRandomResize"):
        TwoStageStudent(MODELS.build(config))
