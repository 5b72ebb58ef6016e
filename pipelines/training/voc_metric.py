"""Pascal VOC's AP beside COCO's, where the images are of a Pascal VOC folder."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric

from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.voc_ap import Detections, read_objects, voc_ap
from kdpipe.pipelines.training.data import annotation_copy

__all__ = ["PascalVOCMetric", "with_voc_metric"]


@METRICS.register_module()
class PascalVOCMetric(BaseMetric):  # type: ignore[misc]
    """`voc_ap` as a metric of mmengine.

    mmdet's VOCMetric measures in one way at a time, and takes objects from the test pipeline, which may load none.

    Args:
        ann_file: The copy of the annotations that `write_coco` wrote.
    """

    default_prefix = "voc"

    def __init__(self, ann_file: str) -> None:
        super().__init__()
        self._objects = read_objects(ann_file)

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        for sample in data_samples:
            predicted = sample["pred_instances"]
            boxes, scores, labels = (predicted[name].cpu().numpy() for name in ("bboxes", "scores", "labels"))
            self.results.append((sample["img_id"], Detections(boxes, scores, labels)))

    def compute_metrics(self, results: list[tuple[int, Detections]]) -> dict[str, float]:
        return voc_ap(self._objects, dict(results))


def with_voc_metric(evaluator: Any, data: DetectionData) -> Any:
    """The evaluator of a config, with Pascal VOC's AP where the data are from there; None stays None."""
    if not data.is_voc or not evaluator:
        return evaluator
    return [evaluator, {"type": PascalVOCMetric.__name__, "ann_file": str(annotation_copy(data))}]
