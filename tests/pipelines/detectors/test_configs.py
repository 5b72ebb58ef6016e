"""Configs come from checkpoints without being executed, from the zoo by name, and from both layouts of mmdet."""

from pathlib import Path
from typing import Any

import mmdet
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import init_default_scope

from kdpipe.pipelines.detectors.checkpoints import Checkpoint
from kdpipe.pipelines.detectors.configs import apply_options, config_from_checkpoint, find_config, set_num_classes
from kdpipe.pipelines.detectors.literal_config import ConfigError, parse_literal_config
from kdpipe.pipelines.detectors.mmdet2 import dataset_paths, for_inference, modernise
from kdpipe.pipelines.teacher.family_checks import TeacherError
from kdpipe.pipelines.teacher.pixel_pipeline import teacher_pixels

OLD = """
img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
model = dict(
    type='CascadeRCNN', pretrained='torchvision://resnet50',
    backbone=dict(type='ResNet', depth=50, base_channels=4, num_stages=4, out_indices=(0, 1, 2, 3), style='pytorch',
        dcn=dict(type='DCN', deformable_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, False, False, True), init_cfg=dict(type='Pretrained', checkpoint='nowhere')),
    neck=dict(type='FPN', in_channels=[16, 32, 64, 128], out_channels=16, num_outs=5,
        add_extra_convs=True, extra_convs_on_inputs=False),
    rpn_head=dict(type='RPNHead', in_channels=16, feat_channels=16,
        anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[.0, .0, .0, .0], target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type='SmoothL1Loss', beta=1.0 / 9.0, loss_weight=1.0)),
    roi_head=dict(type='CascadeRoIHead', num_stages=1, stage_loss_weights=[1],
        bbox_roi_extractor=dict(type='SingleRoIExtractor', out_channels=16, featmap_strides=[4, 8, 16, 32],
            roi_layer=dict(type='RoIAlign', out_size=7, sample_num=0)),
        bbox_head=[dict(type='Shared2FCBBoxHead', in_channels=16, fc_out_channels=32, roi_feat_size=7, num_classes=80,
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.],
                target_stds=[0.1, 0.1, 0.2, 0.2]), reg_class_agnostic=True,
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0))]))
train_cfg = dict(rpn=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3, ignore_iof_thr=-1),
        sampler=dict(type='RandomSampler', num=256, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False),
        allowed_border=0, pos_weight=-1, debug=False),
    rpn_proposal=dict(nms_across_levels=False, nms_pre=2000, nms_post=2000, max_num=2000, nms_thr=0.7, min_bbox_size=0),
    rcnn=[dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, ignore_iof_thr=-1),
        sampler=dict(type='RandomSampler', num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
        pos_weight=-1, debug=False)])
test_cfg = dict(
    rpn=dict(nms_across_levels=False, nms_pre=100, nms_post=100, max_num=50, nms_thr=0.7, min_bbox_size=0),
    rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_thr=0.5), max_per_img=100))
data_root = 'data/coco/'
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='InstaBoost'), dict(type='Normalize', **img_norm_cfg)]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='MultiScaleFlipAug', img_scale=(1333, 800), flip=False,
    transforms=[dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'), dict(type='Normalize', **img_norm_cfg),
        dict(type='Pad', size_divisor=32), dict(type='Collect', keys=['img'])])]
data = dict(
    train=dict(type='RepeatDataset', times=3, dataset=dict(type='CocoDataset', pipeline=train_pipeline,
        ann_file=data_root + 'annotations/instances_train2017.json', img_prefix=data_root + 'train2017/')),
    val=dict(type='CocoDataset', ann_file='annotations/instances_val2017.json', img_prefix='val2017/',
        data_root='/data', pipeline=test_pipeline),
    test=dict(type='VOCDataset', ann_file='VOC2007/ImageSets/Main/test.txt', pipeline=test_pipeline))
"""


def old_config() -> Config:
    return Config(parse_literal_config(OLD))


