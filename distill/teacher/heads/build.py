"""The teacher's frozen box head out of what a cache keeps: which kind it is, its parameters say."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.outputs import HeadOutputs
from kdpipe.distill.teacher.heads.cascade import CascadeHead
from kdpipe.distill.teacher.heads.fc import TeacherHead, TeacherHeadError
from kdpipe.distill.teacher.heads.shared_stage import SHARED_STAGE, SharedStageHead
from kdpipe.distill.teacher.pyramids import TeacherRois


class BoxHead(Protocol):
    """A frozen box head of the teacher, of whatever family."""

    def __call__(self, rois: TeacherRois, /) -> HeadOutputs:
        """What the teacher says of boxes, in the teacher's orientation; in float32, autocast or not."""


def frozen_head(state: Mapping[str, Tensor], spec: CacheSpec) -> BoxHead:
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


@dataclass(frozen=True)
class FrozenTeacher:
    """What a training has of its teacher beside the targets of a batch.

    Attributes:
        spec: What it is.
        needs: What the losses read of it: some of `logits`, `deltas`, `embeddings`, `roi_features`, `features`.
        head_state: Gives the weights of its heads; called when the box head is asked for the first time.
        asks_student: Whether a loss reads what the student says of the RoIs.
        stagewise: Whether a stage of a cascade student is told what the same stage of a cascade teacher says.
    """

    spec: CacheSpec
    needs: frozenset[str]
    head_state: Callable[[], Mapping[str, Tensor]]
    asks_student: bool = True
    stagewise: bool = False

    @property
    def at_rois(self) -> bool:
        """Whether a loss looks at RoIs, and not at whole feature maps only."""
        return self.asks_student or bool(self.needs - {"features"})

    @cached_property
    def head(self) -> BoxHead:
        """Its box head."""
        return frozen_head(self.head_state(), self.spec)

    def head_for(self, stage: int) -> BoxHead:
        """Its box head, or that of its stages which answers a stage of the student."""
        head = self.head
        return head.stage(stage) if self.stagewise and isinstance(head, CascadeHead) else head

    def check_stages(self, count: int) -> None:
        """Make sure that each stage of the student has one of the teacher.

        Args:
            count: Stages of the student.

        Raises:
            TeacherHeadError: Naming both numbers.
        """
        stages = len(self.spec.cascade_stds) or 1
        if self.stagewise and not 1 < stages == count:
            raise TeacherHeadError(
                f"distill.stagewise compares the stages of two cascades one by one; the teacher has {stages} and the "
                f"student {count}. Leave it out."
            )

    def check_crossed(self) -> None:
        """Make sure that its box head can look at features of a student.

        Raises:
            TeacherHeadError: It cannot; the message says why.
        """
        if isinstance(self.head, CascadeHead) and self.head.semantic:
            raise TeacherHeadError(
                "The loss cross applies the teacher's box head to features of the student, and the head of HTC reads a "
                "semantic map of the teacher's own pyramid, too. Leave cross out of --methods."
            )
