"""COCO JSON, read with every entry checked, and written."""

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.plan import ImageInfo
from kdpipe.pipelines.images import image_size

__all__ = ["Annotations", "CocoFile", "DataError", "read_coco", "write_json"]


class DataError(KdpipeError):
    """A data set is missing, malformed, empty, or not the one that is needed."""


@dataclass(frozen=True, eq=False)
class Annotations:
    """The boxes of a data set, sorted by image; those of image i are the rows [starts[i], starts[i + 1])."""

    boxes: npt.NDArray[np.float64]  # [M, 4] x, y, width, height in pixels
    areas: npt.NDArray[np.float64]  # [M] pixels, of the segmentation where there is one
    labels: npt.NDArray[np.int64]  # [M]
    crowds: npt.NDArray[np.bool_]  # [M]
    starts: npt.NDArray[np.int64]  # [images + 1]


@dataclass(frozen=True, eq=False)
class CocoFile:
    """What a COCO JSON holds, in its own order.

    Attributes:
        class_names: names of the categories.
        category_ids: ids of the same.
        images: `num_gt` counts the boxes that mmdet trains on.
        annotations: the boxes that mmdet reads, crowds included.
        is_complete: every field is there that mmdet and pycocotools read.
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[ImageInfo, ...]
    annotations: Annotations
    is_complete: bool


def read_coco(path: Path, img_dir: Path) -> CocoFile:
    """Reads and checks COCO JSON; see `kdpipe.pipelines.datasets.load_coco`."""
    content = _read_json(path)
    if not img_dir.is_dir():
        raise DataError(f"image folder {img_dir} does not exist. Give the folder of the images as --img-dir.")
    names, category_ids = _categories(content, path)
    images, sized = _images(content, path, img_dir)
    annotations, complete = _annotations(content, path, images, category_ids)
    counts = np.diff(np.concatenate([[0], np.cumsum(~annotations.crowds)])[annotations.starts])
    if not counts.any():
        raise DataError(
            f"{path} has no usable annotation among {len(content['annotations'])}: expected boxes at least one pixel "
            "wide and high, in their image, and not all crowds. Check that it is the file of a labelled split."
        )
    counted = tuple(replace(image, num_gt=int(count)) for image, count in zip(images, counts, strict=True))
    return CocoFile(names, category_ids, counted, annotations, complete and sized)


def _read_json(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        raise DataError(f"annotation file {path} does not exist. Give the COCO JSON of the data set as --ann-file.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"annotation file {path} is not valid JSON: {error}. Download or export it again.") from error
    wanted = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in wanted):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path} is not a COCO detection file: expected lists named images, annotations and categories, "
            f"found {found[:200] or 'nothing'}."
        )
    for key in wanted:
        for entry in content[key]:
            if not isinstance(entry, dict):
                raise DataError(
                    f"{path}: an entry of {key} is {str(entry)[:80]!r}, expected an object with named fields."
                )
    return content


def _integer(entry: Mapping[str, Any], key: str, what: str, path: Path) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63:
        raise DataError(f"{path}: {what} has {key} {value!r}, expected an integer. Export the file with integer ids.")
    return value


def _categories(content: Mapping[str, list[Any]], path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    entries = content["categories"]
    if not entries:
        raise DataError(f"{path} has no categories. Expected a list of id and name of each class.")
    ids = [_integer(entry, "id", "a category", path) for entry in entries]
    names = [entry.get("name") for entry in entries]
    if not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{path}: a category has no name. Give each of them one.")
    for what, values in (("category id", ids), ("category name", names)):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise DataError(f"{path}: {what} {twice[0]!r} occurs more than once. Give each class its own.")
    return tuple(names), tuple(ids)


def _images(content: Mapping[str, list[Any]], path: Path, img_dir: Path) -> tuple[list[ImageInfo], bool]:
    entries = content["images"]
    if not entries:
        raise DataError(f"{path} has no images: there is nothing to do. Check that it is the file of the right split.")
    images: dict[int, ImageInfo] = {}
    sized = True
    for entry in entries:
        image_id, name = _integer(entry, "id", "an image", path), entry.get("file_name")
        if image_id in images:
            raise DataError(f"{path}: image id {image_id} occurs more than once. Give each image its own id.")
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: image {image_id} has file_name {name!r}, expected a path relative to {img_dir}.")
        width, height = (_pixels(entry.get(key)) for key in ("width", "height"))
        if not (width and height):
            height, width = image_size(img_dir / name)
            sized = False
        images[image_id] = ImageInfo(image_id, name, height, width, 0)
    return list(images.values()), sized


def _pixels(value: Any) -> int:
    """A width or height; 0 where it is none."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 1
    return int(value) if usable else 0


