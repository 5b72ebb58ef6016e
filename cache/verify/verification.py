"""Whether a cache is complete, and everything in it as it was written; and removing what is not."""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe.cache.codecs import Block
from kdpipe.cache.format.record import check_digests, part_folder, read_part_record, read_record
from kdpipe.cache.format.root import Root, read_root
from kdpipe.cache.store.files import discard, explained, temporary_state
from kdpipe.cache.verify.chunks import check_file, read_layout
from kdpipe.cache.verify.fault import Fault
from kdpipe.cache.verify.part import Task, check_part, stray_files

__all__ = ["Fault", "Verification", "remove_faults", "verify_cache"]

_STATES = {
    "dead": "was left behind by a process that ended",
    "alive": "is being written by a process of this machine",
    "elsewhere": "is, or was, being written by a process of another machine",
}

# Is told how many bytes of how many were read.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verification:
    """What `verify_cache` found.

    Attributes:
        images: in the plan.
        skipped: of these, recorded as unreadable by the run that made the cache.
        parts: in the plan.
        missing: numbers of the parts that were never committed.
        bytes_read: size of all files that were checked.
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


def verify_cache(path: Path, progress: Progress, threads: int | None = None) -> Verification:
    """Read every byte of a cache, and check sizes, digests, checksums, shapes, the index, and that floats are finite.

    Memory is that of the plan and of a few chunks.

    Args:
        path: folder of the cache.
        progress: is called several times a second.
        threads: that read and decode; None takes one per core.

    Raises:
        CacheError: there is no cache at `path`, or its root is damaged, without which nothing can be said of the rest.
    """
    root = read_root(path)
    with explained("Reading the cache", path):
        faults, notes = _check_root(path, root)
        digest = root.digest
        records = {n: read_part_record(path, n, span, digest) for n, span in enumerate(root.parts)}
        total = sum(size for record in records.values() if record for size, _ in record["files"].values())
        skipped = sum(len(record["skipped"]) for record in records.values() if record)
        known = {number for number, record in records.items() if record}
        del records  # those of a large cache take more memory than all else
        missing = []
        for number in sorted(set(range(len(root.parts))) - known):
            there = os.path.lexists(part_folder(path, number))
            ids = root.image_ids[root.parts[number].start : root.parts[number].stop]
            remove = part_folder(Path(), number) if there else None
            faults.append(Fault(f"part {number}", _no_record(there), number, None, tuple(ids.tolist()), remove))
            if not there:
                missing.append(number)
        count = _Count()
        faults += _run(_tasks(path, root, known, faults, count), count, total, progress, threads)
    faults.sort(key=lambda fault: (fault.part is not None, fault.part or 0))
    images = len(root.image_ids)
    return Verification(images, skipped, len(root.parts), tuple(missing), count.done, tuple(faults), tuple(notes))


def remove_faults(path: Path, found: Verification) -> list[Path]:
    """Remove what is wrong, in one atomic act each, so that `cache-teacher` with the same options makes it anew.

    Returns:
        What was removed, relative to the cache.

    Raises:
        CacheError: it cannot be removed.
    """
    wanted = sorted({fault.remove for fault in found.faults if fault.remove is not None})
    whole = [place for place in wanted if not set(place.parents) & set(wanted)]
    with explained("Removing damaged parts", path):
        for place in whole:
            discard(path / place)
    return whole


def _check_root(path: Path, root: Root) -> tuple[list[Fault], list[str]]:
    """What is wrong beside parts and head, and what is noteworthy."""
    record = read_record(path) or {"files": {}}
    faults = [Fault("the root", wrong, repairable=False) for wrong in check_digests(path, record)]
    starts = root.part_starts
    sound = (starts[0], starts[-1]) == (0, len(root.image_ids)) and bool((np.diff(starts) > 0).all())
    if not sound or len(np.unique(root.image_ids)) < len(root.image_ids):
        faults.append(Fault("the root", "has a plan that gives some image to no part, or to two", repairable=False))
    notes = []
    parts = (str(part_folder(Path(), number)) for number in range(len(root.parts)))
    for name in stray_files(path, {"zarr.json", *record["files"], "head", *parts}):  # head and parts: see there
        state = temporary_state(Path(name).name)
        if state in ("alive", "elsewhere"):
            notes.append(f"{name} {_STATES[state]}")
        elif state == "dead":
            faults.append(Fault(name, _STATES[state], remove=Path(name)))
        else:
            faults.append(Fault(name, "does not belong there: remove it by hand", repairable=False))
    return faults, notes


def _tasks(path: Path, root: Root, known: set[int], faults: list[Fault], count: _Count) -> Iterator[Task]:
    """The checks of all files of the head and of the parts; what is wrong with the latter's index goes to `faults`."""
    yield lambda tick: _check_head(path, root)
    spans, digest = root.parts, root.digest
    for number in sorted(known):
        record = read_part_record(path, number, spans[number], digest)
        if record is None:
            continue
        ids = root.image_ids[spans[number].start : spans[number].stop]
        wrong, tasks = check_part(part_folder(path, number), number, ids, record, root.spec, count)
        faults += wrong
        yield from tasks


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
    done, rest = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
    for future in done:
        faults += future.result()
    return rest


def _check_head(path: Path, root: Root) -> list[Fault]:
    """Everything of the teacher's head: it is small, and read as one."""
    folder, place = path / "head", Path("head")
    record: dict[str, Any] | None = read_record(folder)
    if record is None:
        there = os.path.lexists(folder)
        return [Fault("the head", _no_record(there), remove=place if there else None)]
    if record.get("root") != root.digest:
        return [Fault("the head", "was made for another cache", remove=place)]
    files = record["files"]
    faults = [
        Fault("the head", f"{name} does not belong there", remove=place / name)
        for name in stray_files(folder, {"zarr.json", *files})
    ]
    try:
        wrong = check_digests(folder, record)
        for name in [] if wrong else record["parameters"]:
            wrong += _check_parameter(folder, name, files, root.spec.codec)
    except OSError as error:
        wrong = [f"{error.filename} cannot be read: {error.strerror}"]
    return [*faults, *(Fault("the head", line, array=line.split("/")[0], remove=place) for line in wrong)]


def _check_parameter(folder: Path, name: str, files: Mapping[str, Any], codec: str) -> list[str]:
    """What is wrong with the values of a parameter whose files are as they were written."""
    if f"{name}/zarr.json" not in files:
        return [f"{name}/zarr.json is not among what was written"]
    try:
        layout = read_layout((folder / name / "zarr.json").read_bytes(), codec)
    except ValueError as error:
        return [f"{name}/zarr.json is damaged: {error}"]

    def look(number: int, block: Block) -> tuple[str, Block] | None:
        fine = block.dtype.kind != "f" or bool(np.isfinite(block).all())
        return None if fine else ("has values that are not finite", np.ones(1, dtype=bool))

    wrong = []
    for file, chunks in layout.files().items():
        size, digest = files.get(f"{name}/{file}", (0, ""))
        found = check_file(folder / name / file, size, digest, layout, chunks, look, lambda size: None)
        wrong += [f"{name}/{file} {one.reason}" for one in found]
    return wrong


def _no_record(there: bool) -> str:
    return "has a damaged commit record (zarr.json)" if there else "is missing"
