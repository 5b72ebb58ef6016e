"""Whether a cache is complete, and everything in it as it was written; and removing what is not."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdpipe.cache.format.head import HEAD, parameter_layout
from kdpipe.cache.format.layout import Block
from kdpipe.cache.format.record import FILES, files_key, read_head_record, read_part_record, read_record
from kdpipe.cache.format.root import PLAN, Root
from kdpipe.cache.read.root import read_root
from kdpipe.cache.store.location import RECORD, Location, Place, open_location, part_key
from kdpipe.cache.verify.arrays import NO_LIST, GroupFiles, Tick, metadata_fault
from kdpipe.cache.verify.fault import Fault
from kdpipe.cache.verify.part import Task, check_part

__all__ = ["Verification", "remove_faults", "verify_cache"]

# Is told how many bytes of how many were read.
Progress = Callable[[int, int], None]
# The commit record of each group by its key, the plan's being that of the cache; None where there is none.
Records = dict[str, dict[str, Any] | None]
# The files of each group that has a record; None where their list is not as it was written.
Groups = dict[str, GroupFiles | None]


@dataclass(frozen=True)
class Verification:
    """What `verify_cache` found.

    Attributes:
        images: in the plan.
        skipped: of these, recorded as unreadable by the run that made the cache.
        parts: in the plan.
        missing: numbers of the parts that were never committed.
        bytes_read: size of all chunks that were checked.
        faults: everything that is not as it should be, missing parts included.
        notes: what is no fault, such as parts that are being written.
    """

    images: int
    skipped: int
    parts: int
    missing: tuple[int, ...]
    bytes_read: int
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]

    @property
    def bad_parts(self) -> tuple[int, ...]:
        """Numbers of the parts that have to be made, or made again."""
        return tuple(sorted({fault.part for fault in self.faults if fault.part is not None and not fault.is_stray}))


class _StoppedError(Exception):
    """Nobody waits for the rest."""


@dataclass
class _Count:
    """Bytes read so far by all threads; the threads stop where `stop` is set."""

    done: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, size: int) -> None:
        if self.stop.is_set():
            raise _StoppedError
        with self.lock:
            self.done += size


def verify_cache(place: Place, progress: Progress, threads: int | None = None) -> Verification:
    """Read every byte of a cache, and check sizes, digests, checksums, shapes, the index, and that floats are finite.

    Memory is that of the plan, the lists of files and a few chunks.

    Args:
        place: path, URL or location of the cache.
        progress: is called several times a second.
        threads: that read and decode; None takes one per core.

    Raises:
        CacheError: there is no cache, or its root is damaged, without which nothing can be said of the rest.
    """
    location = open_location(place)
    root = read_root(location)
    with location.explained("Reading the cache"):
        digest, spans = root.digest, root.parts
        numbers = range(len(spans))
        parts = location.at_once(lambda number: read_part_record(location, number, spans[number], digest), numbers)
        faults, missing = _without_record(location, root, parts)
        records: Records = {PLAN: read_record(location, ""), HEAD: read_head_record(location)}
        records |= {part_key(number): record for number, record in enumerate(parts)}
        present_records = [(key, record) for key, record in records.items() if record is not None]
        lists = location.at_once(lambda entry: GroupFiles.read(location, *entry), present_records)
        groups: Groups = {key: group for (key, _), group in zip(present_records, lists, strict=True)}
        known_keys, total = _known_files(records, groups)
        notes = _leftovers(location, known_keys, faults)
        skipped = sum(len(record["skipped"]) for record in parts if record)
        count = _Count()
        faults += _run(_tasks(location, root, records, groups, faults, count), count, total, progress, threads)
    faults.sort(key=lambda fault: (fault.part is not None, fault.part or 0))
    images = len(root.image_ids)
    return Verification(images, skipped, len(spans), missing, count.done, tuple(faults), tuple(notes))


def remove_faults(place: Place, verification: Verification) -> list[str]:
    """Remove what is wrong, in one atomic act each, so that `cache-teacher` with the same options makes it anew.

    Returns:
        Keys of what was removed.

    Raises:
        CacheError: it cannot be removed.
    """
    location = open_location(place)
    keys = sorted({fault.remove for fault in verification.faults if fault.remove is not None})
    whole = [key for key in keys if not any(key.startswith(f"{other}/") for other in keys)]
    with location.explained("Removing damaged parts"):
        for key in whole:
            location.discard(key)
    return whole


def _without_record(
    location: Location, root: Root, records: Sequence[dict[str, Any] | None]
) -> tuple[list[Fault], tuple[int, ...]]:
    """The parts that have to be made, and the numbers of those that were never committed."""
    faults, missing, spans = [], [], root.parts
    for number, record in enumerate(records):
        if record is None:
            has_record = location.read(f"{part_key(number)}/{RECORD}") is not None
            span = spans[number]
            ids = tuple(root.image_ids[span.start : span.stop].tolist())
            remove = part_key(number) if has_record else None
            faults.append(Fault(f"part {number}", _no_record(has_record), number, None, ids, remove))
            if not has_record:
                missing.append(number)
    return faults, tuple(missing)


def _known_files(records: Records, groups: Groups) -> tuple[set[str], int]:
    """Keys of all files that belong to the cache, one that ends in `/` for all below it; and the bytes of chunks."""
    keys, total = {RECORD}, 0
    for key, record in records.items():
        if record is None:
            keys.add(f"{key}/")  # it is a fault of its own
            continue
        place, group = files_key(key, record), groups[key]
        files = {} if group is None else group.files
        total += sum(size for name, (size, _) in files.items() if not name.endswith(RECORD))
        keys |= {RECORD if key == PLAN else f"{key}/{RECORD}", f"{place}/{FILES}"}
        keys |= {f"{place}/{name}" for name in files} or {f"{place}/"}
    return keys, total


def _leftovers(location: Location, known_keys: set[str], faults: list[Fault]) -> list[str]:
    """Notes on what is there and does not belong to the cache; what should not be there goes to `faults`."""
    notes = []
    for leftover in location.leftovers(known_keys):
        if not leftover.is_fault:
            notes.append(f"{leftover.key} {leftover.state}")
        else:
            remove = leftover.key if leftover.is_removable else None
            faults.append(Fault(leftover.key, leftover.state, remove=remove, repairable=leftover.is_removable))
    return notes


def _tasks(
    location: Location, root: Root, records: Records, groups: Groups, faults: list[Fault], count: "_Count"
) -> Iterator[Task]:
    """The checks of all files of the head and of the parts; what is wrong with the latter's index goes to `faults`."""
    yield lambda tick: _check_plan(groups.get(PLAN), root, tick)
    yield lambda tick: _check_head(location, records[HEAD], groups.get(HEAD), root, tick)
    for number, span in enumerate(root.parts):
        record = records[part_key(number)]
        if record is not None:
            ids = root.image_ids[span.start : span.stop]
            wrong, tasks = check_part(groups[part_key(number)], number, ids, record, root.spec, count)
            faults += wrong
            yield from tasks


