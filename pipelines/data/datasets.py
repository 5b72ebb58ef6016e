"""Detection data sets, checked before anything is computed from them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdpipe.cache.errors import present
from kdpipe.cache.identity import digest_json
from kdpipe.cache.plan import ImageInfo
from kdpipe.pipelines.data.annotations import Annotations, LeftOut
from kdpipe.pipelines.data.bdd import read_bdd
from kdpipe.pipelines.data.coco import CocoFile, read_coco
from kdpipe.pipelines.data.coco_copy import write_coco
from kdpipe.pipelines.data.coco_entries import DataError
from kdpipe.pipelines.data.voc import read_voc, split_path
from kdpipe.pipelines.runtime.console import bytes_text, command_console, plain

__all__ = [
    "DetectionData",
    "load_bdd",
    "load_coco",
    "load_voc",
]

_LARGE = 64 << 20  # bytes of an annotation file that takes seconds to read


@dataclass(frozen=True, eq=False)
class DetectionData:
    """A detection data set.

    Attributes:
        ann_file: where the annotations are from, as messages name it.
        img_dir: folder that the file names are relative to.
        class_names: in mmdet's label order: that of the annotation file, or that of a model (`match_classes`).
        category_ids: of the same classes.
        images: in the order of the annotation file; `num_gt` counts the boxes of `gt_boxes`.
        annotations: all boxes, trained on or not.
        absent: annotations that are left out of everything.
        notes: what was done to the data, for the user.
        roots: names of categories that other categories are kinds of.
        is_federated: each image has some of its classes annotated only, as LVIS has.
        is_voc: from a Pascal VOC folder, whose AP is measured, too.
        coco_file: the COCO JSON that mmdet and pycocotools read, which `write_copy` writes; None until `copied_to`.
    """

    ann_file: Path
    img_dir: Path
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[ImageInfo, ...]
    annotations: Annotations
    absent: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    roots: frozenset[str] = frozenset()
    is_federated: bool = False
    is_voc: bool = False
    coco_file: Path | None = None

    @cached_property
    def _rows(self) -> Mapping[int, int]:
        return {image.image_id: row for row, image in enumerate(self.images)}

    def _select(self, image_id: int) -> npt.NDArray[np.int64]:
        row = self._rows[image_id]
        start, stop = self.annotations.starts[row : row + 2]
        rows: npt.NDArray[np.int64] = np.arange(start, stop)[self.annotations.kinds[start:stop] == 0]
        return rows

    def gt_boxes(self, image_id: int) -> npt.NDArray[np.float32]:
        """Usable ground-truth boxes, ``[N, 4]`` (x1, y1, x2, y2) in original pixels, clipped to the image.

        Usable are those that mmdet trains on: at least one pixel wide and high, in the image, and no crowd.
        """
        image = self.images[self._rows[image_id]]
        boxes = self.annotations.boxes[self._select(image_id)]
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        limits = np.array([image.width, image.height] * 2)
        clipped: npt.NDArray[np.float32] = np.clip(corners, 0, limits).astype(np.float32)
        return clipped

    def gt_labels(self, image_id: int) -> npt.NDArray[np.int64]:
        """Labels of the same boxes, ``[N]`` int64 in [0, classes)."""
        return self.annotations.labels[self._select(image_id)]

    def left_out(self, *, filter_empty_gt: bool = True, min_size: int = 0) -> tuple[LeftOut, ...]:
        """What is left out of training beyond what is absent, by kind: annotations, and images.

        Args:
            filter_empty_gt: images without a usable annotation are.
            min_size: pixels; images with a shorter side are.
        """
        kinds = {
            "images without a usable annotation": [x for x in self.images if filter_empty_gt and not x.num_gt],
            f"images of less than {min_size} pixels in width or height": [
                image for image in self.images if min(image.width, image.height) < min_size
            ],
        }
        images = [
            LeftOut(len(left_images), kind, left_images[0].file_name)
            for kind, left_images in kinds.items()
            if left_images
        ]
        return (*self.annotations.untrained([image.file_name for image in self.images]), *images)

    def only(self, image_ids: Collection[int]) -> "DetectionData":
        """The same data set with some of its images, in the same order."""
        id_set = set(image_ids)
        rows = [row for row, image in enumerate(self.images) if image.image_id in id_set]
        return replace(
            self, images=tuple(self.images[row] for row in rows), annotations=self.annotations.of_images(rows)
        )

    def digest(self) -> str:
        """Identity of what a cache depends on: ids, names and sizes of the images, categories and usable boxes."""
        data, is_usable = self.annotations, self.annotations.kinds == 0
        boxes = sha256(data.boxes[is_usable].astype("<f8").tobytes() + data.labels[is_usable].astype("<i8").tobytes())
        return digest_json(
            {
                "images": [[i.image_id, i.file_name, i.height, i.width, i.num_gt] for i in self.images],
                "categories": [list(pair) for pair in zip(self.category_ids, self.class_names, strict=True)],
                "boxes": boxes.hexdigest(),
            }
        )

    def copied_to(self, path: Path) -> "DetectionData":
        """The same data, for mmdet and pycocotools to read from a file that is still to be written (`write_copy`)."""
        return replace(self, coco_file=path)

    def write_copy(self) -> Path:
        """Writes `coco_file`, with all boxes; see `write_coco`. Returns its path."""
        path = present(self.coco_file, f"the place of the copy of {self.ann_file}")
        write_coco(path, self.images, self.annotations, self.class_names, self.category_ids)
        return path


def load_coco(ann_file: str | Path, img_dir: str | Path, limit: int | None = None) -> DetectionData:
    """Reads and checks COCO JSON. Images are not opened, unless the file does not give their sizes.

    Args:
        ann_file: the annotations.
        img_dir: folder of the images.
        limit: keep the first so many images only.

    Raises:
        DataError: the file is missing or malformed, or there is nothing to learn from; what and where is named.
    """
    ann_file, img_dir = Path(ann_file), Path(img_dir)
    _announce(ann_file)
    return _limited(read_coco(ann_file, img_dir), ann_file, img_dir, limit)


def load_bdd(labels: str | Path, img_dir: str | Path, limit: int | None = None) -> DetectionData:
    """Reads and checks detection labels of BDD100K; see `kdpipe.pipelines.data.bdd.read_bdd`.

    Args:
        labels: the JSON of a split.
        img_dir: folder of the images.
        limit: keep the first so many images only.

    Raises:
        DataError: the file is missing or malformed, or there is nothing to learn from.
    """
    labels, img_dir = Path(labels), Path(img_dir)
    _announce(labels)
    return _limited(read_bdd(labels, img_dir), labels, img_dir, limit)


def load_voc(folder: str | Path, split: str, limit: int | None = None) -> DetectionData:
    """Reads and checks a split of a Pascal VOC folder; see `kdpipe.pipelines.data.voc.read_voc`.

    Args:
        folder: holds ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``.
        split: ``train`` for ``ImageSets/Main/train.txt``.
        limit: keep the first so many images only.

    Raises:
        VocError: something is missing or malformed; the file is named.
        DataError: there is nothing to learn from.
    """
    folder = Path(folder)
    data = _limited(read_voc(folder, split), split_path(folder, split), folder / "JPEGImages", limit)
    return replace(data, is_voc=True)


def _announce(path: Path) -> None:
    """Says that a large file is being read."""
    if path.is_file() and (size := path.stat().st_size) >= _LARGE:
        command_console().print(plain(f"Reading {path} ({bytes_text(size)})."), markup=False)


def _limited(content: CocoFile, ann_file: Path, img_dir: Path, limit: int | None) -> DetectionData:
    if limit is not None and limit < 1:
        raise DataError(f"the limit of images is {limit}, expected at least 1.")
    data = DetectionData(
        ann_file,
        img_dir,
        content.class_names,
        content.category_ids,
        content.images,
        content.annotations,
        content.absent,
        content.notes,
        roots=content.roots,
        is_federated=content.is_federated,
    )
    return data if limit is None else data.only([image.image_id for image in content.images[:limit]])
