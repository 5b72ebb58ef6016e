"""The COCO JSON that mmdet and pycocotools are handed: every field that they read, and ids that are valid."""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from kdpipe.cache.plan import ImageInfo
from kdpipe.pipelines.data.annotations import Annotations
from kdpipe.pipelines.data.coco_entries import NO_MASK

__all__ = ["write_coco"]

_CHUNK = 20_000  # annotations that are encoded at a time


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

    Args:
        path: The file.
        images: In the order of `annotations`.
        annotations: Theirs.
        class_names: In label order.
        category_ids: Of the classes.
    """
    image_list = [
        {"id": image.image_id, "file_name": image.file_name, "width": image.width, "height": image.height}
        for image in images
    ]
    categories = [{"id": each, "name": name} for each, name in zip(category_ids, class_names, strict=True)]
    image_ids = np.repeat(np.array([image.image_id for image in images], dtype=np.int64), np.diff(annotations.starts))
    encode = msgspec.json.Encoder().encode
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    with aside.open("wb") as file:
        file.write(b'{"images":' + encode(image_list) + b',"categories":' + encode(categories) + b',"annotations":[')
        for start in range(0, len(image_ids), _CHUNK):
            rows = slice(start, start + _CHUNK)
            written = _annotations(image_ids[rows], annotations, np.array(category_ids), rows)
            file.write((b",\n" if start else b"") + encode(list(written))[1:-1])
        file.write(b"]}")
    aside.replace(path)


def _annotations(
    image_ids: npt.NDArray[np.int64], data: Annotations, category_ids: npt.NDArray[np.int64], rows: slice
) -> Iterator[_Annotation]:
    """Some annotations; the objects of all of them would need several times the memory of the data."""
    columns: list[Iterable[Any]] = [
        range(rows.start + 1, rows.stop + 1),
        image_ids.tolist(),
        category_ids[data.labels[rows]].tolist(),
        data.boxes[rows].tolist(),
        data.areas[rows].tolist(),
        data.crowds[rows].astype(int).tolist(),
        data.ignored[rows].astype(int).tolist(),
    ]
    if data.segmentations is not None:
        columns.append(msgspec.UNSET if mask is NO_MASK else mask for mask in data.segmentations[rows])
    return map(_Annotation, *columns)
