"""Which losses there are, what they read, and whether a cache holds that. A new loss is a line in `LOSSES`."""

from collections.abc import Sequence

from torch import Tensor

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.loss import Loss, Sizes, common_strides
from kdpipe.distill.losses.boxes import box_kd_loss
from kdpipe.distill.losses.ckd import CKD
from kdpipe.distill.losses.cross import Cross
from kdpipe.distill.losses.hard import hard_label_loss
from kdpipe.distill.losses.imitation import (
    AnchorMaskImitation,
    BoxMaskImitation,
    GaussianMaskImitation,
    WholeImitation,
)
from kdpipe.distill.losses.pkd import PKD
from kdpipe.distill.losses.prediction import (
    class_aware_regression_kd_loss,
    classification_kd_loss,
    dense_classification_kd_loss,
    regression_kd_loss,
)
from kdpipe.distill.losses.relations import relation_kd_loss
from kdpipe.distill.losses.roifi import RoIFI
from kdpipe.distill.losses.sgfi import SGFI
from kdpipe.distill.pairs import OF_STUDENT, TEACHER_FIELDS
from kdpipe.distill.students.protocol import Student

IMITATION_WEIGHT = 0.01  # FGFI's, for an error that is a sum over channels
PKD_WEIGHT = 6.0  # mmrazor's, for a RetinaNet taught by a Mask R-CNN Swin

LOSSES: dict[str, Loss] = {
    "sgfi": Loss("loss_sgfi", SGFI, SGFI, least_roi_size=7),
    "ckd": Loss("loss_ckd", CKD, CKD, per_stage=True),
    "cls": Loss("loss_kd_cls", classification_kd_loss, dense_classification_kd_loss),
    "reg": Loss("loss_kd_reg", regression_kd_loss, regression_kd_loss),
    "careg": Loss("loss_kd_careg", class_aware_regression_kd_loss, per_class=True),
    "roifi": Loss("loss_roifi", RoIFI, RoIFI),
    "box": Loss("loss_kd_box", box_kd_loss, box_kd_loss),
    "cross": Loss("loss_cross", Cross, Cross),
    "dist": Loss("loss_dist", relation_kd_loss, relation_kd_loss),
    "hard": Loss("loss_hard", hard_label_loss),
    "whole": Loss("loss_whole", WholeImitation, WholeImitation, weight=IMITATION_WEIGHT),
    "gt-mask": Loss("loss_gt_mask", BoxMaskImitation, BoxMaskImitation, weight=IMITATION_WEIGHT),
    "anchor-mask": Loss("loss_anchor_mask", AnchorMaskImitation, AnchorMaskImitation, weight=IMITATION_WEIGHT),
    "gaussian-mask": Loss("loss_gaussian_mask", GaussianMaskImitation, GaussianMaskImitation, weight=IMITATION_WEIGHT),
    "pkd": Loss("loss_pkd", PKD, PKD, weight=PKD_WEIGHT, finest_stride=8),
}

# No losses: the student begins with the teacher's heads, and keeps them, or lets them learn on.
HEAD_TRANSFER, INHERITANCE = HEAD_METHODS = "ht", "inherit"
DEFAULT_METHODS = ("sgfi", "ckd", "pred")
CLASS_AGNOSTIC_METHODS = ("sgfi", "ckd", "cls", "reg")  # where there is one box for all classes
DENSE_METHODS = ("sgfi", "cross")  # of a student that predicts boxes densely
METHODS = (*DEFAULT_METHODS, *(name for name in LOSSES if name not in DEFAULT_METHODS), *HEAD_METHODS)

_TIER_FOR = {
    "roi_features": "pyramid or objects",
    "embeddings": "embeddings",
    "logits": "predictions",
    "deltas": "predictions",
    "features": "pyramid",
}


class ContractError(KdpipeError):
    """Cache, student and methods do not fit together."""


