"""What a dense student of mmdet, with anchors or without, shows to the losses."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from mmdet.models.dense_heads import ATSSHead, FCOSHead, GFLHead, PAAHead, RetinaHead
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from kdpipe.distill.losses.numeric import no_autocast
from kdpipe.distill.rois.sampling import DEFAULT_SAMPLING, RoiSampling
from kdpipe.distill.students.dense_forward import DenseForward
from kdpipe.distill.students.structure import dense_problem
from kdpipe.distill.students.two_stage import StudentError, check_batch_augments

CKD_BRANCHES = ("classification", "localization", "combined")

# Heads whose forward gives class scores and box regression per level, decoded as `DenseStudent.boxes` does.
_FORWARD = (RetinaHead, FCOSHead, ATSSHead, GFLHead)


class DenseStudent:
    """Reads pyramid and dense head of an mmdet single-stage detector, which stays unmodified.

    Args:
        detector: RetinaNet, FCOS, ATSS, GFL, PAA, or another whose head computes its outputs as one of these.
        branch: Which branch of the head the embeddings are of: one of `CKD_BRANCHES`; `combined` is the sum of both
            (G-DetKD, table 12).
        sampling: Of the RoIs that it chooses among its boxes.

    Raises:
        StudentError: The detector has another structure.
    """

    class_agnostic = True

    def __init__(
        self,
        detector: Any,
        branch: str = CKD_BRANCHES[0],
        sampling: RoiSampling = DEFAULT_SAMPLING,
    ) -> None:
        head: Any = getattr(detector, "bbox_head", None)
        _check_head(detector, head)
        check_batch_augments(detector)
        if branch not in CKD_BRANCHES:
            raise StudentError(f"The branch is {branch!r}; expected one of {', '.join(CKD_BRANCHES)}.")
        self.detector, self.head = detector, head
        self.branch, self.sampling = branch, sampling
        self.strides: tuple[int, ...] = tuple(int(stride[0]) for stride in head.prior_generator.strides)
        self.channels = int(head.in_channels)
        self.embedding_dims: tuple[int, ...] = (int(head.feat_channels),)
        self.num_anchors = int(head.num_base_priors)
        self.num_classes = int(head.num_classes)

    @contextmanager
    def watch(self) -> Iterator[DenseForward]:
        """Collect pyramid, features and outputs of the head while the detector makes them for its own loss.

        Nothing is computed twice and no random number is drawn, so that the detector's own loss stays what it is.

        Yields:
            What is filled in by the forward pass.
        """
        forward = DenseForward(self)
        loss_by_feat = self.head.loss_by_feat

        def keep_outputs(scores: Sequence[Tensor], regression: Sequence[Tensor], *others: Any, **options: Any) -> Any:
            forward.scores, forward.regression = list(scores), list(regression)
            truths, forward.metas = others[-3], others[-2]  # then those to ignore
            forward.ground_truth = [(get_box_tensor(truth.bboxes), truth.labels) for truth in truths]
            return loss_by_feat(scores, regression, *others, **options)

        hooks = [self.detector.neck.register_forward_hook(lambda _, inputs, levels: forward.start(levels))]
        for name, kept in (("cls_convs", forward.classification), ("reg_convs", forward.localization)):
            last = getattr(self.head, name)[-1]
            hooks.append(last.register_forward_hook(lambda _, inputs, level, kept=kept: kept.append(level)))
        self.head.loss_by_feat = keep_outputs  # of this instance, until the loss is there
        try:
            yield forward
        finally:
            del self.head.loss_by_feat
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def boxes(
        self,
        regression: Sequence[Tensor],
        image: int,
        size: tuple[int, int],
        rows: Sequence[Tensor | slice] | None = None,
    ) -> Tensor:
        """The boxes that the head predicts in one image of the batch, or some of them.

        Args:
            regression: Per level Tensor[B, A * E, h_l, w_l] as the head's forward gives it in training.
            image: Which image of the batch.
            size: `(h, w)` of that image without padding; boxes are clipped to it.
            rows: Of each level, which of its predictions in the order row, column, anchor; None for all.

        Returns:
            Tensor[N, 4] float32 (x1, y1, x2, y2), N = A * sum of h_l * w_l: level, row, column, anchor.
        """
        parts, levels = [], self.priors(regression)
        every = [slice(None)] * len(levels)
        for level, priors, stride, of in zip(regression, levels, self.strides, rows or every, strict=True):
            encoded = level[image].permute(1, 2, 0)  # [h_l, w_l, A * E]
            encoded = encoded.reshape(-1, encoded.shape[2] // self.num_anchors)[of]  # [n, E]
            parts.append(self.decode(encoded, priors[of], stride))
        boxes: Tensor = clip_boxes_to_image(torch.cat(parts), size)
        return boxes

    def priors(self, regression: Sequence[Tensor]) -> list[Tensor]:
        """Anchors Tensor[h_l * w_l * A, 4], or points Tensor[h_l * w_l, 2], of each level; float32."""
        shapes, device = [level.shape[-2:] for level in regression], regression[0].device
        priors: list[Tensor] = self.head.prior_generator.grid_priors(shapes, dtype=torch.float32, device=device)
        return priors

    def decode(self, encoded: Tensor, priors: Tensor, stride: int) -> Tensor:
        """Boxes of a level as the head means them, not clipped; gradients reach what is decoded.

        Args:
            encoded: Tensor[n, E], of the head's forward in training.
            priors: Tensor[n, 4 or 2], of the same predictions.
            stride: Of the level.

        Returns:
            Tensor[n, 4] float32 (x1, y1, x2, y2).
        """
        head = self.head
        with no_autocast(encoded):
            encoded = encoded.float()
            if hasattr(head, "integral"):
                encoded = head.integral(encoded) * stride
            elif getattr(head, "norm_on_bbox", False) and head.training:
                encoded = encoded * stride
            if isinstance(head.bbox_coder, DistancePointBBoxCoder) and priors.shape[1] == 4:
                priors = (priors[:, :2] + priors[:, 2:]) / 2
            boxes: Tensor = head.bbox_coder.decode(priors, encoded)
        return boxes

    @torch.no_grad()
    def objectness(self, scores: Tensor) -> Tensor:
        """How likely an object of whatever class is, to each prediction of a level of one image.

        Args:
            scores: Tensor[A * K, h_l, w_l], or [A * (K + 1), h_l, w_l] of a softmax head.

        Returns:
            Tensor[h_l * w_l * A] float32 in [0, 1]: row, column, anchor. The largest of the class probabilities.
        """
        of_class = scores.flatten(1).unflatten(0, (self.num_anchors, -1))  # [A, K, h_l * w_l]
        if self.head.use_sigmoid_cls:
            best: Tensor = of_class.amax(dim=1).float().sigmoid()
        else:
            best = of_class.float().softmax(dim=1)[:, :-1].amax(dim=1)
        return best.T.flatten()

    def logits(self, scores: Tensor) -> Tensor:
        """Tensor[R, K] of a sigmoid head, or [R, K + 1], as [R, K + 1] with background last."""
        return torch.cat([scores, scores.new_zeros(len(scores), 1)], dim=1) if self.head.use_sigmoid_cls else scores


def _check_head(detector: Any, head: Any) -> None:
    if reason := dense_problem(detector, _FORWARD):
        raise StudentError(
            f"The student, of type {type(detector).__name__}, cannot be distilled: {reason}. Expected a two-stage "
            "detector, or a single-stage one with a pyramid and the head of RetinaNet, FCOS, ATSS, GFL or PAA, with "
            "convolutions in both branches."
        )
    kind, coder = type(head), getattr(head, "bbox_coder", None)
    if not isinstance(coder, DeltaXYWHBBoxCoder | DistancePointBBoxCoder):
        raise StudentError(
            f"The student's {kind.__name__} encodes boxes by {type(coder).__name__}. Expected DeltaXYWHBBoxCoder or "
            "DistancePointBBoxCoder."
        )
    if isinstance(head, PAAHead) and find_spec("sklearn") is None:
        raise StudentError("PAA fits Gaussian mixtures with scikit-learn, which is missing: pip install scikit-learn")
