"""A config that trains masks on annotations without them is refused, with what leaves the mask branch out."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mmengine.config import Config

from kdpipe.pipelines.data.coco_entries import DataError
from kdpipe.pipelines.data.datasets import load_coco
from kdpipe.pipelines.data.mask_check import check_masks
from kdpipe.pipelines.detectors.configs import apply_options, find_config

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

MASK_RCNN = "mask-rcnn_r50_fpn_1x_coco"


def with_masks(kit: "Kit", path: Path, every: int) -> Path:
    """The annotations of the kit, every so many of them with a mask."""
    content: dict[str, Any] = json.loads(kit.ann.read_text())
    for index, box in enumerate(content["annotations"]):
        box.pop("segmentation", None)
        x, y, w, h = box["bbox"]
        if every and index % every == 0:
            box["segmentation"] = [[x, y, x + w, y, x + w, y + h]]
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("every", [0, 2])
def test_masks_that_are_missing(kit: "Kit", tmp_path: Path, every: int) -> None:
    cfg, data = find_config(MASK_RCNN), load_coco(with_masks(kit, tmp_path / "a.json", every), kit.img)
    with pytest.raises(DataError, match=r"of \d+ annotations of .*a.json have none") as refused:
        check_masks(cfg, data)
    options = re.findall(r"-o (\S+)", str(refused.value))
    assert options == [
        "model.roi_head.mask_roi_extractor=None",
        "model.roi_head.mask_head=None",
        "train_dataloader.dataset.pipeline.1.with_mask=False",
    ]
    check_masks(apply_options(cfg, options), data)


def test_masks_that_are_there_or_not_wanted(kit: "Kit", tmp_path: Path) -> None:
    full, none = (load_coco(with_masks(kit, tmp_path / f"{n}.json", n), kit.img) for n in (1, 0))
    check_masks(find_config(MASK_RCNN), full)
    check_masks(find_config("faster-rcnn_r50_fpn_1x_coco"), none)


def test_where_boxes_need_masks(kit: "Kit", tmp_path: Path) -> None:
    data = load_coco(with_masks(kit, tmp_path / "a.json", 0), kit.img)
    with pytest.raises(DataError, match="A SOLO cannot do without them"):
        check_masks(find_config("solo_r50_fpn_1x_coco"), data)


def test_inside_a_wrapper(kit: "Kit", tmp_path: Path) -> None:
    data = load_coco(with_masks(kit, tmp_path / "a.json", 0), kit.img)
    inner = {"pipeline": [{"type": "LoadAnnotations", "with_mask": True}]}
    cfg = Config({"model": {"type": "X"}, "train_dataloader": {"dataset": {"dataset": inner, "pipeline": []}}})
    with pytest.raises(DataError, match=r"-o train_dataloader.dataset.dataset.pipeline.0.with_mask=False"):
        check_masks(cfg, data)
