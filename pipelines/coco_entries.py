"""Entries of a COCO JSON, decoded from its bytes; what is in their fields is not checked yet."""

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.foreign import foreign_file, foreign_folder, foreign_json

__all__ = ["NO_MASK", "AnnotationEntry", "CategoryEntry", "CocoEntries", "DataError", "ImageEntry", "read_entries"]

NO_MASK = msgspec.Raw()
_LISTS = ("images", "annotations", "categories")


class DataError(KdpipeError):
    """A data set is missing, malformed, empty, or not the one that is needed."""


# A million of them take no part in garbage collection; fields are of any type, so that whoever checks them can say
# what was found.
class ImageEntry(msgspec.Struct, gc=False):
    """What is read of an image."""

    id: Any = None
    file_name: Any = None
    coco_url: Any = None
    width: Any = None
    height: Any = None
    neg_category_ids: Any = None
    not_exhaustive_category_ids: Any = None


class AnnotationEntry(msgspec.Struct, gc=False):
    """What is read of an annotation; the mask stays JSON."""

    id: Any = None
    image_id: Any = None
    category_id: Any = None
    bbox: Any = None
    area: Any = None
    iscrowd: Any = None
    ignore: Any = None
    segmentation: msgspec.Raw = NO_MASK


class CategoryEntry(msgspec.Struct, gc=False):
    """What is read of a category."""

    id: Any = None
    name: Any = None
    supercategory: Any = None


class CocoEntries(msgspec.Struct):
    """What is read of a COCO JSON."""

    images: list[ImageEntry]
    annotations: list[AnnotationEntry]
    categories: list[CategoryEntry]


def read_entries(path: Path) -> CocoEntries:
    """Decodes a COCO JSON in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        DataError: there is no such file, it is no JSON, or no COCO JSON.
    """
    data = _bytes(path)
    encoding = json.detect_encoding(data)
    collects = gc.isenabled()
    gc.disable()  # it would look through millions of new lists again and again
    try:
        return msgspec.json.decode(data if encoding == "utf-8" else data.decode(encoding), type=CocoEntries)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return _decode_leniently(path, data)
    finally:
        if collects:
            gc.enable()


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(f"annotation file {path} is a folder. {foreign_folder(path)}")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"annotation file {path} does not exist. Give the COCO JSON of the data set as --ann-file."
        ) from error
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read: {error.strerror}.") from error
    if not data.strip():
        raise DataError(f"annotation file {path} is empty. Download or export it again.")
    return data


def _decode_leniently(path: Path, data: bytes) -> CocoEntries:
    """As Python's json reads it, which knows NaN and Infinity; several times slower, and says what is wrong."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        known = foreign_file(path, data)
        raise DataError(
            f"annotation file {path} is no COCO JSON. {known}"
            if known
            else f"annotation file {path} is not valid JSON: {error}. Download or export it again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in _LISTS):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path} is not a COCO detection file: expected lists named images, annotations and categories, "
            f"found {found[:200] or 'nothing'}. {foreign_json(content) or 'Export the data set as COCO.'}"
        )
    for key in _LISTS:
        for entry in content[key]:
            if not isinstance(entry, dict):
                raise DataError(
                    f"{path}: an entry of {key} is {str(entry)[:80]!r}, expected an object with named fields."
                )
    return CocoEntries(
        [ImageEntry(**_fields(entry, ImageEntry)) for entry in content["images"]],
        [AnnotationEntry(**_fields(entry, AnnotationEntry)) for entry in content["annotations"]],
        [CategoryEntry(**_fields(entry, CategoryEntry)) for entry in content["categories"]],
    )


def _fields(entry: Mapping[str, Any], kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The fields of an entry that are read."""
    fields = {name: entry[name] for name in kind.__struct_fields__ if name in entry}
    if "segmentation" in fields:
        fields["segmentation"] = msgspec.Raw(json.dumps(fields["segmentation"]).encode())
    return fields
