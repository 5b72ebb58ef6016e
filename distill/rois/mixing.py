"""Whose RoIs a step looks at, where a student that chooses its own is shown the teacher's proposals, too."""

from mmengine.logging import MessageHub

ROI_MIXES = ("none", "first", "union")
_FIRST = 1 / 3  # of the steps of a training


def whose_rois(mix: str) -> tuple[bool, bool]:
    """Whether the student's RoIs are looked at in this step of the running training, and whether the teacher's are.

    Args:
        mix: `none`: the student's in every step; `first`: the teacher's in the first third of the training, then the
            student's; `union`: both in every step.
    """
    if mix == "first":
        hub = MessageHub.get_current_instance()
        is_early = bool(hub.get_info("iter", 0) < _FIRST * hub.get_info("max_iters", 0))
        return not is_early, is_early
    return True, mix == "union"
