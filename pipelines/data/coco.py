"""COCO JSON, read with every entry checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from kdpipe.cache.plan import ImageInfo
from kdpipe.pipelines.data.annotation_columns import AnnotationColumns, integer, read_columns
from kdpipe.pipelines.data.annotations import Annotations, LeftOut, untrained_kinds
from kdpipe.pipelines.data.coco_entries import (
    CategoryEntry,
    CocoEntries,
    DataError,
    ImageEntry,
    annotation_chunks,
    read_entries,
)
from kdpipe.pipelines.data.file_names import names_on_disk
from kdpipe.pipelines.data.images import ImageError, image_size

__all__ = ["CocoFile", "check_entries", "check_folder", "read_coco"]

_MOST_PIXELS = 1 << 31  # more is no width
_UNREAD = (1, 1)  # size of an image that neither the file nor the image gives


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
    """Reads and checks COCO JSON; see `kdpipe.pipelines.data.datasets.load_coco`."""
    entries = read_entries(path)
    check_folder(img_dir)
    return check_entries(entries, path, img_dir)


def check_folder(img_dir: Path) -> None:
    """Refuses a folder of images that is not there.

    Raises:
        DataError: it is none.
    """
    if not img_dir.is_dir():
        state = "is no folder" if img_dir.exists() else "does not exist"
        raise DataError(f"image folder {img_dir} {state}. Give the folder of the images as --img-dir.")


def check_entries(entries: CocoEntries, path: Path, img_dir: Path) -> CocoFile:
    """Checks the entries of a COCO JSON; `path` is where messages say that they are from.

    Args:
        entries: Of the file.
        path: Where messages say that they are from.
        img_dir: Folder of the images.
    """
    columns = read_columns(annotation_chunks(entries, path), path)
    categories, notes = _without_double_roots(entries.categories, set(np.unique(columns.category_ids).tolist()))
    names, category_ids = _categories(categories, path)
    images, name_notes = _images(entries, path, img_dir)
    unread = [row for row, image in enumerate(images) if (image.height, image.width) == _UNREAD]
    annotations, absent = _annotations(columns, images, unread, category_ids)
    counts = annotations.trained_counts().tolist()
    if not any(counts):
        kinds = [*absent, *annotations.untrained([image.file_name for image in images])]
        reasons = "; ".join(map(str, kinds)) or "it has no annotation"
        raise DataError(
            f"{path} has no usable annotation among {len(columns.ids)}: {reasons}. Expected boxes at least one "
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
    notes += name_notes
    return CocoFile(names, category_ids, frozenset(roots), tuple(counted), annotations, absent, notes, federated)


def _is_text(value: Any) -> TypeGuard[str]:
    """Text with something in it that can be written; JSON may escape half a character."""
    return isinstance(value, str) and bool(value) and not any("\ud800" <= char <= "\udfff" for char in value)


def _id(value: Any, key: str, owner: str, path: Path) -> int:
    number = value if type(value) is int and abs(value) < 2**63 else integer(value)
    if number is None:
        raise DataError(f"{path}: {owner} has {key} {value!r}, expected an integer. Export the file with integer ids.")
    return number


def _without_double_roots(
    categories: Sequence[CategoryEntry], used: set[int]
) -> tuple[list[CategoryEntry], tuple[str, ...]]:
    """Leaves out a category without annotations that groups others and has the name of one of them, as Roboflow's."""
    names = [entry.name for entry in categories]
    groups = [
        entry
        for entry in categories
        if integer(entry.id) not in used
        and names.count(entry.name) > 1
        and any(other is not entry and other.supercategory == entry.name for other in categories)
    ]
    if not groups:
        return list(categories), ()
    note = f"category {groups[0].id} ({groups[0].name}) has no annotation and only groups others: it is dropped"
    return [entry for entry in categories if entry is not groups[0]], (note,)


