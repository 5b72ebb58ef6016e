"""Which detectors of mmdet's zoo can teach, and why the others cannot: from their configs, without weights."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from mmdet.models.detectors import FasterRCNN
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from kdpipe.pipelines.detectors.checkpoints import Checkpoint
from kdpipe.pipelines.detectors.configs import apply_options, find_config
from kdpipe.pipelines.detectors.literal_config import ConfigError
from kdpipe.pipelines.detectors.mmdet2 import for_inference
from kdpipe.pipelines.teacher.family_checks import TeacherError, check_classes_of_config, check_family
from kdpipe.pipelines.teacher.teacher import load_teacher

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

# of losses that nobody computes here
pytestmark = [
    pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``:UserWarning"),
    pytest.mark.filterwarnings("ignore:DeprecationWarning. :UserWarning"),
]

CPU = torch.device("cpu")
R50 = "faster-rcnn_r50_fpn_1x_coco"
CASCADE = "cascade-rcnn_r50_fpn_1x_coco"
C4 = "faster-rcnn_r50-caffe-c4_ms-1x_coco"


def check(config: Config) -> None:
    """What `load_teacher` checks before it compares weights; layers have shapes and no values."""
    register_all_modules(init_default_scope=True)
    model = for_inference(config).model
    check_classes_of_config(model)
    for branch in ("mask_roi_extractor", "mask_head"):
        model.roi_head.pop(branch, None)
    with torch.device("meta"):
        built = MODELS.build(model)
    check_family(built)


REFUSED = {
    "sparse-rcnn_r50_fpn_1x_coco": "has a SparseRoIHead .*it is a SparseRCNN",
    "queryinst_r50_fpn_1x_coco": "has a SparseRoIHead .*it is a QueryInst",
    "fast-rcnn_r50_fpn_1x_coco": "is a FastRCNN, which has no RPN",
    "point-rend_r50-caffe_fpn_ms-1x_coco": "has a PointRendRoIHead",
    "scnet_r50_fpn_1x_coco": "has a SCNetRoIHead",
    "grid-rcnn_r50_fpn_gn-head_2x_coco": "has a GridRoIHead",
    "dh-faster-rcnn_r50_fpn_1x_coco": "has a DoubleHeadRoIHead",
    "tridentnet_r50-caffe_1x_coco": "has a TridentRoIHead .*it is a TridentFasterRCNN",
    "ms-rcnn_r50-caffe_fpn_1x_coco": "has a MaskScoringRoIHead",
    "dynamic-rcnn_r50_fpn_1x_coco": "has a DynamicRoIHead",
    "crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman": "has a MultiInstanceRoIHead",
    "mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1": "with a SeesawLoss, whose class scores",
    "sabl-faster-rcnn_r50_fpn_1x_coco": "has a SABLHead in place of a ConvFCBBoxHead",
    "faster-rcnn_r50_fpn_groie_1x_coco": "has a GenericRoIExtractor in place of a SingleRoIExtractor",
    "ga-faster-rcnn_r50_fpn_1x_coco": "has a GARPNHead as its RPN, which has no anchors",
    "crpn_faster-rcnn-r50_caffe_fpn_1x_coco": "has a CascadeRPNHead as its RPN",
    "faster-rcnn_r50_fpn_1x_coco_v1": "LegacyDeltaXYWHBBoxCoder decodes to other boxes",
    "cascade-mask-rcnn_r50_fpn_1x_coco_v1": "LegacyDeltaXYWHBBoxCoder decodes to other boxes",
    "retinanet_r50_fpn_1x_coco": "is a RetinaNet",
    "solo_r50_fpn_1x_coco": "is a SOLO",
    "mask2former_r50_8xb2-lsj-50e_coco": "is a Mask2Former",
    "detr_r50_8xb2-150e_coco": "is a DETR",
}


@pytest.mark.parametrize("name", REFUSED)
def test_zoo_configs_that_cannot_teach(name: str) -> None:
    with pytest.raises(TeacherError, match=REFUSED[name]) as caught:
        check(find_config(name))
    assert "Expected a" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *(R50, CASCADE, C4, "mask-rcnn_r50_fpn_1x_coco", "cascade-mask-rcnn_r50_fpn_1x_coco", "htc_r50_fpn_1x_coco"),
        *("faster-rcnn_r50-caffe-dc5_1x_coco", "libra-faster-rcnn_r50_fpn_1x_coco", "panoptic-fpn_r50_fpn_1x_coco"),
        *("faster-rcnn_r50_fpn_giou_1x_coco", "faster-rcnn_r50_fpn_fcos-rpn_1x_coco"),
        *(
            "faster-rcnn_r50_fpn_ohem_1x_coco",
            "mask-rcnn_r50_fpn_gn-all_2x_coco",
            "faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco",
        ),
    ],
)
def test_zoo_configs_that_can(name: str) -> None:
    check(find_config(name))


class OwnForward(Shared2FCBBoxHead):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        return super().forward(2 * x)


class OwnDecoding(Shared2FCBBoxHead):  # type: ignore[misc]
    def regress_by_class(self, *args: Any) -> Any:
        return super().regress_by_class(*args)


class OwnLoss(Shared2FCBBoxHead):  # type: ignore[misc]
    """What it does only in training is its own affair."""

    def loss(self, *args: Any, **options: Any) -> Any:
        return super().loss(*args, **options)


class OwnRoIHead(StandardRoIHead):  # type: ignore[misc]
    pass


class OwnDetector(FasterRCNN):  # type: ignore[misc]
    pass


for kind in (OwnForward, OwnDecoding, OwnLoss, OwnRoIHead, OwnDetector):
    MODELS.register_module(module=kind, name=f"Test{kind.__name__}")

HEAD, ALIGN = "model.roi_head.bbox_head", "model.roi_head.bbox_roi_extractor"


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (f"{ALIGN}.roi_layer={{'type':'RoIPool','output_size':7}}", "pools its RoI features by RoIPool"),
        (f"{ALIGN}.roi_layer.pool_mode=max", "pool_mode of its RoIAlign should be avg, found max"),
        (f"{ALIGN}.roi_layer.output_size=[7,14]", r"output_size of its RoIAlign should be \(7, 7\), found \(7, 14\)"),
        (f"{ALIGN}.roi_layer.output_size=14", "makes features of 256 x 14 x 14"),
        (f"{ALIGN}.out_channels=128", "makes features of 128 x 7 x 7 .* is for 256 x 7 x 7"),
        (f"{ALIGN}.featmap_strides=[4,8,16,64]", "featmap_strides .* should be"),
        (f"{ALIGN}.finest_scale=56.5", "finest_scale .* should be 56, found 56.5"),
        (f"{HEAD}.bbox_coder.clip_border=False", "clip_border=False"),
        (f"{HEAD}.bbox_coder.add_ctr_clamp=True", "DeltaXYWHBBoxCoder decodes to other boxes"),
        (f"{HEAD}.bbox_coder={{'type':'DeltaXYWHBBoxCoderForGLIP'}}", "ForGLIP decodes to other boxes"),
        (f"{HEAD}.bbox_coder={{'type':'TBLRBBoxCoder'}}", "box coder is a TBLRBBoxCoder"),
        (f"{HEAD}.cls_predictor_cfg={{'type':'NormedLinear'}}", "last layer is a NormedLinear"),
        (f"{HEAD}.reg_predictor_cfg={{'type':'NormedLinear'}}", "last layer is a NormedLinear"),
        (f"{HEAD}.predict_box_type=rbox", "boxes of type 'rbox'"),
        (f"{HEAD}.with_cls=False", "without a classifier"),
        (f"{HEAD}.with_reg=False", "without a box regression"),
        (f"{HEAD}.type=TestOwnForward", "TestOwnForward|OwnForward, whose forward is not"),
        (f"{HEAD}.type=TestOwnDecoding", "OwnDecoding, whose regress_by_class is not"),
        ("model.roi_head.type=TestOwnRoIHead", "has a OwnRoIHead in place of a StandardRoIHead"),
        ("model.rpn_head=None", "which has no RPN"),
        ("model.roi_head=None", "which has no RoI head"),
        (f"{HEAD}=None", "has a StandardRoIHead without a box head"),
        ("model.test_cfg=None", "expected model.test_cfg.rpn"),
        ("model.test_cfg.rpn=None", "expected model.test_cfg.rpn"),
    ],
)
def test_options_that_a_cache_would_not_honour(option: str, reason: str) -> None:
    with pytest.raises(TeacherError, match=reason):
        check(apply_options(find_config(R50), [option]))


def test_a_head_without_a_shared_layer() -> None:
    options = [f"{HEAD}.type=ConvFCBBoxHead", f"{HEAD}.num_cls_fcs=1", f"{HEAD}.num_reg_fcs=1"]
    with pytest.raises(TeacherError, match="without a shared fully connected layer"):
        check(apply_options(find_config(R50), options))


@pytest.mark.parametrize(
    "options",
    [
        (f"{HEAD}.bbox_coder.target_stds=[0.05,0.05,0.1,0.1]", f"{HEAD}.bbox_coder.target_means=[0.1,0,0,0.2]"),
        (f"{HEAD}.reg_decoded_bbox=True", f"{HEAD}.loss_bbox={{'type':'GIoULoss'}}"),  # of training
        (f"{HEAD}.reg_class_agnostic=True",),
        (f"{HEAD}.with_avg_pool=True",),
        (f"{HEAD}.loss_cls={{'type':'CrossEntropyLoss','use_sigmoid':True}}",),  # mmdet reads softmax all the same
        (f"{HEAD}.type=Shared4Conv1FCBBoxHead",),
        (f"{HEAD}.type=ConvFCBBoxHead", f"{HEAD}.num_shared_fcs=1", f"{HEAD}.num_cls_fcs=1", f"{HEAD}.num_reg_fcs=2"),
        (f"{HEAD}.type=TestOwnLoss",),
        ("model.type=TestOwnDetector",),
        (f"{ALIGN}.finest_scale=56.0",),
        (f"{ALIGN}.roi_layer.aligned=False", f"{ALIGN}.roi_layer.sampling_ratio=2"),  # both recorded
    ],
)
def test_options_that_a_cache_honours(options: tuple[str, ...]) -> None:
    check(apply_options(find_config(R50), options))


def test_legacy_anchors_and_deltas_of_proposals_are_the_teachers_own_affair() -> None:
    """The cache holds the proposals themselves; only the box head's coder has to be the usual one."""
    check(apply_options(find_config("faster-rcnn_r50_fpn_1x_coco_v1"), [f"{HEAD}.bbox_coder.type=DeltaXYWHBBoxCoder"]))