ZOO = [
    "faster-rcnn_r50_fpn_1x_coco",
    "cascade-rcnn_x101-64x4d_fpn_1x_coco",
    "htc_x101-64x4d-dconv-c3-c5_fpn_ms-400-1400-16xb1-20e_coco",
    "retinanet_r50_fpn_1x_coco",
    "fcos_r50-caffe_fpn_gn-head_1x_coco",
]


@pytest.mark.parametrize("name", ZOO)
def test_dumped_zoo_configs_are_read_as_they_were(name: str) -> None:
    config = find_config(name)
    assert parse_literal_config(config.pretty_text) == config.to_dict()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a = -1.5e3", -1500.0),
        ("a = {'x': (1, ), 2: [None, True]}", {"x": (1,), 2: [None, True]}),
        ("b = 'data/'\na = b + 'coco'", "data/coco"),
        ("b = dict(x=1)\na = dict(**b, y=1 / 8)", {"x": 1, "y": 0.125}),
        ("b = dict(x=1)\na = {**b, 'y': (2 - 1) * 3}", {"x": 1, "y": 3}),
        ("a = inf", float("inf")),
        ("'''text'''\na = r'x\\y' 'z'", "x\\yz"),
    ],
)
def test_literals(text: str, value: Any) -> None:
    assert parse_literal_config(text)["a"] == value


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "a = open('x')",
        "a = __import__('os').system('x')",
        "a = f'{1}'",
        "a = dict(x=lambda: 1)",
        "a = [i for i in (1, 2)]",
        "a = unknown",
        "a = 'x' * 10",
        "a = 1 / 0",
        "a = 2 ** 99",
        "a.b = 1",
        "a = b'bytes'",
        "a += 1",
        "a = {1, 2}",
        "def f(): pass",
        "a = dict([(1, 2)])",
    ],
)
def test_anything_else_is_refused_with_its_line(line: str) -> None:
    with pytest.raises(ConfigError, match="line 2 of the config text"):
        parse_literal_config(f"x = 1\n{line}")


@pytest.mark.parametrize("text", ["a = (", "a = 1\x00", "work_dirs/a.py\nmodel = dict()", "(" * 500])
def test_text_that_is_not_python(text: str) -> None:
    with pytest.raises(ConfigError, match="--config"):
        parse_literal_config(text)


def test_references_are_copies() -> None:
    values = parse_literal_config("a = dict(x=[1])\nb = [a, a]")
    values["b"][0]["x"].append(2)
    assert values["a"] == values["b"][1] == {"x": [1]}


@pytest.mark.parametrize("key", ["cfg", "config"])
@pytest.mark.parametrize("as_text", [True, False])
def test_config_from_checkpoint(key: str, as_text: bool) -> None:
    expected = find_config("faster-rcnn_r50_fpn_1x_coco")
    meta = {key: expected.pretty_text if as_text else expected.to_dict()}
    config = config_from_checkpoint(Checkpoint({}, meta, Path("a.pth")))
    assert config is not None
    expected.model.backbone.init_cfg = None  # names weights outside of the file
    assert config.to_dict() == expected.to_dict()


def test_checkpoint_without_config_or_with_a_program() -> None:
    assert config_from_checkpoint(Checkpoint({}, {"cfg": ""}, Path("a.pth"))) is None
    with pytest.raises(ConfigError, match=r"a\.pth.*line 1"):
        config_from_checkpoint(Checkpoint({}, {"cfg": "import os"}, Path("a.pth")))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("faster-rcnn_r50_fpn_1x_coco", "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"),
        ("faster_rcnn_r50_fpn_1x_coco.py", "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"),
        ("configs/fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py"),
        (
            "htc_x101_64x4d_fpn_dconv_c3-c5_mstrain_400_1400_16x1_20e_coco",
            "htc/htc_x101-64x4d-dconv-c3-c5_fpn_ms-400-1400-16xb1-20e_coco.py",
        ),
    ],
)
def test_zoo_names(name: str, file: str) -> None:
    assert Path(find_config(name).filename) == Path(mmdet.__file__).parent / ".mim/configs" / file


