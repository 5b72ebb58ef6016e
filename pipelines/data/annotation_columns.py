"""Fields of a million annotations as arrays, checked all at once; only where one is wrong, it is looked for."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from kdpipe.pipelines.data.coco_entries import NO_MASK, AnnotationEntry, DataError

__all__ = ["AnnotationColumns", "integer", "read_columns"]


@dataclass(frozen=True, eq=False)
class AnnotationColumns:
    """Annotations in the order of their file."""

    ids: npt.NDArray[Any]  # [M] as they are given
    image_ids: npt.NDArray[np.int64]  # [M]
    category_ids: npt.NDArray[np.int64]  # [M]
    boxes: npt.NDArray[np.float64]  # [M, 4] x, y, width, height in pixels
    areas: npt.NDArray[np.float64]  # [M] pixels; those of the boxes where none are given
    crowds: npt.NDArray[np.bool_]  # [M]
    ignored: npt.NDArray[np.bool_]  # [M]
    segmentations: Sequence[Any] | None  # [M] JSON texts


def integer(value: Any) -> int | None:
    """An integer of 64 bits, also where it was written as 1.0; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def read_columns(chunks: Iterable[Sequence[AnnotationEntry]], path: Path) -> AnnotationColumns:
    """Checks annotations, some at a time: as arrays, they need a fraction of the memory.

    Raises:
        DataError: a field is not what it has to be; the annotation is named.
    """
    chunk_columns: list[AnnotationColumns] = []
    count = 0
    for entries in chunks:
        chunk_columns.append(_Chunk(entries, count, path).columns())
        count += len(entries)
    if not chunk_columns:
        chunk_columns.append(_Chunk([], 0, path).columns())

    def joined(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(columns, name) for columns in chunk_columns])

    masks: list[Any] | None = None
    if any(columns.segmentations is not None for columns in chunk_columns):
        masks = [mask for columns in chunk_columns for mask in columns.segmentations or [NO_MASK] * len(columns.ids)]
    return AnnotationColumns(
        ids=joined("ids"),
        image_ids=joined("image_ids"),
        category_ids=joined("category_ids"),
        boxes=joined("boxes"),
        areas=joined("areas"),
        crowds=joined("crowds"),
        ignored=joined("ignored"),
        segmentations=masks,
    )


class _Chunk:
    """Some annotations, the first of which is the one at position `start` in the file."""

    def __init__(self, entries: Sequence[AnnotationEntry], start: int, path: Path) -> None:
        self.entries, self.start, self.path = entries, start, path

    def columns(self) -> AnnotationColumns:
        boxes = self._boxes()
        masks = self._values("segmentation")
        return AnnotationColumns(
            ids=self._ids(),
            image_ids=self._integers("image_id"),
            category_ids=self._integers("category_id"),
            boxes=boxes,
            areas=self._areas(boxes),
            crowds=self._flags("iscrowd"),
            ignored=self._flags("ignore"),
            segmentations=None if all(mask is NO_MASK for mask in masks) else masks,
        )

    def _values(self, key: str) -> list[Any]:
        return list(map(attrgetter(key), self.entries))

    def _refuse(self, position: int, key: str, expected: str) -> NoReturn:
        entry = self.entries[position]
        name = f"at position {self.start + position}" if entry.id is None else entry.id
        raise DataError(f"{self.path}: annotation {name} has {key} {getattr(entry, key)!r}, expected {expected}.")

    def _ids(self) -> npt.NDArray[Any]:
        values = self._values("id")
        if set(map(type, values)) <= {int}:
            with suppress(OverflowError):
                return np.array(values, dtype=np.int64)
        column = np.empty(len(values), dtype=object)
        column[:] = values
        return column

    def _integers(self, key: str) -> npt.NDArray[np.int64]:
        values = self._values(key)
        if set(map(type, values)) <= {int}:
            with suppress(OverflowError):
                return np.array(values, dtype=np.int64)
        numbers = [integer(value) for value in values]
        if None in numbers:
            self._refuse(numbers.index(None), key, "an integer. Export the file with integer ids")
        return np.array(numbers, dtype=np.int64)

    def _boxes(self) -> npt.NDArray[np.float64]:
        values = self._values("bbox")
        expected = "four finite numbers [x, y, width, height]. Correct or remove it"
        if not (set(map(type, values)) <= {list} and set(map(len, values)) <= {4}):
            position = next(p for p, value in enumerate(values) if not isinstance(value, list) or len(value) != 4)
            self._refuse(position, "bbox", expected)
        column = self._numbers(list(chain.from_iterable(values)), 4, "bbox", expected)
        return column.reshape(-1, 4)

    def _areas(self, boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        values = self._values("area")
        if type(None) not in set(map(type, values)):
            return self._areas_given(values)
        lacking = np.array([value is None for value in values], dtype=np.bool_)
        return np.where(
            lacking, boxes[:, 2] * boxes[:, 3], self._areas_given([0 if value is None else value for value in values])
        )

    def _areas_given(self, values: Sequence[Any]) -> npt.NDArray[np.float64]:
        return self._numbers(values, 1, "area", "a number of pixels. Correct or remove it")

    def _numbers(self, values: Sequence[Any], per_entry: int, key: str, expected: str) -> npt.NDArray[np.float64]:
        if not set(map(type, values)) <= {int, float}:
            place = next(p for p, value in enumerate(values) if type(value) not in (int, float))
            self._refuse(place // per_entry, key, expected)
        try:
            column = np.array(values, dtype=np.float64)
        except OverflowError:  # an integer beyond all floats
            place = next(p for p, value in enumerate(values) if abs(value) > 1e308)
            self._refuse(place // per_entry, key, expected)
        if not np.isfinite(column).all():
            self._refuse(int(np.argmin(np.isfinite(column))) // per_entry, key, expected)
        return column

    def _flags(self, key: str) -> npt.NDArray[np.bool_]:
        values = self._values(key)
        if not set(map(type, values)) <= {type(None), bool, int, float}:
            position = next(p for p, v in enumerate(values) if v is not None and not isinstance(v, int | float))
            self._refuse(position, key, "0 or 1. Correct it")
        return np.array(values, dtype=np.bool_)