def _annotations(
    content: Mapping[str, list[Any]], path: Path, images: Sequence[ImageInfo], category_ids: Sequence[int]
) -> tuple[Annotations, bool]:
    """The annotations that mmdet keeps, and whether none lacks a field that it needs."""
    rows = {image.image_id: row for row, image in enumerate(images)}
    labels = {category_id: label for label, category_id in enumerate(category_ids)}
    kept: list[tuple[int, int, bool, float, list[float]]] = []  # image row, label, crowd, area, box
    seen: set[Any] = set()
    complete = True
    for position, entry in enumerate(content["annotations"]):
        what = f"annotation {entry['id']}" if "id" in entry else f"annotation at position {position}"
        if "id" in entry:
            if not isinstance(entry["id"], int | str) or entry["id"] in seen:
                raise DataError(f"{path}: annotation id {entry['id']!r} occurs more than once. Give each its own id.")
            seen.add(entry["id"])
        image_id, category_id = (_integer(entry, key, what, path) for key in ("image_id", "category_id"))
        if image_id not in rows:
            raise DataError(
                f"{path}: {what} is of image {image_id}, which is not among the images. Remove it, or add it."
            )
        if category_id not in labels:
            raise DataError(
                f"{path}: {what} has category {category_id}, which is not among the categories "
                f"{list(category_ids)[:20]}. Remove it, or add the category."
            )
        box = _box(entry.get("bbox"), what, path)
        area = entry.get("area", box[2] * box[3])
        if not isinstance(area, int | float) or not math.isfinite(area):
            raise DataError(f"{path}: {what} has area {area!r}, expected a number of pixels. Correct or remove it.")
        complete = complete and {"id", "area", "iscrowd"} <= entry.keys()
        if not entry.get("ignore") and area > 0 and _is_visible(box, images[rows[image_id]]):
            kept.append((rows[image_id], labels[category_id], bool(entry.get("iscrowd")), float(area), box))
    kept.sort(key=lambda item: item[0])  # stable: keeps the file's order within an image
    annotations = Annotations(
        boxes=np.array([item[4] for item in kept], dtype=np.float64).reshape(-1, 4),
        areas=np.array([item[3] for item in kept], dtype=np.float64),
        labels=np.array([item[1] for item in kept], dtype=np.int64),
        crowds=np.array([item[2] for item in kept], dtype=np.bool_),
        starts=np.searchsorted([item[0] for item in kept], np.arange(len(images) + 1)).astype(np.int64),
    )
    return annotations, complete


def _box(value: Any, what: str, path: Path) -> list[float]:
    numbers = isinstance(value, list) and len(value) == 4
    if not numbers or not all(
        isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number) for number in value
    ):
        raise DataError(
            f"{path}: {what} has bbox {value!r}, expected four finite numbers [x, y, width, height]. "
            "Correct or remove it."
        )
    return [float(number) for number in value]


def _is_visible(box: Sequence[float], image: ImageInfo) -> bool:
    """mmdet's rule (CocoDataset.parse_data_info) for boxes that it uses at all."""
    x, y, width, height = box
    inside_x = min(x + width, image.width) - max(x, 0)
    inside_y = min(y + height, image.height) - max(y, 0)
    return width >= 1 and height >= 1 and inside_x > 0 and inside_y > 0


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a JSON file in one atomic act, also where several processes write the same; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    aside.write_text(json.dumps(content), encoding="utf-8")
    aside.replace(path)
    return path
