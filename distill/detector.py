"""DistilledDetector: a student and its distillation losses, and nothing of the teacher."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModel
from torch import Tensor, nn

from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.losses.ckd import CKD
from kdpipe.distill.losses.ckd_queue import TeacherKeys
from kdpipe.distill.losses.prediction import (
    class_aware_regression_kd_loss,
    classification_kd_loss,
    dense_classification_kd_loss,
    recode_deltas,
    regression_kd_loss,
)
from kdpipe.distill.losses.sgfi import SGFI
from kdpipe.distill.losses.shares import gradient_shares
from kdpipe.distill.methods import (
    HEAD_TRANSFER,
    ContractError,
    check_contract,
    expand_methods,
    loss_name,
    needed_fields,
)
from kdpipe.distill.outputs import BatchRois, HeadOutputs, TeacherOutputs
from kdpipe.distill.preprocessor import DistilledPreprocessor
from kdpipe.distill.rois.align import roi_align_levels
from kdpipe.distill.rois.frames import ImageFrames
from kdpipe.distill.students.dense import CKD_BRANCHES, DenseForward, DenseOutputs, DenseStudent
from kdpipe.distill.students.head_transfer import HeadTransfer
from kdpipe.distill.students.two_stage import TwoStageForward, TwoStageStudent
from kdpipe.distill.teacher.any_box import TeacherView, apply_teacher_head
from kdpipe.distill.teacher.heads.build import frozen_head
from kdpipe.distill.teacher.heads.cascade import CascadeHead
from kdpipe.distill.teacher.heads.fc import TeacherHead
from kdpipe.distill.teacher.heads.shared_stage import SharedStageHead
from kdpipe.distill.teacher.source import CachedTargets, TargetSource
from kdpipe.distill.teacher.targets import RoiTargets, join_targets

MODELS.register_module(module=CachedTargets)


@MODELS.register_module()
class DistilledDetector(BaseModel):  # type: ignore[misc]
    """A student detector that also learns what a teacher says (G-DetKD).

    The loss is the student's own plus the weighted sum of the chosen distillation losses, all at the same RoIs: those
    that the targets are for, or those of the student's own sampler where the teacher can be asked about any box. For a
    cascade it is a sum over its stages, with the weights that the student's own loss has; what is logged besides losses
    is of the first stage.

    Args:
        student: mmdet config of the student, or the built detector.
        spec: `CacheSpec.to_json()` of the teacher.
        methods: Some of `METHODS`.
        teacher: Where targets come from: config of a `TargetSource`, or one.
        weights: Weight per loss; 1 where absent.
        sgfi: Options of `SGFI`.
        ckd: Options of `CKD`; and `branch`, that of a dense student's head which embeddings are taken from.
        rois: `num` and `positive_fraction` of the RoIs that a dense student chooses, per image.
        share_interval: Every so many steps, the share of each loss in the gradient at the pyramid; 0 never.

    Raises:
        ContractError: Student, cache and methods do not fit together.
        HeadTransferError: The teacher's heads do not fit into the student.
    """

    def __init__(
        self,
        student: Any,
        spec: Mapping[str, Any],
        methods: Sequence[str],
        teacher: Any,
        weights: Mapping[str, float] | None = None,
        sgfi: Mapping[str, Any] | None = None,
        ckd: Mapping[str, Any] | None = None,
        rois: Mapping[str, Any] | None = None,
        share_interval: int = 50,
    ) -> None:
        detector = student if isinstance(student, nn.Module) else MODELS.build(student)
        source: TargetSource = MODELS.build(teacher) if isinstance(teacher, Mapping) else teacher
        super().__init__(data_preprocessor=DistilledPreprocessor(detector.data_preprocessor, source))
        self.student: Any = detector
        self.teacher = source
        self.spec = CacheSpec.from_json(spec)
        self.dense = not hasattr(detector, "roi_head")
        self.losses = expand_methods(methods, self.dense)
        check_contract(self.spec, self.losses)
        options = dict(ckd or {})
        self._dense_options = {"branch": options.pop("branch", CKD_BRANCHES[0]), **dict(rois or {})}
        view = self._view()
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
            options["num_classes"] = self.spec.num_classes
            anchors = view.num_anchors if isinstance(view, DenseStudent) else 1
            self.ckd = CKD(view.embedding_dim, self.spec.embedding_dim, anchors=anchors, **options)
            # queues of their own: the boxes of a stage are all but those of the stage before
            stages = view.later if isinstance(view, TwoStageStudent) else []
            later = [CKD(stage.embedding_dim, self.spec.embedding_dim, **options) for stage in stages]
            self.later_ckd = nn.ModuleList(later)

        self.share_interval = share_interval
        self._steps = 0
        self._transfer: HeadTransfer | None = None
        if HEAD_TRANSFER in methods:
            self._transfer = HeadTransfer(detector, source.head_state())
            self._transfer.copy()

    def init_weights(self) -> None:
        """As mmengine's, after which the heads are the teacher's again."""
        super().init_weights()
        self.keep_transferred_heads()

    def keep_transferred_heads(self) -> None:
        """Put the teacher's heads back, where they are transferred and other weights have been loaded."""
        if self._transfer is not None:
            self._transfer.copy()

    def train(self, mode: bool = True) -> "DistilledDetector":
        """As torch's, but transferred heads do not train."""
        super().train(mode)
        if self._transfer is not None:
            self._transfer.keep()
        return self

    def _view(self) -> TwoStageStudent | DenseStudent:
        return DenseStudent(self.student, **self._dense_options) if self.dense else TwoStageStudent(self.student)

    def _check_student(self, view: TwoStageStudent | DenseStudent) -> None:
        if not self.dense and self._dense_options["branch"] != CKD_BRANCHES[0]:
            raise ContractError(
                f"--ckd-branch {self._dense_options['branch']} is for students that predict boxes densely; the "
                "embeddings of a two-stage student are the input of its classifier. Leave it out."
            )
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

    @cached_property
    def _head(self) -> TeacherHead | CascadeHead | SharedStageHead:
        return frozen_head(self.teacher.head_state(), self.spec)

    def forward(
        self,
        inputs: Tensor,
        data_samples: Any = None,
        mode: str = "tensor",
        targets: Sequence[RoiTargets] | Sequence[TeacherView] = (),
    ) -> Any:
        """As mmdet's detectors; `loss` mode wants `targets`, one per image.

        Args:
            inputs: Tensor[B, 3, H, W], normalised and padded.
            data_samples: One `DetDataSample` per image.
            mode: `tensor`, `predict` or `loss`.
            targets: What the teacher source gave of each image.

        Raises:
            ContractError: `loss` without targets.
        """
        if mode != "loss" or not self.losses:
            return self.student(inputs, data_samples, mode)
        if not targets:
            raise ContractError(
                "A batch came without the teacher's targets. Add dict(type='AddTeacherTargets', ...) as the last "
                "transform of the training pipeline."
            )
        student = self._view()
        with student.watch() as own:
            losses: dict[str, Any] = self.student.loss(inputs, data_samples)
        frames = ImageFrames.of(data_samples, inputs.device) if "ckd" in self.losses else None
        losses.update(self._distill(student, own, targets, frames))
        if isinstance(student, TwoStageStudent) and isinstance(own, TwoStageForward):
            self._add_later(losses, student, own, targets, frames)
        if self.share_interval and self._steps % self.share_interval == 0:
            losses |= gradient_shares(losses, own.pyramid)
        self._steps += 1
        return losses

    def _add_later(
        self,
        losses: dict[str, Any],
        student: TwoStageStudent,
        own: TwoStageForward,
        targets: Sequence[RoiTargets] | Sequence[TeacherView],
        frames: ImageFrames | None,
    ) -> None:
        """Add what the later stages of a cascade lose."""
        for stage, seen in zip(student.later, own.later, strict=True):
            if not seen.known:
                none = own.chosen.select(own.chosen.labels < 0)
                seen.keep(none, stage.outputs(own.pyramid, none.rois))
            found = self._distill(stage, seen, targets, frames)
            for name in map(loss_name, self.losses):
                losses[name] = losses[name] + found[name]

    def _distill(
        self,
        student: TwoStageStudent | DenseStudent,
        own: TwoStageForward | DenseForward,
        targets: Sequence[RoiTargets] | Sequence[TeacherView],
        frames: ImageFrames | None,
    ) -> dict[str, Tensor]:
        """All distillation losses and the counts that go to the log."""
        rois, shared, shown, said = self._at_rois(student, own, targets)
        result: dict[str, Tensor] = {}
        if said.features is not None:
            loss, levels = self._sgfi(student, own.pyramid, rois, said.features)
            result["loss_sgfi"] = loss
            result["sgfi_temperature"] = self.sgfi.temperature.detach()
            result |= {f"sgfi_level{i}": weight for i, weight in enumerate(levels)}
        if said.embeddings is not None and shown is not None and frames is not None:
            result |= self._ckd(student.stage, shared, shown, said.embeddings, frames)
        if isinstance(student, TwoStageStudent) and isinstance(shown, HeadOutputs):
            result |= self._predictions(student, shared, shown, said)
        elif isinstance(shown, DenseOutputs) and said.logits is not None:
            result["loss_kd_cls"] = dense_classification_kd_loss(shown.logits, said.logits)
        for name in self.losses:
            result[loss_name(name)] *= self.weights[name] * student.weight
        counts = {name: sum(x.view == name for x in targets) for name in ("exact", "mirrored", "skipped")}
        counts["positive"] = int(rois.positive.sum())
        counts["negative"] = len(rois.positive) - counts["positive"]
        if self.dense:
            counts["unpaired"] = len(rois.positive) - len(shared.positive)
        return result | {f"kd_{name}": rois.rois.new_tensor(float(value)) for name, value in counts.items()}

    def _at_rois(
        self,
        student: TwoStageStudent | DenseStudent,
        own: TwoStageForward | DenseForward,
        targets: Sequence[RoiTargets] | Sequence[TeacherView],
    ) -> tuple[BatchRois, BatchRois, HeadOutputs | DenseOutputs | None, TeacherOutputs]:
        """The RoIs of this step, those of them that both heads speak of, and what student and teacher say of these.

        The student's answer is None where no loss wants to know.
        """
        needs = needed_fields(self.losses)
        views = [target for target in targets if isinstance(target, TeacherView)]
        if views:
            kept = torch.tensor([view.view != "skipped" for view in views], device=own.chosen.rois.device)
            kept = kept[own.chosen.rois[:, 0].long()]  # [R]
            rois = own.chosen.select(kept)
            return rois, rois, own.outputs.select(kept), apply_teacher_head(views, rois, self._head, self.spec, needs)
        rois, said = join_targets([x for x in targets if isinstance(x, RoiTargets)], self.spec, needs)
        if not needs - {"features"}:
            return rois, rois, None, said
        if isinstance(student, TwoStageStudent):
            return rois, rois, student.outputs(own.pyramid, rois.rois), said
        if not isinstance(own, DenseForward):
            raise ContractError(f"A {type(own).__name__} pairs no boxes of a dense student; expected a DenseForward.")
        found, shown = own.paired(rois.rois)
        return rois, rois.select(found), shown, said.select(found)

    def _sgfi(
        self, student: TwoStageStudent | DenseStudent, pyramid: list[Tensor], rois: BatchRois, teacher: Tensor
    ) -> tuple[Tensor, Tensor]:
        positive = rois.rois[rois.positive]
        ours = roi_align_levels(pyramid, student.strides, positive, self.spec.roi_size)  # [P, L, C, 7, 7]
        loss, weights = self.sgfi(ours, teacher)
        mean = weights.detach().sum(0) / max(1, weights.shape[0])  # [L]
        return loss, mean

    def _ckd(
        self,
        stage: int,
        rois: BatchRois,
        shown: HeadOutputs | DenseOutputs,
        embeddings: Tensor,
        frames: ImageFrames,
    ) -> dict[str, Tensor]:
        ckd: CKD = (self.ckd, *self.later_ckd)[stage]
        image_ids = frames.image_ids[rois.rois[:, 0].long()]
        teacher = TeacherKeys(embeddings.float(), frames.original_boxes(rois.rois), image_ids, rois.labels)
        loss, top1, spread = ckd(shown.embeddings, teacher, shown.anchors if isinstance(shown, DenseOutputs) else None)
        return {"loss_ckd": loss, "ckd_top1": top1, "ckd_spread": spread, "ckd_queue": ckd.queue.count.to(rois.rois)}

    def _predictions(
        self, student: TwoStageStudent, rois: BatchRois, shown: HeadOutputs, said: TeacherOutputs
    ) -> dict[str, Tensor]:
        """The losses that look at the class scores and boxes of a two-stage student's head."""
        result: dict[str, Tensor] = {}
        if "cls" in self.losses and said.logits is not None:
            result["loss_kd_cls"] = classification_kd_loss(shown.logits, said.logits)
        if said.deltas is not None:
            spec = self.spec
            ours = recode_deltas(shown.deltas, student.box_means, student.box_stds, spec.box_means, spec.box_stds)
            if "reg" in self.losses:
                result["loss_kd_reg"] = regression_kd_loss(ours, said.deltas, rois.labels, spec.num_classes)
            if "careg" in self.losses and said.logits is not None:
                result["loss_kd_careg"] = class_aware_regression_kd_loss(ours, said.deltas, said.logits)
        return result
