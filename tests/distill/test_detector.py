"""DistilledDetector: the student's own loss, plus what the paper adds, at the RoIs that it is given."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor

from kdpipe.cache.quantize import dequantize, dequantize_rows, quantize, quantize_rows
from kdpipe.distill.detector import DistilledDetector
from kdpipe.distill.losses.prediction import class_aware_regression_kd_loss, classification_kd_loss, regression_kd_loss
from kdpipe.distill.methods import ContractError, check_contract, expand_methods, needed_fields
from kdpipe.distill.rois.frames import FrameError
from kdpipe.distill.students.two_stage import TwoStageStage, TwoStageStudent
from kdpipe.distill.teacher.source import CachedTargets
from kdpipe.distill.teacher.targets import RoiTargets

if TYPE_CHECKING:
    from tests.distill.conftest import Pair


def detector(pair: "type[Pair]", *methods: str, **options: Any) -> DistilledDetector:
    torch.manual_seed(0)
    options.setdefault("ckd", {"dim": 8, "queue_size": 64})
    spec = options.pop("spec", pair.spec).to_json()
    model = DistilledDetector(pair.student(), spec, methods, CachedTargets("x.zarr"), **options)
    model.init_weights()
    return model


def targets(pair: "type[Pair]", seed: int, rois: int = 12, positives: int = 4) -> RoiTargets:
    """Made-up targets, whose RoI features stand in for a cache of the `objects` tier."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(rois, 2, generator=g) * 30
    boxes = torch.cat([corner, corner + 4 + torch.rand(rois, 2, generator=g) * 25], dim=1)
    labels = torch.full((rois,), pair.classes)
    labels[:positives] = torch.randint(0, pair.classes, (positives,), generator=g)
    return RoiTargets(
        boxes=boxes,
        labels=labels,
        num_positive=positives,
        view="exact",
        logits=torch.randn(rois, pair.classes + 1, generator=g).half(),
        deltas=torch.randn(rois, pair.classes, 4, generator=g).half(),
        embeddings=torch.randn(rois, pair.spec.embedding_dim, generator=g).half(),
        roi_features=torch.randn(positives, pair.spec.channels, 7, 7, generator=g),
    )


def step(pair: "type[Pair]", model: DistilledDetector, batch_targets: list[RoiTargets]) -> dict[str, Tensor]:
    prepared = model.data_preprocessor.student(pair.batch(len(batch_targets)), True)
    torch.manual_seed(5)
    result: dict[str, Tensor] = model(prepared["inputs"], prepared["data_samples"], mode="loss", targets=batch_targets)
    return result


def test_every_method_adds_its_loss_and_trains_every_parameter(pair: "type[Pair]") -> None:
    model = detector(pair, "sgfi", "ckd", "pred", "reg")
    losses = step(pair, model, [targets(pair, 1), targets(pair, 2)])
    added = {"loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_careg", "loss_kd_reg"}
    assert added <= set(losses)
    total, _ = model.parse_losses(losses)
    total.backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert idle == []
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"student", "sgfi", "ckd"}
    assert int(losses["kd_positive"]) == 8
    assert int(losses["kd_negative"]) == 16


def test_losses_are_those_of_the_student_at_the_given_rois(pair: "type[Pair]") -> None:
    model = detector(pair, "pred", "reg")
    batch_targets = [targets(pair, 1), targets(pair, 2, rois=7, positives=2)]
    losses = step(pair, model, batch_targets)
    prepared = model.data_preprocessor.student(pair.batch(2), True)
    view = TwoStageStudent(model.student)
    pyramid = model.student.extract_feat(prepared["inputs"])
    rois = torch.cat(
        [torch.cat([torch.full((len(x.boxes), 1), float(i)), x.boxes], 1) for i, x in enumerate(batch_targets)]
    )
    _, outputs = TwoStageStage(view, 0, list(pyramid)).outputs_at(rois)
    assert outputs.deltas is not None
    logits = torch.cat([x.logits.float() for x in batch_targets if x.logits is not None])
    deltas = torch.cat([x.deltas.float() for x in batch_targets if x.deltas is not None])
    labels = torch.cat([x.labels for x in batch_targets])
    torch.testing.assert_close(losses["loss_kd_cls"], classification_kd_loss(outputs.logits, logits))
    torch.testing.assert_close(losses["loss_kd_reg"], regression_kd_loss(outputs.deltas, deltas, labels))
    torch.testing.assert_close(losses["loss_kd_careg"], class_aware_regression_kd_loss(outputs.deltas, deltas, logits))


