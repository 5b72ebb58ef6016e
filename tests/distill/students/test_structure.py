"""Students that cannot be distilled are refused for the reason that holds."""

from typing import Any

import pytest
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules

from kdpipe.distill.students.dense import DenseStudent
from kdpipe.distill.students.two_stage import StudentError, TwoStageStudent
from kdpipe.pipelines.detectors.configs import find_config

REFUSED = {
    "grid-rcnn_r50_fpn_gn-head_2x_coco": "type GridRCNN.*GridRoIHead is of another kind: it finds boxes by a grid",
    "htc_r50_fpn_1x_coco": "HybridTaskCascadeRoIHead is of another kind: its stages hand mask features on",
    "sparse-rcnn_r50_fpn_1x_coco": "SparseRoIHead is of another kind: it refines learned queries",
    "fast-rcnn_r50_fpn_1x_coco": "no RPN, and takes its proposals from a file",
    "tridentnet_r50-caffe_1x_coco": "type TridentFasterRCNN.* repeats every image in a batch",
    "mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1": (
        r"channels of its own, 1205 for SeesawLoss, .* for 1204.*-o model\.roi_head\.bbox_head\.loss_cls="
    ),
    "crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman": "MultiInstanceRoIHead is of another kind",
    "solo_r50_fpn_1x_coco": r"no head that predicts boxes \(SOLOHead\)",
    "atss_r50-caffe_fpn_dyhead_1x_coco": r"no convolutions of its own in both .* before it stands DyHead",
    "detr_r50_8xb2-150e_coco": "DETRHead does not predict boxes at each location",
    "vfnet_r50_fpn_1x_coco": "VFNetHead computes its outputs in a way of its own",
}


def small(name: str) -> Any:
    """The model of a config of mmdet's zoo with a backbone of 18 layers that reads no weights."""
    register_all_modules(init_default_scope=True)
    model = find_config(name).model
    model.backbone.init_cfg = None
    if model.backbone.type == "ResNet":
        model.backbone.update(depth=18, style="pytorch")
    return MODELS.build(model)


@pytest.mark.filterwarnings("ignore")  # mmdet's own, of many kinds
@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_is_the_true_one(name: str) -> None:
    detector = small(name)
    with pytest.raises(StudentError, match=REFUSED[name]):
        (TwoStageStudent if hasattr(detector, "roi_head") else DenseStudent)(detector)
