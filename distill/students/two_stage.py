"""What a two-stage student of mmdet shows to the losses."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmdet.models.data_preprocessors import BatchFixedSizePad
from mmdet.models.roi_heads import CascadeRoIHead
from torch import Tensor, nn

from kdpipe.cache.errors import KdpipeError
from kdpipe.distill.outputs import BatchRois, HeadOutputs
from kdpipe.distill.students.structure import two_stage_problem


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


class TwoStageForward:
    """What the student made while it computed its own loss.

    Attributes:
        pyramid: Levels of the neck, or of a backbone without one, Tensor[B, C, h_l, w_l].
        later: The same pyramid, and what was made in each later stage of a cascade.
    """

    def __init__(self, pyramid: list[Tensor] | None = None, later: int = 0) -> None:
        self.pyramid: list[Tensor] = [] if pyramid is None else pyramid
        self.later = [TwoStageForward(self.pyramid) for _ in range(later)]
        self._at_rois: tuple[BatchRois, HeadOutputs] | None = None

    def keep(self, rois: BatchRois, outputs: HeadOutputs) -> None:
        """Take in the RoIs of the student's sampler, and what its box head says of them."""
        self._at_rois = rois, outputs

    @property
    def known(self) -> bool:
        """Whether there are RoIs; a cascade that has none left leaves out the stages that follow."""
        return self._at_rois is not None

    @property
    def chosen(self) -> BatchRois:
        """The RoIs that the student's own sampler chose."""
        return self._found()[0]

    @property
    def outputs(self) -> HeadOutputs:
        """Of the student's box head at these RoIs, part of the graph of its own loss."""
        return self._found()[1]

    def _found(self) -> tuple[BatchRois, HeadOutputs]:
        if self._at_rois is None:
            raise StudentError(
                "The student's own loss did not show which RoIs it sampled: its RoI head computes the loss in a way of "
                "its own. Use --rois teacher."
            )
        return self._at_rois


class TwoStageStudent:
    """Reads pyramid and box head of an mmdet two-stage detector, which stays unmodified.

    Args:
        detector: `FasterRCNN` or another detector with one RoI extractor and one box head; or `CascadeRCNN`,
            which has several of them.
        stage: Of a cascade, the one whose box head is looked at.

    Raises:
        StudentError: The detector has another structure.
    """

    def __init__(self, detector: Any, stage: int = 0) -> None:
        if reason := two_stage_problem(detector):
            raise StudentError(
                f"The student, of type {type(detector).__name__}, cannot be distilled: {reason}. Expected a two-stage "
                "detector with box heads of fully connected layers (Faster or Cascade R-CNN)."
            )
        roi_head: Any = detector.roi_head
        head: Any = getattr(roi_head, "bbox_head", None)
        self.is_cascade = type(roi_head) is CascadeRoIHead
        extractor: Any = getattr(roi_head, "bbox_roi_extractor", None)
        if self.is_cascade:
            head, extractor = head[stage], extractor[stage]
        check_batch_augments(detector)
        self.detector = detector
        self.head = head
        self.stage = stage
        self.weight = float(roi_head.stage_loss_weights[stage]) if self.is_cascade else 1.0
        self.strides: tuple[int, ...] = tuple(int(stride[0]) for stride in detector.rpn_head.prior_generator.strides)
        self.channels = int(extractor.out_channels)
        self.embedding_dim = int(head.fc_cls.in_features)
        self.num_classes = int(head.num_classes)
        self.class_agnostic = bool(head.reg_class_agnostic)
        self.box_means: Sequence[float] = head.bbox_coder.means
        self.box_stds: Sequence[float] = head.bbox_coder.stds

    @property
    def later(self) -> list["TwoStageStudent"]:
        """The stages of a cascade that follow this one."""
        count = self.detector.roi_head.num_stages if self.is_cascade else 1
        return [TwoStageStudent(self.detector, stage) for stage in range(self.stage + 1, count)]

    @contextmanager
    def watch(self) -> Iterator["TwoStageForward"]:
        """Collect pyramid, RoIs and outputs of the box head while the detector makes them for its own loss.

        Nothing is computed twice and no random number is drawn, so that the detector's own loss stays what it is.

        Yields:
            What is filled in by the forward pass.
        """
        later = self.later
        own = TwoStageForward(later=len(later))

        def keep_pyramid(neck: nn.Module, inputs: Any, outputs: Sequence[Tensor]) -> None:
            own.pyramid[:] = outputs

        source = self.detector.neck if self.detector.with_neck else self.detector.backbone
        hook = source.register_forward_hook(keep_pyramid)
        try:
            with ExitStack() as stack:
                for stage, seen in zip([self, *later], [own, *own.later], strict=True):
                    stack.enter_context(stage._watch_head(seen))
                yield own
        finally:
            hook.remove()

    @contextmanager
    def _watch_head(self, own: TwoStageForward) -> Iterator[None]:
        embeddings: list[Tensor] = []
        loss_and_target = self.head.loss_and_target

        def keep_embeddings(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            embeddings[:] = inputs

        def keep_rois(cls_score: Tensor, bbox_pred: Tensor, rois: Tensor, sampling_results: Any, **options: Any) -> Any:
            own.keep(self._chosen(rois, sampling_results), self._outputs(embeddings[0], cls_score, bbox_pred))
            return loss_and_target(cls_score, bbox_pred, rois, sampling_results, **options)

        hook = self.head.fc_cls.register_forward_pre_hook(keep_embeddings)
        self.head.loss_and_target = keep_rois  # of this instance, until the loss is there
        try:
            yield
        finally:
            del self.head.loss_and_target
            hook.remove()

    def _chosen(self, rois: Tensor, results: Sequence[Any]) -> BatchRois:
        """The RoIs of the detector's own sampler, which puts the positives of each image first."""
        positive, labels = [], []
        for result in results:
            background = result.neg_priors.new_full((len(result.neg_priors),), self.num_classes, dtype=torch.int64)
            labels += [result.pos_gt_labels, background]
            positive += [torch.ones_like(result.pos_gt_labels, dtype=torch.bool), background < 0]
        return BatchRois(rois.detach(), torch.cat(labels), torch.cat(positive))

    def _outputs(self, embeddings: Tensor, logits: Tensor, deltas: Tensor) -> HeadOutputs:
        classes = 1 if self.class_agnostic else self.num_classes
        return HeadOutputs(embeddings, logits, deltas.reshape(-1, classes, 4))

    def outputs(self, pyramid: Sequence[Tensor], rois: Tensor) -> HeadOutputs:
        """Run the student's RoI extractor and box head.

        Args:
            pyramid: Levels of the neck, Tensor[B, C, h_l, w_l].
            rois: Tensor[R, 5] (image in the batch, x1, y1, x2, y2), pixels of the network input.
        """
        inputs: list[Tensor] = []
        handle = self.head.fc_cls.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
        try:
            at = (self.stage,) if self.is_cascade else ()
            result = self.detector.roi_head._bbox_forward(*at, pyramid, rois)
        finally:
            handle.remove()
        return self._outputs(inputs[0], result["cls_score"], result["bbox_pred"])
