"""Relations in place of probabilities: how the teacher ranks the classes of a RoI, and the RoIs of a class."""

from torch import Tensor

from kdpipe.distill.losses.numeric import check_dims, check_shape, full_precision, mean_or_zero, no_autocast, unit_rows


def relation_kd_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """One minus Pearson's correlation, over classes and over RoIs (DIST, arXiv 2205.10536, equations 9 to 12).

    With P = softmax(logits) of each side, L = L_inter + L_intra:
    L_inter = 1/N sum_i (1 - pearson(P_s[i, :], P_t[i, :])), each RoI over its classes;
    L_intra = 1/(K + 1) sum_c (1 - pearson(P_s[:, c], P_t[:, c])), each class over the RoIs of the step.

    The paper's beta and gamma are both 1 here (the weight of the loss scales both), and so is its temperature. A row or
    column that differs from its mean by less than 1e-4 in all (a class that no RoI is of) has a correlation near 0,
    with a gradient that stays finite.

    Args:
        student_logits: Tensor[N, K + 1], background last (0 for a sigmoid head).
        teacher_logits: Tensor[N, K + 1], background last. A constant: it gets no gradient.

    Returns:
        Scalar in [0, 4]; 0 for N = 0, still part of the graph. Computed in float32 (float64 for float64 input).

    Raises:
        LossInputError: the shapes differ.
    """
    check_dims("student_logits", student_logits, "[N, K + 1]")
    check_shape("teacher_logits", teacher_logits, tuple(student_logits.shape), "student_logits")
    with no_autocast(student_logits):
        student, teacher = full_precision(student_logits, teacher_logits.detach())
        if not len(student):
            return student.sum()
        of_student, of_teacher = student.softmax(dim=1), teacher.softmax(dim=1)
        return _uncorrelated(of_student, of_teacher) + _uncorrelated(of_student.T, of_teacher.T)


def _uncorrelated(one: Tensor, other: Tensor) -> Tensor:
    """One minus the correlation of two rows, a mean over the rows."""
    one, other = (unit_rows(rows - rows.mean(dim=1, keepdim=True)) for rows in (one, other))
    return mean_or_zero(1 - (one * other).sum(dim=1))
