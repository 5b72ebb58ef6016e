"""The student that a detector is: two-stage or dense."""

from typing import Any

from kdpipe.distill.methods import ContractError
from kdpipe.distill.rois.sampling import DEFAULT_SAMPLING, RoiSampling
from kdpipe.distill.students.dense import CKD_BRANCHES, DenseStudent
from kdpipe.distill.students.protocol import Student
from kdpipe.distill.students.two_stage import TwoStageStudent


def is_dense(detector: Any) -> bool:
    """Whether a detector of mmdet predicts boxes densely, in place of refining proposals."""
    return not hasattr(detector, "roi_head")


def student_of(
    detector: Any,
    branch: str = CKD_BRANCHES[0],
    sampling: RoiSampling = DEFAULT_SAMPLING,
) -> Student:
    """What the losses see of a detector.

    Args:
        detector: Of mmdet.
        branch: Of a dense student's head, which embeddings are taken from: one of `CKD_BRANCHES`.
        sampling: Of the RoIs that a dense student chooses.

    Raises:
        StudentError: The detector is of a family that the losses cannot address.
        ContractError: A branch is chosen for a student that has none.
    """
    if is_dense(detector):
        return DenseStudent(detector, branch, sampling)
    if branch != CKD_BRANCHES[0]:
        raise ContractError(
            f"--ckd-branch {branch} is for students that predict boxes densely; the embeddings of a two-stage student "
            "are the input of its classifier. Leave it out."
        )
    return TwoStageStudent(detector)