def test_whole_numbers_with_a_scale_are_what_they_stand_for(pair: "type[Pair]") -> None:
    """As `objects` caches hold features and embeddings; in one image the features are mirrored."""
    stored, plain = [], []
    for seed, view in ((1, "exact"), (2, "mirrored")):
        roi_targets = replace(targets(pair, seed), view=view)
        assert roi_targets.roi_features is not None
        assert roi_targets.embeddings is not None
        features, roi_scale = quantize(roi_targets.roi_features, torch.float16)
        embeddings, embedding_scale = quantize_rows(roi_targets.embeddings)
        whole = replace(roi_targets, embeddings=embeddings, embedding_scale=embedding_scale)
        stored.append(replace(whole, roi_features=features, roi_scale=roi_scale))
        decoded = dequantize_rows(embeddings, embedding_scale), dequantize(features, roi_scale)
        plain.append(replace(roi_targets, embeddings=decoded[0], roi_features=decoded[1]))
    model = detector(pair, "sgfi", "ckd")
    actual = {name: value for name, value in step(pair, model, stored).items() if "sgfi" in name or name == "loss_ckd"}
    expected = step(pair, detector(pair, "sgfi", "ckd"), plain)
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())
    unmirrored = step(pair, detector(pair, "sgfi", "ckd"), [replace(x, view="exact") for x in plain])
    assert not torch.equal(unmirrored["loss_sgfi"], expected["loss_sgfi"])


def test_deltas_of_another_box_coder_are_compared_in_the_same_unit(pair: "type[Pair]") -> None:
    model = detector(pair, "reg")
    usual = step(pair, model, [targets(pair, 1)])["loss_kd_reg"]
    other = replace(pair.spec, box_stds=(0.2, 0.2, 0.4, 0.4))
    model = detector(pair, "reg", spec=other)  # the same offsets in pixels are half as large in this coder
    roi_targets = targets(pair, 1)
    assert roi_targets.deltas is not None
    halved = step(pair, model, [replace(roi_targets, deltas=roi_targets.deltas / 2)])["loss_kd_reg"]
    torch.testing.assert_close(halved, usual / 2)


def test_with_weights_zero_the_gradients_are_those_of_plain_mmdet(pair: "type[Pair]") -> None:
    methods = ("sgfi", "ckd", "cls", "careg")
    model = detector(pair, *methods, weights=dict.fromkeys(methods, 0.0))
    total, _ = model.parse_losses(step(pair, model, [targets(pair, 1), targets(pair, 2)]))
    total.backward()
    plain = MODELS.build(pair.student())
    plain.load_state_dict(detector(pair, *methods).student.state_dict())
    prepared = plain.data_preprocessor(pair.batch(2), True)
    torch.manual_seed(5)
    total, _ = plain.parse_losses(plain.loss(prepared["inputs"], prepared["data_samples"]))
    total.backward()
    parameters = dict(model.student.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameters[name].grad, parameter.grad), name


