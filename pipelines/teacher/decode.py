"""The teacher's AP from what a cache holds of its proposals: neither its weights nor an image is read."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from kdpipe.cache.errors import CacheError, present
from kdpipe.cache.read.reader import TeacherCache
from kdpipe.cache.views import map_boxes
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.voc_ap import Detections, read_objects, voc_ap
from kdpipe.pipelines.detectors.building import building
from kdpipe.pipelines.runtime.console import ProgressBar, silent_stdout
from kdpipe.pipelines.training.progress import AP_NAMES, VOC_PREFIX

__all__ = ["cached_ap", "cached_detections"]

_MOST_DETECTIONS = (100, 300, 1000)  # per image, as mmdet has them: AP is at 100, the others at 1,000


def cached_ap(
    cache: TeacherCache,
    config: Config,
    data: DetectionData,
    console: Console,
    image_ids: Sequence[int] | None = None,
) -> dict[str, float]:
    """AP of the detections that cached logits and deltas of the proposals decode to.

    Args:
        cache: With the view `identity`.
        config: The teacher's, as `recorded_config` gives it.
        data: What the cache was made of.
        console: Where progress is shown.
        image_ids: Of the images that are measured; None takes those of the cache.

    Returns:
        As `ap_metrics` gives them, not rounded.

    Raises:
        CacheError: the cache lacks the view, or is damaged.
        ConfigError: the config does not describe the teacher's box head.
    """
    image_ids = cache.image_ids.tolist() if image_ids is None else image_ids
    detections = cached_detections(cache, config, image_ids, console)
    with tempfile.TemporaryDirectory() as folder:
        annotations = data.copied_to(Path(folder) / "annotations.json").write_copy()
        metrics = _coco_ap(cache, annotations, detections, image_ids)
        if data.is_voc:
            objects = read_objects(annotations)
            objects = {image_id: objects[image_id] for image_id in image_ids}
            metrics |= {VOC_PREFIX + name: value for name, value in voc_ap(objects, detections).items()}
    return metrics


@torch.inference_mode()
def cached_detections(
    cache: TeacherCache, config: Config, image_ids: Sequence[int], console: Console
) -> dict[int, Detections]:
    """The detections that cached logits and deltas of the proposals decode to, by image id.

    They are decoded as mmdet decodes those of the live teacher: score threshold, class-wise NMS and number of
    detections are those of its config. Images without proposals are left out.

    Args:
        cache: With the view `identity`.
        config: The teacher's, as `recorded_config` gives it.
        image_ids: Of images of the cache.
        console: Where progress is shown.

    Raises:
        CacheError: the cache lacks the view, or is damaged.
        ConfigError: the config does not describe the teacher's box head.
    """
    if "identity" not in cache.spec.views:
        raise CacheError(f"AP needs the view identity, and {cache.location} has {', '.join(cache.spec.views)}.")
    register_all_modules(init_default_scope=True)
    with building("The teacher's box head"):
        head_config = config.model.roi_head.bbox_head
        # of a cascade, what is cached is in the units of the first stage
        head = MODELS.build(head_config[0] if isinstance(head_config, list) else head_config)
        options = config.model.test_cfg.rcnn
    detections: dict[int, Detections] = {}
    start = time.perf_counter()
    with ProgressBar(console, "teacher's AP", len(image_ids)) as progress:
        for done, image_id in enumerate(image_ids, 1):
            if (image_detections := _detections(cache, image_id, head, options)) is not None:
                detections[image_id] = image_detections
            progress.update(done, f"{done / (time.perf_counter() - start):.1f} images/s")
    return detections


def _coco_ap(
    cache: TeacherCache, annotations: Path, detections: Mapping[int, Detections], image_ids: Sequence[int]
) -> dict[str, float]:
    """COCO's AP on images of a cache."""
    results = [entry for image_id, each in detections.items() for entry in _results(cache, image_id, each)]
    if not results:
        return dict.fromkeys(AP_NAMES, 0.0)
    with silent_stdout():
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.imgIds = list(image_ids)
        evaluation.params.catIds = list(cache.spec.category_ids)
        evaluation.params.maxDets = list(_MOST_DETECTIONS)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(AP_NAMES, map(float, evaluation.stats[: len(AP_NAMES)]), strict=True))


def _results(cache: TeacherCache, image_id: int, detections: Detections) -> list[dict[str, Any]]:
    """Detections of an image as COCO results."""
    boxes, labels = detections.boxes, detections.labels.tolist()
    sides = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    return [
        {"image_id": image_id, "category_id": cache.spec.category_ids[label], "bbox": box, "score": score}
        for label, box, score in zip(labels, sides.tolist(), detections.scores.tolist(), strict=True)
    ]


def _detections(cache: TeacherCache, image_id: int, head: Any, options: Any) -> Detections | None:
    """Detections of an image; None where there is no proposal."""
    targets = cache.targets(image_id, "identity", fields=("logits", "deltas"))
    logits, deltas = (
        present(getattr(targets, field), f"{field} of image {image_id}") for field in ("logits", "deltas")
    )
    count = targets.num_proposals
    if count == 0:
        return None
    rois = map_boxes(targets.boxes[:count].double(), targets.matrix).float()
    meta = {
        "img_shape": targets.input_size,
        "ori_shape": targets.original_size,
        "scale_factor": (float(targets.matrix[0, 0]), float(targets.matrix[1, 1])),
    }
    detections = head.predict_by_feat(
        rois=(torch.cat([rois.new_zeros(count, 1), rois], dim=1),),  # [N, 5]
        cls_scores=(logits[:count].float(),),
        bbox_preds=(deltas[:count].float().reshape(count, -1),),
        batch_img_metas=[meta],
        rcnn_test_cfg=options,
        rescale=True,
    )[0]
    return Detections(detections.bboxes.double().numpy(), detections.scores.numpy(), detections.labels.numpy())
