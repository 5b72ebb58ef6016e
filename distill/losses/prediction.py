"""Distillation of what the box head says: class scores and box regression.

In all of these the teacher is a constant and gets no gradient, the arithmetic is in float32 (float64 for float64 input)
whatever autocast says, and no RoIs give a zero that is still part of the graph.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdpipe.distill.losses.numeric import (
    LossInputError,
    check_dims,
    check_shape,
    full_precision,
    mean_or_zero,
    no_autocast,
)
from kdpipe.distill.rows import on_cpu


class ClassAgnosticError(LossInputError):
    """A loss that weighs box regression by class was given regression that does not know classes."""


def classification_kd_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the teacher's class probabilities, -1/N sum P_t log P_s (G-DetKD, section 3).

    As printed: for equal inputs it is the entropy of the teacher, not 0.

    Args:
        student_logits: Tensor[R, K + 1], background last.
        teacher_logits: Tensor[R, K + 1], background last.

    Returns:
        Scalar.

    Raises:
        LossInputError: the shapes differ.
    """
    check_dims("student_logits", student_logits, "[R, K + 1]")
    check_shape("teacher_logits", teacher_logits, tuple(student_logits.shape), "student_logits")
    with no_autocast(student_logits):
        student, teacher = full_precision(student_logits, teacher_logits.detach())
        return mean_or_zero(-(teacher.softmax(dim=1) * student.log_softmax(dim=1)).sum(dim=1))


