"""What teachers of each family say of boxes: docs/reference/families.md has the table, `family_checks` says who may."""

from typing import Any

from mmcv.ops import RoIAlign
from mmdet.models.backbones.resnet import Bottleneck
from mmdet.models.roi_heads import CascadeRoIHead, HybridTaskCascadeRoIHead
from mmdet.models.roi_heads.mask_heads import FusedSemanticHead
from mmdet.models.roi_heads.shared_heads import ResLayer
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from kdpipe.cache.records import decode_deltas, encode_boxes
from kdpipe.distill.outputs import HeadOutputs
from kdpipe.distill.rois.align import roi_align_assigned

__all__ = ["box_outputs", "is_cascade", "roi_size", "semantic_branch", "shared_style", "stages"]


def is_cascade(roi_head: Any) -> bool:
    """Whether boxes go through several box heads, one after the other."""
    return isinstance(roi_head, CascadeRoIHead)


def stages(roi_head: Any) -> list[tuple[Any, Any]]:
    """RoI extractor and box head of every stage; a single one where there is no cascade."""
    if is_cascade(roi_head):
        return list(zip(roi_head.bbox_roi_extractor, roi_head.bbox_head, strict=True))
    return [(roi_head.bbox_roi_extractor, roi_head.bbox_head)]


def roi_size(roi_head: Any) -> int:
    """Cells per side of the RoI features that students imitate.

    A shared residual stage halves what RoIAlign gives it: then it is the size behind that stage.
    """
    extractor, _ = stages(roi_head)[0]
    size = int(extractor.roi_layers[0].output_size[0])
    return size // 2 if roi_head.with_shared_head else size


def shared_style(roi_head: Any) -> str:
    """Where the blocks of a shared residual stage have their stride; empty without a stage of the usual kind."""
    if not roi_head.with_shared_head or type(roi_head.shared_head) is not ResLayer:
        return ""
    blocks = list(getattr(roi_head.shared_head, f"layer{roi_head.shared_head.stage + 1}"))
    norms = [layer for layer in roi_head.shared_head.modules() if isinstance(layer, _BatchNorm)]
    usual = all(
        isinstance(block, Bottleneck)
        and (block.stride, block.dilation) == (1 if index else 2, 1)
        and isinstance(block.norm1, _BatchNorm)
        for index, block in enumerate(blocks)
    )
    return str(blocks[0].style) if usual and all(norm.eps == 1e-5 for norm in norms) else ""


def semantic_branch(roi_head: Any) -> tuple[int, ...]:
    """Of a semantic branch, level of fusion and size of its RoI features; empty without one of the usual kind."""
    if not isinstance(roi_head, HybridTaskCascadeRoIHead) or not roi_head.with_semantic:
        return ()
    branch, extractor = roi_head.semantic_head, roi_head.semantic_roi_extractor
    (box_extractor, _), *_ = stages(roi_head)
    align, box_align = extractor.roi_layers[0], box_extractor.roi_layers[0]
    usual = (
        type(branch) is FusedSemanticHead
        and isinstance(align, RoIAlign)
        and align.pool_mode == "avg"
        and "bbox" in roi_head.semantic_fusion
        and list(extractor.featmap_strides) == [2 ** (branch.fusion_level + 2)]
        and (align.sampling_ratio, align.aligned) == (box_align.sampling_ratio, box_align.aligned)
    )
    return (int(branch.fusion_level), int(align.output_size[0])) if usual else ()


def box_outputs(
    roi_head: Any, pyramid: tuple[Tensor, ...], boxes: Tensor, sample: DetDataSample, embeddings: list[Tensor]
) -> tuple[HeadOutputs, Tensor]:
    """What a teacher says of boxes of one image, computed by mmdet's own code.

    Of a cascade: logits are the mean over its stages; deltas lead from the box itself to where the last stage moves it,
    in the units of the first stage; embeddings are those of the last stage.

    Args:
        roi_head: The teacher's.
        pyramid: Levels `[1, C, h_l, w_l]`.
        boxes: Tensor[R, 4] (x1, y1, x2, y2), pixels of the network input.
        sample: Of the image, with its `img_shape`.
        embeddings: Where a hook leaves the newest input of the (last) classifier layer.

    Returns:
        Of each box, and its RoI features Tensor[R, C, size, size] on the pyramid alone.
    """
    extractor, first = stages(roi_head)[0]
    classes = 1 if first.reg_class_agnostic else first.num_classes
    if not len(boxes):  # some of mmdet's layers take no empty batch
        none, size = boxes.new_zeros, roi_size(roi_head)
        outputs = HeadOutputs(none(0, first.fc_cls.in_features), none(0, first.num_classes + 1), none(0, classes, 4))
        return outputs, none(0, extractor.out_channels, size, size)
    rois = bbox2roi([boxes])
    if not is_cascade(roi_head):
        answers = roi_head._bbox_forward(pyramid, rois)
        deltas = answers["bbox_pred"].reshape(len(boxes), -1, 4)
        outputs = HeadOutputs(embeddings[0], answers["cls_score"], deltas)
        return outputs, _before_shared(roi_head, pyramid, rois) if roi_head.with_shared_head else answers["bbox_feats"]
    features = extractor(pyramid[: extractor.num_inputs], rois)
    semantic = {}
    if isinstance(roi_head, HybridTaskCascadeRoIHead) and roi_head.with_semantic:
        semantic["semantic_feat"] = roi_head.semantic_head(pyramid)[1]
    stage_rois, logits, deltas = roi_head._refine_roi(pyramid, rois, [sample.metainfo], (len(boxes),), **semantic)
    last = roi_head.bbox_head[-1].bbox_coder
    moved = decode_deltas(stage_rois[0][:, 1:], deltas[0].reshape(-1, classes, 4), last.means, last.stds)
    units = first.bbox_coder
    return HeadOutputs(embeddings[0], logits[0], encode_boxes(boxes, moved, units.means, units.stds)), features


def _before_shared(roi_head: Any, pyramid: tuple[Tensor, ...], rois: Tensor) -> Tensor:
    """RoI features that come before a shared residual stage, at the size that they have behind it."""
    extractor, _ = stages(roi_head)[0]
    align = extractor.roi_layers[0]
    return roi_align_assigned(
        pyramid[: extractor.num_inputs],
        extractor.featmap_strides,
        rois,
        extractor.finest_scale,
        roi_size(roi_head),
        align.sampling_ratio,
        align.aligned,
    )
