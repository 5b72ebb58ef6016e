"""The learning rate of every step: kdpipe's own schedule, and a schedule brought to where a resumed training stands."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["cosine_schedule", "doubt_of_warmup", "each_scheduler", "schedule_shape", "wind_forward"]

WARMUP_STEPS = 500
# What a scheduler counts; all else of it is the shape of its schedule.
_COUNTED = {"last_step", "_global_step", "_last_value", "best", "num_bad_values", "cooldown_counter"}


def cosine_schedule(total: int) -> list[dict[str, Any]]:
    """A linear warm-up from a thousandth of the rate, then half a cosine down to 0, as mmengine's `param_scheduler`.

    Args:
        total: Steps of the whole training; the warm-up takes 500 of them, at most a sixth.
    """
    warmup = min(WARMUP_STEPS, total // 6)
    if warmup < 2:  # mmengine's ramp is at the full rate in its last step; one of a single step stays where it begins
        warmup = 0
    cosine = {"type": "CosineAnnealingLR", "by_epoch": False, "begin": warmup, "end": total, "T_max": total - warmup}
    if not warmup:
        return [cosine]
    return [{"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": warmup}, cosine]


def doubt_of_warmup(schedule: Any, total: int) -> str | None:
    """What a user has to know of a schedule that warms up for longer than the training lasts; None of another.

    Args:
        schedule: mmengine's `param_scheduler` of a config.
        total: Steps of the whole training.
    """
    for each in each_scheduler(schedule):
        by_steps, is_rising = not each.get("by_epoch", True), each.get("start_factor", 1) < each.get("end_factor", 1)
        if by_steps and is_rising and each.get("end", 0) > total:
            return (
                f"The warm-up of the config takes {each['end']} steps, and the whole training has {total}: the rate "
                "never gets to its peak. Train longer, change param_scheduler of the config, or take a schedule that "
                "fits (--recipe paper)."
            )
    return None


def schedule_shape(schedulers: Any) -> list[dict[str, Any]]:
    """What makes a schedule, such as its length and its peak rate, without how far it has got.

    Args:
        schedulers: mmengine's, built: a list, or lists by the name of an optimiser.
    """
    return [
        {"class": type(each).__name__}
        | {name: value for name, value in each.state_dict().items() if name not in _COUNTED}
        for each in each_scheduler(schedulers)
    ]


def wind_forward(schedulers: Any, epochs: int, steps_per_epoch: int) -> None:
    """Bring new schedulers, and the rates of their optimisers, to where they are after some epochs.

    Args:
        schedulers: As `schedule_shape` takes them, none of them stepped yet.
        epochs: Epochs that are done.
        steps_per_epoch: Steps of each.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `scheduler.step")  # the optimiser's steps were made before
        for _ in range(epochs):
            for _ in range(steps_per_epoch):
                _step(schedulers, by_epoch=False)
            _step(schedulers, by_epoch=True)


def _step(schedulers: Any, *, by_epoch: bool) -> None:
    for scheduler in each_scheduler(schedulers):
        if scheduler.by_epoch == by_epoch:
            scheduler.step()


def each_scheduler(schedulers: Any) -> Iterable[Any]:
    """Schedulers, or configs of some: of one, of a list, or of these by the name of an optimiser."""
    if isinstance(schedulers, Mapping) and "type" not in schedulers:
        return [scheduler for each in schedulers.values() for scheduler in each_scheduler(each)]
    return schedulers if isinstance(schedulers, list | tuple) else [schedulers]
