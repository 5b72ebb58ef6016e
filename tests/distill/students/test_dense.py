"""Dense students: what they show is taken from their own loss, which does not notice."""

import copy
import math
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from mmdet.models.dense_heads import ATSSHead
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image, generalized_box_iou_loss, roi_align

from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.detector import DistilledDetector
from kdpipe.distill.losses.ckd import ckd_loss
from kdpipe.distill.losses.ckd_negatives import same_object
from kdpipe.distill.losses.prediction import dense_classification_kd_loss
from kdpipe.distill.methods import ContractError
from kdpipe.distill.rois import sampling as rois
from kdpipe.distill.rois.sampling import RoiSampling, best_overlap
from kdpipe.distill.students.dense import CKD_BRANCHES, DenseStudent
from kdpipe.distill.students.dense_forward import DenseForward
from kdpipe.distill.students.two_stage import StudentError
from kdpipe.distill.teacher.any_box import TeacherView
from kdpipe.distill.teacher.targets import RoiTargets
from kdpipe.pipelines.detectors.configs import find_config

if TYPE_CHECKING:
    from tests.distill.conftest import Pair

# mmdet's own heads use what is deprecated
pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{what}:UserWarning") for what in ("num_anchors", "meshgrid")]

METHODS = ("sgfi", "ckd", "pred")
CONFIGS = {
    "retinanet": "retinanet_r18_fpn_1x_coco",
    "fcos": "fcos_r50-caffe_fpn_gn-head_1x_coco",
    "fcos_norm": "fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco",
    "atss": "atss_r50_fpn_1x_coco",
    "gfl": "gfl_r50_fpn_1x_coco",
    "paa": "paa_r50_fpn_1x_coco",
}
FAMILIES = [
    pytest.param(name, marks=pytest.mark.skipif(name == "paa" and not find_spec("sklearn"), reason="sklearn"))
    for name in CONFIGS
]


def config(family: str, classes: int = 3) -> Any:
    """A narrow detector of the family."""
    register_all_modules(init_default_scope=True)
    model = find_config(CONFIGS[family]).model
    model.backbone.update(depth=18, base_channels=8, init_cfg=None, frozen_stages=-1, norm_eval=False)
    model.backbone.norm_cfg.requires_grad = True
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=8)
    head = model.bbox_head
    head.update(in_channels=8, feat_channels=12, num_classes=classes, stacked_convs=2)
    if head.type in ("ATSSHead", "PAAHead"):
        head.anchor_generator.octave_base_scale = 3
    if head.type != "RetinaHead":
        head.norm_cfg = {"type": "GN", "num_groups": 2, "requires_grad": True}
    return model


def after_training(student: Any, family: str) -> None:
    """Boxes that are as large as objects, and differ from location to location."""
    head = student.bbox_head
    for name, weight in head.named_parameters():
        if name.endswith(("_reg.weight", "_cls.weight")):
            torch.nn.init.normal_(weight, std=0.1)
    if family == "fcos":
        torch.nn.init.constant_(head.conv_reg.bias, 2.3)
    if family == "fcos_norm":
        torch.nn.init.constant_(head.conv_reg.bias, 1.2)
    if family == "gfl":
        head.gfl_reg.bias.data = -0.6 * torch.arange(17.0).repeat(4)


def detector(pair: "type[Pair]", family: str, *methods: str, **options: Any) -> DistilledDetector:
    torch.manual_seed(0)
    options.setdefault("ckd", {"dim": 8, "queue_size": 64})
    options.setdefault("roi_sampling", {"num": 32})
    source = pair.source(pair.state(pair.head()))
    student, spec = options.pop("student", None) or config(family), options.pop("spec", pair.spec)
    model = DistilledDetector(student, spec.to_json(), methods, source, **options)
    model.init_weights()
    after_training(model.student, family)
    return model.train()


