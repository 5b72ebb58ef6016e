"""Whether the annotations have the masks that a config trains on."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config

from kdpipe.pipelines.data.coco_entries import NO_MASK, DataError
from kdpipe.pipelines.data.datasets import DetectionData

__all__ = ["check_masks"]


def check_masks(cfg: Config, data: DetectionData) -> None:
    """Refuse to train masks where annotations lack them, which mmdet would tell as `KeyError: 'mask'`.

    Args:
        cfg: Of the training, overrides applied.
        data: The training images.

    Raises:
        DataError: With the overrides that leave the mask branch out.
    """
    steps = list(_mask_steps(cfg.train_dataloader.dataset, "train_dataloader.dataset"))
    if not steps:
        return
    annotations = data.annotations
    trained = (annotations.kinds == 0).nonzero()[0].tolist()
    masks = annotations.segmentations
    lacking = len(trained) if masks is None else sum(masks[row] is NO_MASK for row in trained)
    if not lacking:
        return
    roi_head = cfg.model.get("roi_head") or {}
    branch = [f"model.roi_head.{key}=None" for key in roi_head if key.startswith("mask") and roi_head[key] is not None]
    options = " ".join(f"-o {option}" for option in [*branch, *(f"{step}.with_mask=False" for step in steps)])
    advice = (
        f"Train without them: {options}"
        if branch or not _has_masks(cfg.model)
        else f"A {cfg.model.type} cannot do without them: choose a detector of boxes."
    )
    raise DataError(
        f"The config trains on masks (LoadAnnotations with with_mask=True), and {lacking} of {len(trained)} "
        f"annotations of {data.ann_file} have none (segmentation). {advice}"
    )


def _has_masks(model: Mapping[str, Any]) -> bool:
    return any(key.startswith(("mask", "panoptic")) and value for key, value in model.items())


def _mask_steps(dataset: Mapping[str, Any], place: str) -> Iterator[str]:
    """The places of the steps that load masks, in a data set and in those inside it."""
    for index, step in enumerate(dataset.get("pipeline") or ()):
        if step.get("with_mask"):
            yield f"{place}.pipeline.{index}"
    if inner := dataset.get("dataset"):
        yield from _mask_steps(inner, f"{place}.dataset")