def test_unknown_name_lists_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"closest names:.*faster-rcnn_r50_fpn_1x_coco"):
        find_config("fastr-rcnn_r50_fpn_1x_coco")
    with pytest.raises(ConfigError, match="neither a file nor"):
        find_config("/nowhere/faster-rcnn_r50_fpn_1x_coco.py")


def test_own_files(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("model = dict(type='A')\n")
    assert find_config(tmp_path / "a.py").model.type == "A"
    for text, message in {"x = 1 / 0": "ZeroDivisionError", "x = 1": "no model"}.items():
        (tmp_path / "b.py").write_text(text + "\n")
        with pytest.raises(ConfigError, match=message):
            find_config(tmp_path / "b.py")


def test_own_files_on_top_of_a_config_of_the_zoo(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        """_base_ = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"\nmodel = dict(bbox_head=dict(num_classes=3))\n"""
    )
    head = find_config(file).model.bbox_head
    assert (head.type, head.num_classes, head.stacked_convs) == ("RetinaHead", 3, 4)


def test_modernised_config_builds_and_predicts() -> None:
    config = for_inference(modernise(old_config()))
    init_default_scope("mmdet")
    model = MODELS.build(config.model).eval()
    assert model.data_preprocessor.mean.flatten().tolist() == pytest.approx([103.53, 116.28, 123.675])
    assert model.data_preprocessor.pad_size_divisor == 32
    assert not model.data_preprocessor._channel_conversion
    assert model.neck.add_extra_convs == "on_output"
    assert model.test_cfg.rpn.nms.iou_threshold == 0.7
    assert model.test_cfg.rpn.max_per_img == 50
    assert model.roi_head.bbox_roi_extractor[0].roi_layers[0].output_size == (7, 7)
    model.init_weights()  # downloads nothing
    with torch.no_grad():
        inputs = model.data_preprocessor({"inputs": [torch.zeros(3, 60, 90, dtype=torch.uint8)]})["inputs"]
        assert inputs.shape == (1, 3, 64, 96)
        assert [level.shape[1] for level in model.extract_feat(inputs)] == [16] * 5


def test_modernise_changes_nothing_of_a_modern_config_and_nothing_twice() -> None:
    config = find_config("faster-rcnn_r50_fpn_1x_coco")
    assert modernise(config).to_dict() == config.to_dict()
    once = modernise(old_config())
    assert modernise(once).to_dict() == once.to_dict()
    assert "pretrained" in old_config().model


def test_old_config_that_does_not_normalise() -> None:
    config = old_config()
    config.pop("img_norm_cfg")
    config.data = {}
    config.test_pipeline = []
    with pytest.raises(ConfigError, match="no Normalize"):
        modernise(config)


def test_scale_of_the_test_pipeline_in_both_layouts() -> None:
    register_all_modules(init_default_scope=True)
    assert teacher_pixels(old_config()).own_scale() == (1333, 800)
    assert teacher_pixels(find_config("faster-rcnn_r50_fpn_1x_coco")).own_scale() == (1333, 800)
    with pytest.raises(TeacherError, match=r"300x300 without keeping the ratio\. Give --scale"):
        teacher_pixels(find_config("ssd300_coco")).own_scale()
    with pytest.raises(TeacherError, match="0 resizing transforms"):
        teacher_pixels(Config({"test_pipeline": [{"type": "LoadImageFromFile"}]}))


def test_dataset_paths_of_both_layouts() -> None:
    coco = Path("data/coco")
    train = (coco / "annotations/instances_train2017.json", coco / "train2017")
    val = (Path("/data/annotations/instances_val2017.json"), Path("/data/val2017"))
    assert dataset_paths(old_config(), "train") == train
    assert dataset_paths(old_config(), "val") == val
    assert dataset_paths(find_config("faster-rcnn_r50_fpn_1x_coco"), "train") == train
    assert dataset_paths(find_config("yolox_s_8xb8-300e_coco"), "train") == train  # MultiImageMixDataset
    assert dataset_paths(find_config("faster-rcnn_r50_fpn_1x_voc0712"), "train") is None
    assert dataset_paths(Config({"model": {}}), "train") is None


def test_for_inference_drops_training_and_keeps_the_data() -> None:
    config = for_inference(old_config())
    assert "InstaBoost" not in config.pretty_text
    assert dataset_paths(config, "train") == dataset_paths(old_config(), "train")
    modern = for_inference(find_config("faster-rcnn_r50_fpn_1x_coco"))
    assert "RandomFlip" not in modern.pretty_text
    assert "torchvision://" not in modern.pretty_text
    assert teacher_pixels(modern).own_scale() == (1333, 800)


def test_options() -> None:
    config = find_config("cascade-rcnn_r50_fpn_1x_coco")
    changed = apply_options(
        config,
        [
            "model.backbone.base_channels=16",
            "model.roi_head.bbox_head.1.num_classes=3",
            "model.neck.in_channels=[1,2]",
            "model.backbone.out_indices=(0, 1)",
            "model.backbone.init_cfg=None",
            "model.backbone.style='caffe'",
            "model.backbone.norm_eval=false",
            "data_root=/mnt/x=y",
        ],
    )
    backbone = changed.model.backbone
    assert (backbone.base_channels, backbone.out_indices, backbone.init_cfg) == (16, (0, 1), None)
    assert (backbone.style, backbone.norm_eval) == ("caffe", False)
    assert [head.num_classes for head in changed.model.roi_head.bbox_head] == [80, 3, 80]
    assert changed.model.neck.in_channels == [1, 2]
    assert changed.data_root == "/mnt/x=y"
    assert "base_channels" not in config.model.backbone


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.backbone", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("model..x=3", "KEY=VALUE"),
        ("modle.backbone.depth=18", "no modle. Did you mean model"),
        ("depth=18", "no depth"),
        ("model.backbne.depth=18", "no model.backbne. Did you mean backbone"),
        ("model.backbone.depth.x=18", "model.backbone.depth is 50"),
        ("model.neck.in_channels.7=18", "no model.neck.in_channels.7. There are: 0, 1, 2, 3"),
        ("model.backbone.out_indices=[a, b]", "quote the strings"),
    ],
)
def test_options_that_lead_nowhere(option: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_options(find_config("faster-rcnn_r50_fpn_1x_coco"), [option])
    assert message in str(error.value)


def test_set_num_classes() -> None:
    htc = find_config("htc_r50_fpn_1x_coco").model
    set_num_classes(htc, 3)
    assert {head.num_classes for head in [*htc.roi_head.bbox_head, *htc.roi_head.mask_head]} == {3}
    assert htc.roi_head.semantic_head.num_classes == 183
    fcos = find_config("fcos_r50-caffe_fpn_gn-head_1x_coco").model
    del fcos.bbox_head["num_classes"]
    set_num_classes(fcos, 3)
    assert fcos.bbox_head.num_classes == 3
    rpn = find_config("faster-rcnn_r50_fpn_fcos-rpn_1x_coco").model
    set_num_classes(rpn, 3)
    assert (rpn.rpn_head.num_classes, rpn.roi_head.bbox_head.num_classes) == (1, 3)


@pytest.mark.parametrize(
    "section",
    [
        {"data": 5},
        {"train_dataloader": [1]},
        {"val_dataloader": {"dataset": "coco"}},
        {"test_dataloader": {"dataset": {"pipeline": "Resize"}}},
        {"test_dataloader": {"dataset": {"pipeline": [{"scale": 1}]}}},
        {"data": {"test": {"pipeline": [None]}}},
        {"test_pipeline": 3},
        {"train_cfg": "12 epochs"},
        {"img_norm_cfg": True},
        {"default_hooks": ["CheckpointHook"]},
    ],
)
def test_sections_of_another_layout_are_named(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected .*dict\(.*\. Correct it"):
        modernise(Config({"model": {"type": "FasterRCNN"}, **section}))