def expand_methods(methods: Sequence[str], dense: bool = False) -> tuple[str, ...]:
    """The single losses of a choice of methods: `pred` is `cls` and `careg`; `ht` and `inherit` are none.

    Args:
        methods: Some of `METHODS`.
        dense: For a student that predicts boxes densely, whose `pred` is `cls`.

    Raises:
        ContractError: An unknown method, a method twice, or one that a dense student cannot learn.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ContractError(
            f"Unknown method {', '.join(map(repr, unknown))}. Choose from {', '.join(METHODS)}, separated by commas, "
            "or none."
        )
    two_stage_only = {*HEAD_METHODS, *(name for name, loss in LOSSES.items() if loss.dense is None)}
    if dense and (unfit := [name for name in methods if name in two_stage_only]):
        raise ContractError(
            f"--methods {','.join(unfit)} needs the box head of a two-stage student, and this one predicts boxes "
            f"densely. Such a student learns {', '.join(x for x in METHODS if x not in two_stage_only)} (pred is cls)."
        )
    of_pred = ("cls",) if dense else ("cls", "careg")
    losses = [loss for name in methods for loss in (of_pred if name == "pred" else (name,))]
    if len(set(losses)) < len(losses):
        raise ContractError(f"--methods {','.join(methods)} names a loss twice (pred is {' and '.join(of_pred)}).")
    if set(HEAD_METHODS) <= set(methods):
        raise ContractError("The teacher's heads either stay as they are (ht) or learn on (inherit): leave one out.")
    return tuple(loss for loss in losses if loss not in HEAD_METHODS)


def loss_name(loss: str) -> str:
    """The name of a distillation loss in the log."""
    return LOSSES[loss].log_name


def needed_fields(losses: Sequence[str], dense: bool = False) -> frozenset[str]:
    """What losses read of the teacher: some of `roi_features`, `embeddings`, `logits`, `deltas`, `features`.

    Args:
        losses: As `expand_methods` gives them.
        dense: For a student that predicts boxes densely.
    """
    inputs = {name for loss in losses for name in LOSSES[loss].inputs(dense)}
    return frozenset(field for name, field in TEACHER_FIELDS.items() if name in inputs)


def reads_student(losses: Sequence[str], dense: bool = False) -> bool:
    """Whether a loss reads what the student says of the RoIs.

    Args:
        losses: As `expand_methods` gives them.
        dense: For a student that predicts boxes densely.
    """
    return any(OF_STUDENT & set(LOSSES[loss].inputs(dense)) for loss in losses)


def looks_at_rois(losses: Sequence[str]) -> bool:
    """Whether a loss compares RoIs: all but those of whole feature maps do."""
    return any(not LOSSES[loss].of_maps for loss in losses)


def map_levels(losses: Sequence[str], spec: CacheSpec, student_strides: Sequence[int] | None = None) -> tuple[int, ...]:
    """Positions of the levels of the teacher's pyramid whose feature maps losses compare.

    Args:
        losses: As `expand_methods` gives them.
        spec: What the teacher is.
        student_strides: Of the student's pyramid; None for one with all of the teacher's levels.
    """
    strides = spec.strides if student_strides is None else student_strides
    compared = {stride for loss in losses for stride in LOSSES[loss].strides(spec, strides)}
    return tuple(level for level, stride in enumerate(spec.strides) if stride in compared)


def loss_and_log(name: str, result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss, and what is logged beside it.

    Args:
        name: Of the loss.
        result: What it gave: a scalar, or a named tuple that begins with one.

    Returns:
        The scalar, and the other fields: NAME_FIELD, or NAME_FIELD0, NAME_FIELD1, ... of a vector.
    """
    if isinstance(result, Tensor):
        return result, {}
    loss, *others = result
    logged: dict[str, Tensor] = {}
    for field, value in zip(result._fields[1:], others, strict=True):  # type: ignore[attr-defined]
        parts = {"": value} if value.dim() == 0 else dict(enumerate(value))
        logged |= {f"{name}_{field}{index}": part for index, part in parts.items()}
    return loss, logged


