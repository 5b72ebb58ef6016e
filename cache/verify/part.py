"""Checks one committed part: its index at once, its other arrays as tasks for a pool of threads."""

import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdpipe.cache.codecs import Block
from kdpipe.cache.format.record import check_metadata, part_folder
from kdpipe.cache.spec import VIEWS, CacheSpec
from kdpipe.cache.verify.chunks import Found, Layout, Look, Tick, check_file, read_layout
from kdpipe.cache.verify.fault import Fault
from kdpipe.cache.views import ViewError, input_size
from kdpipe.cache.write.encode import index_columns
from kdpipe.cache.write.part_writer import array_layout

# Boxes are mapped to the network input and back in float32: so many pixels beyond the image are rounding.
_BOX_TOLERANCE = 0.01

Ids = npt.NDArray[np.int64]

# Checks one file of a part.
Task = Callable[[Tick], list[Fault]]


def stray_files(folder: Path, known: Collection[str]) -> Iterator[str]:
    """Paths, relative to a folder, of all files and folders below it that are none of the known files' or theirs."""
    parents = {str(parent) for name in known for parent in Path(name).parents}
    for top, folders, files in os.walk(folder):
        place = Path(top).relative_to(folder)
        for name in sorted(folders):
            path = str(place / name)
            if path not in parents and path not in known:
                yield path
        folders[:] = [name for name in folders if str(place / name) in parents]
        yield from (path for name in sorted(files) if (path := str(place / name)) not in known)


def check_part(
    folder: Path, number: int, image_ids: Ids, record: Mapping[str, Any], spec: CacheSpec, tick: Tick
) -> tuple[list[Fault], list[Task]]:
    """Check the metadata and the index of a part.

    Args:
        folder: of the part.
        number: of the part.
        image_ids: of the images that the plan gives to this part, in order.
        record: its commit record.
        spec: of the cache.
        tick: is told how many bytes were read.

    Returns:
        What is wrong, and what is left to do: a task per file of the other arrays. There are none where the index is
        damaged, since the whole part has to be made again.
    """
    part = _Part(folder, number, image_ids, record, spec)
    faults = [part.fault(name, "does not belong there", remove=name) for name in part.stray()]
    try:
        index, names = (part.read_whole(name, tick) for name in ("index", "file_names"))
        if wrong := part.check_index(index, names):
            return [*faults, part.fault("index", wrong, "index")], []
        tasks: list[Task] = []
        for name, (shape, dtype, rows) in part.arrays().items():
            layout = part.layout(name, (rows, *shape), dtype)
            tasks += [part.task(name, file, chunks, layout) for file, chunks in layout.files().items()]
    except _DamagedError as error:
        return [*faults, error.fault], []
    return faults, tasks