def _categories(entries: Sequence[CategoryEntry], path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    if not entries:
        raise DataError(f"{path} has no categories. Expected a list of id and name of each class.")
    ids = [_id(entry.id, "id", "a category", path) for entry in entries]
    names = [entry.name for entry in entries]
    if not all(map(_is_text, names)):
        raise DataError(f"{path}: a category has no name. Give each of them one.")
    for column, values in (("category id", ids), ("category name", names)):
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise DataError(f"{path}: {column} {twice[0]!r} occurs more than once. Give each class its own.")
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
        ImageInfo(int(entry.id), name, *_size(entry, img_dir, name), 0)
        for entry, name in zip(entries.images, names, strict=True)
    ]
    return images, notes


def _file_name(entry: ImageEntry, path: Path, img_dir: Path) -> str:
    """Its file name, or as of LVIS (mmdet's LVISDataset) the path in its URL."""
    name = entry.file_name
    if name is None and isinstance(entry.coco_url, str):
        name = urlsplit(entry.coco_url).path.lstrip("/")
    if not _is_text(name):
        raise DataError(f"{path}: image {entry.id} has file_name {name!r}, expected a path relative to {img_dir}.")
    return name


def _size(entry: ImageEntry, img_dir: Path, name: str) -> tuple[int, int]:
    """Height and width, from the image where the entry has none; `_UNREAD` where that cannot be read either.

    All images are checked before they are used: then such a one is refused, or left out, as any other bad image.
    """
    height, width = _pixels(entry.height), _pixels(entry.width)
    if width and height:
        return height, width
    try:
        return image_size(img_dir / name)
    except ImageError:
        return _UNREAD


def _pixels(value: Any) -> int:
    """A width or height; 0 where it is none."""
    if type(value) not in (int, float):
        return 0
    return int(value) if 1 <= value < _MOST_PIXELS else 0


def _annotations(
    columns: AnnotationColumns, images: Sequence[ImageInfo], unread: Sequence[int], category_ids: Sequence[int]
) -> tuple[Annotations, tuple[LeftOut, ...]]:
    """The annotations of these images and categories, and what is said of the others."""
    rows = _positions(columns.image_ids, [image.image_id for image in images])
    labels = _positions(columns.category_ids, category_ids)
    absent = (
        _left_out(columns, rows < 0, "images", "image_id", columns.image_ids),
        _left_out(columns, (rows >= 0) & (labels < 0), "categories", "category_id", columns.category_ids),
    )
    order = np.argsort(rows, kind="stable")  # keeps the file's order within an image
    order = order[(rows[order] >= 0) & (labels[order] >= 0)]
    rows, boxes, areas = rows[order], columns.boxes[order], columns.areas[order]
    crowds, ignored = columns.crowds[order], columns.ignored[order]
    sizes = np.array([[image.width, image.height] for image in images], dtype=np.float64)
    sizes[unread] = np.inf
    masks = columns.segmentations
    annotations = Annotations(
        ids=columns.ids[order],
        boxes=boxes,
        areas=areas,
        labels=labels[order],
        crowds=crowds,
        ignored=ignored,
        kinds=untrained_kinds(boxes, areas, crowds, ignored, sizes[rows]),
        segmentations=None if masks is None else [masks[position] for position in order.tolist()],
        starts=np.searchsorted(rows, np.arange(len(images) + 1)).astype(np.int64),
    )
    return annotations, tuple(kind for kind in absent if kind.count)


def _left_out(
    columns: AnnotationColumns, mask: npt.NDArray[np.bool_], of: str, key: str, values: npt.NDArray[np.int64]
) -> LeftOut:
    count, example = int(mask.sum()), ""
    if count:
        position = int(np.argmax(mask))
        identity = columns.ids[position]
        name = f"annotation {identity}" if identity is not None else f"annotation at position {position}"
        example = f"{name} has {key} {values[position]}"
    return LeftOut(count, f"annotations of {of} that are not listed", example)


def _positions(values: npt.NDArray[np.int64], reference: Sequence[int]) -> npt.NDArray[np.int64]:
    """Position of each value in `reference`; -1 where it is not there."""
    known_values = np.array(reference, dtype=np.int64)
    order = np.argsort(known_values)
    nearest = order[np.searchsorted(known_values[order], values).clip(max=len(known_values) - 1)]
    positions: npt.NDArray[np.int64] = np.where(known_values[nearest] == values, nearest, -1)
    return positions