def test_stages_of_a_cascade_are_checked_one_by_one() -> None:
    last = f"{HEAD}.2.bbox_coder"
    with pytest.raises(TeacherError, match="LegacyDeltaXYWHBBoxCoder decodes to other boxes"):
        check(apply_options(find_config(CASCADE), [f"{last}.type=LegacyDeltaXYWHBBoxCoder"]))


def test_classes_in_place_of_names() -> None:
    """As mmengine's pure-Python configs have them."""
    config = find_config(R50)
    config.model.type, config.model.roi_head.type = FasterRCNN, StandardRoIHead
    check(config)
    config.model.roi_head.type = MODELS.get("PISARoIHead")
    with pytest.raises(TeacherError, match="has a PISARoIHead"):
        check(config)


def test_the_family_is_told_before_weights_are_compared(tmp_path: Path) -> None:
    nothing = Checkpoint({"x": torch.zeros(1)}, {}, tmp_path / "w.pth")
    for name in ("sparse-rcnn_r50_fpn_1x_coco", "fast-rcnn_r50_fpn_1x_coco", "scnet_r50_fpn_1x_coco"):
        with pytest.raises(TeacherError, match="Expected a two-stage detector"):
            load_teacher(nothing, for_inference(find_config(name)), proposals=8, device=CPU)