def _check_plan(group: GroupFiles | None, root: Root, tick: Tick) -> list[Fault]:
    """What is wrong with the plan, beside what let it be read."""
    if group is None:
        return [Fault("the root", f"{PLAN}/{NO_LIST}", repairable=False)]
    chunks = [name for name in group.files if not name.endswith(RECORD)]  # the metadata were looked at when opened
    wrong = [f"{PLAN}/{name} {reason}" for name in chunks if (reason := group.wrong_file(name, tick))]
    if unknown := group.unknown_files(("image_ids", "part_starts")):
        wrong.append(f"{PLAN}/{FILES} {unknown}")
    if len(np.unique(root.image_ids)) < len(root.image_ids):
        wrong.append("has a plan that gives an image to two parts")
    return [Fault("the root", line, repairable=False) for line in wrong]


def _run(tasks: Iterator[Task], count: _Count, total: int, progress: Progress, threads: int | None) -> list[Fault]:
    """Run tasks on threads, a few ahead of what is done, and show progress meanwhile."""
    threads = threads or os.cpu_count() or 1
    faults: list[Fault] = []
    pending: set[Future[list[Fault]]] = set()
    with ThreadPoolExecutor(threads, thread_name_prefix="kdpipe-verify") as pool:
        try:
            for task in tasks:
                pending.add(pool.submit(task, count))
                while len(pending) > 4 * threads:
                    pending = _collect(pending, faults)
                    progress(count.done, total)
            while pending:
                pending = _collect(pending, faults)
                progress(count.done, total)
        finally:
            count.stop.set()
            pool.shutdown(cancel_futures=True)
    return faults


def _collect(pending: "set[Future[list[Fault]]]", faults: list[Fault]) -> "set[Future[list[Fault]]]":
    done, pending_still = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
    for future in done:
        faults += future.result()
    return pending_still


def _check_head(
    location: Location, record: dict[str, Any] | None, group: GroupFiles | None, root: Root, tick: Tick
) -> list[Fault]:
    """Everything of the teacher's head: it is small, and read as one."""
    if record is None:
        has_record = location.read(f"{HEAD}/{RECORD}") is not None
        return [Fault("the head", _no_record(has_record), remove=HEAD if has_record else None)]
    if record["root"] != root.digest:
        return [Fault("the head", "was made for another cache", remove=HEAD)]
    if group is None:
        return [Fault("the head", NO_LIST, remove=HEAD)]
    faults = []
    if unknown := group.unknown_files(record["parameters"]):
        faults.append(Fault("the head", f"{FILES} {unknown}", remove=HEAD))
    for name, entry in record["parameters"].items():
        lines = _check_parameter(group, name, entry, root.spec.codec, tick)
        faults += [Fault("the head", line, array=name, remove=HEAD) for line in lines]
    return faults


def _check_parameter(group: GroupFiles, name: str, entry: dict[str, Any], codec: str, tick: Tick) -> list[str]:
    """What is wrong with one parameter."""
    layout, rows = parameter_layout(entry, codec)
    if wrong := metadata_fault(group, name, layout, rows):
        return [f"{name}: {wrong}"]

    def check(first: int, block: Block) -> tuple[str, Block] | None:
        fine = block.dtype.kind != "f" or bool(np.isfinite(block).all())
        return None if fine else ("has values that are not finite", np.ones(len(block), dtype=bool))

    findings = [
        (file, finding)
        for file in layout.files(rows)
        for finding in group.check_file(name, file, layout, rows, check, tick)
    ]
    return list(dict.fromkeys(f"{name}/{file} {finding.reason}" for file, finding in findings))


def _no_record(has_record: bool) -> str:
    return "has a damaged commit record (zarr.json)" if has_record else "is missing"
