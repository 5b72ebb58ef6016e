"""Which losses there are, what each reads of the teacher, and whether a cache holds that."""

from collections.abc import Sequence

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.spec import CacheSpec

HEAD_TRANSFER = "ht"  # no loss: the student begins, and stays, with the teacher's heads
METHODS = ("sgfi", "ckd", "pred", "cls", "reg", "careg", HEAD_TRANSFER)
DEFAULT_METHODS = ("sgfi", "ckd", "pred")
CLASS_AGNOSTIC_METHODS = ("sgfi", "ckd", "cls", "reg")  # where there is one box for all classes
_TWO_STAGE_ONLY = ("reg", "careg", HEAD_TRANSFER)

# What each loss reads of the teacher.
_NEEDS = {
    "sgfi": ("features",),
    "ckd": ("embeddings",),
    "cls": ("logits",),
    "reg": ("deltas",),
    "careg": ("deltas", "logits"),
}
_TIER_FOR = {
    "features": "pyramid or objects",
    "embeddings": "embeddings",
    "logits": "predictions",
    "deltas": "predictions",
}


class ContractError(KdpipeError):
    """Cache, student and methods do not fit together."""


def expand_methods(methods: Sequence[str], dense: bool = False) -> tuple[str, ...]:
    """The single losses of a choice of methods: `pred` is `cls` and `careg`, and `ht` is none.

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
    if dense and (unfit := [name for name in methods if name in _TWO_STAGE_ONLY]):
        raise ContractError(
            f"--methods {','.join(unfit)} needs the box head of a two-stage student, and this one predicts boxes "
            "densely. Such a student learns sgfi, ckd and pred (which is cls)."
        )
    of_pred = ("cls",) if dense else ("cls", "careg")
    losses = [loss for name in methods for loss in (of_pred if name == "pred" else (name,))]
    if len(set(losses)) < len(losses):
        raise ContractError(f"--methods {','.join(methods)} names a loss twice (pred is {' and '.join(of_pred)}).")
    return tuple(loss for loss in losses if loss != HEAD_TRANSFER)


def loss_name(loss: str) -> str:
    """The name of a distillation loss in the log, which must not be that of one of the student's own."""
    return f"loss_{loss}" if loss in ("sgfi", "ckd") else f"loss_kd_{loss}"


def needed_fields(losses: Sequence[str]) -> frozenset[str]:
    """What losses read of the teacher: some of `features`, `embeddings`, `logits`, `deltas`."""
    return frozenset(field for loss in losses for field in _NEEDS[loss])


def check_contract(spec: CacheSpec, losses: Sequence[str]) -> None:
    """Refuse losses that a cache cannot serve.

    Raises:
        ContractError: Naming the loss, what the cache lacks, and the tier to cache again with.
    """
    for loss in losses:
        for field in _NEEDS[loss]:
            served = field in spec.fields or (field == "features" and "roi_features" in spec.fields)
            if not served:
                raise ContractError(
                    f"The loss {loss!r} needs the teacher's {field}, which this cache of tier {spec.tier!r} does not "
                    f"hold (it holds {', '.join(spec.fields)}). Leave {loss} out of --methods, or cache the teacher "
                    f"again with --targets {_TIER_FOR[field]}."
                )
            pyramid = field == "features" and "features" in spec.fields
            if pyramid and (missing := missing_levels(spec, spec.roi_levels)):
                raise ContractError(
                    f"The loss {loss!r} needs the teacher's features of boxes of all sizes, and the pyramid of this "
                    f"cache lacks {missing} (it holds {', '.join(map(spec.level_name, spec.levels))}). Leave {loss} "
                    "out of --methods, or cache the teacher again with --targets objects, or with these levels."
                )
        if loss == "careg" and spec.class_agnostic:
            raise ContractError(
                "Class-aware localisation KD (pred, careg) needs one box per class, and the cached teacher is "
                "class-agnostic. Use --methods cls,reg instead of pred."
            )


def missing_levels(spec: CacheSpec, count: int) -> str:
    """Names of those of the first so many levels that a pyramid lacks; empty where it has them all."""
    return ", ".join(spec.level_name(level) for level in range(count) if level not in spec.levels)
