"""Detection labels of BDD100K, read as COCO JSON is."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from kdpipe.pipelines.data.annotations import LeftOut
from kdpipe.pipelines.data.coco import CocoFile, check_entries, check_folder
from kdpipe.pipelines.data.coco_entries import (
    AnnotationEntry,
    CategoryEntry,
    CocoEntries,
    DataError,
    ImageEntry,
    decode_json,
    read_bytes,
)

__all__ = ["BDD_CLASSES", "read_bdd"]

BDD_CLASSES = (
    *("pedestrian", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
    *("traffic light", "traffic sign"),
)
# The names of 2018 and those that are not counted, as BDD100K's own det.toml maps them.
_RENAMED = {"person": "pedestrian", "bike": "bicycle", "motor": "motorcycle", "caravan": "car", "van": "car"}
_NOT_COUNTED = {"other person": "pedestrian", "other vehicle": "car", "trailer": "truck"}
_LABELS = {name: label for label, name in enumerate(BDD_CLASSES)}


class _Box(msgspec.Struct, gc=False):
    x1: float
    y1: float
    x2: float
    y2: float


class _Attributes(msgspec.Struct, gc=False):
    crowd: Any = None
    ignored: Any = None


class _Label(msgspec.Struct, gc=False):
    category: str
    box2d: _Box | None = None
    attributes: _Attributes | None = None


class _Size(msgspec.Struct, gc=False):
    width: int = 1280  # of all images of BDD100K
    height: int = 720


class _Frame(msgspec.Struct, gc=False):
    name: str
    labels: list[_Label] | None = None
    size: _Size | None = None


class _Config(msgspec.Struct, rename="camel"):
    image_size: _Size | None = None


class _Frames(msgspec.Struct):
    frames: list[_Frame]
    config: _Config | None = None


def read_bdd(path: Path, img_dir: Path) -> CocoFile:
    """Reads the detection labels of a split: the JSON of 2018, or one of the files of a split since 2020.

    Both are lists of frames, with the boxes of each; also as Scalabel's object with ``frames``. Boxes are those of
    BDD100K's own conversion to COCO: corners are whole pixels that belong to the box. Of other persons, other vehicles
    and trailers, and what is marked as a crowd or ignored, become crowds, which neither training nor AP count. Images
    get the ids 1, 2, ... in the order of the file, and are of 1280 x 720 pixels where it does not say so.

    Args:
        path: such as ``labels/det_20/det_train.json``, or ``bdd100k_labels_images_train.json``.
        img_dir: such as ``images/100k/train``.

    Raises:
        DataError: the file is missing or malformed, or there is nothing to learn from.
    """
    frames, size = _read(path)
    check_folder(img_dir)
    _check_names(frames, path)
    images: list[ImageEntry] = []
    boxes: list[AnnotationEntry] = []
    strange: list[str] = []
    counts: Counter[str] = Counter()
    for image_id, frame in enumerate(frames, 1):
        pixels = frame.size or size
        images.append(ImageEntry(image_id, frame.name, width=pixels.width, height=pixels.height))
        for each in frame.labels or ():
            if each.box2d is None:
                counts["no box"] += 1
                continue
            counts[each.category] += 1
            name = _RENAMED.get(each.category, _NOT_COUNTED.get(each.category, each.category))
            if name not in _LABELS:
                strange.append(f"a {each.category!r} in {frame.name}")
                continue
            boxes.append(_annotation(len(boxes) + 1, image_id, each, each.box2d, _LABELS[name]))
    categories = [CategoryEntry(label, name) for label, name in enumerate(BDD_CLASSES, 1)]
    content = check_entries(CocoEntries(images, boxes, categories), path, img_dir)
    kind = "boxes of other classes than the ten of BDD100K"
    absent = (LeftOut(len(strange), kind, strange[0]),) if strange else ()
    return replace(content, absent=absent, notes=(*_notes(counts), *content.notes))


def _read(path: Path) -> tuple[list[_Frame], _Size]:
    data = read_bytes(path, "Give the detection labels of a split of BDD100K as --bdd.")
    try:
        content = decode_json(data, list[_Frame] | _Frames)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise DataError(
            f"{path} is no file of BDD100K's detection labels: {error}. Expected a list of frames with name and "
            "labels, each with category and box2d, such as det_train.json or bdd100k_labels_images_train.json. A COCO "
            "JSON is given as --ann-file."
        ) from error
    if isinstance(content, list):
        return content, _Size()
    return content.frames, (content.config and content.config.image_size) or _Size()


def _check_names(frames: Sequence[_Frame], path: Path) -> None:
    name, count = Counter(frame.name for frame in frames).most_common(1)[0] if frames else ("", 0)
    if count > 1:
        raise DataError(f"{path} names image {name} {count} times. Name each image once.")


def _annotation(index: int, image_id: int, each: _Label, box: _Box, label: int) -> AnnotationEntry:
    sides = [box.x2 - box.x1 + 1, box.y2 - box.y1 + 1]
    attributes = each.attributes or _Attributes()
    crowd = each.category in _NOT_COUNTED or bool(attributes.crowd) or bool(attributes.ignored)
    return AnnotationEntry(index, image_id, label + 1, [box.x1, box.y1, *sides], sides[0] * sides[1], int(crowd))


def _notes(counts: Counter[str]) -> list[str]:
    """What was done to the labels, in words."""
    notes = []
    if counts["no box"]:
        notes.append(f"labels without a box, as of lanes and drivable areas, are not read: {counts['no box']:,}")
    if renamed := [f"{old} as {new}" for old, new in _RENAMED.items() if counts[old]]:
        notes.append(f"classes are named as since 2020: {', '.join(renamed)}")
    if others := [f"{name} ({counts[name]:,})" for name in _NOT_COUNTED if counts[name]]:
        notes.append(f"not counted, as in BDD100K's own benchmark: {', '.join(others)}")
    return notes
