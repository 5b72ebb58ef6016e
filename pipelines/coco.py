"""COCO JSON, read with every entry checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from kdpipe.cache.plan import ImageInfo
from kdpipe.pipelines.annotations import Annotations, LeftOut, untrained_kinds
from kdpipe.pipelines.coco_entries import NO_MASK, AnnotationEntry, CocoEntries, DataError, ImageEntry, read_entries
from kdpipe.pipelines.file_names import names_on_disk
from kdpipe.pipelines.images import image_size

__all__ = ["CocoFile", "check_entries", "read_coco"]


@dataclass(frozen=True, eq=False)
class CocoFile:
    """What a COCO JSON holds, in its own order.

    Attributes:
        class_names: names of the categories.
        category_ids: ids of the same.
        roots: names that are the supercategory of another category.
        images: `num_gt` counts the boxes that mmdet trains on.
        annotations: all boxes of these images and categories.
        absent: the other annotations.
        notes: what was done to the data, for the user.
        is_federated: each image has some of its classes annotated only, as LVIS has.
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    roots: frozenset[str]
    images: tuple[ImageInfo, ...]
    annotations: Annotations
    absent: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()
    is_federated: bool = False


def read_coco(path: Path, img_dir: Path) -> CocoFile:
    """Reads and checks COCO JSON; see `kdpipe.pipelines.datasets.load_coco`."""
    entries = read_entries(path)
    if not img_dir.is_dir():
        state = "is no folder" if img_dir.exists() else "does not exist"
        raise DataError(f"image folder {img_dir} {state}. Give the folder of the images as --img-dir.")
    return check_entries(entries, path, img_dir)


def check_entries(entries: CocoEntries, path: Path, img_dir: Path) -> CocoFile:
    """Checks the entries of a COCO JSON; `path` is where messages say that they are from."""
    names, category_ids = _categories(entries, path)
    images, notes = _images(entries, path, img_dir)
    annotations, absent = _annotations(entries.annotations, path, images, category_ids)
    counts = annotations.trained_counts().tolist()
    if not any(counts):
        found = [*absent, *annotations.untrained([image.file_name for image in images])]
        reasons = "; ".join(map(str, found)) or "it has no annotation"
        raise DataError(
            f"{path} has no usable annotation among {len(entries.annotations)}: {reasons}. Expected boxes at least one "
            "pixel wide and high, with an area, in their image, and not all crowds. Correct them, or check that it is "
            "the file of a labelled split."
        )
    counted = [
        ImageInfo(image.image_id, image.file_name, image.height, image.width, count)
        for image, count in zip(images, counts, strict=True)
    ]
    roots = {each.supercategory for each in entries.categories if isinstance(each.supercategory, str)} - {
        each.name for each in entries.categories if each.name == each.supercategory
    }
    federated = any(entry.neg_category_ids or entry.not_exhaustive_category_ids for entry in entries.images)
    return CocoFile(names, category_ids, frozenset(roots), tuple(counted), annotations, absent, notes, federated)


