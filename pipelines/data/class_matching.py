"""Classes of a data set matched by name with those of a model."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kdpipe.pipelines.data.annotations import LeftOut
from kdpipe.pipelines.data.coco_entries import DataError
from kdpipe.pipelines.data.datasets import DetectionData

__all__ = ["match_classes"]


def match_classes(data: DetectionData, names: Sequence[str], whose: str) -> DetectionData:
    """The same data with the labels of a model, its classes matched by name as mmdet does.

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
    here, wanted = ([_plain(name) for name in each] for each in (data.class_names, names))
    if here == wanted:
        return data
    used = set(np.unique(data.annotations.labels).tolist())
    roots = {
        here[label] for label, name in enumerate(data.class_names) if name in data.roots and label not in used
    } - set(wanted)
    extra = set(here) - set(wanted) - roots
    lacking = set(wanted) - set(here)
    unique = len(set(here)) == len(here) and len(set(wanted)) == len(wanted)
    if not unique or (extra and lacking) or lacking == set(wanted):
        raise DataError(
            f"the classes of {data.ann_file} are not those of {whose}: found {len(here)} ({_list(data.class_names)}), "
            f"expected {len(wanted)} ({_list(names)}). Give the data set that belongs to it, or rename its categories."
        )
    return _relabelled(data, names, here, wanted, roots, whose)


def _relabelled(
    data: DetectionData, names: Sequence[str], here: list[str], wanted: list[str], roots: set[str], whose: str
) -> DetectionData:
    free = max(data.category_ids) + 1
    class_names, category_ids = [], []
    for name, spelling in zip(wanted, names, strict=True):
        known = name in here
        class_names.append(data.class_names[here.index(name)] if known else spelling)
        category_ids.append(data.category_ids[here.index(name)] if known else free)
        free += not known
    labels = np.array([wanted.index(name) if name in wanted else -1 for name in here], dtype=np.int64)
    labels = labels[data.annotations.labels]
    strange = labels < 0
    absent = data.absent
    if strange.any():
        row = int(np.argmax(strange))
        classes = [name for name, plain in zip(data.class_names, here, strict=True) if plain not in {*wanted, *roots}]
        example = f"{data.annotations.describe(row)} of class {data.class_names[data.annotations.labels[row]]}"
        kind = f"annotations of classes that {whose} does not know: {_list(classes)}"
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
        notes=(*data.notes, _note(data, class_names, here, wanted, roots, whose)),
    )


def _note(
    data: DetectionData, class_names: Sequence[str], here: list[str], wanted: list[str], roots: set[str], whose: str
) -> str:
    """What was matched, in words."""
    parts = []
    shared = [name for name in here if name in wanted]
    if shared != [name for name in wanted if name in here]:
        parts.append(f"put in its order: {_list(class_names)}")
    if lacking := [name for name, plain in zip(class_names, wanted, strict=True) if plain not in here]:
        parts.append(f"not in the file: {_list(lacking)}")
    if extra := [name for name, plain in zip(data.class_names, here, strict=True) if plain not in {*wanted, *roots}]:
        parts.append(f"only in the file: {_list(extra)}")
    if roots:
        groups = [name for name, plain in zip(data.class_names, here, strict=True) if plain in roots]
        parts.append(f"dropped, since it only groups others: {_list(groups)}")
    return f"classes are matched by name with those of {whose} ({'; '.join(parts)})"


def _plain(name: str) -> str:
    return name.replace("_", " ").lower()


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
