"""Commit records: what makes a part (or the head, or a cache) exist, and which files belong to it.

A record is the attribute `kdpipe` of a group's `zarr.json`, and appears last. Its files lie in a folder beside it that
bears the beginning of the sha256 of their list, `files.json`: so two that write the same part never write to the same
file unless it is the same.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdpipe.cache.identity import canonical_json, digest_json
from kdpipe.cache.store.location import RECORD, Location, part_key

# Size in bytes and sha256 of each file, by its path in the folder of files.
Files = dict[str, tuple[int, str]]
FILES = "files.json"
_NAME_DIGITS = 16


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
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"kdpipe": record}}
    (folder / RECORD).write_bytes(canonical_json(group))


def parse_record(data: bytes | None) -> dict[str, Any] | None:
    """The record in a `zarr.json`; None where there is none, or it is not as it was written."""
    try:
        record = json.loads(data or b"")["attributes"]["kdpipe"]
        checksum = record.pop("checksum")
        whole = isinstance(record["files"], str) and checksum == digest_json(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if whole else None


def read_record(location: Location, key: str) -> dict[str, Any] | None:
    """The record of a group; None where there is none that is whole."""
    return parse_record(location.read(f"{key}/{RECORD}" if key else RECORD))


def read_part_record(location: Location, index: int, images: range, root: str) -> dict[str, Any] | None:
    """The record of a part, if it is valid.

    Args:
        location: of the cache.
        index: number of the part.
        images: that the plan gives to this part.
        root: `Root.digest` of the cache: a part that was made for another one is none.
    """
    record = read_record(location, part_key(index))
    wanted = {"part": index, "images": [images.start, images.stop], "root": root}
    if record is None or any(record.get(name) != value for name, value in wanted.items()):
        return None
    return record


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
    return {name: (size, sha) for name, (size, sha) in json.loads(data).items()}


def check_sizes(location: Location, key: str, files: Files) -> list[str]:
    """Lines naming the files that cannot be found or have another size than recorded. Reads no data."""
    found = location.sizes(key, files)
    lines = []
    for name, (size, _) in sorted(files.items()):
        if name not in found:
            lines.append(f"{name} is missing")
        elif found[name] != size:
            lines.append(f"{name} has {found[name]} bytes instead of {size}")
    return lines


def is_whole(location: Location, key: str, record: Mapping[str, Any]) -> bool:
    """Whether all files of a group are there in the recorded sizes."""
    place = files_key(key, record)
    files = read_files(location, place, record["files"])
    return files is not None and not check_sizes(location, place, files)
