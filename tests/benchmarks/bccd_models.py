"""Small detectors for small photographs, as options of the command line: teachers and students of `bccd.py`."""

from collections.abc import Mapping
from typing import Any

FASTER, CASCADE = "faster-rcnn_r50_fpn_1x_coco", "cascade-rcnn_r50_fpn_1x_coco"
FCOS = "fcos_r50-caffe_fpn_gn-head_1x_coco"
# From scratch, nothing arrives through RetinaNet's narrow head without normalisation: it gets that of FCOS.
RETINANET = """_base_ = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
model = dict(bbox_head=dict(norm_cfg=dict(type="GN", num_groups=32, requires_grad=True)))
"""


def options(values: Mapping[str, Any]) -> list[str]:
    """Overrides of a config, for the command line."""
    return [part for key, value in values.items() for part in ("-o", f"{key}={value}")]


def backbone(base: int, pyramid: int) -> dict[str, Any]:
    """A ResNet-18 of that width, from scratch, and its pyramid."""
    return {
        "model.backbone.depth": 18,
        "model.backbone.base_channels": base,
        "model.backbone.frozen_stages": -1,
        "model.backbone.norm_cfg.requires_grad": True,
        "model.backbone.norm_eval": False,
        "model.backbone.init_cfg": None,
        "model.neck.in_channels": [base, 2 * base, 4 * base, 8 * base],
        "model.neck.out_channels": pyramid,
    }


def two_stage(
    base: int, pyramid: int, hidden: int, stages: int = 0, anchor_scale: int = 4, rois: int = 128
) -> list[str]:
    """Options that make mmdet's Faster R-CNN, or Cascade R-CNN of so many stages, a small one.

    Args:
        base: Channels of the first stage of the backbone.
        pyramid: Channels of the pyramid.
        hidden: Width of the box head.
        stages: Of a cascade.
        anchor_scale: Side of the RPN's anchors, in strides.
        rois: RoIs per image that the box head is trained on.
    """
    heads = [f"bbox_head.{stage}" for stage in range(stages)] or ["bbox_head"]
    samplers = [f"rcnn.{stage}.sampler" for stage in range(stages)] or ["rcnn.sampler"]
    values = {
        **backbone(base, pyramid),
        "model.rpn_head.in_channels": pyramid,
        "model.rpn_head.feat_channels": pyramid,
        "model.rpn_head.anchor_generator.scales": [anchor_scale],
        "model.roi_head.bbox_roi_extractor.out_channels": pyramid,
        "model.roi_head.bbox_roi_extractor.finest_scale": 28,
        **{f"model.roi_head.{head}.in_channels": pyramid for head in heads},
        **{f"model.roi_head.{head}.fc_out_channels": hidden for head in heads},
        "model.train_cfg.rpn_proposal.nms_pre": 500,
        "model.train_cfg.rpn_proposal.max_per_img": 200,
        **{f"model.train_cfg.{sampler}.num": rois for sampler in samplers},
        "model.test_cfg.rpn.nms_pre": 500,
        "model.test_cfg.rpn.max_per_img": 200,
    }
    return options(values)


def retinanet(base: int, pyramid: int, anchor_scale: int) -> list[str]:
    """Options that make `RETINANET` a small one; the side of its smallest anchors is in strides."""
    head = {
        "model.bbox_head.in_channels": pyramid,
        "model.bbox_head.feat_channels": pyramid,
        "model.bbox_head.anchor_generator.octave_base_scale": anchor_scale,
    }
    return options({**backbone(base, pyramid), **head})


def fcos(base: int, pyramid: int) -> list[str]:
    """Options that make mmdet's FCOS a small one."""
    head = {"model.bbox_head.in_channels": pyramid, "model.bbox_head.feat_channels": pyramid}
    return options({**backbone(base, pyramid), **head})
