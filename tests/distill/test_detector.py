"""DistilledDetector: the student's own loss, plus what the paper adds, at the RoIs that it is given."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.structures import InstanceData
from torch import Tensor

from kdpipe.cache.schema import CacheSpec
from kdpipe.distill.detector import DistilledDetector
from kdpipe.distill.methods import ContractError, check_contract, expand_methods, needed_fields
from kdpipe.distill.prediction import class_aware_regression_kd_loss, classification_kd_loss, regression_kd_loss
from kdpipe.distill.source import CachedTeacher
from kdpipe.distill.targets import RoiTargets
from kdpipe.distill.two_stage import TwoStageStudent
from kdpipe.pipelines.configs import find_config

CLASSES = 3
SPEC = CacheSpec(
    tier="roi",
    dtype="float32",
    codec="none",
    class_names=("a", "b", "c"),
    category_ids=(1, 2, 3),
    channels=10,
    strides=(4, 8, 16, 32, 64),
    roi_levels=4,
    finest_scale=28,
    roi_size=7,
    roi_sampling_ratio=0,
    roi_aligned=True,
    embedding_dim=20,
    box_means=(0.0, 0.0, 0.0, 0.0),
    box_stds=(0.1, 0.1, 0.2, 0.2),
    class_agnostic=False,
    proposals=50,
    views=("identity",),
    scale=(64, 64),
)


def student_config() -> Any:
    register_all_modules(init_default_scope=True)
    model = find_config("faster-rcnn_r50_fpn_1x_coco").model
    model.backbone.update(depth=18, base_channels=8, init_cfg=None, frozen_stages=-1, norm_eval=False)
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=8)
    model.rpn_head.update(in_channels=8, feat_channels=8)
    model.roi_head.bbox_roi_extractor.out_channels = 8
    model.roi_head.bbox_head.update(in_channels=8, fc_out_channels=16, num_classes=CLASSES)
    model.train_cfg.rcnn.sampler.num = 16
    model.train_cfg.rpn_proposal.max_per_img = 20
    return model


def detector(*methods: str, **options: Any) -> DistilledDetector:
    torch.manual_seed(0)
    options.setdefault("ckd", {"dim": 8, "queue_size": 64})
    model = DistilledDetector(student_config(), SPEC.to_json(), methods, CachedTeacher("x.zarr"), **options)
    model.init_weights()
    return model


def batch(count: int = 2) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    inputs, samples = [], []
    for _ in range(count):
        inputs.append(torch.randint(0, 256, (3, 64, 64), generator=g, dtype=torch.uint8))
        sample = DetDataSample(metainfo={"img_shape": (64, 64), "ori_shape": (64, 64), "scale_factor": (1.0, 1.0)})
        corner = torch.rand(3, 2, generator=g) * 30
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([corner, corner + 20], dim=1), labels=torch.randint(0, CLASSES, (3,), generator=g)
        )
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def targets(seed: int, rois: int = 12, positives: int = 4) -> RoiTargets:
    """Made-up targets, whose RoI features stand in for a cache of the `roi` tier."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(rois, 2, generator=g) * 30
    boxes = torch.cat([corner, corner + 4 + torch.rand(rois, 2, generator=g) * 25], dim=1)
    labels = torch.full((rois,), CLASSES)
    labels[:positives] = torch.randint(0, CLASSES, (positives,), generator=g)
    return RoiTargets(
        boxes=boxes,
        labels=labels,
        num_positive=positives,
        view="exact",
        logits=torch.randn(rois, CLASSES + 1, generator=g).half(),
        deltas=torch.randn(rois, CLASSES, 4, generator=g).half(),
        embeddings=torch.randn(rois, SPEC.embedding_dim, generator=g).half(),
        teacher=_RoiFeatures(torch.randn(positives, SPEC.channels, 7, 7, generator=g)),  # type: ignore[arg-type]
    )


class _RoiFeatures:
    features = None

    def __init__(self, features: Tensor) -> None:
        self._features = features

    def rois(self) -> Tensor:
        return self._features


def step(model: DistilledDetector, shown: list[RoiTargets]) -> dict[str, Tensor]:
    data = batch(len(shown))
    prepared = model.data_preprocessor.student({"inputs": data["inputs"], "data_samples": data["data_samples"]}, True)
    torch.manual_seed(5)
    result: dict[str, Tensor] = model(prepared["inputs"], prepared["data_samples"], mode="loss", targets=shown)
    return result


def test_every_method_adds_its_loss_and_trains_every_parameter() -> None:
    model = detector("sgfi", "ckd", "pred", "reg")
    losses = step(model, [targets(1), targets(2)])
    added = {"loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_careg", "loss_kd_reg"}
    assert added <= set(losses)
    total, _ = model.parse_losses(losses)
    total.backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert idle == []
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"student", "sgfi", "ckd"}
    assert int(losses["kd_positive"]) == 8
    assert int(losses["kd_negative"]) == 16