@pytest.mark.parametrize(("own_count", "used"), [(None, None), (-1, -1), (0, 0), (10, 40), (40, 40), (1000, 1000)])
def test_as_many_candidates_as_proposals_are_wanted(
    kit: "Kit", work: Path, own_count: int | None, used: int | None
) -> None:
    """Before suppression, a teacher has as many as its config says, all where it says nothing, and enough."""
    config = kit.config()
    rpn = config.model.test_cfg.rpn
    rpn.pop("nms_pre")
    if own_count is not None:
        rpn.nms_pre = own_count
    state = MODELS.build(for_inference(config).model).state_dict()
    checkpoint = Checkpoint(state, {}, work / "w.pth")
    teacher = load_teacher(checkpoint, for_inference(config), proposals=40, device=CPU)
    assert teacher.model.rpn_head.test_cfg.get("nms_pre") == used
    assert teacher.model.rpn_head.test_cfg.max_per_img == 40


# In the command


def huge(work: Path) -> Path:
    """Annotations that nobody may read: they are no JSON, which is what would be said."""
    path = work / "huge.json"
    path.write_text("{" * 1000)
    return path


def test_refusals_come_before_the_data_is_read(kit: "Kit", work: Path) -> None:
    data = ("--ann-file", huge(work), "--img-dir", kit.img)
    dense = kit.save_detector(work / "dense.pth", kit.dense("retinanet"))
    cache = ("cache-teacher", *data, *kit.VIEW, "--out", work / "x.zarr")
    for command in (cache, (*cache, "--dry-run"), ("train-student", *data)):
        option = "--teacher-ckpt" if command[0] == "train-student" else "--ckpt"
        assert "The teacher is a RetinaNet. Expected" in kit.refused(*command, option, dense)
        assert "missing" in kit.refused(*command, option, kit.teacher, *wrong_config(command[0]))
    assert not (work / "x.zarr").exists()
    assert "missing" in kit.refused("evaluate", "--ckpt", kit.teacher, *data, *wrong_config("evaluate"))
    verify = ("verify", kit.cache, "--ckpt", dense, "--ann-file", huge(work))
    message = kit.refused(*verify)
    assert "does not fit the model" in message
    # a cache that is there: of other options, of another teacher, or something else
    here = ("cache-teacher", *data, "--ckpt", kit.teacher, "--out", kit.cache)
    assert 'spec.dtype: found "int4", wanted "float16"' in kit.refused(*here, *kit.VIEW, "--dtype", "float16")
    assert "plan.part_size" in kit.refused(*here, *kit.VIEW, "--part-size", "1MiB")
    other = kit.save_detector(work / "other.pth", kit.config(fc=48))
    assert "teacher.weights" in kit.refused(*here, *kit.VIEW, "--ckpt", other)
    assert "is no folder" in kit.refused(*here, *kit.VIEW, "--out", kit.student)
    assert "not valid JSON" in kit.refused(*here, *kit.VIEW)  # and then the data