def test_images_without_targets_keep_the_graph_whole(pair: "type[Pair]") -> None:
    model = detector(pair, "sgfi", "ckd", "pred")
    nothing = RoiTargets(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        num_positive=0,
        view="skipped",
        logits=torch.zeros(0, pair.classes + 1),
        deltas=torch.zeros(0, pair.classes, 4),
        embeddings=torch.zeros(0, pair.spec.embedding_dim),
    )
    losses = step(pair, model, [nothing, nothing])
    total, _ = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(losses[name].item() == 0 for name in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_careg"))
    assert int(losses["kd_skipped"]) == 2


def test_the_queue_fills_and_is_part_of_the_checkpoint(pair: "type[Pair]") -> None:
    model = detector(pair, "ckd")
    step(pair, model, [targets(pair, 1), targets(pair, 2)])
    other = detector(pair, "ckd")
    other.load_state_dict(model.state_dict())
    assert int(other.ckd.queue.count) == 24
    assert torch.equal(other.ckd.queue.keys().embeddings, model.ckd.queue.keys().embeddings)
    assert other.ckd.queue.keys().image_ids.tolist() == [70] * 12 + [71] * 12  # those of the samples
    assert torch.equal(other.ckd.queue.keys().boxes[12:], targets(pair, 2).boxes)


def mirrored(roi_targets: RoiTargets, width: float) -> RoiTargets:
    x1, y1, x2, y2 = roi_targets.boxes.unbind(1)
    return replace(roi_targets, boxes=torch.stack([width - x2, y1, width - x1, y2], dim=1))


def test_boxes_of_one_image_are_no_negatives_whatever_the_view(pair: "type[Pair]") -> None:
    """In the queue they lie where they are in the original image, however the student sees it."""
    model = detector(pair, "ckd")
    batch, first = pair.batch(1), targets(pair, 1)
    prepared = model.data_preprocessor.student(batch, True)
    sample = prepared["data_samples"][0]

    def seen(matrix: list[list[float]], view: RoiTargets) -> dict[str, Tensor]:
        sample.set_metainfo({"homography_matrix": np.array(matrix)})
        result: dict[str, Tensor] = model(prepared["inputs"], prepared["data_samples"], mode="loss", targets=[view])
        return result

    seen([[1, 0, 0], [0, 1, 0], [0, 0, 1]], first)
    seen([[-1, 0, 64], [0, 1, 0], [0, 0, 1]], mirrored(first, 64))
    seen(
        [[2, 0, -5], [0, 3, -7], [0, 0, 1]],
        replace(first, boxes=first.boxes * torch.tensor([2, 3, 2, 3]) - torch.tensor([5, 7, 5, 7])),
    )
    kept_boxes = model.ckd.queue.keys().boxes
    assert len(kept_boxes) == 3 * 12
    for step in range(3):
        torch.testing.assert_close(kept_boxes[12 * step : 12 * (step + 1)], first.boxes)


def test_a_view_that_is_not_recorded_is_refused(pair: "type[Pair]") -> None:
    model = detector(pair, "ckd")
    prepared = model.data_preprocessor.student(pair.batch(1), True)
    sample = prepared["data_samples"][0]
    for change, message in (({"flip": True}, "homography_matrix"), ({"img_id": "a"}, "img_id is 'a'")):
        sample.set_metainfo({"flip": False, "img_id": 3, **change})
        with pytest.raises(FrameError, match=message):
            model(prepared["inputs"], prepared["data_samples"], mode="loss", targets=[targets(pair, 1)])


def test_the_log_says_whether_the_contrast_teaches(pair: "type[Pair]") -> None:
    losses = step(pair, detector(pair, "ckd"), [targets(pair, 1), targets(pair, 2)])
    assert 0 <= losses["ckd_top1"].item() <= 1
    assert -1 <= losses["ckd_spread"].item() < 0.9
    assert int(losses["ckd_queue"]) == 24


def test_targets_move_in_storage_type(pair: "type[Pair]") -> None:
    moved = targets(pair, 1)
    moved = replace(moved, maps=None).to("cpu")
    assert moved.logits is not None
    assert moved.logits.dtype == torch.float16


@pytest.mark.parametrize(
    ("methods", "losses"),
    [
        (("sgfi", "ckd", "pred"), ("sgfi", "ckd", "cls", "careg")),
        (("reg",), ("reg",)),
        ((), ()),
    ],
)
def test_methods(methods: tuple[str, ...], losses: tuple[str, ...]) -> None:
    assert expand_methods(methods) == losses


def test_needed_fields() -> None:
    assert needed_fields(("cls",)) == {"logits"}
    assert needed_fields(("sgfi", "careg")) == {"roi_features", "deltas", "logits"}


@pytest.mark.parametrize("methods", [("sfgi",), ("pred", "cls"), ("ckd", "ckd")])
def test_methods_that_cannot_be(methods: tuple[str, ...]) -> None:
    with pytest.raises(ContractError, match=methods[0]):
        expand_methods(methods)


@pytest.mark.parametrize(
    ("tier", "loss", "again"),
    [
        ("predictions", "ckd", "embeddings"),
        ("embeddings", "sgfi", "pyramid or objects"),
        ("predictions", "sgfi", "pyramid"),
    ],
)
def test_a_tier_that_cannot_serve_a_loss(pair: "type[Pair]", tier: str, loss: str, again: str) -> None:
    with pytest.raises(ContractError, match=f"{loss}.*--targets {again}"):
        check_contract(replace(pair.spec, tier=tier), (loss,))


def test_levels_that_a_loss_cannot_do_without(pair: "type[Pair]") -> None:
    without_p2, without_p6 = (replace(pair.spec, levels=levels) for levels in ((1, 2, 3, 4), (0, 1, 2, 3)))
    with pytest.raises(ContractError, match=r"'sgfi' needs .* lacks P2 \(it holds P3, P4, P5, P6\).*--targets objects"):
        check_contract(without_p2, ("ckd", "sgfi"))
    check_contract(without_p2, ("ckd", "cls", "careg"))
    check_contract(without_p6, ("sgfi",))


def test_roi_features_that_are_too_small_for_a_loss(pair: "type[Pair]") -> None:
    small = replace(pair.spec, roi_size=5)
    with pytest.raises(ContractError, match=r"'sgfi' needs RoI features of at least 7 x 7 .* have 5 x 5.* roifi"):
        check_contract(small, ("ckd", "sgfi"))
    check_contract(small, ("ckd", "roifi", "cls"))


def test_class_agnostic_sides_cannot_be_class_aware(pair: "type[Pair]") -> None:
    with pytest.raises(ContractError, match="class-agnostic"):
        check_contract(replace(pair.spec, class_agnostic=True), ("careg",))
    config = pair.student()
    config.roi_head.bbox_head.reg_class_agnostic = True
    with pytest.raises(ContractError, match="reg_class_agnostic=False"):
        DistilledDetector(config, pair.spec.to_json(), ("pred",), CachedTargets("x.zarr"))


def test_a_student_with_other_classes_is_refused(pair: "type[Pair]") -> None:
    config = pair.student()
    config.roi_head.bbox_head.num_classes = 5
    with pytest.raises(ContractError, match="5 classes and the cache 3"):
        DistilledDetector(config, pair.spec.to_json(), ("cls",), CachedTargets("x.zarr"))


def test_a_weight_without_its_loss_is_refused(pair: "type[Pair]") -> None:
    with pytest.raises(ContractError, match="sgfi"):
        DistilledDetector(pair.student(), pair.spec.to_json(), ("cls",), CachedTargets("x.zarr"), weights={"sgfi": 2.0})


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_a_weight_that_is_none_is_refused(pair: "type[Pair]", weight: float) -> None:
    source = CachedTargets("x.zarr")
    with pytest.raises(ContractError, match=r"finite and at least 0; found {'cls'"):
        DistilledDetector(pair.student(), pair.spec.to_json(), ("cls",), source, weights={"cls": weight})


def test_a_batch_without_targets_is_refused(pair: "type[Pair]") -> None:
    model = detector(pair, "cls")
    data = model.data_preprocessor(pair.batch(1), True)
    with pytest.raises(ContractError, match="AddTeacherTargets"):
        model(data["inputs"], data["data_samples"], mode="loss")