class _DamagedError(Exception):
    """The part has to be made again, and cannot be looked at any further."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault


class _Part:
    """What is known of a part while it is checked."""

    def __init__(self, folder: Path, number: int, image_ids: Ids, record: Mapping[str, Any], spec: CacheSpec) -> None:
        self.folder, self.number, self.image_ids, self.record, self.spec = folder, number, image_ids, record, spec
        self.columns = {name: position for position, name in enumerate(index_columns(spec))}
        self.index: Ids = np.zeros((0, len(self.columns)), dtype=np.int64)
        self.elements = 0

    def fault(
        self, name: str, message: str, array: str | None = None, images: Ids | None = None, remove: str | None = None
    ) -> Fault:
        """Something wrong with `name`, such as a file; the whole part is to be removed unless only `remove` is."""
        ids = () if remove else tuple((self.image_ids if images is None else np.unique(images)).tolist())
        place = part_folder(Path(), self.number) / (remove or "")
        return Fault(f"part {self.number}", f"{name} {message}", self.number, array, ids, place)

    def stray(self) -> Iterator[str]:
        return stray_files(self.folder, {"zarr.json", *self.record["files"]})

    def column(self, name: str) -> Ids:
        values: Ids = self.index[:, self.columns[name]]
        return values

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        """The layout of an array, whose `zarr.json` and sizes are checked, and that has to fit a shape and type.

        Raises:
            _DamagedError: it does not.
        """
        if wrong := check_metadata(self.folder, self.record, name):
            raise _DamagedError(self.fault(f"{name}:", wrong, name))
        try:
            layout = read_layout((self.folder / name / "zarr.json").read_bytes(), self.spec.codec)
        except (ValueError, OSError) as error:
            raise _DamagedError(self.fault(f"{name}/zarr.json", f"is damaged: {error}", name)) from error
        chunks = -(-shape[0] // layout.chunk[0])
        fits = (layout.shape[1:], layout.dtype, layout.chunk[1:]) == (shape[1:], dtype, shape[1:])
        wanted = {f"{name}/{file}" for file in (*layout.files(), "zarr.json")}
        found = {file for file in self.record["files"] if file.startswith(f"{name}/")}
        if not fits or layout.shape[0] != chunks * layout.chunk[0] or layout.shard is None or wanted != found:
            message = f"does not fit the specification: found {layout.shape} {layout.dtype}, expected {shape} {dtype}"
            raise _DamagedError(self.fault(name, message, name))
        return layout

    def read_whole(self, name: str, tick: Tick) -> Block:
        """A small array that is needed to check the others.

        Raises:
            _DamagedError: it is damaged.
        """
        rows = self.record["rows"]
        if name == "index":
            layout = self.layout(name, (rows, len(self.columns)), "int64")
        else:
            rows = int(self.index[-1, self.columns["name_stop"]]) if len(self.index) else 0
            layout = self.layout(name, (rows,), "uint8")
        blocks = [np.zeros((0, *layout.shape[1:]), dtype=layout.dtype)]
        for file, chunks in layout.files().items():
            size, digest = self.record["files"][f"{name}/{file}"]

            def keep(number: int, block: Block) -> None:
                blocks.append(block)

            for found in check_file(self.folder / name / file, size, digest, layout, chunks, keep, tick):
                raise _DamagedError(self.fault(f"{name}/{file}", found.reason, name))
        values: Block = np.concatenate(blocks)[:rows]
        if name == "index":
            self.index = values
        return values

    def check_index(self, index: Block, names: Block) -> str | None:
        """What is wrong with the rows of the index, of which `record` and plan say how they have to be."""
        skipped = {entry["image_id"] for entry in self.record["skipped"]}
        kept = [image_id for image_id in self.image_ids.tolist() if image_id not in skipped]
        wanted = [(image_id, VIEWS.index(view)) for image_id in kept for view in self.spec.views]
        if len(kept) + len(skipped) != len(self.image_ids):
            return "records skipped images that are not of this part"
        if index[:, :2].tolist() != [list(pair) for pair in wanted]:
            return f"has not the images and views of the plan: expected {len(wanted)} rows, found {len(index)}"
        sizes = [name for name in self.columns if name.endswith(("height", "width"))]
        if len(index) and min(int(self.column(name).min()) for name in sizes) < 1:
            return "has a size that is not positive"
        cells = [
            self.column(f"level{level}_height") * self.column(f"level{level}_width")
            for level in range(len(self.spec.strides))
            if "features" in self.spec.fields
        ]
        elements = sum(cells, np.zeros(len(index), dtype=np.int64)) * self.spec.channels
        rois, proposals = self.column("row_stop") - self.column("row_start"), self.column("num_proposals")
        lengths = self.column("name_stop") - self.column("name_start")
        for start, counts in (("row_start", rois), ("element_start", elements), ("name_start", lengths)):
            if counts.min(initial=0) < 0 or not np.array_equal(self.column(start), np.cumsum(counts) - counts):
                return f"has values of {start} that leave gaps or overlap"
        if int(rois.sum()) != self.record["rois"]:
            return f"has {int(rois.sum())} boxes, and the commit record {self.record['rois']}"
        if (proposals < 0).any() or (proposals > np.minimum(rois, self.spec.proposals)).any():
            return "has impossible numbers of proposals"
        self.elements = int(elements.sum())
        return self._check_names_and_sizes(names)

    def _check_names_and_sizes(self, names: Block) -> str | None:
        for row in self.index:
            entry = dict(zip(self.columns, row.tolist(), strict=True))
            try:
                names[entry["name_start"] : entry["name_stop"]].tobytes().decode()
                expected = input_size((entry["height"], entry["width"]), self.spec.scale)
            except (UnicodeDecodeError, ViewError) as error:
                return f"is wrong about image {entry['image_id']}: {error}"
            found = (entry["input_height"], entry["input_width"])
            if found != expected:
                return f"gives image {entry['image_id']} the network input {found}, expected {expected}"
        return None

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str, int]]:
        """Row shape, type and number of rows of each array beside the index and the names."""
        rows = {"features": self.elements, "scale": len(self.index)}
        return {
            name: (shape, dtype, rows.get(name, self.record["rois"]))
            for name, (shape, dtype, _) in array_layout(self.spec).items()
            if name not in ("index", "file_names")
        }

    def task(self, name: str, file: str, chunks: range, layout: Layout) -> Task:
        """The check of one file."""
        size, digest = self.record["files"][f"{name}/{file}"]

        def run(tick: Tick) -> list[Fault]:
            look = self._look(name, layout)
            found = check_file(self.folder / name / file, size, digest, layout, chunks, look, tick)
            grouped = itertools.groupby(found, key=lambda one: one.reason)
            return [self._named(name, file, reason, list(same), chunks, layout) for reason, same in grouped]

        return run

    def _named(self, name: str, file: str, reason: str, found: Sequence[Found], chunks: range, layout: Layout) -> Fault:
        """The same thing wrong with some chunks of a file, as one fault that names the images."""
        step = layout.chunk[0]
        concerned = np.zeros(len(self.index), dtype=bool)
        for one in found:
            if one.rows is None:
                span = chunks if one.chunk is None else range(one.chunk, one.chunk + 1)
                first, last = self._owners(name, np.array([span.start * step, span.stop * step - 1])).tolist()
                concerned[first : last + 1] = True
            else:
                assert one.chunk is not None
                concerned[self._owners(name, one.chunk * step + np.flatnonzero(one.rows))] = True
        return self.fault(f"{name}/{file}", reason, name, self.column("image_id")[concerned])

    def _starts(self, name: str) -> Ids:
        """Where each index row starts in an array."""
        if name == "scale":
            return np.arange(len(self.index))
        return self.column("element_start" if name == "features" else "row_start")

    def _owners(self, name: str, rows: Ids) -> Ids:
        """The index rows that rows of an array belong to."""
        owners: Ids = np.searchsorted(self._starts(name), rows, side="right") - 1
        return owners

    def _look(self, name: str, layout: Layout) -> Look | None:
        """The check of the values of an array; None where every value is fine."""
        if np.dtype(layout.dtype).kind != "f":
            return None
        step = layout.chunk[0]

        def look(number: int, block: Block) -> tuple[str, Block] | None:
            finite = np.isfinite(block)
            if not finite.all():
                return "has values that are not finite", _any_in_row(~finite)
            if name in ("scale", "roi_scale") and (block < 0).any():
                return "has negative scales", _any_in_row(block < 0)
            if name == "boxes":
                wrong = self._wrong_boxes(block, number * step)
                return ("has boxes outside of their image, or upside down", wrong) if wrong.any() else None
            return None

        return look

    def _wrong_boxes(self, boxes: Block, first: int) -> Block:
        """Which rows [N, 4] of `boxes`, the first of which has that number, cannot be."""
        rows = np.arange(first, min(first + len(boxes), self.record["rois"]))
        owners = self._owners("boxes", rows)
        limits = np.stack([self.column("width")[owners], self.column("height")[owners]], axis=1) + _BOX_TOLERANCE
        corner, opposite = boxes[: len(rows), :2], boxes[: len(rows), 2:]
        wrong = np.zeros(len(boxes), dtype=bool)
        wrong[: len(rows)] = ((corner < -_BOX_TOLERANCE) | (opposite < corner) | (opposite > limits)).any(axis=1)
        return wrong


def _any_in_row(wrong: Block) -> Block:
    return np.asarray(wrong.reshape(len(wrong), -1).any(axis=1))
