"""What a two-stage student of mmdet shows to the losses."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kdpipe.cache.errors import KdpipeError


class StudentError(KdpipeError):
    """The student is of a family, or has a head, that the distillation cannot address."""


@dataclass(frozen=True)
class HeadOutputs:
    """What the student's box head says of R RoIs.

    Attributes:
        embeddings: Tensor[R, D], input of the classifier layer.
        logits: Tensor[R, K + 1], background last.
        deltas: Tensor[R, K or 1, 4], normalised by the student's box coder.
    """

    embeddings: Tensor
    logits: Tensor
    deltas: Tensor


class TwoStageStudent:
    """Reads pyramid and box head of an mmdet two-stage detector, which stays unmodified.

    Args:
        detector: `FasterRCNN` or another detector with a neck, one RoI extractor and one box head.

    Raises:
        StudentError: The detector has another structure.
    """

    def __init__(self, detector: Any) -> None:
        head: Any = getattr(getattr(detector, "roi_head", None), "bbox_head", None)
        if not getattr(detector, "with_neck", False) or not hasattr(head, "fc_cls") or not hasattr(head, "fc_reg"):
            raise StudentError(
                f"The student is a {type(detector).__name__} whose box head is {type(head).__name__}. Expected a "
                "two-stage detector with a pyramid and one box head of fully connected layers (Faster R-CNN)."
            )
        if not hasattr(detector.rpn_head, "prior_generator"):
            raise StudentError(
                f"The student's {type(detector.rpn_head).__name__} has no anchors, which tell the strides of its "
                "pyramid. Expected mmdet's RPNHead."
            )
        self.detector = detector
        self.head = head
        self.strides: tuple[int, ...] = tuple(int(stride[0]) for stride in detector.rpn_head.prior_generator.strides)
        self.channels = int(detector.roi_head.bbox_roi_extractor.out_channels)
        self.embedding_dim = int(head.fc_cls.in_features)
        self.num_classes = int(head.num_classes)
        self.class_agnostic = bool(head.reg_class_agnostic)
        self.box_means: Sequence[float] = head.bbox_coder.means
        self.box_stds: Sequence[float] = head.bbox_coder.stds

    @contextmanager
    def watch_pyramid(self) -> Iterator[list[Tensor]]:
        """Collect the pyramid that the neck makes while the detector computes its own loss.

        Yields:
            A list that holds the levels, Tensor[B, C, h_l, w_l], after the forward pass.
        """
        pyramid: list[Tensor] = []

        def keep(neck: nn.Module, inputs: Any, outputs: Sequence[Tensor]) -> None:
            pyramid[:] = outputs

        handle = self.detector.neck.register_forward_hook(keep)
        try:
            yield pyramid
        finally:
            handle.remove()

    def outputs(self, pyramid: Sequence[Tensor], rois: Tensor) -> HeadOutputs:
        """Run the student's RoI extractor and box head.

        Args:
            pyramid: Levels of the neck, Tensor[B, C, h_l, w_l].
            rois: Tensor[R, 5] (image in the batch, x1, y1, x2, y2), pixels of the network input.
        """
        inputs: list[Tensor] = []
        handle = self.head.fc_cls.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
        try:
            result = self.detector.roi_head._bbox_forward(pyramid, rois)
        finally:
            handle.remove()
        classes = 1 if self.class_agnostic else self.num_classes
        deltas = result["bbox_pred"].reshape(-1, classes, 4)
        return HeadOutputs(inputs[0], result["cls_score"], deltas)