def test_losses_are_those_of_the_student_at_the_given_rois() -> None:
    model = detector("pred", "reg")
    shown = [targets(1), targets(2, rois=7, positives=2)]
    losses = step(model, shown)
    data = batch(2)
    prepared = model.data_preprocessor.student(data, True)
    view = TwoStageStudent(model.student)
    pyramid = model.student.extract_feat(prepared["inputs"])
    rois = torch.cat([torch.cat([torch.full((len(x.boxes), 1), float(i)), x.boxes], 1) for i, x in enumerate(shown)])
    said = view.outputs(pyramid, rois)
    logits = torch.cat([x.logits.float() for x in shown if x.logits is not None])
    deltas = torch.cat([x.deltas.float() for x in shown if x.deltas is not None])
    labels = torch.cat([x.labels for x in shown])
    torch.testing.assert_close(losses["loss_kd_cls"], classification_kd_loss(said.logits, logits))
    torch.testing.assert_close(losses["loss_kd_reg"], regression_kd_loss(said.deltas, deltas, labels))
    torch.testing.assert_close(losses["loss_kd_careg"], class_aware_regression_kd_loss(said.deltas, deltas, logits))


def test_deltas_of_another_box_coder_are_compared_in_the_same_unit() -> None:
    model = detector("reg")
    usual = step(model, [targets(1)])["loss_kd_reg"]
    other = replace(SPEC, box_stds=(0.2, 0.2, 0.4, 0.4))
    model.spec = other  # the same offsets in pixels are half as large in this coder
    shown = targets(1)
    assert shown.deltas is not None
    halved = step(model, [replace(shown, deltas=shown.deltas / 2)])["loss_kd_reg"]
    torch.testing.assert_close(halved, usual / 2)


def test_with_weights_zero_the_gradients_are_those_of_plain_mmdet() -> None:
    methods = ("sgfi", "ckd", "cls", "careg")
    model = detector(*methods, weights=dict.fromkeys(methods, 0.0))
    total, _ = model.parse_losses(step(model, [targets(1), targets(2)]))
    total.backward()
    plain = MODELS.build(student_config())
    plain.load_state_dict(detector(*methods).student.state_dict())
    prepared = plain.data_preprocessor(batch(2), True)
    torch.manual_seed(5)
    total, _ = plain.parse_losses(plain.loss(prepared["inputs"], prepared["data_samples"]))
    total.backward()
    ours = dict(model.student.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(ours[name].grad, parameter.grad), name


def test_images_without_targets_keep_the_graph_whole() -> None:
    model = detector("sgfi", "ckd", "pred")
    nothing = RoiTargets(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        num_positive=0,
        view="skipped",
        logits=torch.zeros(0, CLASSES + 1),
        deltas=torch.zeros(0, CLASSES, 4),
        embeddings=torch.zeros(0, SPEC.embedding_dim),
    )
    losses = step(model, [nothing, nothing])
    total, _ = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(losses[name].item() == 0 for name in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_careg"))
    assert int(losses["kd_skipped"]) == 2


def test_the_queue_fills_and_is_part_of_the_checkpoint() -> None:
    model = detector("ckd")
    step(model, [targets(1), targets(2)])
    other = detector("ckd")
    other.load_state_dict(model.state_dict())
    assert int(other.ckd.queue.count) == 24
    assert torch.equal(other.ckd.queue.negatives(), model.ckd.queue.negatives())


def test_targets_move_in_storage_type() -> None:
    moved = targets(1)
    moved = replace(moved, teacher=None).to("cpu")
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
    assert needed_fields(("sgfi", "careg")) == {"features", "deltas", "logits"}


@pytest.mark.parametrize("methods", [("sfgi",), ("pred", "cls"), ("ckd", "ckd")])
def test_methods_that_cannot_be(methods: tuple[str, ...]) -> None:
    with pytest.raises(ContractError, match=methods[0]):
        expand_methods(methods)


@pytest.mark.parametrize(
    ("tier", "loss", "again"),
    [
        ("predictions", "ckd", "embeddings"),
        ("embeddings", "sgfi", "pyramid or roi"),
        ("predictions", "sgfi", "pyramid"),
    ],
)
def test_a_tier_that_cannot_serve_a_loss(tier: str, loss: str, again: str) -> None:
    with pytest.raises(ContractError, match=f"{loss}.*--targets {again}"):
        check_contract(replace(SPEC, tier=tier), (loss,))


def test_class_agnostic_sides_cannot_be_class_aware() -> None:
    with pytest.raises(ContractError, match="class-agnostic"):
        check_contract(replace(SPEC, class_agnostic=True), ("careg",))
    config = student_config()
    config.roi_head.bbox_head.reg_class_agnostic = True
    with pytest.raises(ContractError, match="reg_class_agnostic=False"):
        DistilledDetector(config, SPEC.to_json(), ("pred",), CachedTeacher("x.zarr"))


def test_a_student_with_other_classes_is_refused() -> None:
    config = student_config()
    config.roi_head.bbox_head.num_classes = 5
    with pytest.raises(ContractError, match="5 classes and the cache 3"):
        DistilledDetector(config, SPEC.to_json(), ("cls",), CachedTeacher("x.zarr"))


def test_a_weight_without_its_loss_is_refused() -> None:
    with pytest.raises(ContractError, match="sgfi"):
        DistilledDetector(student_config(), SPEC.to_json(), ("cls",), CachedTeacher("x.zarr"), weights={"sgfi": 2.0})


def test_a_batch_without_targets_is_refused() -> None:
    model = detector("cls")
    data = model.data_preprocessor(batch(1), True)
    with pytest.raises(ContractError, match="AddTeacherTargets"):
        model(data["inputs"], data["data_samples"], mode="loss")
