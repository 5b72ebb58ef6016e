"""In which order a teacher numbers its classes: that of the names in its checkpoint, or that of the annotation file.

mmdet's CocoDataset numbers labels as the annotation file lists its categories, whatever the order of `classes` in the
config, and a checkpoint names its classes in the config's order. Where these differ, what the teacher says of annotated
boxes decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kdpipe.cache.errors import present
from kdpipe.cache.spec import CacheSpec
from kdpipe.pipelines.data.class_matching import in_file_order, in_file_order_text, telling_images
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.images import ImageError, load_picture
from kdpipe.pipelines.teacher.setup import with_classes
from kdpipe.pipelines.teacher.teacher import Teacher

__all__ = ["with_right_classes"]

_IMAGES = 8
_LEAST_BOXES, _LEAST_RATIO = 5, 3


def with_right_classes(
    teacher: Teacher,
    spec: CacheSpec,
    data: DetectionData,
    classes: Sequence[str] | None,
    whose: str,
    say: Callable[[str], None],
) -> tuple[CacheSpec, DetectionData]:
    """As `with_classes`, but where its names come in another order than the file's, the teacher is asked what it means.

    Args:
        teacher: The teacher.
        spec: As `prepare_teacher` gives it.
        data: The data set.
        classes: Names of the teacher's classes; None where its checkpoint names none.
        whose: The teacher's, for messages.
        say: Is given a line for people where it numbers its classes as the file does.

    Raises:
        KdpipeError: The teacher knows other classes.
    """
    by_name = with_classes(spec, data, classes, whose)
    order = None if classes is None else in_file_order(data, classes)
    if order is None:
        return by_name
    by_file = with_classes(spec, data, order, whose)
    named, filed = _right_once(teacher, by_name[0], (by_name[1], by_file[1]))
    if filed < max(_LEAST_BOXES, _LEAST_RATIO * named):
        return by_name
    say(
        f"{in_file_order_text(order, data, whose)}: of annotated boxes where these differ, it has {filed} right so, "
        f"and {named} by the names."
    )
    return by_file


@torch.no_grad()
def _right_once(teacher: Teacher, spec: CacheSpec, meanings: tuple[DetectionData, DetectionData]) -> tuple[int, int]:
    """Of how many annotated boxes of a few images the teacher's class is right in one meaning, and only in that."""
    spec = replace(spec, tier="predictions", views=spec.views[:1])
    right, data = [0, 0], meanings[0]
    telling = set(telling_images(meanings, _IMAGES))
    for image in [image for image in data.images if image.image_id in telling]:
        size, path, image_id = (image.height, image.width), data.img_dir / image.file_name, image.image_id
        try:
            pixels = load_picture(path, size, spec.scale, teacher.pixels.decoding).pixels
        except ImageError:
            continue  # whoever reads all images says so
        known: dict[str, Any] = {"spec": spec, "image_id": image_id, "file_name": path.name, "view": spec.views[0]}
        truth = data.gt_boxes(image_id)
        logits = present(teacher.record(pixels, truth, **known).logits, "the teacher's logits")
        answers = logits[len(logits) - len(truth) :, : spec.num_classes].argmax(dim=1).cpu().numpy()
        is_right = [answers == meaning.gt_labels(image_id) for meaning in meanings]
        for number in (0, 1):
            right[number] += int((is_right[number] & ~is_right[1 - number]).sum())
    return right[0], right[1]
