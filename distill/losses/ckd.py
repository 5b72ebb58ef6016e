"""Contrastive distillation: the student's view of a box should find the teacher's among those of many others."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdpipe.distill.losses.ckd_negatives import NoNegatives
from kdpipe.distill.losses.ckd_queue import TeacherKeys, TeacherQueue, of_all_ranks
from kdpipe.distill.losses.ckd_sliced import sliced_ckd_loss
from kdpipe.distill.losses.numeric import (
    LossInputError,
    check_dims,
    check_shape,
    full_precision,
    no_autocast,
    unit_rows,
)
from kdpipe.distill.rows import in_order, rows_of_each

PROJECTIONS = ("linear", "nonlinear")


def ckd_loss(student: Tensor, keys: Tensor, exclude: Tensor | None = None, temperature: float = 0.07) -> Tensor:
    """InfoNCE between projected representations of the same boxes (G-DetKD, eq. 2).

    -1/N sum_i log(g(s_i, t_i) / sum_j g(s_i, t_j)) with g = exp(cosine similarity / temperature): a cross-entropy, in
    which the class of box i is the teacher's representation of the same box. j runs over all keys, the positive i
    included. The paper is silent about the temperature; 0.07 is that of CRD and MoCo. Computed in float32 (float64 for
    float64 input), autocast or not.

    Trainings compute the same by `sliced_ckd_loss`, which never holds the N x (N + K) similarities whole.

    Args:
        student: Tensor[N, d], need not be normalised.
        keys: Tensor[N + K, d], the teacher's: first those of the same N boxes, then those of others.
        exclude: Tensor[N, N + K] bool, True where key j is not a negative of student i. The positive always counts.
        temperature: gamma > 0.

    Returns:
        Scalar >= 0; 0 for N = 0, still part of the graph.

    Raises:
        LossInputError: shapes that do not fit, `exclude` is not bool, or the temperature is not positive and finite.
    """
    check_dims("student", student, "[N, d]")
    check_dims("keys", keys, "[N + K, d]")
    num_boxes, num_keys = len(student), len(keys)
    expected = (max(num_keys, num_boxes), student.shape[1])
    check_shape("keys", keys, expected, f"student {list(student.shape)}, of which each needs a key")
    if exclude is not None:
        check_shape("exclude", exclude, (num_boxes, num_keys), f"{num_boxes} of the student and {num_keys} keys")
        if exclude.dtype != torch.bool:
            raise LossInputError(f"exclude must be bool, found {exclude.dtype}.")
    _check_temperature(temperature)
    with no_autocast(student):
        s, t = map(unit_rows, full_precision(student, keys))
        similarity = s @ t.T / temperature  # [N, N + K]
        positive = torch.arange(num_boxes, device=student.device)  # [N], the key of the same box
        if exclude is not None:
            is_positive = positive[:, None] == torch.arange(num_keys, device=student.device)  # [N, N + K]
            similarity = similarity.masked_fill(exclude & ~is_positive, -torch.inf)
        return functional.cross_entropy(similarity, positive, reduction="sum") / max(num_boxes, 1)


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise LossInputError(f"The temperature of CKD must be above 0 and finite, found {temperature}.")


class CKDResult(NamedTuple):
    """What CKD gives.

    Attributes:
        loss: Scalar.
        top1: Scalar in [0, 1]: the share of boxes whose own key is nearer than every negative. 0 for no boxes.
        spread: Scalar in [-1, 1]: mean cosine between two projected keys. Near 1, f_theta takes all boxes to one point,
            and the loss teaches nothing.
        queue: Scalar: how many keys the queue holds for the next step.
    """

    loss: Tensor
    top1: Tensor
    spread: Tensor
    queue: Tensor


class CKD(nn.Module):
    """Parameters of CKD: f_theta, shared by both sides, and the queue. Needed in training only.

    A student whose embeddings have another length than the teacher's is lifted to it by one linear layer, so that
    f_theta stays shared. Where an embedding is of a location with several anchors, that layer makes a representation of
    each of them, so that boxes of one location differ (section 4.3.2, "decoupled for each anchor").

    The queue holds the teacher's embeddings themselves, which f_theta projects anew in each step: projections of an
    earlier f_theta would be told apart by their age. Negatives of the current step are those of all ranks.

    Args:
        student_dim: length of the student's embeddings.
        teacher_dim: length of the teacher's embeddings.
        dim: length of the projected representations.
        queue_size: how many of the teacher's are kept as negatives. The paper's 80 x 1024 is 10 steps of 8 images with
            1,024 RoIs; the default is that with 512 RoIs per image.
        temperature: gamma > 0.
        anchors: boxes A that one of the student's embeddings stands for.
        exclude_iou: boxes of one image that overlap more are no negatives of each other.
        projection: f_theta: `linear`, or `nonlinear`: a hidden layer with ReLU before it (table 11).

    Raises:
        LossInputError: an option that is out of its range.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        dim: int = 128,
        queue_size: int = 10 * 8 * 512,
        temperature: float = 0.07,
        anchors: int = 1,
        exclude_iou: float = 0.5,
        projection: str = "linear",
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        if projection not in PROJECTIONS:
            raise LossInputError(f"projection is {projection!r}; expected one of {', '.join(PROJECTIONS)}.")
        if not 0 <= exclude_iou <= 1:
            raise LossInputError(f"exclude_iou is {exclude_iou}; expected 0 to 1.")
        lifted = student_dim != teacher_dim or anchors > 1
        self.lift = nn.Linear(student_dim, anchors * teacher_dim) if lifted else nn.Identity()
        self.f_theta: nn.Module = nn.Linear(teacher_dim, dim)
        if projection == "nonlinear":
            self.f_theta = nn.Sequential(nn.Linear(teacher_dim, teacher_dim), nn.ReLU(inplace=True), self.f_theta)
        self.queue = TeacherQueue(teacher_dim, queue_size)
        self.student_dim, self.teacher_dim, self.anchors = student_dim, teacher_dim, anchors
        self.temperature, self.exclude_iou = temperature, exclude_iou

    def forward(
        self, student_embeddings: Tensor, teacher_keys: TeacherKeys, anchors: Tensor | None = None
    ) -> CKDResult:
        """The loss of `ckd_loss` after projection. In training mode, the teacher's side then joins the queue.

        Args:
            student_embeddings: Tensor[N, student_dim].
            teacher_keys: what the teacher says of the same boxes, N; it gets no gradient.
            anchors: Tensor[N] int64 in [0, A), which anchor of its location each box is of. Needed where A > 1.

        Returns:
            The loss, and how well the student tells the keys apart.

        Raises:
            LossInputError: shapes that do not fit.
        """
        num_boxes = len(student_embeddings)
        for name, found, dim in (
            ("student_embeddings", student_embeddings, self.student_dim),
            ("the teacher's embeddings", teacher_keys.embeddings, self.teacher_dim),
        ):
            check_shape(name, found, (num_boxes, dim), f"{num_boxes} student embeddings and a length of {dim}")
        others, new = of_all_ranks(teacher_keys) if self.training else (teacher_keys[:0], teacher_keys[:0])
        keys = TeacherKeys.join([teacher_keys, others, self.queue.keys()])
        with no_autocast(student_embeddings):
            dtype = next(self.f_theta.parameters()).dtype
            student = unit_rows(self.f_theta(self.lifted(student_embeddings.to(dtype), anchors)))
            projected = unit_rows(self.f_theta(keys.embeddings.detach().to(dtype)))
            exclude = NoNegatives(teacher_keys, keys, self.exclude_iou)
            loss, is_nearest = sliced_ckd_loss(student, projected, exclude, self.temperature)
        if self.training:
            self.queue.push(new)
        return CKDResult(
            loss,
            is_nearest.sum() / max(num_boxes, 1),
            mean_cosine(projected.detach()),
            self.queue.count.to(loss),
        )

    def lifted(self, embeddings: Tensor, anchors: Tensor | None = None) -> Tensor:
        """The student's embeddings in the teacher's dimension, each by the slice of the layer that is its anchor's.

        The slices are applied to their own rows only: a product with the whole layer would cost A times as much.

        Args:
            embeddings: Tensor[N, student_dim].
            anchors: Tensor[N] int64 in [0, A). Needed where A > 1.

        Returns:
            Tensor[N, teacher_dim].

        Raises:
            LossInputError: there are several anchors, and it is not said of which each row is.
        """
        if self.anchors == 1:
            lifted: Tensor = self.lift(embeddings)
            return lifted
        if anchors is None or anchors.shape != embeddings.shape[:1]:
            raise LossInputError(
                f"The embeddings {list(embeddings.shape)} stand for {self.anchors} anchors each: expected anchors "
                f"[{len(embeddings)}], found {None if anchors is None else list(anchors.shape)}."
            )
        weight, bias = (getattr(self.lift, name).unflatten(0, (self.anchors, -1)) for name in ("weight", "bias"))
        rows = rows_of_each(anchors, self.anchors)
        parts = [functional.linear(embeddings[of], w, b) for of, w, b in zip(rows, weight, bias, strict=True)]
        return in_order(parts, rows)


def mean_cosine(unit: Tensor) -> Tensor:
    """Mean cosine between two different ones of the rows of Tensor[N, d], which have length 1; 0 where N < 2."""
    count = len(unit)
    return (unit.sum(dim=0).square().sum() - unit.square().sum()) / max(count * (count - 1), 1)
