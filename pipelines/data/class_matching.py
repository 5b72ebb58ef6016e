"""Classes of a data set matched by name with those of a model."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from kdpipe.pipelines.data.annotations import LeftOut
from kdpipe.pipelines.data.coco_entries import DataError
from kdpipe.pipelines.data.datasets import DetectionData

__all__ = ["in_file_order", "in_file_order_text", "match_classes", "telling_images"]


def in_file_order(data: DetectionData, names: Sequence[str]) -> tuple[str, ...] | None:
    """Classes of a model in the order of the annotation file; None where that is theirs, or it lacks some.

    Args:
        data: the data set.
        names: the classes of the model.
    """
    data_names = [_plain(name) for name in data.class_names]
    if not {_plain(name) for name in names} <= set(data_names):
        return None
    order = tuple(sorted(names, key=lambda name: data_names.index(_plain(name))))
    return None if order == tuple(names) else order


def telling_images(meanings: Sequence[DetectionData], count: int) -> list[int]:
    """Ids of the first so many images with boxes whose labels are not the same in two meanings of a data set."""
    one, other = meanings
    found = (
        image.image_id
        for image in one.images
        if not np.array_equal(one.gt_labels(image.image_id), other.gt_labels(image.image_id))
    )
    return list(islice(found, count))


def in_file_order_text(order: Sequence[str], data: DetectionData, whose: str) -> str:
    """What is said where a model means the order of the file, to be followed by why that is known."""
    return (
        f"Classes of {whose} are taken to be {_list(order)}, in the order of {data.ann_file}, by which mmdet numbers "
        "labels whatever the order of the names, and not in that of the names in the checkpoint"
    )


def match_classes(data: DetectionData, names: Sequence[str], whose: str) -> DetectionData:
    """The same data with the labels of a model, its classes matched by name.

    The annotation file may have its categories in another order, or lack some: these get category ids that are free. It
    may have more: their annotations are left out, and counted. Upper case and underscores do not count: mmdet 1.x wrote
    ``traffic_light``. A category that only groups others and has no annotation, as Roboflow's first, is dropped.

    Args:
        data: the data set.
        names: the classes of the model, in the order of its labels.
        whose: names their owner, e.g. ``the teacher x.pth``.

    Raises:
        DataError: both have classes that the other lacks, or a name occurs twice; or no annotation is left.
    """
    data_names, model_names = ([_plain(name) for name in each] for each in (data.class_names, names))
    if data_names == model_names:
        return data
    used = set(np.unique(data.annotations.labels).tolist())
    roots = {
        data_names[label] for label, name in enumerate(data.class_names) if name in data.roots and label not in used
    } - set(model_names)
    extra = set(data_names) - set(model_names) - roots
    lacking = set(model_names) - set(data_names)
    unique = len(set(data_names)) == len(data_names) and len(set(model_names)) == len(model_names)
    if not unique or (extra and lacking) or lacking == set(model_names):
        raise DataError(
            f"the classes of {data.ann_file} are not those of {whose}: found {len(data_names)} "
            f"({_list(data.class_names)}), expected {len(model_names)} ({_list(names)}). Give the data set that "
            "belongs to it, or rename its categories."
        )
    return _relabelled(data, names, data_names, model_names, roots, whose)


def _relabelled(
    data: DetectionData,
    names: Sequence[str],
    data_names: list[str],
    model_names: list[str],
    roots: set[str],
    whose: str,
) -> DetectionData:
    free = max(data.category_ids) + 1
    class_names, category_ids = [], []
    for name, spelling in zip(model_names, names, strict=True):
        is_in_data = name in data_names
        class_names.append(data.class_names[data_names.index(name)] if is_in_data else spelling)
        category_ids.append(data.category_ids[data_names.index(name)] if is_in_data else free)
        free += not is_in_data
    labels = np.array([model_names.index(name) if name in model_names else -1 for name in data_names], dtype=np.int64)
    labels = labels[data.annotations.labels]
    strange = labels < 0
    extra = [
        name for name, plain in zip(data.class_names, data_names, strict=True) if plain not in {*model_names, *roots}
    ]
    absent = data.absent
    if strange.any():
        row = int(np.argmax(strange))
        example = f"{data.annotations.describe(row)} of class {data.class_names[data.annotations.labels[row]]}"
        kind = f"annotations of classes that {whose} does not know: {_list(extra)}"
        absent = (*absent, LeftOut(int(strange.sum()), kind, example))
    annotations = replace(data.annotations, labels=labels).take(~strange)
    counts = annotations.trained_counts().tolist()
    if not any(counts):
        raise DataError(f"{data.ann_file} has no usable annotation of the classes of {whose} ({_list(names)}).")
    return replace(
        data,
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        images=tuple(replace(image, num_gt=count) for image, count in zip(data.images, counts, strict=True)),
        annotations=annotations,
        absent=absent,
        notes=(*data.notes, _note(data, class_names, data_names, model_names, extra, roots, whose)),
    )


def _note(
    data: DetectionData,
    class_names: Sequence[str],
    data_names: list[str],
    model_names: list[str],
    extra: list[str],
    roots: set[str],
    whose: str,
) -> str:
    """What was matched, in words."""
    parts = []
    shared = [name for name in data_names if name in model_names]
    if shared != [name for name in model_names if name in data_names]:
        parts.append(f"put in its order: {_list(class_names)}")
    if lacking := [name for name, plain in zip(class_names, model_names, strict=True) if plain not in data_names]:
        parts.append(f"not in the file: {_list(lacking)}")
    if extra:
        parts.append(f"only in the file: {_list(extra)}")
    if roots:
        groups = [name for name, plain in zip(data.class_names, data_names, strict=True) if plain in roots]
        parts.append(f"dropped, since it only groups others: {_list(groups)}")
    return f"classes are matched by name with those of {whose} ({'; '.join(parts)})"


def _plain(name: str) -> str:
    return name.replace("_", " ").lower()


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
