"""What a trained student sees in images that its teacher's cache holds, and how it belongs to what the teacher sees."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mmcv.transforms import Compose
from torch import Tensor
from torchvision.ops import box_iou

from kdpipe.cache.errors import KdpipeError, present
from kdpipe.cache.records import TeacherTargets
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.views import map_boxes
from kdpipe.distill.losses.sgfi import SGFI
from kdpipe.distill.rois.align import assign_levels, roi_align_levels
from kdpipe.distill.students.build import is_dense, student_of
from kdpipe.distill.students.protocol import StudentStage
from kdpipe.distill.teacher.pyramids import TeacherPyramids
from kdpipe.pipelines.commands.evaluate import load_detector
from kdpipe.pipelines.data.provenance import recorded_entry
from kdpipe.pipelines.detectors.checkpoints import class_names, load_checkpoint
from kdpipe.pipelines.detectors.config_types import type_name
from kdpipe.pipelines.detectors.configs import config_from_checkpoint
from kdpipe.pipelines.detectors.mmdet2 import test_steps
from kdpipe.pipelines.report.trainings import Training
from kdpipe.pipelines.training.work_dir import WorkDir

__all__ = ["StudentView", "TrainedStudent", "level_differences", "load_sgfi", "positive_rows", "without_padding"]

_POSITIVE = 0.5  # IoU with an annotated object


@dataclass(frozen=True, eq=False)
class StudentView:
    """What a student sees in an image.

    Attributes:
        stage: Its first box head, which answers for RoIs.
        matrix: ``[3, 3]``, original pixels -> network input.
        size: (height, width) of that without padding.
    """

    stage: StudentStage
    matrix: npt.NDArray[np.float64]
    size: tuple[int, int]

    @property
    def levels(self) -> dict[int, Tensor]:
        """Tensor[C, h, w] by stride, without padding."""
        levels = zip(self.stage.strides, self.stage.pyramid, strict=True)
        return {stride: without_padding(level[0], stride, self.size) for stride, level in levels}

    def rois(self, boxes: Tensor) -> Tensor:
        """Boxes Tensor[R, 4] in original pixels as RoIs Tensor[R, 5] of the network input."""
        mapped = map_boxes(boxes.double(), self.matrix).float()
        return torch.cat([mapped.new_zeros(len(mapped), 1), mapped], dim=1)

    def logits(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Which boxes it has something to say of, Tensor[R] bool, and its logits Tensor[N, K + 1] at these."""
        rows, outputs = self.stage.outputs_at(self.rois(boxes))
        answered = torch.zeros(len(boxes), dtype=torch.bool)
        answered[rows] = True
        return answered, present(outputs, "the student's outputs").logits


