"""What a distillation loss can be given: student and teacher at the same RoIs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kdpipe.cache.errors import present
from kdpipe.cache.records import decode_deltas, encode_boxes
from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.losses.ckd_queue import TeacherKeys
from kdpipe.distill.losses.masks import Anchor
from kdpipe.distill.losses.prediction import recode_deltas
from kdpipe.distill.outputs import BatchRois, Rows, StudentOutputs, TeacherOutputs
from kdpipe.distill.rois.align import roi_align_levels
from kdpipe.distill.rois.frames import ImageFrames
from kdpipe.distill.rois.sampling import best_overlap
from kdpipe.distill.students.protocol import StudentStage
from kdpipe.distill.students.pyramids import StudentPyramids
from kdpipe.distill.teacher.heads.build import BoxHead, FrozenTeacher
from kdpipe.distill.teacher.maps import StoredMaps, WarpedMaps
from kdpipe.distill.teacher.pyramids import TeacherRois

# What a loss can be given of what the student says of the RoIs.
OF_STUDENT = frozenset({"student_embeddings", "student_logits", "student_deltas", "student_boxes", "anchors"})
# What a loss can be given of the teacher, and the field of a cache that it is made of.
TEACHER_FIELDS = {
    "teacher_roi_features": "roi_features",
    "teacher_keys": "embeddings",
    "teacher_logits": "logits",
    "teacher_deltas": "deltas",
    "teacher_boxes": "deltas",
    "all_teacher_logits": "logits",
    "all_teacher_deltas": "deltas",
    "teacher_maps": "features",
}


@dataclass(frozen=True)
class RoiPairs:
    """What student and teacher say of the same RoIs of a batch, at one stage of the student.

    A loss is given what the names of its parameters say: properties of this class (`methods.Loss`).

    Attributes:
        stage: Of the student.
        spec: What the teacher is.
        rois: All RoIs of the step, R.
        rows: Which of them the student has something to say of, N: all but those without a partner among a dense
            student's boxes.
        student: At these; None where no loss reads it.
        teacher: At all of them.
        samples: mmdet's `DetDataSample` of each image of the batch.
        frozen_teacher: Has the teacher's box head.
        maps: The teacher's feature maps of each image; None of one that is left out.
    """

    stage: StudentStage
    spec: CacheSpec
    rois: BatchRois
    rows: Rows
    student: StudentOutputs | None
    teacher: TeacherOutputs
    samples: Sequence[Any] = ()
    frozen_teacher: FrozenTeacher | None = None
    maps: Sequence[StoredMaps | None] = ()

    @cached_property
    def paired(self) -> BatchRois:
        """The N RoIs that both speak of."""
        return self.rois.select(self.rows)

    def _of_teacher(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else values[self.rows]

    @property
    def num_classes(self) -> int:
        """K, which is the label of background."""
        return self.spec.num_classes

    @property
    def labels(self) -> Tensor:
        """Tensor[N] int64 in [0, K], of the ground truth; K is background."""
        return self.paired.labels

    @property
    def anchors(self) -> Tensor | None:
        """Tensor[N] int64, which of the predictions of a dense student's location a box is; None of others."""
        return None if self.student is None else self.student.anchors

    @property
    def student_embeddings(self) -> Tensor | None:
        """Tensor[N, D of the student]."""
        return None if self.student is None else self.student.embeddings

    @property
    def student_logits(self) -> Tensor | None:
        """Tensor[N, K + 1], background last."""
        return None if self.student is None else self.student.logits

    @cached_property
    def student_deltas(self) -> Tensor | None:
        """Tensor[N, K or 1, 4], in the units of the teacher's box coder.

        Those of a dense student lead from each RoI to the box that it predicts there, which it may predict in another
        way.
        """
        spec, student = self.spec, self.student
        if student is None:
            return None
        if student.boxes is not None:
            return encode_boxes(self.paired.boxes, student.boxes[:, None], spec.box_means, spec.box_stds)
        if student.deltas is None:
            return None
        means, stds = self.stage.box_coder
        return recode_deltas(student.deltas, means, stds, spec.box_means, spec.box_stds)

    @property
    def student_boxes(self) -> Tensor | None:
        """Tensor[N, K or 1, 4] (x1, y1, x2, y2), pixels of the student's network input, not clipped."""
        if self.student is not None and self.student.boxes is not None:
            return self.student.boxes[:, None]
        return self._decoded(self.student_deltas)

    def _decoded(self, deltas: Tensor | None) -> Tensor | None:
        """Boxes that deltas in the units of the teacher's box coder lead to from the N RoIs."""
        spec = self.spec
        return None if deltas is None else decode_deltas(self.paired.boxes, deltas, spec.box_means, spec.box_stds)

    @property
    def true_deltas(self) -> Tensor:
        """Tensor[N, 4], from each RoI to the annotation that it overlaps most, in the units of the teacher's box coder.

        Zeros in images without annotations.
        """
        rois = self.paired
        boxes = rois.boxes.float()
        for image, truth in enumerate([x.to(boxes) for x in self.gt_boxes]):
            if len(truth):
                nearest = truth[best_overlap(rois.boxes, truth)[1]]
                boxes = torch.where((rois.image_index == image)[:, None], nearest, boxes)
        return encode_boxes(rois.boxes, boxes[:, None], self.spec.box_means, self.spec.box_stds)[:, 0]

    @property
    def student_roi_features(self) -> Tensor:
        """Tensor[P, L, C of the student, size, size], of the positives, on each level of the student's pyramid."""
        rois, stage = self.rois.rois[self.rois.positive_rows], self.stage
        return roi_align_levels(stage.pyramid, stage.strides, rois, self.spec.roi_size)

    @property
    def _student_pyramids(self) -> StudentPyramids:
        return StudentPyramids(self.stage.pyramid, self.stage.strides, self.spec)

    @property
    def student_assigned_roi_features(self) -> Tensor:
        """Tensor[P, C of the student, size, size], of the positives, each from one level: `StudentPyramids`."""
        return self._student_pyramids.roi_align(self.rois.rois[self.rois.positive_rows])

    @property
    def student_rois(self) -> TeacherRois:
        """All R RoIs, with the student's pyramids that a box head of the teacher's can look at."""
        index = self.rois.image_index
        boxes = self.rois.boxes.float()
        sizes = torch.tensor([sample.img_shape[1::-1] for sample in self.samples], dtype=boxes.dtype)  # [B, 2] (w, h)
        return TeacherRois(self._student_pyramids, index, boxes, sizes.to(boxes.device, non_blocking=True)[index])

    @property
    def box_head(self) -> BoxHead:
        """The teacher's, frozen."""
        return present(self.frozen_teacher, "the teacher of a training").head_for(self.stage.index)

    @property
    def student_maps(self) -> dict[int, Tensor]:
        """The student's pyramid, by stride: Tensor[B, C of the student, h, w]."""
        return dict(zip(self.stage.strides, self.stage.pyramid, strict=True))

    @cached_property
    def teacher_maps(self) -> WarpedMaps:
        """The teacher's pyramids in the student's view, by stride, for the levels that both have."""
        return WarpedMaps(self.maps, self.spec, self.student_maps, [sample.img_shape[:2] for sample in self.samples])

    @cached_property
    def gt_boxes(self) -> list[Tensor]:
        """Annotated boxes of each image, Tensor[G, 4] (x1, y1, x2, y2), pixels of the student's network input."""
        device = self.stage.pyramid[0].device
        boxes = [sample.gt_instances.bboxes for sample in self.samples]
        return [getattr(x, "tensor", x).to(device, non_blocking=True) for x in boxes]

    @property
    def base_anchors(self) -> dict[int, list[Anchor]]:
        """The student's anchors of the cell (0, 0), by stride: (x1, y1, x2, y2), pixels."""
        return self.stage.base_anchors

    @property
    def teacher_keys(self) -> TeacherKeys:
        """The teacher's embeddings, and of which boxes of which images they are."""
        embeddings = present(self.teacher.embeddings, "the teacher's embeddings")[self.rows]
        frames = ImageFrames.of(self.samples, embeddings.device)
        boxes, image_ids = frames.original_boxes(self.paired.rois), frames.image_ids[self.paired.image_index]
        return TeacherKeys(embeddings.float(), boxes, image_ids)

    @property
    def teacher_logits(self) -> Tensor | None:
        """Tensor[N, K + 1], background last."""
        return self._of_teacher(self.teacher.logits)

    @property
    def teacher_deltas(self) -> Tensor | None:
        """Tensor[N, K or 1, 4], normalised by the teacher's box coder."""
        return self._of_teacher(self.teacher.deltas)

    @property
    def teacher_boxes(self) -> Tensor | None:
        """Tensor[N, K or 1, 4] (x1, y1, x2, y2), pixels of the student's network input, not clipped."""
        return self._decoded(self.teacher_deltas)

    @property
    def all_teacher_logits(self) -> Tensor | None:
        """Tensor[R, K + 1], background last: of all RoIs, also those that the student has nothing to say of."""
        return self.teacher.logits

    @property
    def all_teacher_deltas(self) -> Tensor | None:
        """Tensor[R, K or 1, 4], normalised by the teacher's box coder: of all RoIs."""
        return self.teacher.deltas

    @property
    def teacher_roi_features(self) -> Tensor | None:
        """Tensor[P, C of the teacher, size, size], of the positives, from the level that the teacher assigns."""
        return self.teacher.roi_features
