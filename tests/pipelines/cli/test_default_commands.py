"""The two commands with nothing else on the line, in a folder that follows mmdet's conventions."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torchvision
from mmdet.datasets import CocoDataset
from mmengine.runner.checkpoint import get_torchvision_models

from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.training.options import SCHEDULES

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

COCO = CocoDataset.METAINFO["classes"]
NOT_IN_COCO = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_IDS = [number for number in range(1, 91) if number not in NOT_IN_COCO]


@pytest.fixture
def folder(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`data/coco`, `x101.pth` in the layout of mmdet's own weights, and torchvision's weights of the backbone."""
    for split, ann, images, count in (("train", kit.ann, kit.img, 2), ("val", kit.val_ann, kit.val_img, 1)):
        content = json.loads(ann.read_text())
        kept_images = content["images"][:count]
        ids = {image["id"] for image in kept_images}
        boxes = [
            {**box, "category_id": COCO_IDS[7 * box["category_id"]]}
            for box in content["annotations"]
            if box["image_id"] in ids
        ]
        categories = [{"id": number, "name": name} for number, name in zip(COCO_IDS, COCO, strict=True)]
        target = work / "data" / "coco" / "annotations" / f"instances_{split}2017.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"images": kept_images, "annotations": boxes, "categories": categories}))
        shutil.copytree(images, work / "data" / "coco" / f"{split}2017")
    teacher = kit.config("faster-rcnn_x101-64x4d_fpn_1x_coco", classes=80)
    kit.save_detector(work / "x101.pth", teacher, classes=COCO)
    weights = work / "torch" / "hub" / "checkpoints" / get_torchvision_models()["resnet50"].rpartition("/")[2]
    weights.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet50().state_dict(), weights)
    monkeypatch.setenv("TORCH_HOME", str(work / "torch"))
    return work


def check(folder: Path) -> None:
    """The cache holds the training images, and the student began with the backbone's weights."""
    cache = open_cache(folder / "coco.zarr")
    assert (len(cache), cache.spec.tier, cache.spec.dtype, cache.spec.proposals) == (2, "pyramid", "int4", 512)
    assert cache.spec.class_names == COCO
    work_dir = folder / "work_dirs" / "faster-rcnn_r50_fpn_1x_coco_sgfi-ckd-pred"
    student = torch.load(work_dir / "student.pth", weights_only=True)["state_dict"]
    (file,) = (folder / "torch" / "hub" / "checkpoints").iterdir()
    stem = torch.load(file, weights_only=True)["conv1.weight"]
    assert torch.equal(student["backbone.conv1.weight"], stem)  # frozen
    assert student["roi_head.bbox_head.fc_cls.weight"].shape == (81, 1024)
    assert json.loads((work_dir / "result.json").read_text())["ap"] is not None


@pytest.mark.slow
def test_with_little_else_on_the_line(kit: "Kit", folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with small images, and one epoch instead of the schedule's twelve."""
    monkeypatch.setitem(SCHEDULES, "1x", 1)
    assert "coco.zarr: 2 images" in kit.run("cache-teacher", "--ckpt", "x101.pth", "--scale", "333x200").out
    kit.run("train-student", "--cache", "coco.zarr")
    check(folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_as_users_type_it(folder: Path) -> None:
    kdpipe = Path(sys.executable).with_name("kdpipe")
    train = ("train-student", "--cache", "coco.zarr", "--epochs", "1")  # of the twelve
    for command in (("cache-teacher", "--ckpt", "x101.pth"), train):
        done = subprocess.run([kdpipe, *command], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert "AP" in done.stdout
    check(folder)


def test_where_there_is_no_data(kit: "Kit", folder: Path) -> None:
    (folder / "data").rename(folder / "elsewhere")
    message = kit.refused("cache-teacher", "--ckpt", "x101.pth")
    assert "data/coco/annotations/instances_train2017.json" in message
    assert "--ann-file" in message


def test_where_the_pretrained_weights_cannot_be_had(kit: "Kit", folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder / "torch" / "hub")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody answers there
    kit.run("cache-teacher", "--ckpt", "x101.pth", "--targets", "predictions")
    message = kit.refused("train-student", "--cache", "coco.zarr", "--methods", "pred")
    assert "could not be downloaded" in message
    assert "init_cfg=None" in message
