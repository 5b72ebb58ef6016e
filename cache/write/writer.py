"""Creates or resumes a cache and writes its parts."""

import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.record import check_sizes, part_folder, read_part_record, read_record, write_record
from kdpipe.cache.format.root import create_root, describe_plan, digest_root, read_root
from kdpipe.cache.identity import canonical_json, difference
from kdpipe.cache.plan import ImageInfo, plan_parts
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.store.files import FileRecord, discard, explained, publish, remove_stale, temporary_folder
from kdpipe.cache.write.arrays import write_array
from kdpipe.cache.write.part_writer import PartWriter


class CacheWriter:
    """Creates the cache at `path`, or goes on with it where it is one of the same identity.

    Any number of processes may write to one cache at once: a part appears in one atomic act, and of two that wrote the
    same part the second drops its own.

    Args:
        path: folder of the cache.
        spec: what is stored.
        images: all images of the data set, in order.
        part_size: raw bytes per part.
        identity: JSON values that say what the targets depend on, such as {"teacher": ..., "options": ...};
            compared when a cache is resumed.
        metadata: JSON values that are recorded, and not compared when a cache is resumed.

    Raises:
        CacheError: `path` is something else, is damaged, was made with another identity, specification, data set or
            part size (the message names what differs), or cannot be written. What is there stays untouched.
    """

    def __init__(
        self,
        path: Path,
        spec: CacheSpec,
        images: Sequence[ImageInfo],
        part_size: int,
        identity: Mapping[str, Any],
        metadata: Mapping[str, Any],
    ) -> None:
        self.path = Path(path)
        self.spec = spec
        self.images = tuple(images)
        self.parts = plan_parts(self.images, spec, part_size)
        canonical_json([identity, metadata])  # not JSON: say so before anything is made
        plan = describe_plan(self.images, self.parts, part_size)
        self._root = digest_root(spec, identity, plan)
        if not self.images:
            raise CacheError(f"There are no images to cache at {self.path}: check the annotation file.")
        with explained("Creating the cache", self.path):
            if not _is_there(self.path) and create_root(
                self.path, spec, self.images, self.parts, part_size, identity, metadata
            ):
                return
            root = read_root(self.path)
            found = {**root.identity, "spec": root.spec.to_json(), "plan": root.plan}
            _check_same(self.path, found, {**identity, "spec": spec.to_json(), "plan": plan})
            remove_stale(self.path.parent, self.path.name)  # of a process that was creating it, too
            remove_stale(self.path)
            remove_stale(self.path / "parts")

    def pending(self) -> list[int]:
        """Numbers of the parts that are not committed, or whose files are missing or cut short."""
        return [index for index in range(len(self.parts)) if not self._committed(index)]

    def write_head(self, state: Mapping[str, Tensor]) -> None:
        """Store the weights of the teacher's RPN and RoI head; does nothing where they are stored already.

        Args:
            state: by parameter name. Floating point becomes float32.

        Raises:
            CacheError: a name cannot be stored, or writing failed.
        """
        final = self.path / "head"
        for name in state:
            if "/" in name or name.startswith("__") or not name.strip(".") or name == "zarr.json":
                raise CacheError(f"The parameter name {name!r} cannot be the name of an array.")
        with explained("Writing the head", self.path):
            if self._head_stored():
                return
            folder = temporary_folder(final)
            try:
                files: dict[str, FileRecord] = {}
                for name in sorted(state):
                    values = state[name].detach()
                    if values.is_floating_point():
                        values = values.to(torch.float32)
                    written = write_array(folder / name, values.cpu().contiguous().numpy(), self.spec.codec)
                    files |= {f"{name}/{file}": entry for file, entry in written.items()}
                write_record(folder, {"parameters": sorted(state), "root": self._root}, files)
                while not publish(folder, final):
                    if self._head_stored():
                        return
                    discard(final)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def part(self, index: int) -> PartWriter:
        """The writer of one part, a context manager."""
        span = self.parts[index]
        return PartWriter(self.path, index, span, self.images[span.start : span.stop], self.spec, self._root)

    def _head_stored(self) -> bool:
        record = read_record(self.path / "head")
        return record is not None and record["root"] == self._root and not check_sizes(self.path / "head", record)

    def _committed(self, index: int) -> bool:
        with explained(f"Reading part {index}", self.path):
            record = read_part_record(self.path, index, self.parts[index], self._root)
            return record is not None and not check_sizes(part_folder(self.path, index), record)


def check_resumable(path: Path, spec: CacheSpec, identity: Mapping[str, Any], part_size: int) -> None:
    """Refuse a cache at `path` that `CacheWriter` would refuse whatever the data; do so before the data is read.

    Args:
        path: where the cache is or will be.
        spec: of the cache to write; its classes are not compared.
        identity: the part of the cache's identity that is known without the data.
        part_size: raw bytes per part.

    Raises:
        CacheError: `path` is something else, is damaged, or was made with something else; the message names what
            differs.
    """
    with explained("Reading the cache", path):
        if not _is_there(path):
            return
        root = read_root(path)
    known = {name: root.identity.get(name) for name in identity}
    wanted = replace(spec, class_names=root.spec.class_names, category_ids=root.spec.category_ids)
    _check_same(
        path,
        {**known, "spec": root.spec.to_json(), "plan": {"part_size": root.plan["part_size"]}},
        {**identity, "spec": wanted.to_json(), "plan": {"part_size": part_size}},
    )


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if lines := difference(found, wanted):
        raise CacheError(
            f"The cache {path} was made with something else, and stays as it is:\n  "
            + "\n  ".join(lines)
            + "\nUse the same options to go on with it, or choose another --out."
        )


def _is_there(path: Path) -> bool:
    """Whether there is something at a path that is not an empty folder.

    Raises:
        CacheError: it is no folder, or lies in another cache.
    """
    for place in path.resolve().parents:
        if (place / "zarr.json").exists():
            raise CacheError(f"{path} lies in the cache {place}: choose another --out.")
    try:
        mode = path.stat().st_mode  # asked once: another process may create it at any moment
    except FileNotFoundError:
        if not path.is_symlink():
            return False
        mode = 0  # a link that leads nowhere
    if not stat.S_ISDIR(mode):
        raise CacheError(f"{path} is there and is no folder: choose another --out.")
    return any(path.iterdir())
