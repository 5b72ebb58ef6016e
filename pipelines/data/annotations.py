"""The boxes of a data set as columns, and what of them is left out, by kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["UNTRAINED", "Annotations", "LeftOut", "untrained_kinds"]

# Why mmdet does not train on a box, in the order in which reasons are looked for; `Annotations.kinds` counts from 1.
UNTRAINED = (
    "marked to be ignored",
    "of negative width or height",
    "with area 0 or less",
    "less than a pixel wide or high",
    "outside of their image",
    "of crowds or difficult objects",
)


@dataclass(frozen=True)
class LeftOut:
    """Annotations or images of one kind that are left out.

    Attributes:
        count: How many.
        kind: What they are, such as `annotations with area 0 or less`.
        example: The first of them.
    """

    count: int
    kind: str
    example: str

    def __str__(self) -> str:
        return f"{self.count:,} {self.kind} (the first: {self.example})"


@dataclass(frozen=True, eq=False)
class Annotations:
    """All boxes of a data set, sorted by image; those of image i are the rows [starts[i], starts[i + 1])."""

    ids: npt.NDArray[Any]  # [M] as the file has them, which may be text, double or None
    boxes: npt.NDArray[np.float64]  # [M, 4] x, y, width, height in pixels
    areas: npt.NDArray[np.float64]  # [M] pixels, of the segmentation where there is one
    labels: npt.NDArray[np.int64]  # [M]
    crowds: npt.NDArray[np.bool_]  # [M]
    ignored: npt.NDArray[np.bool_]  # [M] marked by `ignore`, which mmdet knows and pycocotools does not
    kinds: npt.NDArray[np.uint8]  # [M] 0: trained on; k: UNTRAINED[k - 1]
    segmentations: Sequence[Any] | None  # [M] JSON texts of masks, empty where there is none
    starts: npt.NDArray[np.int64]  # [images + 1]

    def of_images(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> "Annotations":
        """Those of some images, which are rows in ascending order."""
        counts = np.diff(self.starts)
        is_chosen = np.zeros(len(counts), dtype=np.bool_)
        is_chosen[rows] = True
        return self.take(np.repeat(is_chosen, counts), is_chosen)

    def take(self, is_kept: npt.NDArray[np.bool_], images: npt.NDArray[np.bool_] | None = None) -> "Annotations":
        """Those that are `is_kept` ([M]), of the images that are ([images]; None: all)."""
        per_image = np.diff(np.concatenate([[0], np.cumsum(is_kept)])[self.starts])
        if images is not None:
            per_image = per_image[images]
        segmentations = self.segmentations
        if segmentations is not None:
            segmentations = [segmentations[row] for row in np.flatnonzero(is_kept).tolist()]
        return Annotations(
            self.ids[is_kept],
            self.boxes[is_kept],
            self.areas[is_kept],
            self.labels[is_kept],
            self.crowds[is_kept],
            self.ignored[is_kept],
            self.kinds[is_kept],
            segmentations,
            np.concatenate([[0], np.cumsum(per_image)]).astype(np.int64),
        )

    def trained_counts(self) -> npt.NDArray[np.int64]:
        """Per image, how many boxes are trained on, ``[images]``."""
        total = np.concatenate([[0], np.cumsum(self.kinds == 0)])
        counts: npt.NDArray[np.int64] = np.diff(total[self.starts])
        return counts

    def untrained(self, file_names: Sequence[str]) -> tuple[LeftOut, ...]:
        """What is not trained on, by kind, with the first in the order of the images."""
        left_out = []
        for kind, count in enumerate(np.bincount(self.kinds, minlength=len(UNTRAINED) + 1).tolist()):
            if kind and count:
                row = int(np.argmax(self.kinds == kind))
                name = file_names[int(np.searchsorted(self.starts, row, side="right")) - 1]
                left_out.append(LeftOut(count, f"annotations {UNTRAINED[kind - 1]}", f"{self.describe(row)} of {name}"))
        return tuple(left_out)

    def describe(self, row: int) -> str:
        """An annotation in words."""
        box = ", ".join(f"{number:g}" for number in self.boxes[row].tolist())
        identity = "an annotation without id" if self.ids[row] is None else f"annotation {self.ids[row]}"
        return f"{identity}, bbox [{box}], area {self.areas[row]:g},"


def untrained_kinds(
    boxes: npt.NDArray[np.float64],
    areas: npt.NDArray[np.float64],
    crowds: npt.NDArray[np.bool_],
    ignored: npt.NDArray[np.bool_],
    sizes: npt.NDArray[np.float64],
) -> npt.NDArray[np.uint8]:
    """Why mmdet does not train on each box (CocoDataset.parse_data_info), ``[M]`` as `Annotations.kinds`.

    Args:
        boxes: ``[M, 4]`` x, y, width, height.
        areas: ``[M]``.
        crowds: ``[M]``.
        ignored: ``[M]``.
        sizes: ``[M, 2]`` width and height of their images.
    """
    sides = boxes[:, 2:]
    inside = np.minimum(boxes[:, :2] + sides, sizes) - np.maximum(boxes[:, :2], 0)  # [M, 2]
    reasons = (ignored, (sides < 0).any(1), areas <= 0, (sides < 1).any(1), (inside <= 0).any(1), crowds)
    return np.select(reasons, range(1, len(UNTRAINED) + 1), 0).astype(np.uint8)
