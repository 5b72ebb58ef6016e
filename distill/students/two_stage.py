"""What a two-stage student of mmdet shows to the losses."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.data_preprocessors import BatchFixedSizePad
from mmdet.models.roi_heads import CascadeRoIHead
from torch import Tensor, nn

from kdpipe.cache.errors import KdpipeError
from kdpipe.distill.losses.masks import Anchor
from kdpipe.distill.outputs import BatchRois, StudentOutputs
from kdpipe.distill.students.protocol import BoxCoder
from kdpipe.distill.students.structure import base_anchors, two_stage_problem


class StudentError(KdpipeError):
    """The student is of a family, or has a head, that the distillation cannot address."""


def check_batch_augments(detector: Any) -> None:
    """Refuse a student whose preprocessor moves what is in the images.

    Raises:
        StudentError: Naming the steps that do.
    """
    batch = getattr(detector.data_preprocessor, "batch_augments", None) or ()
    moving = [type(step).__name__ for step in batch if type(step) is not BatchFixedSizePad]
    if moving:
        raise StudentError(
            f"The student's data_preprocessor changes whole batches ({', '.join(moving)}): boxes are no longer "
            "where the teacher saw them. Set model.data_preprocessor.batch_augments=None, and scale the images in the "
            "data pipeline."
        )


class TwoStageStudent:
    """Reads pyramid and box heads of an mmdet two-stage detector, which stays unmodified.

    Args:
        detector: `FasterRCNN` or another detector with one RoI extractor and one box head; or `CascadeRCNN`,
            which has several of them.

    Raises:
        StudentError: The detector has another structure.
    """

    num_anchors = 1

    def __init__(self, detector: Any) -> None:
        if reason := two_stage_problem(detector):
            raise StudentError(
                f"The student, of type {type(detector).__name__}, cannot be distilled: {reason}. Expected a two-stage "
                "detector with box heads of fully connected layers (Faster or Cascade R-CNN)."
            )
        check_batch_augments(detector)
        roi_head: Any = detector.roi_head
        self.detector = detector
        self.is_cascade = type(roi_head) is CascadeRoIHead
        self.heads: list[Any] = list(roi_head.bbox_head) if self.is_cascade else [roi_head.bbox_head]
        self.stage_weights = [float(x) for x in roi_head.stage_loss_weights] if self.is_cascade else [1.0]
        extractor: Any = roi_head.bbox_roi_extractor[0] if self.is_cascade else roi_head.bbox_roi_extractor
        self.strides: tuple[int, ...] = tuple(int(stride[0]) for stride in detector.rpn_head.prior_generator.strides)
        self.channels = int(extractor.out_channels)
        self.embedding_dims = tuple(int(head.fc_cls.in_features) for head in self.heads)
        self.num_classes = int(self.heads[0].num_classes)
        self.class_agnostic = bool(self.heads[0].reg_class_agnostic)

    @contextmanager
    def watch(self) -> Iterator["TwoStageForward"]:
        """Collect pyramid, RoIs and outputs of the box heads while the detector makes them for its own loss.

        Nothing is computed twice and no random number is drawn, so that the detector's own loss stays what it is.

        Yields:
            What is filled in by the forward pass.
        """
        pyramid: list[Tensor] = []
        forward = TwoStageForward(pyramid, [TwoStageStage(self, index, pyramid) for index in range(len(self.heads))])

        def keep_pyramid(neck: nn.Module, inputs: Any, outputs: Sequence[Tensor]) -> None:
            pyramid[:] = outputs

        source = self.detector.neck if self.detector.with_neck else self.detector.backbone
        hook = source.register_forward_hook(keep_pyramid)
        try:
            with ExitStack() as stack:
                for stage in forward.stages:
                    stack.enter_context(stage.watch_head())
                yield forward
        finally:
            hook.remove()


@dataclass(frozen=True)
class TwoStageForward:
    """What a two-stage student made while it computed its own loss.

    Attributes:
        pyramid: Levels of the neck, or of a backbone without one, Tensor[B, C, h_l, w_l].
        stages: One, or those of a cascade.
    """

    pyramid: list[Tensor]
    stages: list["TwoStageStage"]


class TwoStageStage:
    """A box head in one forward pass of the student: `StudentStage`.

    Args:
        student: Whose head it is.
        index: Of the stage.
        pyramid: Filled in by the forward pass.
    """

    def __init__(self, student: TwoStageStudent, index: int, pyramid: list[Tensor]) -> None:
        self.student, self.index, self.pyramid = student, index, pyramid
        self.weight, self.strides, self.head = student.stage_weights[index], student.strides, student.heads[index]
        self.box_coder: BoxCoder = self.head.bbox_coder.means, self.head.bbox_coder.stds
        self._sampled: tuple[BatchRois, StudentOutputs] | None = None

    @property
    def base_anchors(self) -> dict[int, list[Anchor]]:
        return base_anchors(self.student.detector.rpn_head.prior_generator, self.strides)

    def sampled(self) -> tuple[BatchRois, slice, StudentOutputs]:
        """The RoIs of the student's own sampler, and what its box head says of all of them, in the graph of its loss.

        None where mmdet left a cascade before this stage, because no box was left.

        Raises:
            StudentError: The student's own loss did not show them.
        """
        if self._sampled is not None:
            rois, outputs = self._sampled
            return rois, slice(None), outputs
        if self.index == 0:
            raise StudentError(
                "The student's own loss did not show which RoIs it sampled: its RoI head computes the loss in a way of "
                "its own. Use --rois teacher."
            )
        none = BatchRois.none(self.pyramid[0].device)
        return none, *self.outputs_at(none.rois)

    def outputs_at(self, rois: Tensor) -> tuple[slice, StudentOutputs]:
        """Run the student's RoI extractor and box head.

        Args:
            rois: Tensor[R, 5] (image in the batch, x1, y1, x2, y2), pixels of the network input.

        Returns:
            All of the RoIs, and what it says of them.
        """
        embeddings: list[Tensor] = []
        hook = self.head.fc_cls.register_forward_pre_hook(lambda layer, inputs: embeddings.append(inputs[0]))
        try:
            stage = (self.index,) if self.student.is_cascade else ()
            outputs = self.student.detector.roi_head._bbox_forward(*stage, self.pyramid, rois)
        finally:
            hook.remove()
        return slice(None), self._outputs(embeddings[0], outputs["cls_score"], outputs["bbox_pred"])

    @contextmanager
    def watch_head(self) -> Iterator[None]:
        """Collect RoIs and outputs while the box head computes its own loss."""
        embeddings: list[Tensor] = []
        loss_and_target = self.head.loss_and_target

        def keep_embeddings(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            embeddings[:] = inputs

        def keep_rois(cls_score: Tensor, bbox_pred: Tensor, rois: Tensor, sampling_results: Any, **options: Any) -> Any:
            outputs = self._outputs(embeddings[0], cls_score, bbox_pred)
            self._sampled = _sampled_rois(rois, sampling_results, int(self.head.num_classes)), outputs
            return loss_and_target(cls_score, bbox_pred, rois, sampling_results, **options)

        hook = self.head.fc_cls.register_forward_pre_hook(keep_embeddings)
        self.head.loss_and_target = keep_rois  # of this instance, until the loss is there
        try:
            yield
        finally:
            del self.head.loss_and_target
            hook.remove()

    def _outputs(self, embeddings: Tensor, logits: Tensor, deltas: Tensor) -> StudentOutputs:
        classes = 1 if self.head.reg_class_agnostic else int(self.head.num_classes)
        return StudentOutputs(embeddings, logits, deltas.reshape(-1, classes, 4))


def _sampled_rois(rois: Tensor, results: Sequence[Any], num_classes: int) -> BatchRois:
    """The RoIs of the detector's own sampler, which puts the positives of each image first."""
    positive, labels = [], []
    for result in results:
        background = result.neg_priors.new_full((len(result.neg_priors),), num_classes, dtype=torch.int64)
        labels += [result.pos_gt_labels, background]
        positive += [torch.ones_like(result.pos_gt_labels, dtype=torch.bool), background < 0]
    num_positive = sum(len(result.pos_gt_labels) for result in results)
    return BatchRois(rois.detach(), torch.cat(labels), torch.cat(positive), num_positive)
