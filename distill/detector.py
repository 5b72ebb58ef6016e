"""DistilledDetector: a student and its distillation losses, and nothing of the teacher."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.model import BaseDataPreprocessor, BaseModel
from torch import Tensor, nn

from kdpipe.cache.schema import CacheSpec
from kdpipe.distill.ckd import CKD, exclude_pairs
from kdpipe.distill.methods import ContractError, check_contract, expand_methods
from kdpipe.distill.prediction import (
    class_aware_regression_kd_loss,
    classification_kd_loss,
    recode_deltas,
    regression_kd_loss,
)
from kdpipe.distill.rois import roi_align_levels
from kdpipe.distill.sgfi import SGFI
from kdpipe.distill.targets import RoiTargets, teacher_roi_features
from kdpipe.distill.two_stage import TwoStageStudent


@MODELS.register_module()
class DistilledPreprocessor(BaseDataPreprocessor):  # type: ignore[misc]
    """The student's own preprocessor, with the teacher's targets carried to the same device beside the images."""

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.student = student

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        targets = data.get("targets")
        prepared = dict(self.student(data, training))
        if targets is not None:
            prepared["targets"] = [target.to(self.device) for target in targets]
        return prepared


@MODELS.register_module()
class DistilledDetector(BaseModel):  # type: ignore[misc]
    """A student detector that also learns from cached targets (G-DetKD).

    The loss is the student's own plus the weighted sum of the chosen distillation losses, all at the same RoIs.

    Args:
        student: mmdet config of the student, or the built detector.
        spec: `CacheSpec.to_json()` of the cache.
        methods: Some of `sgfi`, `ckd`, `pred`, `cls`, `reg`, `careg`.
        weights: Weight per loss; 1 where absent.
        sgfi: Options of `SGFI`.
        ckd: Options of `CKD`, and `exclude_iou` (0.5): pairs of one image that overlap more are no negatives.

    Raises:
        ContractError: Student, cache and methods do not fit together.
    """

    def __init__(
        self,
        student: Any,
        spec: Mapping[str, Any],
        methods: Sequence[str],
        weights: Mapping[str, float] | None = None,
        sgfi: Mapping[str, Any] | None = None,
        ckd: Mapping[str, Any] | None = None,
    ) -> None:
        detector = student if isinstance(student, nn.Module) else MODELS.build(student)
        super().__init__(data_preprocessor=DistilledPreprocessor(detector.data_preprocessor))
        self.student: Any = detector
        self.spec = CacheSpec.from_json(spec)
        self.losses = expand_methods(methods)
        check_contract(self.spec, self.losses)
        view = TwoStageStudent(detector)
        self._check_student(view)
        self.weights = dict.fromkeys(self.losses, 1.0) | dict(weights or {})
        if unknown := set(self.weights) - set(self.losses):
            raise ContractError(
                f"A weight is given for {', '.join(sorted(unknown))}, which is none of the losses "
                f"{', '.join(self.losses)}."
            )
        if "sgfi" in self.losses:
            self.sgfi = SGFI(view.channels, self.spec.channels, **dict(sgfi or {}))
        if "ckd" in self.losses:
            options = dict(ckd or {})
            self.exclude_iou = options.pop("exclude_iou", 0.5)
            self.ckd = CKD(view.embedding_dim, self.spec.embedding_dim, **options)

    def _check_student(self, view: TwoStageStudent) -> None:
        if view.num_classes != self.spec.num_classes:
            raise ContractError(
                f"The student has {view.num_classes} classes and the cache {self.spec.num_classes} "
                f"({', '.join(self.spec.class_names[:5])}...). Set the student's num_classes to the latter."
            )
        if "careg" in self.losses and view.class_agnostic:
            raise ContractError(
                "Class-aware localisation KD (pred, careg) needs one box per class, and the student's box head is "
                "class-agnostic. Set model.roi_head.bbox_head.reg_class_agnostic=False, or use --methods cls,reg."
            )

    def forward(
        self,
        inputs: Tensor,
        data_samples: Any = None,
        mode: str = "tensor",
        targets: Sequence[RoiTargets] | None = None,
    ) -> Any:
        """As mmdet's detectors; `loss` mode wants `targets`, one per image.

        Args:
            inputs: Tensor[B, 3, H, W], normalised and padded.
            data_samples: One `DetDataSample` per image.
            mode: `tensor`, `predict` or `loss`.
            targets: The teacher's, one `RoiTargets` per image.

        Raises:
            ContractError: `loss` without targets.
        """
        if mode != "loss":
            return self.student(inputs, data_samples, mode)
        if targets is None:
            raise ContractError(
                "A batch came without the teacher's targets. Add dict(type='AddTeacherTargets', ...) as the last "
                "transform of the training pipeline."
            )
        view = TwoStageStudent(self.student)
        with view.watch_pyramid() as pyramid:
            losses: dict[str, Any] = self.student.loss(inputs, data_samples)
        losses.update(self._distill(view, pyramid, targets))
        return losses

    def _distill(
        self, view: TwoStageStudent, pyramid: list[Tensor], targets: Sequence[RoiTargets]
    ) -> dict[str, Tensor]:
        """All distillation losses and the counts that go to the log."""
        image = torch.cat([x.labels.new_full(x.labels.shape, i) for i, x in enumerate(targets)])  # [R]
        boxes = torch.cat([x.boxes for x in targets])  # [R, 4]
        rois = torch.cat([image[:, None].to(boxes), boxes], dim=1)  # [R, 5]
        result: dict[str, Tensor] = {}
        if "sgfi" in self.losses:
            loss, levels = self._sgfi(view, pyramid, rois, targets)
            result["loss_sgfi"] = loss
            result["sgfi_temperature"] = self.sgfi.temperature.detach()
            result |= {f"sgfi_level{i}": weight for i, weight in enumerate(levels)}
        if set(self.losses) - {"sgfi"}:
            result |= self._at_head(view, pyramid, rois, image, targets)
        for name in self.losses:
            result[f"loss_{name}" if name in ("sgfi", "ckd") else f"loss_kd_{name}"] *= self.weights[name]
        counts = {name: sum(x.view == name for x in targets) for name in ("exact", "mirrored", "skipped")}
        counts["positive"] = sum(x.num_positive for x in targets)
        counts["rois"] = rois.shape[0]
        return result | {f"kd_{name}": boxes.new_tensor(float(value)) for name, value in counts.items()}

    def _sgfi(
        self, view: TwoStageStudent, pyramid: list[Tensor], rois: Tensor, targets: Sequence[RoiTargets]
    ) -> tuple[Tensor, Tensor]:
        teacher = torch.cat([teacher_roi_features(x, self.spec) for x in targets])  # [P, C, 7, 7]
        positive = torch.cat([torch.arange(x.boxes.shape[0]) < x.num_positive for x in targets]).to(rois.device)  # [R]
        student = roi_align_levels(pyramid, view.strides, rois[positive], self.spec.roi_size)  # [P, L, C, 7, 7]
        loss, weights = self.sgfi(student, teacher)
        mean = weights.detach().sum(0) / max(1, weights.shape[0])  # [L]
        return loss, mean

    def _at_head(
        self, view: TwoStageStudent, pyramid: list[Tensor], rois: Tensor, image: Tensor, targets: Sequence[RoiTargets]
    ) -> dict[str, Tensor]:
        """The losses that look at the outputs of the box head."""
        student = view.outputs(pyramid, rois)
        result: dict[str, Tensor] = {}
        if "ckd" in self.losses:
            embeddings = _joined(targets, "embeddings")
            exclude = exclude_pairs(rois[:, 1:], image, self.exclude_iou)
            result["loss_ckd"] = self.ckd(student.embeddings, embeddings, exclude)
            result["ckd_queue"] = self.ckd.queue.count.to(rois)
        if "cls" in self.losses:
            result["loss_kd_cls"] = classification_kd_loss(student.logits, _joined(targets, "logits"))
        if "reg" in self.losses or "careg" in self.losses:
            deltas = _joined(targets, "deltas")
            ours = recode_deltas(student.deltas, view.box_means, view.box_stds, self.spec.box_means, self.spec.box_stds)
            if "reg" in self.losses:
                labels = torch.cat([x.labels for x in targets])
                result["loss_kd_reg"] = regression_kd_loss(ours, deltas, labels, self.spec.num_classes)
            if "careg" in self.losses:
                result["loss_kd_careg"] = class_aware_regression_kd_loss(ours, deltas, _joined(targets, "logits"))
        return result


def _joined(targets: Sequence[RoiTargets], field: str) -> Tensor:
    """A field of all images, one after the other, in float32."""
    return torch.cat([getattr(target, field).float() for target in targets])
