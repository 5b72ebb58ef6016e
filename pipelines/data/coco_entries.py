"""Entries of a COCO JSON, decoded from its bytes; what is in their fields is not checked yet."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.data.foreign import foreign_file, foreign_folder, foreign_json

__all__ = [
    "NO_MASK",
    "AnnotationEntry",
    "CategoryEntry",
    "CocoEntries",
    "DataError",
    "ImageEntry",
    "annotation_chunks",
    "decode_json",
    "read_bytes",
    "read_entries",
]

NO_MASK = msgspec.Raw()
_CHUNK = 20_000
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


class _File(msgspec.Struct):
    images: list[ImageEntry]
    annotations: list[msgspec.Raw]
    categories: list[CategoryEntry]


@dataclass(frozen=True)
class CocoEntries:
    """What is read of a COCO JSON; `annotation_chunks` gives the annotations, some of which may be JSON still."""

    images: list[ImageEntry]
    annotations: list[Any]  # of msgspec.Raw or of AnnotationEntry
    categories: list[CategoryEntry]


def read_entries(path: Path) -> CocoEntries:
    """Decodes a COCO JSON in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        DataError: there is no such file, it is no JSON, or no COCO JSON.
    """
    data = read_bytes(path, "Give the COCO JSON of the data set as --ann-file.")
    try:
        file = decode_json(data, _File)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return _decode_leniently(path, data)
    return CocoEntries(file.images, file.annotations, file.categories)


def annotation_chunks(entries: CocoEntries, path: Path) -> Iterator[list[AnnotationEntry]]:
    """The annotations in the order of the file, some at a time; decoded all at once, they are five times the file.

    They can be had once: what is read is let go.

    Raises:
        DataError: one is not an object.
    """
    decode = msgspec.json.Decoder(AnnotationEntry).decode
    for start in range(0, len(entries.annotations), _CHUNK):
        chunk = entries.annotations[start : start + _CHUNK]
        entries.annotations[start : start + _CHUNK] = [None] * len(chunk)
        if isinstance(chunk[0], AnnotationEntry):
            yield chunk
            continue
        try:
            yield list(map(decode, chunk))
        except msgspec.DecodeError:  # no object, or with a number that Python's json reads as infinity
            objects = [_object(json.loads(bytes(entry)), "annotations", path) for entry in chunk]
            yield [AnnotationEntry(**_fields(entry, AnnotationEntry)) for entry in objects]
    entries.annotations.clear()


def decode_json(data: bytes, kind: Any) -> Any:
    """Decodes JSON in UTF-8, UTF-16 or UTF-32, with or without a byte order mark, as a type that msgspec knows.

    Raises:
        DecodeError: of msgspec: it is no JSON, or not of this type.
        UnicodeError: it is not in that encoding.
    """
    encoding = json.detect_encoding(data)
    return msgspec.json.decode(data if encoding == "utf-8" else data.decode(encoding), type=kind)


def read_bytes(path: Path, advice: str) -> bytes:
    """The bytes of an annotation file; `advice` says what to give where there is none.

    Raises:
        DataError: it is missing, empty, a folder, or cannot be read.
    """
    if path.is_dir():
        raise DataError(f"annotation file {path} is a folder. {foreign_folder(path)}")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"annotation file {path} does not exist. {advice}") from error
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
        hint = foreign_file(path, data)
        raise DataError(
            f"annotation file {path} is no COCO JSON. {hint}"
            if hint
            else f"annotation file {path} is not valid JSON: {error}. Download or export it again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in _LISTS):
        content_kind = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        if isinstance(content, dict) and content.keys() >= set(_LISTS):
            wrong = next(key for key in _LISTS if not isinstance(content[key], list))
            raise DataError(
                f"{path}: {wrong} is {json.dumps(content[wrong])[:80]}, expected a list of objects. Export it again."
            )
        raise DataError(
            f"{path} is not a COCO detection file: expected lists named images, annotations and categories, "
            f"found {content_kind[:200] or 'nothing'}. {foreign_json(content) or 'Export the data set as COCO.'}"
        )
    for key in _LISTS:
        for entry in content[key]:
            _object(entry, key, path)
    return CocoEntries(
        [ImageEntry(**_fields(entry, ImageEntry)) for entry in content["images"]],
        [AnnotationEntry(**_fields(entry, AnnotationEntry)) for entry in content["annotations"]],
        [CategoryEntry(**_fields(entry, CategoryEntry)) for entry in content["categories"]],
    )


def _object(entry: Any, key: str, path: Path) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise DataError(f"{path}: an entry of {key} is {str(entry)[:80]!r}, expected an object with named fields.")
    return entry


def _fields(entry: Mapping[str, Any], kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The fields of an entry that are read."""
    fields = {name: entry[name] for name in kind.__struct_fields__ if name in entry}
    if "segmentation" in fields:
        fields["segmentation"] = msgspec.Raw(json.dumps(fields["segmentation"]).encode())
    return fields
