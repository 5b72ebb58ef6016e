"""Which detectors can teach: decided by a config's classes before it is built, and by the options of what was built."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmcv.cnn import Linear as MmcvLinear
from mmcv.ops import RoIAlign
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import CascadeRoIHead, HybridTaskCascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead, ConvFCBBoxHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.registry import MODELS
from torch import nn

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.records import decode_deltas
from kdpipe.pipelines.detectors.config_types import resolve_type
from kdpipe.pipelines.teacher.families import stages

__all__ = ["TeacherError", "check_classes_of_config", "check_family"]

_EXPECTED = (
    "Expected a two-stage detector (Faster R-CNN, Mask R-CNN, Cascade R-CNN, Cascade Mask R-CNN, HTC), an RPN with "
    "anchors, SingleRoIExtractors with RoIAlign, and box heads with shared fully connected layers (Shared2FCBBoxHead) "
    "or a BBoxHead behind a shared residual stage (C4)."
)
_ROI_HEADS = (StandardRoIHead, CascadeRoIHead, HybridTaskCascadeRoIHead)
# Methods by which these classes decide what a teacher says of a box; a subclass with its own says something else.
_METHODS: dict[type, tuple[str, ...]] = {
    SingleRoIExtractor: ("forward", "map_roi_levels", "roi_rescale"),
    BBoxHead: ("predict_by_feat", "_predict_by_feat_single", "regress_by_class"),
}


class TeacherError(KdpipeError):
    """The teacher cannot be built, loaded or cached."""


def check_classes_of_config(model: Mapping[str, Any]) -> None:
    """Refuse a detector by the classes that its config names, before it is built.

    Args:
        model: `model` of an mmdet config. A class that is not known is left for the building to name.

    Raises:
        TeacherError: Naming what was found and what was expected.
    """
    detector, head = _class_of(model), _class_of(model.get("roi_head"))
    if detector is None:
        return
    if not issubclass(detector, TwoStageDetector):
        raise _refusal(f"is a {detector.__name__}")
    for part, name in (("roi_head", "RoI head"), ("rpn_head", "RPN")):
        if not model.get(part):
            raise _refusal(f"is a {detector.__name__}, which has no {name}")
    if head is not None and head not in _ROI_HEADS:
        raise _refusal(f"has a {head.__name__} in place of a StandardRoIHead (it is a {detector.__name__})")
    if not (model.get("test_cfg") or {}).get("rpn"):
        raise TeacherError(
            f"The teacher's config says nothing of how its {detector.__name__} makes proposals: expected "
            "model.test_cfg.rpn, as in mmdet's own configs."
        )


def check_family(model: Any) -> None:
    """Refuse a detector of which a cache would not hold what mmdet says.

    Raises:
        TeacherError: Naming what was found and what was expected.
    """
    if not isinstance(model, TwoStageDetector):
        raise _refusal(f"is a {type(model).__name__}")
    head = model.roi_head
    if type(head) not in _ROI_HEADS:
        raise _refusal(f"has a {type(head).__name__} in place of a StandardRoIHead")
    if not head.with_bbox:
        raise _refusal(f"has a {type(head).__name__} without a box head")
    if not hasattr(model.rpn_head, "prior_generator"):
        raise _refusal(f"has a {type(model.rpn_head).__name__} as its RPN, which has no anchors")
    strides = [tuple(stride) for stride in model.rpn_head.prior_generator.strides]
    for extractor, box_head in stages(head):
        _check_extractor(extractor, strides)
        _check_box_head(box_head, head.with_shared_head)
        if not head.with_shared_head:
            _check_fit(extractor, box_head)
    if len(kinds := {_settings(*stage) for stage in stages(head)}) > 1:
        raise TeacherError(
            "The stages of the teacher's cascade differ in their RoI extractors, their number of regressions, the "
            f"means of their box coders or the width of their heads: {sorted(kinds)}. Expected them to differ in the "
            "standard deviations of their box coders only."
        )


def _class_of(part: Any) -> type | None:
    """The class that a part of a config names, by name or as itself; None where it names none that is known."""
    part_type = resolve_type(part.get("type"), MODELS) if isinstance(part, Mapping) else None
    return part_type if isinstance(part_type, type) else None


def _refusal(fault: str) -> TeacherError:
    return TeacherError(f"The teacher {fault}. {_EXPECTED}")


def _check_kind(part: Any, kind: type) -> None:
    """Refuse what is not of a kind, or is of a subclass with methods of its own."""
    name = type(part).__name__
    if not isinstance(part, kind):
        raise _refusal(f"has a {name} in place of a {kind.__name__}")
    for base, methods in _METHODS.items():
        for method in methods:
            if issubclass(kind, base) and getattr(type(part), method) is not getattr(kind, method):
                raise _refusal(f"has a {name}, whose {method} is not that of a {kind.__name__}")


def _check_extractor(extractor: Any, strides: Sequence[tuple[Any, ...]]) -> None:
    _check_kind(extractor, SingleRoIExtractor)
    align = extractor.roi_layers[0]
    if not isinstance(align, RoIAlign):
        raise _refusal(f"pools its RoI features by {type(align).__name__}")
    own_strides = [(stride, stride) for stride in extractor.featmap_strides]
    for name, value, expected in (
        ("the pool_mode of its RoIAlign", align.pool_mode, "avg"),
        ("the output_size of its RoIAlign", tuple(align.output_size), (align.output_size[0],) * 2),
        ("the finest_scale of its RoI extractor", extractor.finest_scale, int(extractor.finest_scale)),
        (
            "the featmap_strides of its RoI extractor (those of the RPN's anchors)",
            own_strides,
            strides[: len(own_strides)],
        ),
    ):
        if value != expected:
            raise TeacherError(f"The teacher cannot be cached: {name} should be {expected}, found {value}.")


def _check_box_head(head: Any, behind_stage: bool) -> None:
    """Refuse a box head that says more, or something else, than its logits and deltas."""
    _check_kind(head, BBoxHead if behind_stage else ConvFCBBoxHead)
    name = type(head).__name__
    if type(head).forward not in (BBoxHead.forward, ConvFCBBoxHead.forward):
        raise _refusal(f"has a {name}, whose forward is not that of a ConvFCBBoxHead")
    for missing, present in (
        ("classifier (with_cls=False)", head.with_cls),
        ("box regression (with_reg=False)", head.with_reg),
        ("shared fully connected layer", behind_stage or head.num_shared_fcs),
    ):
        if not present:
            raise _refusal(f"has a {name} without a {missing}")
    loss = type(head.loss_cls).__name__
    if head.custom_cls_channels or head.custom_activation:
        raise _refusal(
            f"has a {name} with a {loss}, whose class scores are not one number per class and the background, turned "
            "into probabilities by softmax"
        )
    for layer in (head.fc_cls, head.fc_reg):
        if type(layer) not in (nn.Linear, MmcvLinear):
            raise _refusal(f"has a {name} whose last layer is a {type(layer).__name__} in place of a Linear")
    if head.predict_box_type != "hbox":
        raise _refusal(f"has a {name} that predicts boxes of type {head.predict_box_type!r} in place of 'hbox'")
    _check_coder(head.bbox_coder)


def _check_coder(coder: Any) -> None:
    """Refuse a box coder that decodes otherwise than `decode_deltas`, which reads what is cached."""
    name = type(coder).__name__
    expected = "Expected a DeltaXYWHBBoxCoder with its default options, but for its means and standard deviations."
    if getattr(coder, "encode_size", 4) != 4 or not hasattr(coder, "means") or not hasattr(coder, "stds"):
        raise TeacherError(f"The teacher's box coder is a {name}. {expected}")
    if not getattr(coder, "clip_border", True):
        raise TeacherError(
            f"The teacher's {name} has clip_border=False, and boxes from a cache are clipped to the image. {expected}"
        )
    size = torch.tensor([4.0, 30.0, 400.0]).repeat_interleave(5)
    boxes = torch.stack([size, size / 2, 2 * size, 2 * size], dim=1)  # [15, 4]
    shift = torch.tensor([-6.0, -0.7, 0.0, 0.7, 6.0]).repeat(3)  # beyond what growth is limited to
    moves = torch.stack([shift, -shift, shift, -shift / 2], dim=1)
    deltas = (moves - moves.new_tensor(coder.means)) / moves.new_tensor(coder.stds)
    decoded = coder.decode(boxes, deltas)
    decoded_boxes = getattr(decoded, "tensor", decoded)
    expected_boxes = decode_deltas(boxes, deltas[:, None], coder.means, coder.stds)[:, 0]
    if not torch.allclose(decoded_boxes, expected_boxes, rtol=1e-4, atol=1e-2):
        off = float((decoded_boxes - expected_boxes).abs().max())
        raise TeacherError(f"The teacher's {name} decodes to other boxes, up to {off:.2g} pixels away. {expected}")


def _check_fit(extractor: Any, head: Any) -> None:
    """Refuse a box head that is not for the RoI features that its extractor makes."""
    feature_shape = (extractor.out_channels, *extractor.roi_layers[0].output_size)
    head_shape = (head.in_channels, *head.roi_feat_size)
    if tuple(feature_shape) != tuple(head_shape):
        raise TeacherError(
            f"The teacher's RoI extractor makes features of {' x '.join(map(str, feature_shape))} (channels, height, "
            f"width), and its {type(head).__name__} is for {' x '.join(map(str, head_shape))}: correct the config."
        )


def _settings(extractor: Any, box_head: Any) -> tuple[Any, ...]:
    """What has to be the same in all stages of a cascade."""
    align = extractor.roi_layers[0]
    return (
        extractor.num_inputs,
        extractor.finest_scale,
        tuple(align.output_size),
        align.sampling_ratio,
        align.aligned,
        box_head.reg_class_agnostic,
        tuple(box_head.bbox_coder.means),
        box_head.fc_cls.in_features,
    )