def _integer(value: Any) -> int | None:
    """An integer of 64 bits, also where it was written as 1.0; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def _id(value: Any, key: str, what: str, path: Path) -> int:
    number = _integer(value)
    if number is None:
        raise DataError(f"{path}: {what} has {key} {value!r}, expected an integer. Export the file with integer ids.")
    return number


def _categories(entries: CocoEntries, path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if not entries.categories:
        raise DataError(f"{path} has no categories. Expected a list of id and name of each class.")
    ids = [_id(entry.id, "id", "a category", path) for entry in entries.categories]
    names = [entry.name for entry in entries.categories]
    if not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{path}: a category has no name. Give each of them one.")
    for what, values in (("category id", ids), ("category name", names)):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise DataError(f"{path}: {what} {twice[0]!r} occurs more than once. Give each class its own.")
    return tuple(names), tuple(ids)


def _images(entries: CocoEntries, path: Path, img_dir: Path) -> tuple[list[ImageInfo], tuple[str, ...]]:
    """The images, none counted yet, and what was done to their names."""
    if not entries.images:
        raise DataError(f"{path} has no images: there is nothing to do. Check that it is the file of the right split.")
    ids: set[int] = set()
    for entry in entries.images:
        image_id = _id(entry.id, "id", "an image", path)
        if image_id in ids:
            raise DataError(f"{path}: image id {image_id} occurs more than once. Give each image its own id.")
        ids.add(image_id)
    names, notes = names_on_disk([_file_name(entry, path, img_dir) for entry in entries.images], img_dir)
    if all(entry.file_name is None for entry in entries.images):
        notes = (f"file names are those of coco_url (the first: {names[0]})", *notes)
    images = [
        ImageInfo(int(entry.id), name, *_size(entry, img_dir / name), 0)
        for entry, name in zip(entries.images, names, strict=True)
    ]
    return images, notes


def _file_name(entry: ImageEntry, path: Path, img_dir: Path) -> str:
    """Its file name, or as of LVIS (mmdet's LVISDataset) the path in its URL."""
    name = entry.file_name
    if name is None and isinstance(entry.coco_url, str):
        name = urlsplit(entry.coco_url).path.lstrip("/")
    if not isinstance(name, str) or not name:
        raise DataError(f"{path}: image {entry.id} has file_name {name!r}, expected a path relative to {img_dir}.")
    return name


def _size(entry: ImageEntry, image: Path) -> tuple[int, int]:
    """Height and width, from the image where the entry has none."""
    height, width = (_pixels(value) for value in (entry.height, entry.width))
    return (height, width) if width and height else image_size(image)


def _pixels(value: Any) -> int:
    """A width or height; 0 where it is none."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 1
    return int(value) if usable else 0


def _annotations(
    entries: Sequence[AnnotationEntry], path: Path, images: Sequence[ImageInfo], category_ids: Sequence[int]
) -> tuple[Annotations, tuple[LeftOut, ...]]:
    """The annotations of these images and categories, and what is said of the others."""
    columns = _Columns(entries, path)
    rows = _places(columns.integers("image_id"), [image.image_id for image in images])
    labels = _places(columns.integers("category_id"), category_ids)
    boxes = columns.boxes()
    areas = columns.areas(boxes)
    crowds, ignored = columns.flags("iscrowd"), columns.flags("ignore")
    absent = (
        columns.left_out(rows < 0, "annotations of images that are not listed", "image_id"),
        columns.left_out((rows >= 0) & (labels < 0), "annotations of categories that are not listed", "category_id"),
    )
    order = np.argsort(rows, kind="stable")  # keeps the file's order within an image
    order = order[(rows[order] >= 0) & (labels[order] >= 0)]
    rows, boxes, areas, crowds, ignored = rows[order], boxes[order], areas[order], crowds[order], ignored[order]
    sizes = np.array([[image.width, image.height] for image in images], dtype=np.float64)[rows]
    annotations = Annotations(
        ids=columns.ids()[order],
        boxes=boxes,
        areas=areas,
        labels=labels[order],
        crowds=crowds,
        ignored=ignored,
        kinds=untrained_kinds(boxes, areas, crowds, ignored, sizes),
        segmentations=columns.segmentations(order),
        starts=np.searchsorted(rows, np.arange(len(images) + 1)).astype(np.int64),
    )
    return annotations, tuple(kind for kind in absent if kind.count)


def _places(values: npt.NDArray[np.int64], known: Sequence[int]) -> npt.NDArray[np.int64]:
    """Place of each value among those known; -1 where it is not there."""
    wanted = np.array(known, dtype=np.int64)
    order = np.argsort(wanted)
    places = order[np.searchsorted(wanted[order], values).clip(max=len(wanted) - 1)]
    found: npt.NDArray[np.int64] = np.where(wanted[places] == values, places, -1)
    return found


class _Columns:
    """Fields of all annotations as arrays, checked at once; only where one is wrong, it is looked for."""

    def __init__(self, entries: Sequence[AnnotationEntry], path: Path) -> None:
        self.entries, self.path = entries, path

    def _refuse(self, position: int, key: str, expected: str) -> NoReturn:
        value = getattr(self.entries[position], key)
        raise DataError(f"{self.path}: {self.name(position)} has {key} {value!r}, expected {expected}.")

    def name(self, position: int) -> str:
        identity = self.entries[position].id
        return f"annotation at position {position}" if identity is None else f"annotation {identity}"

    def ids(self) -> npt.NDArray[Any]:
        values = [entry.id for entry in self.entries]
        if all(type(value) is int and abs(value) < 2**63 for value in values):
            return np.array(values, dtype=np.int64)
        column = np.empty(len(values), dtype=object)
        column[:] = values
        return column

    def integers(self, key: str) -> npt.NDArray[np.int64]:
        values = [getattr(entry, key) for entry in self.entries]
        if not all(type(value) is int and abs(value) < 2**63 for value in values):
            numbers = [_integer(value) for value in values]
            if None in numbers:
                self._refuse(numbers.index(None), key, "an integer. Export the file with integer ids")
            values = numbers
        return np.array(values, dtype=np.int64)

    def boxes(self) -> npt.NDArray[np.float64]:
        values = [entry.bbox for entry in self.entries]
        expected = "four finite numbers [x, y, width, height]. Correct or remove it"
        if not all(type(value) is list and len(value) == 4 for value in values):
            position = next(p for p, value in enumerate(values) if not isinstance(value, list) or len(value) != 4)
            self._refuse(position, "bbox", expected)
        column = self._numbers(list(chain.from_iterable(values)), 4, "bbox", expected)
        return column.reshape(-1, 4)

    def areas(self, boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        values = [entry.area for entry in self.entries]
        lacking = np.array([value is None for value in values], dtype=np.bool_)
        given = [0 if value is None else value for value in values]
        column = self._numbers(given, 1, "area", "a number of pixels. Correct or remove it")
        return np.where(lacking, boxes[:, 2] * boxes[:, 3], column)

    def _numbers(self, values: Sequence[Any], per_entry: int, key: str, expected: str) -> npt.NDArray[np.float64]:
        if not set(map(type, values)) <= {int, float}:
            place = next(p for p, value in enumerate(values) if type(value) not in (int, float))
            self._refuse(place // per_entry, key, expected)
        try:
            column = np.array(values, dtype=np.float64)
        except OverflowError:  # an integer beyond all floats
            place = next(p for p, value in enumerate(values) if abs(value) > 1e308)
            self._refuse(place // per_entry, key, expected)
        if not np.isfinite(column).all():
            self._refuse(int(np.argmin(np.isfinite(column))) // per_entry, key, expected)
        return column

    def flags(self, key: str) -> npt.NDArray[np.bool_]:
        values = [getattr(entry, key) for entry in self.entries]
        if not set(map(type, values)) <= {type(None), bool, int, float}:
            position = next(p for p, v in enumerate(values) if v is not None and not isinstance(v, int | float))
            self._refuse(position, key, "0 or 1. Correct it")
        return np.array([bool(value) for value in values], dtype=np.bool_)

    def segmentations(self, order: npt.NDArray[np.int64]) -> list[Any] | None:
        if all(entry.segmentation is NO_MASK for entry in self.entries):
            return None
        return [self.entries[position].segmentation for position in order.tolist()]

    def left_out(self, mask: npt.NDArray[np.bool_], kind: str, key: str) -> LeftOut:
        count, example = int(mask.sum()), ""
        if count:
            position = int(np.argmax(mask))
            example = f"{self.name(position)} has {key} {getattr(self.entries[position], key)}"
        return LeftOut(count, kind, example)
