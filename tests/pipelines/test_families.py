"""Every family, from mmdet's config by its name: cached, and some steps trained, at a tiny size."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mmengine.config import Config

from kdpipe.cache.reader import open_cache
from kdpipe.pipelines.configs import apply_options, find_config, set_num_classes
from kdpipe.pipelines.layouts import dictionaries
from kdpipe.pipelines.shapes import CLASS_NAMES
from kdpipe.pipelines.transforms import set_scale

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

SCALE = (128, 96)


def tiny(name: str, *options: str, channels: int = 8, fc: int = 16, levels: int = 5) -> Config:
    """A config of mmdet's zoo with the layers that it has, each of them narrow."""
    config = apply_options(find_config(name), options)
    model = config.model
    backbone = model.backbone
    backbone.update(base_channels=8, frozen_stages=-1, norm_eval=False, init_cfg=None)
    if backbone.type == "ResNeXt":
        backbone.update(groups=2, base_width=4)
    for part in dictionaries(model):
        for key, value in part.items():
            if key in ("in_channels", "feat_channels", "out_channels", "conv_out_channels") and value == 256:
                part[key] = channels
            if key == "fc_out_channels":
                part[key] = fc
            if key == "finest_scale":
                part[key] = 28
    model.neck.update(in_channels=[8, 16, 32, 64] if backbone.depth < 50 else [32, 64, 128, 256], num_outs=levels)
    strides = [4, 8, 16, 32, 64][:levels]
    model.rpn_head.anchor_generator.update(scales=[4], strides=strides)
    model.train_cfg.rpn_proposal.max_per_img = 50
    model.test_cfg.rpn.max_per_img = 50
    for stage in dictionaries(model.train_cfg.rcnn):
        if "sampler" in stage:
            stage["sampler"]["num"] = 32
    model.data_preprocessor.pop("batch_augments", None)
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        if loader.dataset.get("dataset"):  # a wrapper repeats it
            loader.dataset = loader.dataset.dataset
        loader.dataset.pipeline = set_scale(loader.dataset.pipeline, SCALE)
    set_num_classes(model, len(CLASS_NAMES))
    return config


def cached(kit: "Kit", work: Path, config: Config, *options: object) -> Path:
    """The cache of an untrained teacher."""
    ckpt, out = kit.save_detector(work / "teacher.pth", config), work / "teacher.zarr"
    kit.run("cache-teacher", "--ckpt", ckpt, *kit.data, *kit.VIEW, "--out", out, *options)
    return out


def trained(kit: "Kit", work: Path, cache: Path, config: Config, *options: object) -> list[dict[str, Any]]:
    """The log of an epoch of two steps."""
    student = work / "student.py"
    student.write_text(config.pretty_text)
    kit.train_student(work / "w", "--student", student, *options, cache=cache)
    (file,) = (work / "w").glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text().splitlines() if "loss" in line]


R50 = "faster-rcnn_r50_fpn_1x_coco"
BACKBONES = {
    "R18": ("faster-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco",),
    "R34": (R50, "model.backbone.depth=34"),
    "R50": (R50,),
    "R101": ("faster-rcnn_r101_fpn_1x_coco",),
    "R152": (R50, "model.backbone.depth=152"),
    "caffe": ("faster-rcnn_r50-caffe_fpn_1x_coco",),
    "X101-32x4d": ("faster-rcnn_x101-32x4d_fpn_1x_coco",),
    "R50-DCN": ("faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco",),
    "R50-DCNv2": ("faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco",),
    "X101-DCN": ("faster-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco",),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(kit: "Kit", work: Path, name: str) -> None:
    """As a teacher and as a student."""
    cache = cached(kit, work, tiny(*BACKBONES[name]))
    steps = trained(kit, work, cache, tiny(*BACKBONES[name]))
    for loss in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_careg"):
        assert all(step[loss] > 0 for step in steps), loss


def test_a_quarter_of_the_width(kit: "Kit", work: Path) -> None:
    """By the options that a user gives: nothing else of mmdet's config changes but the neck's input."""
    quarter = ("-o", "model.backbone.base_channels=16", "-o", "model.neck.in_channels=[64,128,256,512]")
    options = (*quarter, "-o", "model.backbone.init_cfg=None", "--scale", "128x96", "--batch-size", 4)
    ended = kit.run(
        *("train-student", "--cache", kit.cache, "--student", R50, "--work-dir", work / "w", "--epochs", 1),
        *("--workers", 0, "--methods", "sgfi,cls", *options),
    )
    assert "RoIs: those of the student" in ended.out
    assert (work / "w" / "student.pth").is_file()


@pytest.mark.parametrize("rois", ["student", "teacher"])
@pytest.mark.parametrize(("of_teacher", "of_student"), [(5, 4), (4, 5)])
def test_other_channels_widths_and_levels(kit: "Kit", work: Path, rois: str, of_teacher: int, of_student: int) -> None:
    cache = cached(kit, work, tiny(R50, channels=16, fc=24, levels=of_teacher))
    spec = open_cache(cache).spec
    assert (spec.channels, spec.embedding_dim, len(spec.strides)) == (16, 24, of_teacher)
    config = tiny("faster-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco", channels=8, fc=16, levels=of_student)
    steps = trained(kit, work, cache, config, "--rois", rois, "--methods", "sgfi,ckd,pred,reg")
    for loss in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_reg", "loss_kd_careg"):
        assert all(step[loss] > 0 for step in steps), loss
    weights = [step[f"sgfi_level{level}"] for step in steps for level in range(of_student)]
    assert sum(weights) == pytest.approx(len(steps), abs=1e-4)
