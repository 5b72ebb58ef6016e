"""The COCO JSON that mmdet and pycocotools are handed: every field that they read, and ids that are valid."""

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kdpipe.cache.plan import ImageInfo
from kdpipe.pipelines.annotations import Annotations
from kdpipe.pipelines.coco_entries import NO_MASK

__all__ = ["write_coco"]


class _Annotation(msgspec.Struct, gc=False, omit_defaults=True):
    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int
    ignore: int = 0
    segmentation: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def write_coco(
    path: Path,
    images: Sequence[ImageInfo],
    annotations: Annotations,
    class_names: Sequence[str],
    category_ids: Sequence[int],
) -> None:
    """Writes a COCO JSON in one atomic act, also where several processes write the same.

    Annotations get the ids 1, 2, ...: pycocotools takes 0 for "no match", and counts one of two that share an id. All
    are written, whether they are trained on or not, with their boxes, areas and masks as they were given.
    """
    content = {
        "images": [
            {"id": image.image_id, "file_name": image.file_name, "width": image.width, "height": image.height}
            for image in images
        ],
        "annotations": list(_annotations(images, annotations, category_ids)),
        "categories": [{"id": each, "name": name} for each, name in zip(category_ids, class_names, strict=True)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    aside.write_bytes(msgspec.json.encode(content))
    aside.replace(path)


def _annotations(images: Sequence[ImageInfo], data: Annotations, category_ids: Sequence[int]) -> Iterator[_Annotation]:
    image_ids = np.repeat(np.array([image.image_id for image in images], dtype=np.int64), np.diff(data.starts))
    categories = np.array(category_ids, dtype=np.int64)[data.labels]
    columns: tuple[list[Any], ...] = (
        image_ids.tolist(),
        categories.tolist(),
        data.boxes.tolist(),
        data.areas.tolist(),
        data.crowds.astype(int).tolist(),
        data.ignored.astype(int).tolist(),
    )
    if data.segmentations is None:
        yield from map(_Annotation, range(1, len(data.labels) + 1), *columns)
        return
    masks = (msgspec.UNSET if mask is NO_MASK else mask for mask in data.segmentations)
    yield from map(_Annotation, range(1, len(data.labels) + 1), *columns, masks)
