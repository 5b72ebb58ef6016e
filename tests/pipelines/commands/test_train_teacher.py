"""`kdpipe train-teacher`, as users type it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.detectors.checkpoints import register_safe_types

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

# A small detector from a config of mmdet's zoo.
NARROW = {
    "backbone.depth": 18,
    "backbone.base_channels": 8,
    "backbone.frozen_stages": -1,
    "backbone.norm_eval": False,
    "backbone.init_cfg": None,
    "neck.in_channels": [8, 16, 32, 64],
    "neck.out_channels": 8,
    "rpn_head.in_channels": 8,
    "rpn_head.feat_channels": 8,
    "roi_head.bbox_roi_extractor.out_channels": 8,
    "roi_head.bbox_head.in_channels": 8,
    "roi_head.bbox_head.fc_out_channels": 16,
}


def command(kit: "Kit", work_dir: Path) -> tuple[object, ...]:
    narrow = [word for key, value in NARROW.items() for word in ("-o", f"model.{key}={value}")]
    start = ("train-teacher", "--config", "faster-rcnn_r50_fpn_1x_coco", *kit.data, *kit.val, "--scale", "128x96")
    return (*start, "--epochs", 2, "--batch-size", 4, "--workers", 0, "--work-dir", work_dir, *narrow)


def test_trains_resumes_and_teaches(kit: "Kit", work: Path) -> None:
    ended = kit.run(*command(kit, work / "straight"))
    ap = json.loads((work / "straight" / "result.json").read_text())["ap"]
    assert f"{work / 'straight' / 'teacher.pth'}: AP {ap:.3f}" in ended.out.replace("\n", "")

    kit.interrupted(*command(kit, work / "resumed"))
    assert "already holds a training" in kit.refused(*command(kit, work / "resumed"))
    kit.run(*command(kit, work / "resumed"), "--resume")
    register_safe_types()
    states = [
        torch.load(work / name / "epoch_2.pth", weights_only=True)["state_dict"] for name in ("straight", "resumed")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    kit.run(
        "cache-teacher", "--ckpt", work / "straight" / "teacher.pth", *kit.data, "--proposals", 20, "--out", "x.zarr"
    )
    assert open_cache("x.zarr").spec.scale == (128, 96)  # as it was trained
    assert open_cache("x.zarr").spec.class_names == kit.classes


def test_annotations_without_areas(kit: "Kit", work: Path) -> None:
    """mmdet and pycocotools need ids, areas and crowd flags; files from elsewhere may come without."""
    content = json.loads(kit.ann.read_text())
    for box in content["annotations"]:
        del box["area"], box["iscrowd"]
    (work / "plain.json").write_text(json.dumps(content))
    plain = ("--ann-file", work / "plain.json", "--val-ann-file", work / "plain.json", "--val-img-dir", kit.img)
    kit.run(*command(kit, work / "w"), *plain, "--epochs", 1)
    assert json.loads((work / "w" / "result.json").read_text())["ap"] is not None


def test_needs_data(kit: "Kit") -> None:
    message = kit.refused("train-teacher", "--config", "faster-rcnn_r50_fpn_1x_coco", code=2)
    assert "--ann-file (or --bdd) and --img-dir" in message