def dense_classification_kd_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy of a dense student with a two-stage teacher, -1/N sum P_t log P_s (G-DetKD, appendix D).

    P_s = softmax(L_s) / max softmax(L_s), the maximum over all K + 1 classes, and P_t = softmax(L_t); both then for the
    K object classes only. log P_s is L_s - max L_s, whatever the denominator of the softmax.

    Args:
        student_logits: Tensor[R, K + 1], background last (0 for a sigmoid head).
        teacher_logits: Tensor[R, K + 1], background last.

    Returns:
        Scalar >= 0.

    Raises:
        LossInputError: the shapes differ.
    """
    check_dims("student_logits", student_logits, "[R, K + 1]")
    check_shape("teacher_logits", teacher_logits, tuple(student_logits.shape), "student_logits")
    with no_autocast(student_logits):
        student, teacher = full_precision(student_logits, teacher_logits.detach())
        log_scores = student - student.amax(dim=1, keepdim=True)  # [R, K + 1]
        return mean_or_zero(-(teacher.softmax(dim=1) * log_scores)[:, :-1].sum(dim=1))


def regression_kd_loss(
    student_deltas: Tensor, teacher_deltas: Tensor, labels: Tensor, num_classes: int | None = None
) -> Tensor:
    """L1 between the box regressions for each RoI's class, 1/N sum |reg_t - reg_s| (G-DetKD, section 3, without its -).

    A sum over the four coordinates, a mean over all N RoIs, of which those of the background contribute nothing: the N
    of equation 3, so that the two can be compared (table 13).

    Args:
        student_deltas: Tensor[R, K, 4], or [R, 1, 4] class-agnostic, normalised as the teacher's (`recode_deltas`).
        teacher_deltas: Tensor[R, K, 4], or [R, 1, 4] class-agnostic.
        labels: Tensor[R] int64 in [0, K]; K is background and contributes nothing.
        num_classes: K. Needed where both sides are class-agnostic; otherwise it is read from the shapes.

    Returns:
        Scalar.

    Raises:
        LossInputError: shapes that do not fit, or labels outside [0, K].
    """
    check_dims("student_deltas", student_deltas, "[R, K, 4]")
    check_dims("teacher_deltas", teacher_deltas, "[R, K, 4]")
    num_rois, student_classes, _ = student_deltas.shape
    classes = num_classes or max(student_classes, teacher_deltas.shape[1])
    for name, deltas in (("student_deltas", student_deltas), ("teacher_deltas", teacher_deltas)):
        expected = (num_rois, 1 if deltas.shape[1] == 1 else classes, 4)
        check_shape(name, deltas, expected, f"{num_rois} RoIs and {classes} classes")
    check_shape("labels", labels, (num_rois,), f"student_deltas {list(student_deltas.shape)}")
    # on a GPU the check would wait for it; labels are checked where they are made, too
    if on_cpu(labels) and num_rois and (int(labels.min()) < 0 or int(labels.max()) > classes):
        raise LossInputError(
            f"Labels must be in [0, {classes}], {classes} being background; found {int(labels.min())} to "
            f"{int(labels.max())}. Where both regressions are class-agnostic, give num_classes."
        )
    with no_autocast(student_deltas):
        student, teacher = full_precision(student_deltas, teacher_deltas.detach())
        is_object, of_class = labels < classes, labels.clamp(max=classes - 1)  # [R]
        rows = torch.arange(num_rois, device=labels.device)
        student = student[rows, of_class if student.shape[1] > 1 else 0]  # [R, 4]
        teacher = teacher[rows, of_class if teacher.shape[1] > 1 else 0]  # [R, 4]
        distance = (teacher - student).abs().sum(dim=1)
        return mean_or_zero(torch.where(is_object, distance, 0.0))


def class_aware_regression_kd_loss(student_deltas: Tensor, teacher_deltas: Tensor, teacher_logits: Tensor) -> Tensor:
    """L1 of the class-weighted difference of box regressions, |sum_c p_t^c (reg_t^c - reg_s^c)| (G-DetKD, eq. 3).

    The absolute value comes after the sum over classes, as printed. p_t is the teacher's softmax over all K + 1
    classes; the sum runs over the K foreground classes, so that background RoIs weigh little. A sum over the four
    coordinates, a mean over RoIs.

    Args:
        student_deltas: Tensor[R, K, 4], normalised as the teacher's (`recode_deltas`).
        teacher_deltas: Tensor[R, K, 4].
        teacher_logits: Tensor[R, K + 1], background last.

    Returns:
        Scalar.

    Raises:
        ClassAgnosticError: a side has one regression for all of several classes.
        LossInputError: shapes that do not fit.
    """
    check_dims("teacher_logits", teacher_logits, "[R, K + 1]")
    num_rois, num_classes = teacher_logits.shape[0], teacher_logits.shape[1] - 1
    for name, deltas in (("student_deltas", student_deltas), ("teacher_deltas", teacher_deltas)):
        check_dims(name, deltas, "[R, K, 4]")
        if deltas.shape[1] == 1 and num_classes > 1:
            raise ClassAgnosticError(
                f"Class-aware localisation distillation needs a box regression per class on both sides, but {name} "
                f"has shape {list(deltas.shape)}, one regression for all of {num_classes} classes. Use plain "
                "regression distillation, or a box head with reg_class_agnostic=False."
            )
        check_shape(name, deltas, (num_rois, num_classes, 4), f"teacher_logits {list(teacher_logits.shape)}")
    with no_autocast(student_deltas):
        student, teacher, logits = full_precision(student_deltas, teacher_deltas.detach(), teacher_logits.detach())
        weights = logits.softmax(dim=1)[:, :num_classes]  # [R, K]
        difference = torch.einsum("rk,rkd->rd", weights, teacher - student)  # [R, 4]
        return mean_or_zero(difference.abs().sum(dim=1))


def recode_deltas(
    deltas: Tensor,
    from_means: Sequence[float],
    from_stds: Sequence[float],
    to_means: Sequence[float],
    to_stds: Sequence[float],
) -> Tensor:
    """Box regression as another box coder normalises it.

    Args:
        deltas: Tensor[..., 4] (dx, dy, dw, dh), normalised with `from_means` and `from_stds`.
        from_means: of the coder that the deltas are for, 4 numbers.
        from_stds: of the same, 4 numbers above 0.
        to_means: of the coder that the result is for, 4 numbers.
        to_stds: of the same, 4 numbers above 0.

    Returns:
        Tensor[..., 4], float32 (float64 for float64 input), normalised with `to_means` and `to_stds`.

    Raises:
        LossInputError: not four of something, a standard deviation that is not positive, or a number that is not
            finite.
    """
    constants = (from_means, from_stds, to_means, to_stds)
    if deltas.shape[-1:] != (4,) or any(len(constant) != 4 for constant in constants):
        raise LossInputError(
            f"Deltas [..., 4] are recoded with 4 means and 4 stds on each side; found deltas {list(deltas.shape)} and "
            f"means and stds {[tuple(constant) for constant in constants]}."
        )
    if not all(0 < std < math.inf for std in (*from_stds, *to_stds)):
        raise LossInputError(f"Stds of a box coder must be above 0, found {tuple(from_stds)} and {tuple(to_stds)}.")
    if not all(map(math.isfinite, (*from_means, *to_means))):
        raise LossInputError(f"Means of a box coder must be finite, found {tuple(from_means)} and {tuple(to_means)}.")
    (full,) = full_precision(deltas)
    table = torch.tensor(constants, dtype=full.dtype).to(full.device, non_blocking=True)
    mean_in, std_in, mean_out, std_out = table.unbind()
    return (full * std_in + (mean_in - mean_out)) / std_out