def view(pair: "type[Pair]", seed: int, kind: str = "exact", spec: CacheSpec | None = None) -> TeacherView:
    g, spec = torch.Generator().manual_seed(seed), spec or pair.spec
    if kind == "skipped":
        return TeacherView(kind, np.eye(3))
    sizes = [64 // stride for stride in spec.strides[: spec.roi_levels]]
    levels = tuple(torch.randn(spec.channels, size, size, generator=g) for size in sizes)
    return TeacherView(kind, np.eye(3), levels)


def step(pair: "type[Pair]", model: DistilledDetector, targets: list[Any]) -> dict[str, Tensor]:
    prepared = model.data_preprocessor.student(pair.batch(len(targets)), True)
    torch.manual_seed(5)
    result: dict[str, Tensor] = model(prepared["inputs"], prepared["data_samples"], mode="loss", targets=targets)
    return result


def watched(pair: "type[Pair]", model: DistilledDetector, **options: Any) -> DenseForward:
    """A forward pass of the student for its own loss."""
    prepared = model.data_preprocessor.student(pair.batch(2), True)
    student = DenseStudent(model.student, sampling=RoiSampling(num=32), **options)
    torch.manual_seed(5)
    with student.watch() as forward:
        model.student.loss(prepared["inputs"], prepared["data_samples"])
    return forward


def teacher_features(spec: CacheSpec, views: list[TeacherView], rois: Tensor) -> Tensor:
    """RoI features by mmdet's own extractor, Tensor[R, C, 7, 7]."""
    extractor = MODELS.build(
        {
            "type": "SingleRoIExtractor",
            "roi_layer": {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0},
            "out_channels": spec.channels,
            "featmap_strides": list(spec.strides[: spec.roi_levels]),
            "finest_scale": spec.finest_scale,
        }
    )
    features: Tensor = extractor([torch.stack(level) for level in zip(*(x.pyramid for x in views), strict=True)], rois)
    return features


def naive_iou(a: list[float], b: list[float]) -> float:
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return wide * high / max(sum(areas) - wide * high, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_all_of_its_parameters(pair: "type[Pair]", family: str) -> None:
    model = detector(pair, family, *METHODS)
    losses = step(pair, model, [view(pair, 1), view(pair, 2)])
    assert {"loss_sgfi", "loss_ckd", "loss_kd_cls"} <= losses.keys()
    assert losses["kd_positive"] > 0
    assert 30 < losses["kd_positive"] + losses["kd_negative"] <= 64
    assert losses["kd_unpaired"] <= 6  # annotations that no predicted box meets
    total, _ = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total)
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert {name.split(".")[0] for name in model.state_dict()} == {"student", "sgfi", "ckd"}


def cached(pair: "type[Pair]", boxes: Tensor) -> RoiTargets:
    """What a cache says of boxes of an image, its first an object."""
    g = torch.Generator().manual_seed(1)
    logits, embeddings = torch.randn(len(boxes), 4, generator=g), torch.randn(len(boxes), pair.width, generator=g)
    labels = torch.tensor([0] + [3] * (len(boxes) - 1))
    return RoiTargets(boxes, labels, 1, "exact", logits=logits, embeddings=embeddings)


@pytest.mark.parametrize("rois", ["student", "teacher"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_weights_zero_the_gradients_are_those_of_plain_mmdet(pair: "type[Pair]", family: str, rois: str) -> None:
    methods = {"sgfi": "sgfi", "ckd": "ckd", "pred": "cls"}
    views: list[Any] = [view(pair, 1), view(pair, 2)]
    if rois == "teacher":
        del methods["sgfi"]
        views = [cached(pair, torch.tensor([[8.0, 8, 40, 40], [0, 20, 30, 60], [30, 4, 34, 8]]))] * 2
    model = detector(pair, family, *methods, weights=dict.fromkeys(methods.values(), 0.0))
    losses = step(pair, model, views)
    assert all(losses[f"loss_{name}"].item() == 0 for name in ("ckd", "kd_cls"))
    total, _ = model.parse_losses(losses)
    total.backward()
    drawn = torch.rand(1)
    plain = MODELS.build(config(family))
    plain.load_state_dict(model.student.state_dict())
    prepared = plain.data_preprocessor(pair.batch(2), True)
    torch.manual_seed(5)
    total, _ = plain.parse_losses(plain.loss(prepared["inputs"], prepared["data_samples"]))
    total.backward()
    assert torch.equal(drawn, torch.rand(1))  # not one random number more
    parameters = dict(model.student.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameters[name].grad, parameter.grad), name


@pytest.mark.parametrize("family", FAMILIES)
def test_boxes_are_those_that_mmdet_predicts(pair: "type[Pair]", family: str) -> None:
    """Of the same outputs, by mmdet's own code without threshold and NMS: as a set, whose order it changes."""
    model = detector(pair, family, *METHODS)
    forward = watched(pair, model)
    head = model.student.bbox_head
    size = (40, 56)  # of the image without what pads it to the batch
    metas = [{**meta, "img_shape": size, "scale_factor": (1.0, 1.0)} for meta in forward.metas]
    outputs = [forward.scores, forward.regression]
    if family == "fcos_norm":  # in training, the head leaves the product with the stride to the loss
        outputs[1] = [level * stride for level, stride in zip(forward.regression, (8, 16, 32, 64, 128), strict=True)]
    every = copy.deepcopy(model.student.test_cfg)
    every.update(score_thr=-1.0, nms_pre=100000, min_bbox_size=-1)
    factors = {} if family in ("retinanet", "gfl") else {"score_factors": _ones(forward)}
    if family == "paa":  # whose own code insists on NMS
        head = copy.copy(head)
        head.__class__ = ATSSHead
    results = head.predict_by_feat(*outputs, *factors.values(), batch_img_metas=metas, cfg=every, with_nms=False)
    for image, result in enumerate(results):
        boxes = DenseStudent(model.student).boxes(forward.regression, image, size)
        assert boxes[:, 2:].amax(dim=0).tolist() == [56, 40]
        expected = result.bboxes.unique(dim=0)
        torch.testing.assert_close(boxes.unique(dim=0), expected, atol=1e-4, rtol=0)
        assert len(expected) > 50


def _ones(forward: DenseForward) -> list[Tensor]:
    """A score factor per prediction."""
    anchors = forward._student.num_anchors
    return [level.new_ones(level.shape[0], anchors, *level.shape[2:]) for level in forward.scores]


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
@pytest.mark.parametrize("branch", CKD_BRANCHES)
def test_outputs_are_those_of_the_location_that_predicted_the_box(pair: "type[Pair]", family: str, branch: str) -> None:
    model = detector(pair, family, *METHODS)
    forward = watched(pair, model, branch=branch)
    features: dict[str, list[Tensor]] = {"cls": [], "reg": []}
    head = model.student.bbox_head
    with torch.no_grad():
        for level in forward.pyramid:
            for name, convs in (("cls", head.cls_convs), ("reg", head.reg_convs)):
                x = level
                for conv in convs:
                    x = conv(x)
                features[name].append(x)
    every, paired, outputs = forward.sampled()
    assert outputs.anchors is not None
    sampled = every.select(paired)
    anchors = DenseStudent(model.student).num_anchors
    names = {"classification": ("cls",), "localization": ("reg",), "combined": ("cls", "reg")}[branch]
    boxes = [DenseStudent(model.student).boxes(forward.regression, image, (64, 64)) for image in range(2)]
    compared = 0
    for row in range(len(sampled.rois)):
        image, place = int(sampled.rois[row, 0]), sampled.rois[row, 1:]
        same = (boxes[image] == place).all(dim=1).nonzero().squeeze(1).tolist()
        if len(same) != 1:  # clipped to the same box, or an annotation
            continue
        compared += 1
        # the prediction that is this box, walked to by loops: level, row, column, anchor
        index, depth = same[0], 0
        while index >= anchors * forward.scores[depth][0, 0].numel():
            index -= anchors * forward.scores[depth][0, 0].numel()
            depth += 1
        cell, anchor = divmod(index, anchors)
        y, x_ = divmod(cell, forward.scores[depth].shape[3])
        expected = torch.stack([features[name][depth][image, :, y, x_] for name in names]).sum(dim=0)
        torch.testing.assert_close(outputs.embeddings[row].detach(), expected)
        assert int(outputs.anchors[row]) == anchor
        scores = forward.scores[depth][image, anchor * 3 : anchor * 3 + 3, y, x_]
        torch.testing.assert_close(outputs.logits[row], torch.cat([scores, torch.zeros(1)]))
    assert compared > 20


def naive_proposals(model: DistilledDetector, forward: DenseForward, image: int) -> list[int]:
    """Which predictions of an image are proposals, as loops say: the best of each level that no better one overlaps."""
    student = DenseStudent(model.student)
    boxes = student.boxes(forward.regression, image, forward.metas[image]["img_shape"]).tolist()
    start, proposals = 0, []
    for level in forward.scores:
        classes = level[image].shape[0] // student.num_anchors
        scores = level[image].unflatten(0, (student.num_anchors, classes)).permute(2, 3, 0, 1).reshape(-1, classes)
        best = [max(row) for row in scores.sigmoid().tolist()]
        kept: list[int] = []
        for index in sorted(range(len(best)), key=lambda i: -best[i])[:2000]:
            box = boxes[start + index]
            if box[2] <= box[0] or box[3] <= box[1]:
                continue
            if all(naive_iou(box, boxes[start + other]) <= 0.7 for other in kept):
                kept.append(index)
        proposals += [(best[index], start + index) for index in kept]
        start += len(best)
    return [index for _, index in sorted(proposals, reverse=True)[:1000]]


@pytest.mark.parametrize("family", ["retinanet", "fcos"])
def test_proposals_are_those_of_an_rpn_and_the_ground_truth(pair: "type[Pair]", family: str) -> None:
    model = detector(pair, family, *METHODS)
    forward = watched(pair, model)
    forward._student.sampling = RoiSampling(num=10**6, positive_fraction=1.0)
    forward.metas[1]["img_shape"] = (44, 60)  # the second image is padded to the batch
    sampled, paired, outputs = forward.sampled()
    assert len(outputs.logits) == int(paired.sum())
    for image, (gt_boxes, gt_labels) in enumerate(forward.ground_truth):
        of_image = sampled.image_index == image
        boxes = DenseStudent(model.student).boxes(forward.regression, image, forward.metas[image]["img_shape"])
        expected = [boxes[index].tolist() for index in naive_proposals(model, forward, image)]
        expected += gt_boxes.tolist()
        assert len(expected) > 30
        assert sorted(sampled.boxes[of_image].tolist()) == sorted(expected)
        by_location = [level[image].flatten(1).T for level in forward.scores]  # [h_l * w_l, A * K]
        logits = torch.cat([level.reshape(-1, 3) for level in by_location])
        for box, label in zip(gt_boxes.tolist(), gt_labels.tolist(), strict=True):
            row = sampled.boxes[of_image].tolist().index(box)
            overlaps = [naive_iou(box, other) for other in boxes.tolist()]
            assert sampled.labels[of_image][row] == label
            assert bool(paired[of_image][row]) == (max(overlaps) >= 0.5)
            if max(overlaps) >= 0.5:
                place = int(paired[: int(of_image.nonzero()[row]) + 1].sum()) - 1
                torch.testing.assert_close(outputs.logits[place, :3], logits[overlaps.index(max(overlaps))])


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_boxes_are_part_of_the_graph(pair: "type[Pair]", family: str) -> None:
    """Clipped, they are the proposals, and those that annotations are paired with."""
    model = detector(pair, family, "reg", "box")
    forward = watched(pair, model)
    sampled, paired, outputs = forward.sampled()
    assert outputs.boxes is not None
    rois, boxes = sampled.select(paired), clip_boxes_to_image(outputs.boxes, (64, 64))
    is_truth = torch.zeros(len(rois), dtype=torch.bool)
    for image, (gt_boxes, _) in enumerate(forward.ground_truth):
        same = (rois.boxes[:, None] == gt_boxes).all(dim=2).any(dim=1)
        is_truth |= same & (rois.image_index == image)
    torch.testing.assert_close(boxes[~is_truth], rois.boxes[~is_truth], atol=1e-4, rtol=0)
    overlaps = [naive_iou(*both) for both in zip(boxes[is_truth].tolist(), rois.boxes[is_truth].tolist(), strict=True)]
    assert all(overlap >= 0.5 for overlap in overlaps)
    outputs.boxes.sum().backward()
    learned = {name for name, p in model.student.bbox_head.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("reg" in name for name in learned)
    assert not any("cls" in name for name in learned)


def test_boxes_are_distilled_where_the_student_predicts_them(pair: "type[Pair]") -> None:
    model = detector(pair, "fcos", "reg", "box")
    forward = watched(pair, model)
    views = [view(pair, 1), view(pair, 2)]
    losses = step(pair, model, views)
    sampled, paired, outputs = forward.sampled()
    assert outputs.boxes is not None
    rois = sampled.select(paired)
    with torch.no_grad():
        logits, deltas = pair.head()(teacher_features(pair.spec, views, rois.rois))
    deltas, scores = deltas.unflatten(1, (-1, 4)) * torch.tensor(pair.spec.box_stds), logits.softmax(dim=1)
    predicted = outputs.boxes.detach()
    of_deltas, of_boxes = 0.0, 0.0
    for i, (x1, y1, x2, y2) in enumerate(rois.boxes.tolist()):
        w, h = x2 - x1, y2 - y1
        a = predicted[i].tolist()
        moved = [(a[0] + a[2] - x1 - x2) / 2 / w, (a[1] + a[3] - y1 - y2) / 2 / h]
        moved += [math.log((a[2] - a[0]) / w), math.log((a[3] - a[1]) / h)]
        if int(rois.labels[i]) < 3:
            wanted = deltas[i, int(rois.labels[i])].tolist()
            of_deltas += sum(abs(s - t) / std for s, t, std in zip(moved, wanted, pair.spec.box_stds, strict=True))
        for c in range(3):
            dx, dy, dw, dh = deltas[i, c].clamp(max=math.log(1000 / 16)).tolist()
            x, y, half_w, half_h = (
                (x1 + x2) / 2 + dx * w,
                (y1 + y2) / 2 + dy * h,
                w / 2 * math.exp(dw),
                h / 2 * math.exp(dh),
            )
            teachers = torch.tensor([[x - half_w, y - half_h, x + half_w, y + half_h]])
            of_boxes += float(scores[i, c] * generalized_box_iou_loss(predicted[i : i + 1], teachers))
    assert of_deltas > 0
    assert losses["loss_kd_reg"].item() == pytest.approx(of_deltas / len(rois), rel=1e-3)
    assert losses["loss_kd_box"].item() == pytest.approx(of_boxes / len(rois), rel=1e-3)


def test_a_softmax_head_proposes_by_its_object_classes() -> None:
    model = config("retinanet")
    model.bbox_head.loss_cls = {"type": "CrossEntropyLoss", "use_sigmoid": False}
    student = DenseStudent(MODELS.build(model))
    scores = torch.randn(9 * 4, 2, 3)
    objectness = student.objectness(scores)
    for row, column, anchor in ((0, 0, 0), (1, 2, 5), (0, 1, 8)):
        expected = scores[4 * anchor : 4 * anchor + 4, row, column].softmax(dim=0)[:3].max()
        torch.testing.assert_close(objectness[(row * 3 + column) * 9 + anchor], expected)


def test_rois_are_matched_and_sampled_one_to_three(pair: "type[Pair]") -> None:
    forward = watched(pair, detector(pair, "retinanet", *METHODS))
    forward.metas[1]["img_shape"] = (44, 60)  # the second image is padded to the batch
    sampled = forward.sampled()[0]
    for image, (gt_boxes, gt_labels) in enumerate(forward.ground_truth):
        rows = (sampled.rois[:, 0] == image).nonzero().squeeze(1).tolist()
        assert len(rows) == 32
        assert 0 < sum(sampled.positive[rows].tolist()) <= 8
        for row in rows:
            box = sampled.rois[row, 1:].tolist()
            high, wide = ((64, 64), (44, 60))[image]
            assert 0 <= box[0] < box[2] <= wide
            assert 0 <= box[1] < box[3] <= high
            overlaps = [naive_iou(box, gt) for gt in gt_boxes.tolist()]
            assert bool(sampled.positive[row]) == (max(overlaps) >= 0.5)
            expected = gt_labels[overlaps.index(max(overlaps))] if max(overlaps) >= 0.5 else 3
            assert int(sampled.labels[row]) == int(expected)


def test_the_sample_follows_the_seed_of_the_step(pair: "type[Pair]") -> None:
    model = detector(pair, "retinanet", *METHODS)
    one, again = watched(pair, model).sampled()[0], watched(pair, model).sampled()[0]
    assert torch.equal(one.rois, again.rois)
    forward = watched(pair, model)
    torch.manual_seed(6)
    assert not torch.equal(one.rois, forward.sampled()[0].rois)


def test_boxes_of_one_location_get_different_representations(pair: "type[Pair]") -> None:
    model = detector(pair, "retinanet", *METHODS)
    ckd = model.ckd
    assert ckd.lift.weight.shape == (9 * pair.width, 12)
    one = torch.randn(1, 12)
    lifted = ckd.lifted(one.expand(9, -1), torch.arange(9))
    assert lifted.shape == (9, pair.width)
    whole = ckd.lift(one).unflatten(1, (9, -1))[0]
    torch.testing.assert_close(lifted, whole)
    distances = torch.cdist(lifted, lifted)
    assert (distances[~torch.eye(9, dtype=torch.bool)] > 0.1).all()
    mixed = torch.tensor([3, 0, 3, 8])
    torch.testing.assert_close(ckd.lifted(one.expand(4, -1), mixed), whole[mixed])


def test_losses_are_those_of_the_parts(pair: "type[Pair]") -> None:
    model = detector(pair, "retinanet", *METHODS)
    forward = watched(pair, model)
    losses = step(pair, model, [view(pair, 1), view(pair, 2)])
    sampled, paired, outputs = forward.sampled()
    sampled = sampled.select(paired)
    head = pair.head()
    features = teacher_features(pair.spec, [view(pair, 1), view(pair, 2)], sampled.rois)
    recorded: list[Tensor] = []
    head.fc_cls.register_forward_pre_hook(lambda layer, inputs: recorded.append(inputs[0]))
    logits, _ = head(features)
    close = torch.testing.assert_close
    close(losses["loss_kd_cls"], dense_classification_kd_loss(outputs.logits, logits))
    place = sampled.rois[:, 1:], sampled.rois[:, 0].long()
    student_keys = model.ckd.f_theta(model.ckd.lifted(outputs.embeddings, outputs.anchors))
    close(losses["loss_ckd"], ckd_loss(student_keys, model.ckd.f_theta(recorded[0]), same_object(*place, *place)))


@pytest.mark.parametrize("levels", [5, 3])
@pytest.mark.parametrize(("strides", "roi_levels"), [((4, 8, 16, 32, 64), 4), ((8, 16, 32), 2), ((16,), 1)])
def test_sgfi_is_across_all_levels_whatever_the_teachers_are(
    pair: "type[Pair]", levels: int, strides: tuple[int, ...], roi_levels: int
) -> None:
    """Equation 1 in float64, on RoI features of torchvision and of mmdet's extractor."""
    spec = replace(pair.spec, strides=strides, roi_levels=roi_levels, levels=())
    student = config("retinanet")
    student.neck.num_outs = levels  # from P3 on
    every = [8, 16, 32, 64, 128][:levels]
    student.bbox_head.anchor_generator.strides = every
    model = detector(pair, "retinanet", "sgfi", student=student, spec=spec)
    forward = watched(pair, model)
    views = [view(pair, 1, spec=spec), view(pair, 2, spec=spec)]
    losses = step(pair, model, views)
    rois = forward.sampled()[0].rois[forward.sampled()[0].positive]
    assert len(rois) == int(losses["kd_positive"]) > 3
    expected = teacher_features(spec, views, rois).double()
    sgfi = copy.deepcopy(model.sgfi).double()
    features = [roi_align(x, rois, 7, 1 / stride, 2, True) for x, stride in zip(forward.pyramid, every, strict=True)]
    adapted = torch.stack([sgfi.adapt(x.double()) for x in features], dim=1)  # [P, L, C, 7, 7]
    keys = torch.stack([sgfi.embed(adapted[:, level].clone()) for level in range(levels)], dim=1)
    alpha = ((keys * sgfi.embed(expected.clone())[:, None]).sum(dim=2) / sgfi.temperature).softmax(dim=1)  # [P, L]
    mixed = (alpha[..., None, None, None] * adapted).sum(dim=1)
    assert losses["loss_sgfi"].item() == pytest.approx((mixed - expected).square().mean().item(), rel=1e-4)
    assert {name for name in losses if name.startswith("sgfi_level")} == {f"sgfi_level{i}" for i in range(levels)}
    for level in range(levels):
        assert losses[f"sgfi_level{level}"].item() == pytest.approx(alpha[:, level].mean().item(), rel=1e-4)


def test_cached_boxes_are_paired_with_the_box_that_overlaps_them_most(pair: "type[Pair]") -> None:
    model = detector(pair, "fcos", *METHODS)
    forward = watched(pair, model)
    boxes = [DenseStudent(model.student).boxes(forward.regression, image, (64, 64)) for image in range(2)]
    g = torch.Generator().manual_seed(4)
    corner = torch.rand(30, 2, generator=g) * 30
    cached = torch.cat([corner, corner + 10 + 20 * torch.rand(30, 2, generator=g)], dim=1)
    rois = torch.cat([(torch.arange(30) % 2)[:, None], cached], dim=1)
    is_paired, outputs = forward.outputs_at(rois)
    assert 0 < int(is_paired.sum()) < 30
    paired = iter(range(len(outputs.logits)))
    for row in range(30):
        image = row % 2
        overlaps = [naive_iou(cached[row].tolist(), box) for box in boxes[image].tolist()]
        assert bool(is_paired[row]) == (max(overlaps) >= 0.5)
        if is_paired[row]:
            index = overlaps.index(max(overlaps))
            scores = torch.cat([level[image].flatten(1).T for level in forward.scores])[index]
            torch.testing.assert_close(outputs.logits[next(paired)][:3], scores)


def test_cached_rois_without_a_partner_are_counted_and_left_to_sgfi(pair: "type[Pair]") -> None:
    model = detector(pair, "fcos", "ckd", "pred")
    forward = watched(pair, model)
    near = DenseStudent(model.student).boxes(forward.regression, 0, (64, 64))[[5, 20, 40]]
    far = torch.tensor([[0.0, 0.0, 2.0, 2.0], [60.0, 0.0, 64.0, 64.0]])
    boxes = torch.cat([near, far])
    losses = step(pair, model, [cached(pair, boxes)])
    assert int(losses["kd_unpaired"]) == 2
    assert int(losses["kd_positive"]) == 1
    assert int(losses["kd_negative"]) == 4
    assert int(model.ckd.queue.count) == 3


def test_skipped_images_are_left_out(pair: "type[Pair]") -> None:
    model = detector(pair, "retinanet", *METHODS)
    losses = step(pair, model, [view(pair, 1), view(pair, 2, "skipped")])
    assert losses["kd_positive"] + losses["kd_negative"] == 32
    none = step(pair, detector(pair, "retinanet", *METHODS), [view(pair, 1, "skipped"), view(pair, 2, "skipped")])
    assert all(none[name].item() == 0 for name in ("loss_sgfi", "loss_ckd", "loss_kd_cls"))
    total, _ = model.parse_losses(none)
    total.backward()
    assert torch.isfinite(total)


def test_losses_are_in_full_precision_beside_a_student_in_half(pair: "type[Pair]") -> None:
    model = detector(pair, "fcos", *METHODS, share_interval=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(pair, model, [view(pair, 1), view(pair, 2)])
    values = [losses[name] for name in ("loss_sgfi", "loss_ckd", "loss_kd_cls")]
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in values)
    torch.stack(values).sum().backward()


def test_softmax_heads_keep_their_background(pair: "type[Pair]") -> None:
    model = config("retinanet")
    model.bbox_head.loss_cls = {"type": "CrossEntropyLoss", "use_sigmoid": False}
    student = DenseStudent(MODELS.build(model))
    logits = torch.randn(5, 4)
    assert torch.equal(student.logits(logits), logits)
    sigmoid = DenseStudent(MODELS.build(config("retinanet", classes=1)))
    score = torch.randn(5, 1)
    torch.testing.assert_close(sigmoid.logits(score).softmax(dim=1)[:, :1], score.sigmoid())


def test_overlaps_in_slices_are_those_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(90, 2, generator=g) * 50
    boxes = torch.cat([corner, corner + 1 + torch.rand(90, 2, generator=g) * 30], dim=1)
    whole = best_overlap(boxes[:60], boxes[60:])
    sizes: list[int] = []

    def watch(one: Tensor, two: Tensor) -> Tensor:
        sizes.append(len(one) * len(two))
        overlaps: Tensor = box_iou(one, two)
        return overlaps

    monkeypatch.setattr(rois, "box_iou", watch)
    monkeypatch.setattr(rois, "_SLICE_ELEMENTS", 70)
    assert best_overlap(boxes, boxes[:2])[0].shape == (90,)
    assert max(sizes) == 70
    for actual, expected in zip(best_overlap(boxes[:60], boxes[60:]), whole, strict=True):
        assert torch.equal(actual, expected)
    for row in range(60):
        overlaps = [naive_iou(boxes[row].tolist(), box) for box in boxes[60:].tolist()]
        assert float(whole[0][row]) == pytest.approx(max(overlaps), abs=1e-6)


def test_the_student_is_as_it_was_also_after_an_error(pair: "type[Pair]") -> None:
    model = detector(pair, "fcos", "ckd")
    head = model.student.bbox_head
    with pytest.raises(RuntimeError, match="stop"), DenseStudent(model.student).watch():
        raise RuntimeError("stop")
    step(pair, model, [view(pair, 1)])
    assert "loss_by_feat" not in vars(head)
    assert not model.student.neck._forward_hooks
    assert not head.cls_convs[-1]._forward_hooks
    assert not head.reg_convs[-1]._forward_hooks


@pytest.mark.parametrize("method", ["careg", "ht", "hard"])
def test_losses_of_two_stage_students_are_refused(pair: "type[Pair]", method: str) -> None:
    with pytest.raises(ContractError, match=f"--methods {method} needs the box head of a two-stage student"):
        detector(pair, "fcos", method)


def test_other_heads_are_refused(pair: "type[Pair]") -> None:
    for name, text in (("yolox_s_8xb8-300e_coco", "YOLOXHead"), ("vfnet_r50_fpn_1x_coco", "VFNetHead")):
        model = find_config(name).model
        if name.startswith("yolox"):
            model.data_preprocessor.batch_augments = None
        with pytest.raises(StudentError, match=text):
            DenseStudent(MODELS.build(model))
    student = config("retinanet")
    student.bbox_head.stacked_convs = 0
    with pytest.raises(StudentError, match="convolutions in both branches"):
        DenseStudent(MODELS.build(student))
    student = config("retinanet")
    student.bbox_head.bbox_coder = {"type": "TBLRBBoxCoder", "normalizer": 4.0}
    with pytest.raises(StudentError, match="TBLRBBoxCoder"):
        DenseStudent(MODELS.build(student))


def test_a_missing_library_of_paa_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdpipe.distill.students.dense.find_spec", lambda name: None)
    with pytest.raises(StudentError, match="pip install scikit-learn"):
        DenseStudent(MODELS.build(config("paa")))


def test_a_branch_is_for_dense_students(pair: "type[Pair]") -> None:
    with pytest.raises(ContractError, match="--ckd-branch combined"):
        source = pair.source(pair.state(pair.head()))
        DistilledDetector(pair.student(), pair.spec.to_json(), ("ckd",), source, ckd={"branch": "combined"})
    with pytest.raises(StudentError, match="'both'"):
        detector(pair, "fcos", "ckd", ckd={"branch": "both"})