def without_padding(level: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """The cells of a level, Tensor[C, h, w], that lie in an image of a size (height, width)."""
    return level[:, : math.ceil(size[0] / stride), : math.ceil(size[1] / stride)]


class TrainedStudent:
    """A student with the weights that it has been measured with, on the CPU.

    Args:
        training: Of the student.

    Raises:
        KdpipeError: Its checkpoint is not there, or cannot be built.
    """

    def __init__(self, training: Training) -> None:
        checkpoint = load_checkpoint(training.checkpoint, trust=False)
        config, names = config_from_checkpoint(checkpoint), class_names(checkpoint)
        if config is None or names is None:
            raise KdpipeError(f"{training.checkpoint} does not carry its config and its classes")
        self.model = load_detector(config, checkpoint, len(names)).eval()
        self.student = student_of(self.model)
        steps = [step for step in test_steps(config) if type_name(step["type"]) != "LoadAnnotations"]
        self._pipeline = Compose(steps)

    @torch.inference_mode()
    def look(self, path: Path) -> StudentView:
        """What it sees in an image file.

        Raises:
            KdpipeError: The file cannot be read.
        """
        try:
            packed = self._pipeline({"img_path": str(path), "img_id": 0, "instances": []})
        except OSError as error:
            raise KdpipeError(f"{path} cannot be read ({error})") from error
        sample = packed["data_samples"]
        batch = self.model.data_preprocessor({"inputs": [packed["inputs"]], "data_samples": [sample]}, False)
        with self.student.watch() as forward:
            pyramid = self.model.extract_feat(batch["inputs"])
            if is_dense(self.model):
                watched: Any = forward
                scores, regression = self.model.bbox_head(pyramid)[:2]
                watched.scores, watched.regression = list(scores), list(regression)
                watched.metas = [sample.metainfo]
        width, height = sample.metainfo["scale_factor"]
        return StudentView(forward.stages[0], np.diag([width, height, 1.0]), sample.metainfo["img_shape"][:2])


def load_sgfi(training: Training) -> SGFI:
    """The parameters of SGFI, which the newest checkpoint of a training has beside the student.

    Args:
        training: With `sgfi` among its methods.

    Raises:
        KdpipeError: They are not there.
    """
    checkpoint = load_checkpoint(WorkDir(training.path).newest(), trust=False)
    prefix = "sgfi."
    weights = {
        name.removeprefix(prefix): value for name, value in checkpoint.state_dict.items() if name.startswith(prefix)
    }
    if "adapt.weight" not in weights:
        raise KdpipeError(f"{checkpoint.path} does not hold the parameters of sgfi")
    out_channels, in_channels, size, _ = weights["adapt.weight"].shape
    normalize = bool(recorded_entry(training.record, "distillation", "sgfi", "normalize"))
    sgfi = SGFI(in_channels, out_channels, size, normalize=normalize)
    sgfi.load_state_dict(weights)
    return sgfi


def positive_rows(targets: TeacherTargets) -> Tensor:
    """Numbers of the cached boxes that are annotated objects or overlap one by an IoU of at least 0.5."""
    truth = targets.boxes[targets.num_proposals + targets.num_jittered :]
    if not len(truth):
        return torch.zeros(0, dtype=torch.int64)
    rows: Tensor = (box_iou(targets.boxes, truth).amax(dim=1) >= _POSITIVE).nonzero().squeeze(1)
    return rows


@torch.inference_mode()
def level_differences(targets: TeacherTargets, spec: CacheSpec, view: StudentView, sgfi: SGFI) -> list[int]:
    """By how many levels the student's best match lies above the level that the teacher assigns, per positive RoI.

    The best match is the level that SGFI looks at most. Levels are compared by their stride: 0 is the same one.

    Args:
        targets: Of the image, in the view `identity`, with its RoI features or its pyramid.
        spec: Of the cache.
        view: What the student sees in the image.
        sgfi: As it was trained.
    """
    rows = positive_rows(targets)
    if targets.roi_rows is not None:
        is_stored = torch.isin(targets.roi_rows.long(), rows)
        rows, teacher = targets.roi_rows.long()[is_stored], targets.float_roi_features()[is_stored]
        boxes = map_boxes(targets.boxes[rows], targets.matrix)
    else:
        boxes = map_boxes(targets.boxes[rows], targets.matrix)
        levels = present(targets.features, f"the features of image {targets.image_id}")
        pyramids = TeacherPyramids({0: (levels, targets.scale)}, spec)
        teacher = pyramids.roi_align(torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1))
    if not len(rows):
        return []
    assigned = assign_levels(boxes, spec.finest_scale, spec.roi_levels)
    stage = view.stage
    student = roi_align_levels(stage.pyramid, stage.strides, view.rois(targets.boxes[rows]), spec.roi_size)
    best = sgfi.level_weights(student, teacher).argmax(dim=1)
    strides = _octaves(stage.strides)[best] - _octaves(spec.strides)[assigned]
    return [int(step) for step in strides.round().tolist()]


def _octaves(strides: Sequence[int]) -> Tensor:
    octaves: Tensor = torch.tensor(strides, dtype=torch.float32).log2()
    return octaves
