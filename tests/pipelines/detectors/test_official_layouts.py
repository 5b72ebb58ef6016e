"""Checkpoints laid out as those that mmdet 2.x published, read without what only the training of the teacher needs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from mmengine.config import Config

from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.demo.drawing import CLASS_NAMES
from kdpipe.pipelines.detectors.configs import find_config

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

PUBLISHED = {
    "Mask R-CNN X101 InstaBoost": "mask_rcnn_x101_64x4d_fpn_instaboost_4x_coco",
    "Cascade Mask R-CNN X101 InstaBoost": "cascade_mask_rcnn_x101_64x4d_fpn_instaboost_4x_coco",
    "HTC X101 DCN": "htc_x101_64x4d_fpn_dconv_c3-c5_mstrain_400_1400_16x1_20e_coco",
}
NORM = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True}


def text_of_mmdet2(config: Config) -> str:
    """The config as mmdet 2.0 wrote it into checkpoints, of the same model."""
    model: dict[str, Any] = config.model.to_dict()
    del model["data_preprocessor"]
    model["pretrained"] = "open-mmlab://resnext101_64x4d"
    train_cfg, test_cfg = model.pop("train_cfg"), model.pop("test_cfg")
    for part in (train_cfg["rpn_proposal"], test_cfg["rpn"]):
        nms, count = part.pop("nms"), part.pop("max_per_img")
        part.update(nms_thr=nms["iou_threshold"], max_num=count, nms_post=count, nms_across_levels=False)
    test_cfg["rcnn"]["nms"]["iou_thr"] = test_cfg["rcnn"]["nms"].pop("iou_threshold")
    layers = [part for name, part in model["roi_head"].items() if name.endswith("roi_extractor") and part]
    for layer in (extractor["roi_layer"] for extractor in layers):
        layer["out_size"], layer["sample_num"] = layer.pop("output_size"), layer.pop("sampling_ratio")
    if "dcn" in model["backbone"]:
        model["backbone"]["dcn"]["deformable_groups"] = model["backbone"]["dcn"].pop("deform_groups")
    if "semantic_head" in model["roi_head"]:
        semantic = model["roi_head"]["semantic_head"]
        del semantic["loss_seg"]
        semantic.update(ignore_label=255, loss_weight=0.2)
    train = [
        {"type": "LoadImageFromFile"},
        {"type": "InstaBoost", "action_candidate": ("normal", "horizontal", "skip"), "action_prob": (1, 0, 0)},
        {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
        {"type": "Albu", "transforms": [{"type": "ShiftScaleRotate", "p": 0.5}], "keymap": {"img": "image"}},
        {"type": "Resize", "img_scale": (1333, 800), "keep_ratio": True},
        {"type": "Collect", "keys": ["img", "gt_bboxes", "gt_labels", "gt_masks"]},
    ]
    steps = [
        {"type": "Resize", "keep_ratio": True},
        {"type": "RandomFlip"},
        {"type": "Normalize", **NORM},
        {"type": "Pad", "size_divisor": 32},
        {"type": "ImageToTensor", "keys": ["img"]},
        {"type": "Collect", "keys": ["img"]},
    ]
    flip = {"type": "MultiScaleFlipAug", "img_scale": (128, 96), "flip": False, "transforms": steps}
    test = [{"type": "LoadImageFromFile"}, flip]
    paths = {"ann_file": "data/coco/annotations/instances_train2017.json", "img_prefix": "data/coco/train2017/"}
    data = {"type": "CocoDataset", **paths}
    parts = {
        "train": {**data, "pipeline": train},
        "val": {**data, "pipeline": test},
        "test": {**data, "pipeline": test},
    }
    text: str = Config(
        {
            "model": model,
            "train_cfg": train_cfg,
            "test_cfg": test_cfg,
            "dataset_type": "CocoDataset",
            "data_root": "data/coco/",
            "img_norm_cfg": NORM,
            "train_pipeline": train,
            "test_pipeline": test,
            "data": {"imgs_per_gpu": 2, "workers_per_gpu": 2, **parts},
            "evaluation": {"metric": ["bbox", "segm"]},
            "optimizer": {"type": "SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 0.0001},
            "optimizer_config": {"grad_clip": None},
            "lr_config": {"policy": "step", "warmup": "linear", "step": [32, 44]},
            "total_epochs": 48,
            "checkpoint_config": {"interval": 1},
            "log_config": {"interval": 50, "hooks": [{"type": "TextLoggerHook"}]},
            "dist_params": {"backend": "nccl"},
            "log_level": "INFO",
            "load_from": None,
            "resume_from": None,
            "workflow": [("train", 1)],
        }
    ).pretty_text
    return text


def published(path: Path, modern: Path, config: Config) -> Path:
    """The weights of a checkpoint of mmdet 3.x as mmdet 2.x published them."""
    meta: dict[str, Any] = {
        "env_info": "sys.platform: linux\nPyTorch: 1.5.0",
        "mmdet_version": "2.0.0+unknown",
        "mmcv_version": "0.5.9",
        "seed": None,
        "config": text_of_mmdet2(config),
        "CLASSES": CLASS_NAMES,
        "exp_name": "teacher.py",
        "epoch": 48,
        "iter": 351840,
        "time": "Fri May 15 11:00:00 2020",
        "hook_msgs": {},
    }
    state = torch.load(modern, weights_only=True)["state_dict"]
    torch.save({"meta": meta, "state_dict": state}, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``:UserWarning")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_teachers_load(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for package in ("instaboostfast", "albumentations"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    config = kit.tiny(PUBLISHED[name])
    assert config.model.backbone.depth == find_config(PUBLISHED[name]).model.backbone.depth == 101
    modern = kit.save_detector(work / "modern.pth", config)
    teacher = published(work / "published.pth", modern, config)
    assert any("mask_head" in key for key in torch.load(teacher, weights_only=True)["state_dict"])
    ended = kit.run("cache-teacher", "--ckpt", teacher, *kit.data, "--proposals", 40, "--dry-run")
    assert "features" in ended.out
    predictions = ("--proposals", 40, "--targets", "predictions", "--dtype", "float32", "--limit", 2)
    for ckpt in (modern, teacher):
        kit.run("cache-teacher", "--ckpt", ckpt, *kit.data, *predictions, "--out", ckpt.with_suffix(".zarr"))
    old_cache, new_cache = (open_cache(ckpt.with_suffix(".zarr")) for ckpt in (teacher, modern))
    assert old_cache.spec == new_cache.spec
    for image_id in old_cache.image_ids.tolist():
        one, two = old_cache.targets(image_id), new_cache.targets(image_id)
        assert all(torch.equal(getattr(one, field), getattr(two, field)) for field in ("boxes", "logits", "deltas"))


def test_what_is_not_of_a_mask_branch_has_to_be_there(kit: "Kit", work: Path) -> None:
    config = kit.tiny(PUBLISHED["Cascade Mask R-CNN X101 InstaBoost"])
    modern = kit.save_detector(work / "modern.pth", config)
    content = torch.load(modern, weights_only=True)
    weight = content["state_dict"].pop("roi_head.bbox_head.1.fc_cls.weight")
    content["state_dict"]["roi_head.bbox_head.3.fc_cls.weight"] = weight
    torch.save(content, work / "bad.pth")
    message = kit.refused("cache-teacher", "--ckpt", work / "bad.pth", *kit.data, "--proposals", 40, "--dry-run")
    assert "1 missing: roi_head.bbox_head.1.fc_cls.weight" in message
    assert "1 unexpected: roi_head.bbox_head.3.fc_cls.weight" in message
