"""Whose RoIs a step looks at, where a student that chooses its own is shown the teacher's proposals, too."""

ROI_MIXES = ("none", "first", "union")
_FIRST = 1 / 3  # of the steps of a training


def whose_rois(mix: str, progress: float) -> tuple[bool, bool]:
    """Whether the student's RoIs are looked at in a step of a training, and whether the teacher's are.

    Args:
        mix: `none`: the student's in every step; `first`: the teacher's in the first third of the training, then the
            student's; `union`: both in every step.
        progress: Share of the training that is over, from 0 to 1.
    """
    if mix == "first":
        return progress >= _FIRST, progress < _FIRST
    return True, mix == "union"
