"""From cached targets to losses."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdpipe.distill.detector import DistilledDetector
    from kdpipe.distill.losses.ckd import CKD, ckd_loss
    from kdpipe.distill.losses.prediction import (
        class_aware_regression_kd_loss,
        classification_kd_loss,
        regression_kd_loss,
    )
    from kdpipe.distill.losses.sgfi import SGFI, sgfi_loss
    from kdpipe.distill.methods import LOSSES, ContractError
    from kdpipe.distill.teacher.source import CachedTargets, TargetSource

__all__ = [
    "CKD",
    "LOSSES",
    "SGFI",
    "CachedTargets",
    "ContractError",
    "DistilledDetector",
    "TargetSource",
    "ckd_loss",
    "class_aware_regression_kd_loss",
    "classification_kd_loss",
    "regression_kd_loss",
    "sgfi_loss",
]

_MODULES = {
    "detector": ("DistilledDetector",),
    "losses.ckd": ("CKD", "ckd_loss"),
    "losses.prediction": ("class_aware_regression_kd_loss", "classification_kd_loss", "regression_kd_loss"),
    "losses.sgfi": ("SGFI", "sgfi_loss"),
    "methods": ("LOSSES", "ContractError"),
    "teacher.source": ("CachedTargets", "TargetSource"),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: mmcv's ops need some modules of this package without mmdet."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"kdpipe.distill.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
