"""Commit records: what makes a part (or the head, or a cache) exist, and which files belong to it.

A record is the attribute `kdpipe` of a group's `zarr.json`, and appears last. Its files lie in a folder beside it that
bears the beginning of the sha256 of their list, `files.json`: so two that write the same part never write to the same
file unless it is the same.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.head import HEAD, is_head
from kdpipe.cache.format.layout import PER
from kdpipe.cache.identity import canonical_json, digest_json
from kdpipe.cache.plan import MAX_PART_IMAGES
from kdpipe.cache.store.location import RECORD, Location, part_key

# Size in bytes and sha256 of each file, by its path in the folder of files.
Files = dict[str, tuple[int, str]]
FILES = "files.json"
_NAME_DIGITS = 16

# Numbers beyond this are none of bytes or rows.
_MAX_SIZE = 1 << 48
_MAX_IMAGES = 1 << 26


def write_record(folder: Path, content: Mapping[str, Any], files: Files, within: str = "") -> None:
    """Finish a group: list its files, give their folder its name, and write the record.

    Args:
        folder: of the group; the files are below its sub-folder `new`, or `within`/new.
        content: JSON values.
        files: below that sub-folder.
        within: folder of the group in which the folder of files is.
    """
    listed = canonical_json({name: list(entry) for name, entry in sorted(files.items())})
    digest = hashlib.sha256(listed).hexdigest()
    (folder / within / "new" / FILES).write_bytes(listed)
    (folder / within / "new").rename(folder / within / digest[:_NAME_DIGITS])
    record = {**content, "files": digest}
    record["checksum"] = digest_json(record)
    (folder / RECORD).write_bytes(_group(record))


def _group(record: Mapping[str, Any]) -> bytes:
    """The `zarr.json` that holds a record."""
    return canonical_json({"zarr_format": 3, "node_type": "group", "attributes": {"kdpipe": record}})


def parse_record(data: bytes | None) -> dict[str, Any] | None:
    """The record in a `zarr.json`; None where there is none, or it is not byte for byte as it was written.

    Its entry `files` is a sha256. What else is in it may be anything that is JSON: see `read_part_record` and the like.
    """
    try:
        record = json.loads(data or b"")["attributes"]["kdpipe"]
        whole = data == _group(record)
        checksum = record.pop("checksum")
        whole = whole and is_digest(record["files"]) and checksum == digest_json(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, CacheError):
        return None
    return record if whole else None


def read_record(location: Location, key: str) -> dict[str, Any] | None:
    """The record of a group; None where there is none that is whole."""
    return parse_record(location.read(f"{key}/{RECORD}" if key else RECORD))


def read_part_record(location: Location, index: int, images: range, root: str) -> dict[str, Any] | None:
    """The record of a part, if there is a valid one: see `parse_part_record`.

    Args:
        location: of the cache.
        index: of the part.
        images: the positions in the plan of those that it has to have.
        root: digest of the cache's root.
    """
    return parse_part_record(location.read(f"{part_key(index)}/{RECORD}"), index, images, root)


def parse_part_record(data: bytes | None, index: int, images: range, root: str) -> dict[str, Any] | None:
    """The record of a part, if it is valid: every entry is there, and of its type.

    Args:
        data: the part's `zarr.json`.
        index: number of the part.
        images: that the plan gives to this part.
        root: `Root.digest` of the cache: a part that was made for another one is none.
    """
    record = parse_record(data)
    expected = {"part": index, "images": [images.start, images.stop], "root": root}
    if record is None or any(record.get(name) != value for name, value in expected.items()):
        return None
    rows, skipped = record.get("rows"), record.get("skipped")
    sound = isinstance(rows, dict) and rows.keys() == set(PER) and all(map(is_size, rows.values()))
    return record if sound and isinstance(skipped, list) and all(map(_is_skipped, skipped)) else None


def read_head_record(location: Location) -> dict[str, Any] | None:
    """The record of the head, if it is whole and its parameters are some that can be stored."""
    record = read_record(location, HEAD)
    if record is None or not isinstance(record.get("root"), str) or not is_head(record.get("parameters")):
        return None
    return record


def parse_root_record(data: bytes) -> dict[str, Any] | None:
    """The record of a cache, if it is whole and every entry is there, and of its type; `spec` may be any mapping."""
    record = parse_record(data)
    groups = ("spec", "identity", "metadata", "plan")
    if record is None or not all(isinstance(record.get(name), dict) for name in groups):
        return None
    plan, counts = record["plan"], ("images", "parts", "part_size")
    if plan.keys() != {*counts, "digest"} or not is_digest(plan["digest"]) or not all(is_size(plan[n]) for n in counts):
        return None
    most = min(_MAX_IMAGES, plan["parts"] * MAX_PART_IMAGES)
    return record if plan["parts"] <= plan["images"] <= most else None


def is_size(value: Any) -> bool:
    """Whether a JSON value is a number of bytes or rows."""
    return type(value) is int and 0 <= value < _MAX_SIZE


def is_digest(value: Any) -> bool:
    """Whether a JSON value is a sha256 in hexadecimal digits."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_skipped(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"image_id", "file_name", "reason"}:
        return False
    texts = isinstance(entry["file_name"], str) and isinstance(entry["reason"], str)
    return texts and type(entry["image_id"]) is int and -(1 << 63) <= entry["image_id"] < 1 << 63


