"""RoI feature imitation: RoI features of teacher and student, each from the level that the size of the box assigns."""

from torch import Tensor, nn

from kdpipe.distill.losses.numeric import check_dims, check_shape, full_precision, mean_or_zero, no_autocast
from kdpipe.distill.rois.convolution import RoIConv2d


def roi_imitation_loss(student_roi_features: Tensor, teacher_roi_features: Tensor) -> Tensor:
    """Mean square error between RoI features of the positives (RoIFI of G-DetKD, section 4.1 and table 6).

    L = 1/N sum_i MSE(f_adapt(S_i), T_i): a mean over channels and cells, then over RoIs, as SGFI's (eq. 1), from which
    it differs by the one level that the student's feature comes from. Computed in float32 (float64 for float64 input).

    Args:
        student_roi_features: Tensor[R, C, H, W], already adapted to the teacher's channels.
        teacher_roi_features: Tensor[R, C, H, W]. A constant: it gets no gradient.

    Returns:
        Scalar; 0 for R = 0, still part of the graph.

    Raises:
        LossInputError: Shapes that do not fit.
    """
    check_dims("student_roi_features", student_roi_features, "[R, C, H, W]")
    fit = f"student_roi_features {list(student_roi_features.shape)}"
    check_shape("teacher_roi_features", teacher_roi_features, tuple(student_roi_features.shape), fit)
    with no_autocast(student_roi_features):
        student, teacher = full_precision(student_roi_features, teacher_roi_features.detach())
        return mean_or_zero((student - teacher).square().flatten(1).mean(dim=1))


class RoIFI(nn.Module):
    """`roi_imitation_loss` after f_adapt, a convolution of 1 x 1 as SGFI's is by default.

    Args:
        student_channels: Channels of the student's pyramid.
        teacher_channels: Channels of the teacher's.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        self.adapt = RoIConv2d(student_channels, teacher_channels, 1)

    def forward(self, student_assigned_roi_features: Tensor, teacher_roi_features: Tensor) -> Tensor:
        """The loss.

        Args:
            student_assigned_roi_features: Tensor[R, student channels, H, W].
            teacher_roi_features: Tensor[R, teacher channels, H, W]; gets no gradient.

        Returns:
            Scalar.

        Raises:
            LossInputError: Shapes that do not fit.
        """
        with no_autocast(student_assigned_roi_features):
            adapted: Tensor = self.adapt(student_assigned_roi_features.to(self.adapt.weight.dtype))
        return roi_imitation_loss(adapted, teacher_roi_features)
