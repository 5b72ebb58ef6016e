"""DistilledDetector: a student and its distillation losses, and nothing of the teacher."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmdet.registry import MODELS
from mmengine.model import BaseModel
from torch import Tensor, nn

from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.loss import Loss, LossFunction
from kdpipe.distill.losses.shares import SHARE_INTERVAL, gradient_shares
from kdpipe.distill.methods import (
    HEAD_METHODS,
    HEAD_TRANSFER,
    LOSSES,
    ContractError,
    check_contract,
    check_student,
    expand_methods,
    loss_and_log,
    needed_fields,
    reads_student,
    stage_sizes,
)
from kdpipe.distill.outputs import BatchRois
from kdpipe.distill.pairs import RoiPairs
from kdpipe.distill.preprocessor import DistilledPreprocessor
from kdpipe.distill.rois.sampling import RoiSampling
from kdpipe.distill.students.build import is_dense, student_of
from kdpipe.distill.students.dense import CKD_BRANCHES
from kdpipe.distill.students.head_transfer import HeadTransfer
from kdpipe.distill.students.protocol import Student
from kdpipe.distill.teacher.heads.build import FrozenTeacher
from kdpipe.distill.teacher.source import CachedTargets, ImageTargets, TargetSource

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
        weights: Weight per loss; that of `LOSSES` where absent.
        sgfi: Options of `SGFI`.
        ckd: Options of `CKD`; and of a dense student `branch`, that of its head which embeddings are taken from.
        roi_sampling: Options of `RoiSampling`, for the RoIs that a dense student chooses.
        share_interval: Every so many steps, the share of each loss in the gradient at the pyramid; 0 never.
        stagewise: Whether each stage of a cascade is told what that stage of a cascade teacher says, where the student
            chooses the RoIs.

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
        roi_sampling: Mapping[str, Any] | None = None,
        share_interval: int = SHARE_INTERVAL,
        stagewise: bool = False,
    ) -> None:
        detector = student if isinstance(student, nn.Module) else MODELS.build(student)
        source: TargetSource = MODELS.build(teacher) if isinstance(teacher, Mapping) else teacher
        super().__init__(data_preprocessor=DistilledPreprocessor(detector.data_preprocessor, source))
        self.student: Any = detector
        self.teacher = source
        self.spec = CacheSpec.from_json(spec)
        self.dense = is_dense(detector)
        self.losses = expand_methods(methods, self.dense)
        check_contract(self.spec, self.losses)
        options = {"sgfi": dict(sgfi or {}), "ckd": dict(ckd or {})}
        self._branch: str = options["ckd"].pop("branch", CKD_BRANCHES[0])
        self._roi_sampling = RoiSampling(**dict(roi_sampling or {}))
        self._build_losses(options)
        self.weights = {name: LOSSES[name].weight for name in self.losses} | dict(weights or {})
        if unknown := set(self.weights) - set(self.losses):
            raise ContractError(
                f"A weight is given for {', '.join(sorted(unknown))}, which is none of the losses "
                f"{', '.join(self.losses)}."
            )
        if wrong := {name: weight for name, weight in self.weights.items() if not 0 <= weight < math.inf}:
            raise ContractError(f"Weights of losses are finite and at least 0; found {wrong}.")
        needs = needed_fields(self.losses, self.dense)
        asks_student = reads_student(self.losses, self.dense)
        self.frozen_teacher = FrozenTeacher(self.spec, needs, source.head_state, asks_student, stagewise)
        self.frozen_teacher.check_stages(len(self._watched_student().embedding_dims))
        if "cross" in self.losses:
            self.frozen_teacher.check_crossed()
        self.share_interval = share_interval
        self._steps = 0
        self._transfer: HeadTransfer | None = None
        if transfer := set(methods) & set(HEAD_METHODS):
            self._transfer = HeadTransfer(detector, source.head_state(), frozen=HEAD_TRANSFER in transfer)
            self._transfer.copy()

    def _watched_student(self) -> Student:
        return student_of(self.student, self._branch, self._roi_sampling)

    def _build_losses(self, options: Mapping[str, Mapping[str, Any]]) -> None:
        """Put the losses that have parameters among the modules, under their names."""
        student = self._watched_student()
        check_student(student, self.spec, self.losses)
        for name, loss in self._in_order():
            if loss.has_parameters:
                first, *later = (
                    loss.build(stage_sizes(student, stage, self.spec), options.get(name, {}))
                    for stage in range(len(student.embedding_dims) if loss.per_stage else 1)
                )
                self.add_module(name, first)
                if loss.per_stage:
                    self.add_module(f"later_{name}", nn.ModuleList(later))

    def _in_order(self) -> list[tuple[str, Loss]]:
        """The chosen losses in the order of the table, so that initial weights do not depend on that of the methods."""
        return [(name, loss) for name, loss in LOSSES.items() if name in self.losses]

    def _distill_loss(self, name: str, stage: int) -> LossFunction:
        """A loss as it is for a stage of the student."""
        loss = LOSSES[name]
        if not loss.has_parameters:
            return loss.of(self.dense)
        distill_loss: LossFunction = getattr(self, name)
        return getattr(self, f"later_{name}")[stage - 1] if stage and loss.per_stage else distill_loss

    def init_weights(self) -> None:
        """As mmengine's, after which the heads are the teacher's again."""
        super().init_weights()
        self.keep_transferred_heads()

    def keep_transferred_heads(self) -> None:
        """Put the teacher's heads back, where they are transferred and other weights have been loaded."""
        if self._transfer is not None:
            self._transfer.copy()

    def train(self, mode: bool = True) -> "DistilledDetector":
        """As torch's, but transferred heads that are frozen do not train."""
        super().train(mode)
        if self._transfer is not None:
            self._transfer.keep()
        return self

    def forward(
        self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor", targets: Sequence[ImageTargets] = ()
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
        with self._watched_student().watch() as forward:
            losses: dict[str, Any] = self.student.loss(inputs, data_samples)
        batch = targets[0].batch(targets, self.frozen_teacher)
        rois: BatchRois | None = None
        of_rois: dict[str, Tensor] = {}
        for stage in forward.stages:
            pairs = replace(batch.pair_with(stage), samples=data_samples, frozen_teacher=self.frozen_teacher)
            is_first = stage.index == 0
            if pairs.rois is not rois:
                rois, of_rois = pairs.rois, {}
            for name, value, logged in self._distill(pairs, of_rois):
                losses |= {name: value, **logged} if is_first else {name: losses[name] + value}
            if is_first:
                losses |= self._counts(pairs, targets)
        if self.share_interval and self._steps % self.share_interval == 0:
            losses |= gradient_shares(losses, forward.pyramid)
        self._steps += 1
        return losses

    def _distill(self, pairs: RoiPairs, of_rois: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Name in the log and weighted value of each loss at a stage, and what is logged beside it.

        Args:
            pairs: Of the stage.
            of_rois: Values of losses that say the same at every stage that has these RoIs; gets those of this one.
        """
        stage = pairs.stage
        for name, loss in self._in_order():
            if loss.of_maps and stage.index:
                continue  # a cascade has one pyramid
            logged: dict[str, Tensor] = {}
            value = of_rois.get(name)
            if value is None:
                inputs = {x: getattr(pairs, x) for x in loss.inputs(self.dense)}
                value, logged = loss_and_log(name, self._distill_loss(name, stage.index)(**inputs))
                if not reads_student([name], self.dense):
                    of_rois[name] = value
            yield loss.log_name, value * (self.weights[name] * stage.weight), logged

    def _counts(self, pairs: RoiPairs, targets: Sequence[ImageTargets]) -> dict[str, Tensor]:
        """How many images and RoIs of which kind there are."""
        counts = {name: sum(x.view == name for x in targets) for name in ("exact", "mirrored", "skipped")}
        counts["positive"] = len(pairs.rois.positive_rows)
        counts["negative"] = len(pairs.rois) - counts["positive"]
        if self.dense:
            counts["unpaired"] = len(pairs.rois) - len(pairs.paired)
        return {f"kd_{name}": pairs.rois.rois.new_full((), float(value)) for name, value in counts.items()}
