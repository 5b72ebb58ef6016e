"""Commit records: what makes a part (or the head, or a cache) exist, and whether its files are as recorded.

A record is the `kdpipe` attribute of a group's `zarr.json`. It carries the size and sha256 of each file below the
group and that of itself, and it is the last file written before the group gets its final name.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdpipe.cache.codecs import group_metadata
from kdpipe.cache.errors import CacheError
from kdpipe.cache.store.files import FileRecord, file_record, write_file

_BLOCK = 1 << 20
# A record begins with the sha256 of its file, taken with zeros in that place.
_START = b'{"attributes":{"kdpipe":{"checksum":"'
_BLANK = "0" * 64
# Keys are sorted, and only this is long: what a part lacks comes after it.
_AFTER_FILES = b',"images":['
_END = b'}},"node_type":"group","zarr_format":3}\n'


def part_folder(cache: Path, index: int) -> Path:
    """Folder of a part."""
    return cache / "parts" / f"{index:05d}"


def write_record(folder: Path, content: Mapping[str, Any], files: Mapping[str, FileRecord]) -> None:
    """Write the commit record of a group, as the last of its files.

    Args:
        folder: of the group.
        content: JSON values.
        files: size and digest of each file, by its path relative to `folder`.
    """
    record = {**content, "files": {name: list(entry) for name, entry in files.items()}}
    blank = group_metadata({"kdpipe": {"checksum": _BLANK, **record}})
    write_file(folder / "zarr.json", _START + _checksum(blank) + blank[len(_START) + len(_BLANK) :])


def parse_record(data: bytes) -> dict[str, Any] | None:
    """The record in the bytes of a `zarr.json`; None where it is not exactly as it was written."""
    end = len(_START) + len(_BLANK)
    if not data.startswith(_START) or _checksum(_START + _BLANK.encode() + data[end:]) != data[len(_START) : end]:
        return None
    record: dict[str, Any] = json.loads(data)["attributes"]["kdpipe"]
    del record["checksum"]
    return record


def read_record(folder: Path) -> dict[str, Any] | None:
    """The commit record of a group; None where there is none, or none that is whole."""
    try:
        return parse_record((folder / "zarr.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def read_part_record(cache: Path, index: int, images: range, root: str) -> dict[str, Any] | None:
    """The commit record of a part, if it is valid.

    Args:
        cache: path of the cache.
        index: number of the part.
        images: that the plan gives to this part.
        root: `Root.digest` of the cache: a part that was made for another one is none.
    """
    record = read_record(part_folder(cache, index))
    return record if record is not None and _belongs(record, index, images, root) else None


def _belongs(record: Mapping[str, Any], index: int, images: range, root: str) -> bool:
    wanted = {"part": index, "images": [images.start, images.stop], "root": root}
    return all(record.get(name) == value for name, value in wanted.items())


def read_skipped(cache: Path, index: int, images: range, root: str) -> list[dict[str, Any]] | None:
    """The images that could not be cached with a part, None where `read_part_record` finds no record.

    For opening a cache of many thousand parts: the checksum is taken of the whole record, but its list of files, which
    is most of it, is not parsed.
    """
    try:
        file = os.open(f"{part_folder(cache, index)}/zarr.json", os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        data = os.read(file, os.fstat(file).st_size)
    except IsADirectoryError:
        return None
    finally:
        os.close(file)
    end = len(_START) + len(_BLANK)
    digest = hashlib.sha256(_START + _BLANK.encode())
    digest.update(memoryview(data)[end:])
    if not data.startswith(_START) or digest.hexdigest().encode() != data[len(_START) : end]:
        return None
    after_files = data.find(_AFTER_FILES)
    if after_files < 0:
        return None  # the record of something else than a part
    record = json.loads(b"{" + data[after_files + 1 : -len(_END)] + b"}")
    if not _belongs(record, index, images, root):
        return None
    skipped: list[dict[str, Any]] = record["skipped"]
    return skipped


def check_sizes(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Lines naming the files of a group that cannot be found or have another size than recorded. Reads no data."""
    wrong = []
    for name, (size, _) in sorted(record["files"].items()):
        if reason := check_size(folder / name, size):
            wrong.append(f"{name} {reason}")
    return wrong


def check_size(file: Path, size: int) -> str | None:
    """What is wrong with a file that should have so many bytes, to follow its name; None where nothing is."""
    try:
        found = file.stat()
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    if not stat.S_ISREG(found.st_mode):
        return "is no file"
    return None if found.st_size == size else f"has {found.st_size} bytes instead of {size}"


def check_digests(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Lines naming the files of a group whose content is not as recorded. Reads every byte."""
    wrong = check_sizes(folder, record)
    if wrong:
        return wrong
    for name, (_, expected) in sorted(record["files"].items()):
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        if digest.hexdigest() != expected:
            wrong.append(f"{name} has other content than was written")
    return wrong


def check_metadata(folder: Path, record: Mapping[str, Any], array: str) -> str | None:
    """What is wrong with an array's `zarr.json` and the sizes of its files; None where nothing is."""
    entries = {name: entry for name, entry in record["files"].items() if name.startswith(f"{array}/")}
    name = f"{array}/zarr.json"
    if name not in entries:
        return f"{name} is not among what was written"
    if wrong := check_sizes(folder, {"files": entries}):
        return "; ".join(wrong)
    found = file_record((folder / name).read_bytes())
    return None if list(found) == entries[name] else f"{name} has other content than was written"


def require_group(folder: Path, what: str, remedy: str) -> dict[str, Any]:
    """The valid record of a group.

    Raises:
        CacheError: there is none.
    """
    record = read_record(folder)
    if record is None:
        state = "damaged" if folder.exists() else "missing"
        raise CacheError(f"{what} is {state} ({folder / 'zarr.json'}): {remedy}.")
    return record
