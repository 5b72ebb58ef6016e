"""What `-o distill....` can change: defaults, and the values that are allowed."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmengine.config import Config, ConfigDict

from kdpipe.distill.losses.ckd import PROJECTIONS
from kdpipe.distill.losses.shares import SHARE_INTERVAL
from kdpipe.distill.methods import LOSSES, ContractError
from kdpipe.distill.students.dense import CKD_BRANCHES
from kdpipe.pipelines.detectors.configs import apply_options
from kdpipe.pipelines.training.config import world_size
from kdpipe.pipelines.training.student_choices import ROI_SAMPLING
from kdpipe.pipelines.training.transform_types import check_names, quote_names

__all__ = ["DISTILL_DEFAULTS", "ckd_queue_size", "distill_options", "other_options", "unused_options"]

DISTILL_DEFAULTS: dict[str, Any] = {
    "rois": ROI_SAMPLING,
    "stagewise": False,
    "weights": {},
    "sgfi": LOSSES["sgfi"].options,
    "ckd": {
        **LOSSES["ckd"].options,
        "queue_size": None,  # `ckd_queue_size`
        "branch": CKD_BRANCHES[0],
    },
    "share_interval": SHARE_INTERVAL,
    "transforms": [],  # of the student's pipeline: the user answers for them, see `with_teacher_targets`
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(least: int, most: int) -> tuple[str, Callable[[Any], bool]]:
    def allowed(value: Any) -> bool:
        return isinstance(value, int) and _is_number(value) and least <= value <= most

    return f"a whole number from {least} to {most}", allowed


def _one_of(values: Sequence[str]) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(values)}", lambda value: value in values


_YES_OR_NO = "True or False", lambda value: isinstance(value, bool)
_SHARE = "a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "rois.num": _whole(1, 2**16),
    "rois.positive_fraction": _SHARE,
    "stagewise": _YES_OR_NO,
    "sgfi.kernel_size": ("an odd whole number from 1 to 31", lambda value: _whole(1, 31)[1](value) and value % 2 == 1),
    "sgfi.normalize": _YES_OR_NO,
    "ckd.dim": _whole(1, 2**16),
    "ckd.queue_size": (
        f"{_whole(1, 2**24)[0]}, or None",
        lambda value: value is None or _whole(1, 2**24)[1](value),
    ),
    "ckd.temperature": ("a number above 0, at most 1000", lambda value: _is_number(value) and 0 < value <= 1000),
    "ckd.exclude_iou": _SHARE,
    "ckd.branch": _one_of(CKD_BRANCHES),
    "ckd.projection": _one_of(PROJECTIONS),
    "share_interval": _whole(0, 2**31),
}
_WEIGHT = "a finite number of at least 0", lambda value: _is_number(value) and value >= 0


def distill_options(options: Sequence[str], losses: Sequence[str], ckd_branch: str | None = None) -> ConfigDict:
    """The options of the distillation.

    Args:
        options: `KEY=VALUE` overrides, those of other parts of the config included.
        losses: That are distilled.
        ckd_branch: Of `--ckd-branch`, which has the last word.

    Raises:
        ContractError: There is no such option, or its value is not allowed.
        ConfigError: An option cannot be read.
    """
    of_distill = [option for option in quote_names(options) if _is_ours(option)]
    defaults = Config({"distill": copy.deepcopy(DISTILL_DEFAULTS)})
    distill: ConfigDict = apply_options(defaults, of_distill).distill
    _check_names("distill", distill, DISTILL_DEFAULTS)
    for section, default in DISTILL_DEFAULTS.items():
        if isinstance(default, dict):
            _check_names(f"distill.{section}", distill.get(section), default)
            distill[section] = {**default, **distill[section]}
    if unknown := sorted(set(distill.weights) - set(losses)):
        raise ContractError(
            f"distill.weights.{unknown[0]}: a weight is given for {unknown[0]}, which is none of the losses "
            f"{', '.join(losses) or 'of this training (there are none)'}."
        )
    if ckd_branch is not None:
        distill.ckd.branch = ckd_branch
    for key, (expected, allowed) in {**_ALLOWED, **{f"weights.{name}": _WEIGHT for name in distill.weights}}.items():
        section, _, name = key.partition(".")
        value = distill[section][name] if name else distill[section]
        if not allowed(value):
            raise ContractError(f"distill.{key} is {value!r}; expected {expected}.")
    check_names(distill.transforms)
    return distill


def ckd_queue_size(cfg: Config, roi_source: str | None, num: int) -> int:
    """The default length of CKD's queue: the RoIs of 10 steps on all ranks, as the paper's 80 x 1024 is at 8 x 1024.

    Args:
        cfg: Training config of the student.
        roi_source: `teacher` or `student`: who chooses the RoIs.
        num: RoIs per image, of all but two-stage students that choose them by their own sampler.
    """
    if roi_source == "student" and "roi_head" in cfg.model:
        stages = cfg.model.train_cfg.rcnn
        num = (stages[0] if isinstance(stages, Sequence) else stages).sampler.get("num", num)
    return int(10 * num * cfg.train_dataloader.get("batch_size", 1) * world_size())


def _check_names(place: str, values: Any, names: Mapping[str, Any]) -> None:
    if not isinstance(values, Mapping):
        raise ContractError(f"{place} is {values!r}; expected {place}.NAME=VALUE.")
    if names and (unknown := sorted(set(values) - set(names))):
        raise ContractError(f"Unknown option {place}.{unknown[0]}. There are: {', '.join(names)}.")


def _is_ours(option: str) -> bool:
    return option.strip().split(".")[0].split("=")[0] == "distill"


def unused_options(options: Sequence[str], losses: Sequence[str]) -> list[str]:
    """The overrides of the distillation that are for losses which are not distilled."""
    keys = [option.partition("=")[0].strip() for option in options if _is_ours(option)]
    sections = {"distill.ckd": "ckd" in losses, "distill.sgfi": "sgfi" in losses}
    idle = [section for section, is_used in sections.items() if not is_used] if losses else ["distill"]
    return [key for key in keys if any(key == section or key.startswith(f"{section}.") for section in idle)]


def other_options(options: Sequence[str]) -> list[str]:
    """The overrides that are not for the distillation."""
    return [option for option in options if not _is_ours(option)]
