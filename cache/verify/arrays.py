"""Checks the arrays of a group: files by size and digest, values by looking at them."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kdpipe.cache.format.layout import ArrayLayout, Block
from kdpipe.cache.format.record import FILES, Files, files_key, read_files
from kdpipe.cache.read.arrays import ArrayReader, DamagedError, read_rows
from kdpipe.cache.store.location import GoneError, Location

NO_LIST = f"{FILES} is missing or has other content than was written"

# Is told how many bytes were read.
Tick = Callable[[int], None]
# What is wrong with values, given the number of the first row: a reason, and which of the rows; None where nothing is.
BlockCheck = Callable[[int, Block], "tuple[str, Block] | None"]


@dataclass(frozen=True)
class Finding:
    """Something wrong in a file of an array.

    Attributes:
        reason: to follow the name of the file.
        rows: of the array that it concerns.
        wrong: which of these rows; None where it may be all.
    """

    reason: str
    rows: range
    wrong: Block | None = None


@dataclass(frozen=True)
class GroupFiles:
    """The files of a part, the head or the plan.

    Attributes:
        location: of the cache.
        key: of the folder of files.
        files: size and digest by name.
    """

    location: Location
    key: str
    files: Files

    @classmethod
    def read(cls, location: Location, key: str, record: Mapping[str, Any]) -> "GroupFiles | None":
        """The files of the group of a key, whose record this is; None where their list is not as it was written.

        Args:
            location: of the cache.
            key: of the group.
            record: its commit record.
        """
        place = files_key(key, record)
        files = read_files(location, place, record["files"])
        return None if files is None else cls(location, place, files)

    def unknown_files(self, arrays: Collection[str]) -> str | None:
        """What is wrong with the list where files of none of the arrays are in it, to follow its name."""
        unknown = [name for name in self.files if name.split("/")[0] not in arrays]
        return f"lists {len(unknown)} files of no array, such as {unknown[0]}" if unknown else None

    def wrong_file(self, name: str, tick: Tick) -> str | None:
        """What is wrong with a file, every byte of which is read; None where nothing is."""
        size, expected = self.files[name]
        digest, count = hashlib.sha256(), 0
        try:
            for block in self.location.stream(f"{self.key}/{name}"):
                digest.update(block)
                count += len(block)
                tick(len(block))
        except GoneError:
            return "is missing"
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        if count != size:
            return f"has {count} bytes instead of {size}"
        return None if digest.hexdigest() == expected else "has other content than was written"

    def check_file(
        self, array: str, file: str, layout: ArrayLayout, rows: int, check: BlockCheck | None, tick: Tick
    ) -> list[Finding]:
        """Check one file of an array: its digest, then the checksum and the values of each of its chunks.

        Where the digest is wrong, the chunks tell which rows are damaged.

        Args:
            array: name of the array, whose `zarr.json` is as it was written.
            file: name of the file within the array.
            layout: of the array.
            rows: of the array.
            check: of the values; None takes them as they are.
            tick: is told how many bytes were read.
        """
        held = layout.files(rows)[file]
        wrong = self.wrong_file(f"{array}/{file}", tick)
        if wrong is None and check is None:
            return []
        try:
            reader = ArrayReader(self.location, self.key, array, layout, rows, self.files)
        except DamagedError:
            return [Finding(wrong or "cannot be opened", held)]
        findings = []
        for chunk in _chunks(held, layout.chunk_rows, one_by_one=wrong is not None):
            try:
                (block,) = read_rows([(reader, chunk)])
            except (DamagedError, OSError) as error:
                findings.append(Finding(wrong or str(error), chunk))
                continue
            if check is not None and (problem := check(chunk.start, block)):
                findings.append(Finding(problem[0], chunk, problem[1]))
        if wrong is not None and not any(finding.reason == wrong for finding in findings):
            findings.append(Finding(wrong, held))  # all chunks can be decoded: another file, or damaged between them
        return findings


def _chunks(rows: range, size: int, one_by_one: bool) -> Iterator[range]:
    """Rows chunk by chunk, or several chunks at a time where that is quicker and nothing is known to be wrong."""
    step = size if one_by_one else size * max(1, (1 << 16) // size)
    for start in range(rows.start, rows.stop, step):
        yield range(start, min(start + step, rows.stop))


def metadata_fault(group: GroupFiles, array: str, layout: ArrayLayout, rows: int) -> str | None:
    """What is wrong with an array's metadata and the sizes of its files; None where nothing is.

    Args:
        group: the files that the array is among.
        array: its name.
        layout: of the array.
        rows: how many it has.
    """
    try:
        ArrayReader(group.location, group.key, array, layout, rows, group.files)
    except DamagedError as error:
        return error.reason
    return None


def grouped(findings: list[Finding]) -> Mapping[str, list[Finding]]:
    """Findings by reason."""
    by_reason: dict[str, list[Finding]] = {}
    for finding in findings:
        by_reason.setdefault(finding.reason, []).append(finding)
    return by_reason