def files_key(key: str, record: Mapping[str, Any]) -> str:
    """Key of the folder of a group's files; those of the root lie below `plan`."""
    return f"{key}/{record['files'][:_NAME_DIGITS]}"


def read_files(location: Location, key: str, digest: str) -> Files | None:
    """The list of a group's files; None where it is missing or not as it was written.

    Args:
        location: of the cache.
        key: of the folder of files.
        digest: sha256 of the list, as the record has it.
    """
    data = location.read(f"{key}/{FILES}")
    if data is None or hashlib.sha256(data).hexdigest() != digest:
        return None
    try:
        entries = json.loads(data)
        files = {name: (size, sha) for name, (size, sha) in entries.items() if is_size(size) and is_digest(sha)}
        sound = len(files) == len(entries) and all(map(_is_file, files)) and data == canonical_json(entries)
    except (ValueError, TypeError, AttributeError, RecursionError, CacheError):
        return None
    return files if sound else None


def _is_file(name: str) -> bool:
    """Whether a path leads to a file below the folder that it is relative to."""
    return all(part.isprintable() and part.strip(".") for part in name.split("/"))


def files_below(files: Files, name: str) -> Files:
    """Those of the files that lie in a folder, such as an array's, by their names in it."""
    return {file.removeprefix(f"{name}/"): entry for file, entry in files.items() if file.startswith(f"{name}/")}


def check_sizes(location: Location, key: str, files: Files) -> list[str]:
    """Lines naming the files that cannot be found or have another size than recorded. Reads no data.

    Args:
        location: of the cache.
        key: folder of the files.
        files: size and sha256 of each, by name.
    """
    stored_sizes = location.sizes(key, files)
    lines = []
    for name, (size, _) in sorted(files.items()):
        if name not in stored_sizes:
            lines.append(f"{name} is missing")
        elif stored_sizes[name] != size:
            lines.append(f"{name} has {stored_sizes[name]} bytes instead of {size}")
    return lines


def whole_files(location: Location, key: str, record: Mapping[str, Any]) -> Files | None:
    """The files of a group; None where one is not there in its size, or their list is not as it was written.

    Args:
        location: of the cache.
        key: of the group.
        record: its commit record.
    """
    place = files_key(key, record)
    files = read_files(location, place, record["files"])
    return None if files is None or check_sizes(location, place, files) else files


def is_whole(location: Location, key: str, record: Mapping[str, Any]) -> bool:
    """Whether all files of a group are there in the recorded sizes.

    Args:
        location: of the cache.
        key: of the group.
        record: its commit record.
    """
    return whole_files(location, key, record) is not None
