"""What gpu.py works on: pictures of COCO's sizes, teachers with random weights, and configs of students."""

import json
import math
from collections.abc import Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from kdpipe.pipelines.detectors.configs import find_config

TEACHERS = {"x101": "faster-rcnn_x101-64x4d_fpn_1x_coco", "r101": "faster-rcnn_r101_fpn_1x_coco"}
STUDENTS = {
    "faster-rcnn": "faster-rcnn_r50_fpn_1x_coco",
    "retinanet": "retinanet_r50_fpn_1x_coco",
    "fcos": "fcos_r50-caffe_fpn_gn-head_1x_coco",
}
# Width and height of COCO's images, as often as they are there in tenths.
SIZES = ((640, 480),) * 5 + ((480, 640),) * 2 + ((640, 427),) * 2 + ((500, 375),)
BOXES = 7  # per image, as in COCO


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        scale: `(w, h)` that images are fitted into.
        images: Pictures.
        shrink: Pictures have `1 / shrink` of COCO's sides.
        batch: Images per training step.
        steps: Of each training, beside a teacher in a cache.
        live_steps: Beside one that runs.
        left_out: First steps that do not count.
        workers: Of the loaders of trainings.
        rates: Numbers of workers whose rate is measured.
        proposals: Of the teacher, in a cache; None: as many as the tier has by default.
        rois: Per image, where a dense student or the teacher chooses them; None: the default.
        tiny: Detectors are a few channels wide.
    """

    scale: tuple[int, int] = (1333, 800)
    images: int = 64
    shrink: int = 1
    batch: int = 8
    steps: int = 30
    live_steps: int = 18
    left_out: int = 10
    workers: int = 8
    rates: tuple[int, ...] = (4, 8, 16)
    proposals: int | None = None
    rois: int | None = None
    tiny: bool = False


@cache
def classes() -> tuple[str, ...]:
    """COCO's."""
    from mmdet.datasets import CocoDataset  # which wants mmcv's ops, that kdpipe's import brought

    names: tuple[str, ...] = CocoDataset.METAINFO["classes"]
    return names


SMALL = Size(
    (128, 96),
    images=8,
    shrink=5,
    batch=2,
    steps=4,
    live_steps=3,
    left_out=1,
    workers=0,
    rates=(1,),
    proposals=40,
    rois=32,
    tiny=True,
)


def draw(folder: Path, size: Size) -> Path:
    """Draw the pictures, and write their annotations; returns these."""
    (folder / "images").mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(lambda number: _picture(folder / "images", number, size.shrink), range(size.images)))
    content: dict[str, list[Any]] = {
        "images": [image for image, _ in pictures],
        "annotations": [box for _, boxes in pictures for box in boxes],
        "categories": [{"id": number + 1, "name": name} for number, name in enumerate(classes())],
    }
    for number, box in enumerate(content["annotations"]):
        box["id"] = number + 1
    file = folder / "annotations.json"
    file.write_text(json.dumps(content))
    return file


def _picture(folder: Path, number: int, shrink: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A JPEG file of textured ellipses on textured ground, and its entries in COCO's format."""
    rng = np.random.default_rng(number)
    width, height = (side // shrink for side in SIZES[number % len(SIZES)])
    pixels = _texture(rng, width, height)
    boxes = []
    for _ in range(int(rng.integers(BOXES - 4, BOXES + 5))):
        sides = np.exp(rng.uniform(math.log(40), math.log(360), 2)) / shrink
        w, h = (max(4, int(min(side, most - 2))) for side, most in zip(sides, (width, height), strict=True))
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        mask = cv2.ellipse(np.zeros((h, w, 1), np.uint8), (w // 2, h // 2), (w // 2, h // 2), 0, 0, 360, 1, -1)
        window = pixels[y : y + h, x : x + w]
        window[:] = np.where(mask == 1, _texture(rng, w, h), window)
        label = int(rng.integers(len(classes())))
        entry = {"image_id": number + 1, "category_id": label + 1, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
        boxes.append(entry)
    name = f"{number:06d}.jpg"
    (folder / name).write_bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    return {"id": number + 1, "file_name": name, "width": width, "height": height}, boxes


def _texture(rng: np.random.Generator, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Noise of several sizes around a colour: a JPEG file of it has as many bytes as one of a photograph."""
    pixels = np.full((height, width, 3), rng.uniform(60, 200, 3), np.float32)
    for cell, strength in ((64, 40), (16, 20), (4, 9), (1, 16)):
        grid = rng.normal(0, strength, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        pixels += cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)
    return pixels.clip(0, 255).astype(np.uint8)


def teacher(path: Path, name: str, size: Size) -> Path:
    """A checkpoint of a Faster R-CNN with random weights, made unless it is there.

    Its RPN gives as many boxes as it may, about the anchors of coarse levels first; its classifier is sure of nothing.
    """
    if path.exists():
        return path
    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    config = find_config(TEACHERS[name] if not size.tiny else STUDENTS["faster-rcnn"])
    config.model.backbone.init_cfg = None
    if size.tiny:
        _shrink(config.model)
    model = MODELS.build(config.model)
    # large features, which those of fine levels are, make a low score: of the best boxes many are of the objects' sizes
    model.rpn_head.rpn_cls.weight.data.abs_().neg_()
    meta = {"cfg": config.pretty_text, "dataset_meta": {"classes": classes()}, "epoch": 12}
    aside = path.with_suffix(".tmp")
    torch.save({"state_dict": model.state_dict(), "meta": meta}, aside)
    return aside.rename(path)


def student(path: Path, name: str, size: Size, times: int) -> Path:
    """A config file of a student that begins with random weights and sees its images several times in an epoch."""
    config = Config(find_config(STUDENTS[name]).to_dict())
    config.model.backbone.init_cfg = None
    if size.tiny:
        _shrink(config.model)
    if name == "faster-rcnn":  # as many positive RoIs as a trained student has, whose boxes are near the objects
        config.model.train_cfg.rcnn.assigner.update(pos_iou_thr=0.3, neg_iou_thr=0.3, min_pos_iou=0.3)
        scores = {"type": "Constant", "name": "rpn_cls", "val": -0.01}  # as the teacher's: coarse levels first
        config.model.rpn_head.init_cfg = {"type": "Normal", "layer": "Conv2d", "std": 0.01, "override": scores}
    loader = config.train_dataloader
    loader.dataset = {"type": "RepeatDataset", "times": times, "dataset": loader.dataset}
    path.write_text(config.pretty_text)
    return path


def _shrink(model: MutableMapping[str, Any]) -> None:
    """A detector of a few channels."""
    model["backbone"].update(type="ResNet", depth=18, base_channels=8, init_cfg=None)
    for key in ("groups", "base_width"):
        model["backbone"].pop(key, None)
    _replace(model, {256: 32, 1024: 64})
    model["neck"]["in_channels"] = [8, 16, 32, 64]
    if "roi_head" in model:
        model["train_cfg"]["rpn_proposal"]["max_per_img"] = 50
        model["train_cfg"]["rcnn"]["sampler"]["num"] = 32


def _replace(part: Any, widths: Mapping[int, int]) -> None:
    """Other numbers of channels, in a part of a config and all that is in it."""
    if isinstance(part, MutableMapping):
        for key, value in part.items():
            if key.endswith("_channels") and isinstance(value, int):
                part[key] = widths.get(value, value)
            _replace(value, widths)
    elif isinstance(part, list | tuple):
        for value in part:
            _replace(value, widths)
