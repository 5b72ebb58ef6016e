"""RoIs of a batch, and what the box heads of student and teacher say of them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Rows = Tensor | slice  # a mask, row numbers, or a slice


@dataclass(frozen=True)
class BatchRois:
    """R RoIs of a batch; those of an image lie together, its positives first.

    Attributes:
        rois: Tensor[R, 5] (image in the batch, x1, y1, x2, y2), pixels of the student's network input.
        labels: Tensor[R] int64, number of classes = background.
        positive: Tensor[R] bool.
        num_positive: P, where it is known without asking the device.
    """

    rois: Tensor
    labels: Tensor
    positive: Tensor
    num_positive: int | None = None

    def __len__(self) -> int:
        return len(self.rois)

    @cached_property
    def positive_rows(self) -> Tensor:
        """Tensor[P] int64, ascending row numbers of the positives."""
        if self.num_positive is None:
            return self.positive.nonzero().squeeze(1)
        return self.positive.byte().argsort(descending=True, stable=True)[: self.num_positive]

    @property
    def image_index(self) -> Tensor:
        """Tensor[R] int64, the image in the batch."""
        return self.rois[:, 0].long()

    @property
    def boxes(self) -> Tensor:
        """Tensor[R, 4] (x1, y1, x2, y2)."""
        return self.rois[:, 1:]

    @staticmethod
    def none(device: torch.device) -> "BatchRois":
        """No RoIs."""
        labels = torch.zeros(0, dtype=torch.int64, device=device)
        return BatchRois(torch.zeros(0, 5, device=device), labels, labels > 0, num_positive=0)

    def select(self, rows: Rows) -> "BatchRois":
        """Some of them."""
        if isinstance(rows, slice) and rows == slice(None):
            return self
        return BatchRois(self.rois[rows], self.labels[rows], self.positive[rows])


@dataclass(frozen=True)
class HeadOutputs:
    """What a box head of a two-stage detector says of R RoIs.

    Attributes:
        embeddings: Tensor[R, D], input of the classifier layer.
        logits: Tensor[R, K + 1], background last.
        deltas: Tensor[R, K or 1, 4], normalised by the box coder of that head.
    """

    embeddings: Tensor
    logits: Tensor
    deltas: Tensor


@dataclass(frozen=True)
class StudentOutputs:
    """What a student says of R RoIs, part of its graph.

    Attributes:
        embeddings: Tensor[R, D]: the input of the classifier layer; of a dense student, the feature of the last
            convolution of a branch at the location of the prediction.
        logits: Tensor[R, K + 1], background last. The background of a sigmoid head is 0, since
            sigmoid(x) = softmax(x, 0)[0].
        deltas: Tensor[R, K or 1, 4], normalised by the student's box coder; None of a dense student.
        anchors: Tensor[R] int64, which of its location's predictions it is; None of a two-stage student.
        boxes: Tensor[R, 4] float32 (x1, y1, x2, y2), what a dense student predicts there, not clipped; None of others.
    """

    embeddings: Tensor
    logits: Tensor
    deltas: Tensor | None = None
    anchors: Tensor | None = None
    boxes: Tensor | None = None

    def select(self, rows: Rows) -> "StudentOutputs":
        """Those of some rows."""
        others = (_at(values, rows) for values in (self.deltas, self.anchors, self.boxes))
        return StudentOutputs(self.embeddings[rows], self.logits[rows], *others)


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher says of the RoIs of a batch, in the student's orientation. What no loss asks for is None.

    Attributes:
        roi_features: Tensor[P, C, size, size] float32, of the positives.
        embeddings: Tensor[R, D].
        logits: Tensor[R, K + 1], background last.
        deltas: Tensor[R, K or 1, 4], normalised by the teacher's box coder.
    """

    roi_features: Tensor | None = None
    embeddings: Tensor | None = None
    logits: Tensor | None = None
    deltas: Tensor | None = None


@dataclass(frozen=True)
class TeacherMap:
    """A level of the teacher's pyramids of a batch, in the student's view.

    Attributes:
        values: Tensor[B, C, h, w] float32.
        inside: Tensor[B, h, w] float32 of 0 and 1: the teacher saw the centre of this cell.
    """

    values: Tensor
    inside: Tensor


def _at(values: Tensor | None, rows: Rows) -> Tensor | None:
    return None if values is None else values[rows]
