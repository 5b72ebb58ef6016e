"""RoIs of a batch, and what box heads say of them."""

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class BatchRois:
    """R RoIs of a batch; those of an image lie together, its positives first.

    Attributes:
        rois: Tensor[R, 5] (image in the batch, x1, y1, x2, y2), pixels of the student's network input.
        labels: Tensor[R] int64, number of classes = background.
        positive: Tensor[R] bool.
    """

    rois: Tensor
    labels: Tensor
    positive: Tensor

    def select(self, rows: Tensor) -> "BatchRois":
        """Those of a mask or of row numbers."""
        return BatchRois(self.rois[rows], self.labels[rows], self.positive[rows])


@dataclass(frozen=True)
class HeadOutputs:
    """What a box head says of R RoIs.

    Attributes:
        embeddings: Tensor[R, D], input of the classifier layer.
        logits: Tensor[R, K + 1], background last.
        deltas: Tensor[R, K or 1, 4], normalised by the box coder of that head.
    """

    embeddings: Tensor
    logits: Tensor
    deltas: Tensor

    def select(self, rows: Tensor) -> "HeadOutputs":
        """Those of a mask or of row numbers."""
        return HeadOutputs(self.embeddings[rows], self.logits[rows], self.deltas[rows])


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher says of the RoIs of a batch, in the student's orientation. What no loss asks for is None.

    Attributes:
        features: Tensor[P, C, size, size] float32, RoI features of the positives.
        embeddings: Tensor[R, D].
        logits: Tensor[R, K + 1], background last.
        deltas: Tensor[R, K or 1, 4], normalised by the teacher's box coder.
    """

    features: Tensor | None = None
    embeddings: Tensor | None = None
    logits: Tensor | None = None
    deltas: Tensor | None = None

    def select(self, rows: Tensor) -> "TeacherOutputs":
        """The features as they are, and the rest at a mask or at row numbers."""
        of_head = {name: getattr(self, name) for name in ("embeddings", "logits", "deltas")}
        return replace(self, **{name: value[rows] for name, value in of_head.items() if value is not None})
