"""What a distillation loss is to the detector: what it is given, what its parameters depend on, its name in the log."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from kdpipe.cache.spec import CacheSpec

LossFunction = Callable[..., Any]  # or a class of Modules, of which `build` makes one


@dataclass(frozen=True)
class Sizes:
    """What the parameters of a loss can depend on; a Module's constructor is given those that it names.

    Attributes:
        student_channels: Of the student's pyramid.
        teacher_channels: Of the teacher's.
        student_dim: Length of the student's embeddings.
        teacher_dim: Length of the teacher's.
        anchors: Boxes that one of the student's embeddings stands for.
        strides: Of the levels that the pyramids of both have.
    """

    student_channels: int
    teacher_channels: int
    student_dim: int
    teacher_dim: int
    anchors: int
    strides: tuple[int, ...] = ()


@dataclass(frozen=True)
class Loss:
    """A distillation loss: a function, or a Module with parameters, for each kind of student.

    The names of its parameters (of `forward`) say what it is given: properties of `RoiPairs`. Those of a Module's
    constructor are of `Sizes`, or options of the user. The result is the loss, a scalar; or a named tuple that begins
    with it, whose other fields are logged as NAME_FIELD, those of a vector one by one.

    Attributes:
        log_name: Its name in the log, which must not be that of one of the student's own.
        two_stage: For students with a box head for RoIs.
        dense: For students that predict boxes densely; None where these cannot learn it.
        per_stage: Whether each stage of a cascade has parameters of its own.
        per_class: Whether it needs a box for each class.
        weight: Where the user gives none.
        finest_stride: Of the levels that it compares, if it compares feature maps.
        least_roi_size: Cells per side that RoI features must have, if it compares these.
    """

    log_name: str
    two_stage: LossFunction
    dense: LossFunction | None = None
    per_stage: bool = False
    per_class: bool = False
    weight: float = 1.0
    finest_stride: int = 0
    least_roi_size: int = 1

    @property
    def has_parameters(self) -> bool:
        """Whether it is a Module, the same class for each kind of student."""
        return isinstance(self.two_stage, type)

    @property
    def options(self) -> dict[str, Any]:
        """What a user can choose of a Module, with its default: the constructor's arguments that are no sizes."""
        if not self.has_parameters:
            return {}
        names = inspect.signature(self.two_stage).parameters
        return {name: x.default for name, x in names.items() if name not in Sizes.__dataclass_fields__}

    def build(self, sizes: Sizes, options: Mapping[str, Any]) -> nn.Module:
        """The Module.

        Args:
            sizes: Of student and teacher.
            options: Further arguments of its constructor.
        """
        names = inspect.signature(self.two_stage).parameters
        sizes = replace(sizes, strides=tuple(x for x in sizes.strides if x >= self.finest_stride))
        module: nn.Module = self.two_stage(**{k: v for k, v in vars(sizes).items() if k in names}, **options)
        return module

    def of(self, dense: bool) -> LossFunction:
        """That of a kind of student."""
        return self.dense if dense and self.dense is not None else self.two_stage

    def inputs(self, dense: bool) -> tuple[str, ...]:
        """Names of what it is given of `RoiPairs`."""
        called = getattr(self.two_stage, "forward", self.of(dense))
        return tuple(name for name in inspect.signature(called).parameters if name != "self")

    @property
    def of_maps(self) -> bool:
        """Whether it compares whole feature maps, once for each image, in place of RoIs."""
        return "teacher_maps" in self.inputs(dense=False)

    def strides(self, spec: CacheSpec, student_strides: Sequence[int]) -> tuple[int, ...]:
        """Strides of the levels whose maps it compares: all that both pyramids have, from `finest_stride` up."""
        common = [stride for stride in common_strides(spec, student_strides) if stride >= self.finest_stride]
        return tuple(common) if self.of_maps else ()


def common_strides(spec: CacheSpec, student_strides: Sequence[int]) -> tuple[int, ...]:
    """Strides of the levels that are stored of the teacher's pyramid, and are in the student's, too."""
    return tuple(x for level, x in enumerate(spec.strides) if level in spec.levels and x in student_strides)
