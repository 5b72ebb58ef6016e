"""DistilledPreprocessor: what the teacher says of a batch, beside its images."""

from typing import Any

from mmdet.registry import MODELS
from mmengine.model import BaseDataPreprocessor

from kdpipe.distill.teacher.source import TargetSource


@MODELS.register_module()
class DistilledPreprocessor(BaseDataPreprocessor):  # type: ignore[misc]
    """The student's own preprocessor, with what the teacher says put beside the images, on the same device."""

    def __init__(self, student: Any, teacher: TargetSource) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        # a live teacher looks at the images before the student's normalisation
        targets = self.teacher.targets(data, self.device) if training else ()
        prepared = dict(self.student(data, training))
        return {**prepared, "targets": targets} if targets else prepared
