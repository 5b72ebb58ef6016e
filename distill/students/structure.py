"""Why the losses cannot address a student of mmdet, found in what it is made of."""

from collections.abc import Sequence
from typing import Any

from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import TridentFasterRCNN
from mmdet.models.roi_heads import CascadeRoIHead
from mmdet.models.roi_heads.grid_roi_head import GridRoIHead
from mmdet.models.roi_heads.htc_roi_head import HybridTaskCascadeRoIHead
from mmdet.models.roi_heads.multi_instance_roi_head import MultiInstanceRoIHead
from mmdet.models.roi_heads.scnet_roi_head import SCNetRoIHead
from mmdet.models.roi_heads.sparse_roi_head import SparseRoIHead
from mmdet.models.task_modules.prior_generators import AnchorGenerator
from torch import Tensor, nn

from kdpipe.distill.losses.masks import Anchor

__all__ = ["base_anchors", "dense_problem", "two_stage_problem"]

_ROI_HEADS = {
    GridRoIHead: "it finds boxes by a grid of points, and its box head regresses none",
    HybridTaskCascadeRoIHead: "its stages hand mask features on to each other",
    SCNetRoIHead: "its stages are fed with features of its masks and of the whole image",
    SparseRoIHead: "it refines learned queries in place of proposals",
    MultiInstanceRoIHead: "it predicts several boxes for each proposal",
}


def base_anchors(prior_generator: Any, strides: Sequence[int]) -> dict[int, list[Anchor]]:
    """The anchors of a head at cell (0, 0) of each level, by stride: (x1, y1, x2, y2), pixels.

    A head without anchors has those that an RPN of mmdet would have there: 8 strides wide, of three shapes.

    Args:
        prior_generator: Of the head.
        strides: Pixels per cell of each level.
    """
    if not hasattr(prior_generator, "base_anchors"):
        prior_generator = AnchorGenerator(strides=list(strides), ratios=[0.5, 1.0, 2.0], scales=[8])
    return dict(zip(strides, map(Tensor.tolist, prior_generator.base_anchors), strict=True))


def two_stage_problem(detector: Any) -> str:
    """Why a detector with a RoI head cannot be a student; empty where it can.

    Fitting are detectors with one RoI extractor and one box head, or the stages of Cascade R-CNN, whose box heads have
    a fully connected classifier for each class and background, and regression (`fc_cls`, `fc_reg`).
    """
    if isinstance(detector, TridentFasterRCNN):
        return "it repeats every image in a batch, once for each of its branches, and the targets are of one"
    roi_head = detector.roi_head
    for kind, reason in _ROI_HEADS.items():
        if isinstance(roi_head, kind):
            return f"its {type(roi_head).__name__} is of another kind: {reason}"
    heads: Any = getattr(roi_head, "bbox_head", None)
    if isinstance(heads, nn.ModuleList) and type(roi_head) is not CascadeRoIHead:
        return f"its {type(roi_head).__name__} has several box heads, and is not the CascadeRoIHead of Cascade R-CNN"
    stages = isinstance(heads, nn.ModuleList)
    for stage, head in enumerate(heads if stages else [heads]):
        name = type(head).__name__
        if missing := [layer for layer in ("fc_cls", "fc_reg") if not hasattr(head, layer)]:
            return f"its box head {name} has no {' and no '.join(missing)}"
        channels = int(head.num_classes) + 1
        if getattr(head, "custom_cls_channels", False) or head.fc_cls.out_features != channels:
            return (
                f"the classifier of its {name} has channels of its own, {head.fc_cls.out_features} for "
                f"{type(head.loss_cls).__name__}, and the teacher's targets are for {channels}: the classes and "
                f"background. Train it with another loss: -o model.roi_head.bbox_head.{f'{stage}.' if stages else ''}"
                "loss_cls=\"{'type': 'CrossEntropyLoss'}\""
            )
    rpn_head = getattr(detector, "rpn_head", None)
    if rpn_head is None:
        return "it has no RPN, and takes its proposals from a file"
    if not hasattr(rpn_head, "prior_generator"):
        return f"its {type(rpn_head).__name__} has no anchors, which tell the strides of its pyramid"
    return ""


def dense_problem(detector: Any, forwards: tuple[Any, ...]) -> str:
    """Why a detector without RoI head cannot be a student; empty where it can.

    Args:
        detector: The student.
        forwards: Heads whose forward is known; a fitting head computes its outputs by one of these.
    """
    head: Any = getattr(detector, "bbox_head", None)
    if head is None:
        others = [type(part).__name__ for name, part in detector.named_children() if name.endswith("head")]
        return f"it has no head that predicts boxes ({', '.join(others) or 'it has no head at all'})"
    name = type(head).__name__
    if not isinstance(head, BaseDenseHead):
        return f"its head {name} does not predict boxes at each location of a pyramid"
    if type(head).loss is not BaseDenseHead.loss:
        return f"its head {name} computes its loss in a way of its own"
    if not any(type(head).forward is x.forward and type(head).forward_single is x.forward_single for x in forwards):
        return f"its head {name} computes its outputs in a way of its own"
    if not getattr(detector, "with_neck", False):
        return "it has no neck, and so no pyramid"
    for branch in ("cls_convs", "reg_convs"):
        convs = getattr(head, branch, None)
        if not isinstance(convs, nn.ModuleList) or not len(convs) or isinstance(convs[-1], nn.ModuleList):
            neck = getattr(detector, "neck", None)
            before = f" before it stands {type(neck[-1]).__name__};" if isinstance(neck, nn.Sequential) else ""
            return (
                f"its head {name} has no convolutions of its own in both branches ({branch};{before} "
                "model.bbox_head.stacked_convs), whose features are compared"
            )
    return ""