def stage_sizes(student: Student, stage: int, spec: CacheSpec) -> Sizes:
    """What the parameters of losses can depend on, at a stage of a student.

    Args:
        student: The student.
        stage: Number of its stage.
        spec: What the teacher is.
    """
    dims = student.embedding_dims[stage], spec.embedding_dim
    strides = common_strides(spec, student.strides)
    return Sizes(student.channels, spec.channels, *dims, student.num_anchors, strides)


def check_student(student: Student, spec: CacheSpec, losses: Sequence[str]) -> None:
    """Refuse a student that does not fit the teacher, or one of the losses.

    Args:
        student: The student.
        spec: What the teacher is.
        losses: As `expand_methods` gives them.

    Raises:
        ContractError: Naming what does not fit.
    """
    if student.num_classes != spec.num_classes:
        raise ContractError(
            f"The student has {student.num_classes} classes and the cache {spec.num_classes} "
            f"({', '.join(spec.class_names[:5])}...). Set the student's num_classes to the latter."
        )
    for loss in losses:
        if LOSSES[loss].of_maps and not LOSSES[loss].strides(spec, student.strides):
            finest = f" from stride {LOSSES[loss].finest_stride} up" if LOSSES[loss].finest_stride else ""
            raise ContractError(
                f"The loss {loss!r} compares levels of the same stride{finest}, and there are none: the student's "
                f"pyramid has the strides {list(student.strides)}, what is stored of the teacher's "
                f"{[spec.strides[level] for level in spec.levels]}. Leave {loss} out of --methods."
            )
    if student.class_agnostic and any(LOSSES[loss].per_class for loss in losses):
        raise ContractError(
            "Class-aware localisation KD (pred, careg) needs one box per class, and the student's box head is "
            "class-agnostic. Set model.roi_head.bbox_head.reg_class_agnostic=False, or use --methods cls,reg."
        )


def check_contract(spec: CacheSpec, losses: Sequence[str]) -> None:
    """Refuse losses that a cache cannot serve.

    Raises:
        ContractError: Naming the loss, what the cache lacks, and the tier to cache again with.
    """
    for loss in losses:
        for field in sorted(needed_fields([loss])):
            stored = field in spec.fields
            from_pyramid = field == "roi_features" and not stored and "features" in spec.fields
            if not (stored or from_pyramid):
                raise ContractError(
                    f"The loss {loss!r} needs the teacher's {field.replace('roi_', 'RoI ')}, which this cache of "
                    f"tier {spec.tier!r} does not hold (it holds {', '.join(spec.fields)}). Leave {loss} out of "
                    f"--methods, or cache the teacher again with --targets {_TIER_FOR[field]}."
                )
            if from_pyramid and (missing := missing_levels(spec, spec.roi_levels)):
                raise ContractError(
                    f"The loss {loss!r} needs the teacher's features of boxes of all sizes, and the pyramid of this "
                    f"cache lacks {missing} (it holds {', '.join(map(spec.level_name, spec.levels))}). Leave {loss} "
                    "out of --methods, or cache the teacher again with --targets objects, or with these levels."
                )
        if spec.roi_size < (least := LOSSES[loss].least_roi_size):
            raise ContractError(
                f"The loss {loss!r} needs RoI features of at least {least} x {least} cells, and those of this teacher "
                f"have {spec.roi_size} x {spec.roi_size}. Leave {loss} out of --methods; roifi compares features of "
                "any size."
            )
        if LOSSES[loss].per_class and spec.class_agnostic:
            raise ContractError(
                "Class-aware localisation KD (pred, careg) needs one box per class, and the cached teacher is "
                "class-agnostic. Use --methods cls,reg instead of pred."
            )


def missing_levels(spec: CacheSpec, count: int) -> str:
    """Names of those of the first so many levels that a pyramid lacks; empty where it has them all."""
    return ", ".join(spec.level_name(level) for level in range(count) if level not in spec.levels)
