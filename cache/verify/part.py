"""Checks one committed part: its index at once, its other arrays as tasks for a pool of threads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kdpipe.cache.format.index import index_fault, rows_fault
from kdpipe.cache.format.layout import ArrayLayout, Block, index_columns, part_layout
from kdpipe.cache.format.record import FILES
from kdpipe.cache.spec import VIEWS, CacheSpec
from kdpipe.cache.store.location import part_key
from kdpipe.cache.verify.arrays import NO_LIST, BlockCheck, Finding, GroupFiles, Tick, grouped, metadata_fault
from kdpipe.cache.verify.fault import Fault

# Boxes are mapped to the network input and back in float32: so many pixels beyond the image are rounding.
_BOX_TOLERANCE = 0.01

Ids = npt.NDArray[np.int64]

# Checks one file of a part.
Task = Callable[[Tick], list[Fault]]


def check_part(
    group: GroupFiles | None,
    number: int,
    image_ids: Ids,
    record: Mapping[str, Any],
    spec: CacheSpec,
    tick: Tick,
) -> tuple[list[Fault], list[Task]]:
    """Check the metadata and the index of a part.

    Args:
        group: the files of the part; None where their list is missing or not as it was written.
        number: of the part.
        image_ids: of the images that the plan gives to this part, in order.
        record: its commit record.
        spec: of the cache.
        tick: is told how many bytes were read.

    Returns:
        What is wrong, and what is left to do: a task per file of the other arrays. There are none where the index is
        damaged, since the whole part has to be made again.
    """
    if group is None:
        return [Fault(f"part {number}", NO_LIST, number, None, tuple(image_ids.tolist()), part_key(number))], []
    part = _Part(number, image_ids, record, spec, group)
    if wrong := rows_fault(record, spec):
        return [part.fault("index", wrong, "index")], []
    if wrong := part.group.unknown_files(part.layout):
        return [part.fault(FILES, wrong)], []
    for name in part.layout:
        if wrong := metadata_fault(part.group, name, part.layout[name], part.rows(name)):
            return [part.fault(f"{name}:", wrong, name)], []
    try:
        index, names = (part.read_whole(name, tick) for name in ("index", "file_names"))
    except _DamagedError as error:
        return [error.fault], []
    if wrong := part.check_index(index, names):
        return [part.fault("index", wrong, "index")], []
    arrays = [name for name in part.layout if name not in ("index", "file_names")]
    return [], [part.task(name, file) for name in arrays for file in part.layout[name].files(part.rows(name))]


class _DamagedError(Exception):
    """The part has to be made again, and cannot be looked at any further."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault


class _Part:
    """What is known of a part while it is checked."""

    def __init__(
        self, number: int, image_ids: Ids, record: Mapping[str, Any], spec: CacheSpec, group: GroupFiles
    ) -> None:
        self.number, self.image_ids, self.record, self.spec, self.group = number, image_ids, record, spec, group
        self.layout: dict[str, ArrayLayout] = part_layout(spec)
        self.columns = {name: position for position, name in enumerate(index_columns(spec))}
        self.index: Ids = np.zeros((0, len(self.columns)), dtype=np.int64)

    def rows(self, name: str) -> int:
        """Number of rows of an array, by the record."""
        count: int = self.record["rows"][self.layout[name].per]
        return count

    def fault(self, name: str, message: str, array: str | None = None, images: Ids | None = None) -> Fault:
        """Something wrong with `name`, such as a file; the whole part is to be removed."""
        ids = tuple((self.image_ids if images is None else np.unique(images)).tolist())
        return Fault(f"part {self.number}", f"{name} {message}", self.number, array, ids, part_key(self.number))

    def column(self, name: str) -> Ids:
        values: Ids = self.index[:, self.columns[name]]
        return values

    def read_whole(self, name: str, tick: Tick) -> Block:
        """A small array that is needed to check the others.

        Raises:
            _DamagedError: it is damaged.
        """
        blocks: list[Block] = []

        def keep(first: int, block: Block) -> None:
            blocks.append(block)

        layout, rows = self.layout[name], self.rows(name)
        for file in layout.files(rows):
            for finding in self.group.check_file(name, file, layout, rows, keep, tick):
                raise _DamagedError(self.fault(f"{name}/{file}", finding.reason, name))
        values: Block = np.concatenate([np.zeros((0, *layout.row_shape), dtype=layout.dtype), *blocks])
        if name == "index":
            self.index = values
        return values

    def check_index(self, index: Block, names: Block) -> str | None:
        """What is wrong with the rows of the index, of which `record` and plan say how they have to be."""
        skipped = {entry["image_id"] for entry in self.record["skipped"]}
        image_ids = [image_id for image_id in self.image_ids.tolist() if image_id not in skipped]
        if len(image_ids) + len(skipped) != len(self.image_ids):
            return "records skipped images that are not of this part"
        expected = [[image_id, VIEWS.index(view)] for image_id in image_ids for view in self.spec.views]
        if index[:, :2].tolist() != expected:
            return f"has not the images and views of the plan: expected {len(expected)} rows, found {len(index)}"
        return index_fault(index, names, self.record["rows"], self.spec)

    def task(self, name: str, file: str) -> Task:
        """The check of one file."""

        def run(tick: Tick) -> list[Fault]:
            findings = self.group.check_file(
                name, file, self.layout[name], self.rows(name), self._value_check(name), tick
            )
            return [self._fault(name, file, reason, same) for reason, same in grouped(findings).items()]

        return run

    def _fault(self, name: str, file: str, reason: str, findings: Sequence[Finding]) -> Fault:
        """The same thing wrong with some rows of a file, as one fault that names the images."""
        concerned = np.zeros(len(self.index), dtype=bool)
        for finding in findings:
            rows = np.array([finding.rows.start, finding.rows.stop - 1])
            if finding.wrong is None:
                first, last = self._owners(name, rows).tolist()
                concerned[first : last + 1] = True
            else:
                concerned[self._owners(name, finding.rows.start + np.flatnonzero(finding.wrong))] = True
        return self.fault(f"{name}/{file}", reason, name, self.column("image_id")[concerned])

    def _owners(self, name: str, rows: Ids) -> Ids:
        """The index rows that rows of an array belong to."""
        per = self.layout[name].per
        starts = np.arange(len(self.index)) if per == "view" else self.column(f"{per}_start")
        owners: Ids = np.searchsorted(starts, rows, side="right") - 1
        return owners

    def _value_check(self, name: str) -> BlockCheck | None:
        """The check of the values of an array; None where every value is fine."""
        if np.dtype(self.layout[name].dtype).kind != "f":
            return None

        def check(first: int, block: Block) -> tuple[str, Block] | None:
            finite = np.isfinite(block)
            if not finite.all():
                return "has values that are not finite", _any_in_row(~finite)
            if name.endswith("scale") and (block < 0).any():
                return "has negative scales", _any_in_row(block < 0)
            if name == "boxes":
                wrong = self._wrong_boxes(block, first)
                return ("has boxes outside of their image, or upside down", wrong) if wrong.any() else None
            return None

        return check

    def _wrong_boxes(self, boxes: Block, first: int) -> Block:
        """Which rows [N, 4] of `boxes`, the first of which has that number, cannot be."""
        owners = self._owners("boxes", np.arange(first, first + len(boxes)))
        limits = np.stack([self.column("width")[owners], self.column("height")[owners]], axis=1) + _BOX_TOLERANCE
        corner, opposite = boxes[:, :2], boxes[:, 2:]
        wrong = (corner < -_BOX_TOLERANCE) | (opposite < corner) | (opposite > limits)
        return np.asarray(wrong.any(axis=1))


def _any_in_row(wrong: Block) -> Block:
    return np.asarray(wrong.reshape(len(wrong), -1).any(axis=1))
