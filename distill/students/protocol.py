"""What the losses see of a student, whatever its family."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from kdpipe.distill.losses.masks import Anchor
from kdpipe.distill.outputs import BatchRois, Rows, StudentOutputs

BoxCoder = tuple[Sequence[float], Sequence[float]]  # means and standard deviations of deltas, four each


class StudentStage(Protocol):
    """A stage of a student in one forward pass: box head and RoIs. A student that is no cascade has one.

    Attributes:
        index: 0 for the first.
        weight: Of the losses of this stage.
        pyramid: Per level Tensor[B, C, h_l, w_l], part of the graph of the student's own loss.
        strides: Pixels per cell of each level.
        box_coder: Which `deltas` are in the units of.
    """

    index: int
    weight: float
    pyramid: list[Tensor]
    strides: tuple[int, ...]
    box_coder: BoxCoder

    @property
    def base_anchors(self) -> dict[int, list[Anchor]]:
        """By stride, anchors of the cell (0, 0): (x1, y1, x2, y2), pixels."""

    def sampled(self) -> tuple[BatchRois, Rows, StudentOutputs]:
        """The RoIs that the student's own sampler chose, which of them it has something to say of, N, and what.

        Raises:
            StudentError: Its own loss did not show them.
        """

    def outputs_at(self, rois: Tensor) -> tuple[Rows, StudentOutputs]:
        """What the student says of RoIs that it did not choose.

        Args:
            rois: Tensor[R, 5] (image in the batch, x1, y1, x2, y2), pixels of the network input.

        Returns:
            Which of them it has something to say of, N, and what.
        """


class StudentForward(Protocol):
    """What a student made of a batch while it computed its own loss."""

    @property
    def pyramid(self) -> list[Tensor]:
        """Per level Tensor[B, C, h_l, w_l]."""

    @property
    def stages(self) -> Sequence[StudentStage]:
        """One, or those of a cascade."""


class Student(Protocol):
    """Reads pyramid and head of a detector, which stays unmodified.

    Attributes:
        strides: Pixels per cell of each level of the pyramid.
        channels: Of the pyramid.
        embedding_dims: Length of the embeddings of each stage.
        num_anchors: Boxes A that one embedding stands for.
        num_classes: K, background left out.
        class_agnostic: Its box regression is one for all classes.
    """

    strides: tuple[int, ...]
    channels: int
    embedding_dims: tuple[int, ...]
    num_anchors: int
    num_classes: int
    class_agnostic: bool

    def watch(self) -> AbstractContextManager[StudentForward]:
        """Collect what the detector makes while it computes its own loss, which stays what it is.

        Nothing is computed twice, and no random number is drawn.
        """