def wrong_config(command: str) -> tuple[str, str]:
    return ("--teacher-config" if command == "train-student" else "--config", R50)


def test_a_student_is_refused_before_the_data_is_read(kit: "Kit", work: Path) -> None:
    data = ("--ann-file", huge(work))
    (work / "vfnet.py").write_text(kit.config("vfnet_r50_fpn_1x_coco", channels=32).pretty_text)
    for options, reason in (
        (("--student", work / "vfnet.py", "--methods", "cls"), "VFNetHead"),
        (("-o", "model.backbone.colour=red"), "unexpected keyword argument 'colour'"),
        (("--methods", "sgfy"), "Unknown method 'sgfy'"),
        (("--resume",), "Nothing to resume"),
        (("--student", "nowhere"), "neither a file nor a config"),
    ):
        assert reason in kit.refused(*kit.student_command(work / "w", *data, *options))
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--targets", "predictions", "--out", work / "p.zarr")
    assert "again with --targets pyramid or objects" in kit.refused(
        *kit.student_command(work / "w", *data, cache=work / "p.zarr")
    )
    for part in (work / "p.zarr" / "parts").iterdir():
        if part.is_dir():
            part.rename(work / part.name)
    command = kit.student_command(work / "w", *data, "--allow-partial", "--methods", "cls", cache=work / "p.zarr")
    assert "no finished part yet" in kit.refused(*command)
    wrong = ("-o", "model.backbone.colour=red", "--work-dir", work / "w")
    plain = kit.student_command(work / "w", *data, "--methods", "none", *wrong[:2])
    for command in (plain, ("train-teacher", "--config", kit.student, *data, "--img-dir", kit.img, *wrong)):
        assert "unexpected keyword argument 'colour'" in kit.refused(*command)
    assert not (work / "w").exists()


def test_a_teacher_that_cannot_answer_leaves_no_cache(kit: "Kit", work: Path) -> None:
    """Weights and config fit, and the layers do not fit each other; or weights are not finite."""
    config = kit.config()
    config.model.neck.num_outs = 4  # and the RPN expects five levels
    ckpt = kit.save_detector(work / "teacher.pth", config)
    command = ("cache-teacher", *kit.data, *kit.VIEW, "--out", work / "x.zarr", "--ckpt")
    message = kit.refused(*command, ckpt)
    assert "The teacher cannot answer" in message
    assert "levels" in message
    content = torch.load(kit.teacher, weights_only=True)
    content["state_dict"]["roi_head.bbox_head.fc_cls.bias"][0] = float(np.nan)
    torch.save(content, work / "nan.pth")
    assert "are not finite" in kit.refused(*command, work / "nan.pth")
    assert not (work / "x.zarr").exists()


@pytest.mark.skipif(importlib.util.find_spec("mmpretrain") is not None, reason="mmpretrain is there")
def test_a_package_that_is_missing_is_named(kit: "Kit", work: Path) -> None:
    with pytest.raises(ConfigError, match="pip install mmpretrain"):
        find_config("mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco")
    config = kit.config()
    config.model.backbone = {"type": "mmpretrain.ConvNeXt", "arch": "tiny"}
    (work / "teacher.py").write_text(config.pretty_text)
    command = ("cache-teacher", *kit.source, *kit.VIEW, "--out", work / "x.zarr", "--config", work / "teacher.py")
    message = kit.refused(*command)
    assert "pip install mmpretrain" in message
    student = kit.refused(*kit.student_command(work / "w", "--student", work / "teacher.py", "--methods", "cls"))
    assert "pip install mmpretrain" in student
