"""Detection data sets in COCO JSON, checked before anything is computed from them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdpipe.cache.fingerprint import digest_json
from kdpipe.cache.plan import ImageInfo
from kdpipe.pipelines.coco import Annotations, DataError, read_coco, write_json
from kdpipe.pipelines.images import ImageError, image_problem, read_image
from kdpipe.pipelines.voc import convert_voc

__all__ = [
    "DataError",
    "DetectionData",
    "ImageError",
    "check_classes",
    "check_images",
    "convert_voc",
    "load_coco",
    "read_image",
]


@dataclass(frozen=True, eq=False)
class DetectionData:
    """A detection data set.

    Attributes:
        ann_file: COCO JSON.
        img_dir: folder that the file names are relative to.
        class_names: in the order of the annotation file, which is mmdet's label order.
        category_ids: of the same classes.
        images: in the order of the annotation file; `num_gt` counts the boxes of `gt_boxes`.
        is_complete: the annotation file holds all that mmdet and pycocotools read, sizes and areas too. Otherwise they
            need the file that `save_coco` writes.
    """

    ann_file: Path
    img_dir: Path
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: tuple[ImageInfo, ...]
    is_complete: bool
    _annotations: Annotations
    _rows: Mapping[int, int]

    def _select(self, image_id: int) -> npt.NDArray[np.int64]:
        row = self._rows[image_id]
        start, stop = self._annotations.starts[row : row + 2]
        return np.arange(start, stop)[~self._annotations.crowds[start:stop]]

    def gt_boxes(self, image_id: int) -> npt.NDArray[np.float32]:
        """Usable ground-truth boxes, ``[N, 4]`` (x1, y1, x2, y2) in original pixels, clipped to the image.

        Usable are those that mmdet trains on: at least one pixel wide and high, in the image, and no crowd.
        """
        image = self.images[self._rows[image_id]]
        boxes = self._annotations.boxes[self._select(image_id)]
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        limits = np.array([image.width, image.height] * 2)
        clipped: npt.NDArray[np.float32] = np.clip(corners, 0, limits).astype(np.float32)
        return clipped

    def gt_labels(self, image_id: int) -> npt.NDArray[np.int64]:
        """Labels of the same boxes, ``[N]`` int64 in [0, classes)."""
        return self._annotations.labels[self._select(image_id)]

    def only(self, image_ids: Collection[int]) -> "DetectionData":
        """The same data set with some of its images, in the same order; `save_coco` writes a file for them."""
        wanted, data = set(image_ids), self._annotations
        rows = [row for row, image in enumerate(self.images) if image.image_id in wanted]
        counts = np.diff(data.starts)
        kept = np.repeat(np.isin(np.arange(len(counts)), rows), counts)
        annotations = Annotations(
            data.boxes[kept],
            data.areas[kept],
            data.labels[kept],
            data.crowds[kept],
            np.concatenate([[0], np.cumsum(counts[rows])]),
        )
        images = tuple(self.images[row] for row in rows)
        order = {image.image_id: row for row, image in enumerate(images)}
        return replace(self, images=images, is_complete=False, _annotations=annotations, _rows=order)

    def digest(self) -> str:
        """Identity of what a cache depends on: ids, names and sizes of the images, categories and usable boxes."""
        data, kept = self._annotations, ~self._annotations.crowds
        boxes = sha256(data.boxes[kept].astype("<f8").tobytes() + data.labels[kept].astype("<i8").tobytes())
        return digest_json(
            {
                "images": [[i.image_id, i.file_name, i.height, i.width, i.num_gt] for i in self.images],
                "categories": [list(pair) for pair in zip(self.category_ids, self.class_names, strict=True)],
                "boxes": boxes.hexdigest(),
            }
        )

    def completed(self, path: Path) -> "DetectionData":
        """The same data, from a new file at `path` if its own lacks what mmdet and pycocotools read."""
        return self if self.is_complete else replace(self, ann_file=self.save_coco(path), is_complete=True)

    def save_coco(self, path: str | Path) -> Path:
        """Writes the data set as COCO JSON with every field that mmdet and pycocotools read, crowds included."""
        path, data = Path(path), self._annotations
        counts = np.diff(data.starts)
        ids = np.repeat([image.image_id for image in self.images], counts)
        content = {
            "images": [
                {"id": image.image_id, "file_name": image.file_name, "width": image.width, "height": image.height}
                for image in self.images
            ],
            "annotations": [
                {
                    "id": index + 1,
                    "image_id": int(ids[index]),
                    "category_id": self.category_ids[data.labels[index]],
                    "bbox": data.boxes[index].tolist(),
                    "area": float(data.areas[index]),
                    "iscrowd": int(data.crowds[index]),
                }
                for index in range(len(ids))
            ],
            "categories": [
                {"id": each, "name": name} for each, name in zip(self.category_ids, self.class_names, strict=True)
            ],
        }
        return write_json(path, content)


def load_coco(ann_file: str | Path, img_dir: str | Path, limit: int | None = None) -> DetectionData:
    """Reads and checks COCO JSON. Images are not opened, unless the file does not give their sizes.

    Args:
        ann_file: the annotations.
        img_dir: folder of the images.
        limit: keep the first so many images only.

    Raises:
        DataError: the file is missing or malformed, or there is nothing to learn from; what and where is named.
        ImageError: the size of an image is unknown, and its file does not give it either.
    """
    ann_file, img_dir = Path(ann_file), Path(img_dir)
    if limit is not None and limit < 1:
        raise DataError(f"the limit of images is {limit}, expected at least 1.")
    content = read_coco(ann_file, img_dir)
    images, annotations = content.images[:limit], content.annotations
    stop = int(annotations.starts[len(images)])
    annotations = Annotations(
        annotations.boxes[:stop],
        annotations.areas[:stop],
        annotations.labels[:stop],
        annotations.crowds[:stop],
        annotations.starts[: len(images) + 1],
    )
    rows = {image.image_id: row for row, image in enumerate(images)}
    return DetectionData(
        ann_file, img_dir, content.class_names, content.category_ids, images, content.is_complete, annotations, rows
    )


def check_classes(data: DetectionData, names: Sequence[str], whose: str) -> None:
    """Compares the classes of a data set with those of a model or a cache, in label order.

    Upper case and underscores do not count: mmdet 1.x wrote ``traffic_light``.

    Args:
        data: what is checked.
        names: the classes wanted.
        whose: names their owner in the error, e.g. ``the teacher x.pth``.

    Raises:
        DataError: other classes, or the same in another order.
    """
    found, wanted = ([name.replace("_", " ").lower() for name in each] for each in (data.class_names, names))
    if found == wanted:
        return
    if sorted(found) == sorted(wanted):
        raise DataError(
            f"the classes of {data.ann_file} are those of {whose}, but in another order: found "
            f"{_list(data.class_names)}, expected {_list(names)}. Labels would be mixed up: reorder its categories."
        )
    raise DataError(
        f"the classes of {data.ann_file} are not those of {whose}: found {len(found)} ({_list(data.class_names)}), "
        f"expected {len(wanted)} ({_list(names)}). Give the data set that belongs to it."
    )


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def check_images(data: DetectionData, image_ids: Sequence[int] | None = None) -> dict[int, str]:
    """Decodes images, all by default, and says by image id what is wrong with those that are not as annotated."""
    wanted = None if image_ids is None else set(image_ids)
    problems = {
        image.image_id: image_problem(data.img_dir / image.file_name, image.width, image.height)
        for image in data.images
        if wanted is None or image.image_id in wanted
    }
    return {image_id: problem for image_id, problem in problems.items() if problem is not None}
