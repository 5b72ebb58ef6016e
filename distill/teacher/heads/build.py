"""The teacher's frozen box head out of what a cache keeps: which kind it is, its parameters say."""

from collections.abc import Mapping

from torch import Tensor

from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.teacher.heads.cascade import CascadeHead
from kdpipe.distill.teacher.heads.fc import TeacherHead
from kdpipe.distill.teacher.heads.shared_stage import SHARED_STAGE, SharedStageHead


def frozen_head(state: Mapping[str, Tensor], spec: CacheSpec) -> TeacherHead | CascadeHead | SharedStageHead:
    """The box head, or heads, that a cache keeps.

    Args:
        state: Parameters by their names in the teacher's state dict.
        spec: What the teacher is.

    Raises:
        TeacherHeadError: It cannot say what the teacher says of any box.
    """
    if any(name.startswith(SHARED_STAGE) for name in state):
        return SharedStageHead(state, spec)
    return CascadeHead(state, spec) if spec.cascade_stds else TeacherHead(state, spec)
