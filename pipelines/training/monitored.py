"""The figures of validations that hooks and schedule of a config follow: those that there are."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mmengine.hooks import CheckpointHook, EarlyStoppingHook

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.training.schedule import each_scheduler

__all__ = ["check_monitored"]

_OF_BBOX = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
# Options of CocoMetric that leave the names of its figures as they are.
_LEAVES_NAMES = {"type", "_scope_", "ann_file", "outfile_prefix", "metric", "proposal_nums", "iou_thrs"}


def check_monitored(evaluator: Any, hooks: Iterable[Any], schedule: Any) -> None:
    """Refuse what follows a figure that the validation does not give, which would show after an epoch only, or never.

    Args:
        evaluator: Config `val_evaluator`; of one that a user changed so that its figures have other names, nothing is
            known.
        hooks: Of the runner.
        schedule: Config `param_scheduler`.

    Raises:
        KdpipeError: Naming the figures that there are.
    """
    if not isinstance(evaluator, Mapping) or evaluator.get("metric") != "bbox" or set(evaluator) - _LEAVES_NAMES:
        return
    known = [f"coco/bbox_{name}" for name in _OF_BBOX]
    for where, name in _followed(hooks, schedule):
        if name not in known:
            raise KdpipeError(
                f"{where} is {name!r}, and validation gives no such figure. It gives {', '.join(known)}: name one of "
                "these in the config, or leave it out."
            )


def _followed(hooks: Iterable[Any], schedule: Any) -> Iterator[tuple[str, str]]:
    """Where a figure is named, and which; `auto` is the first that there is."""
    for hook in hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best:
            names = [hook.save_best] if isinstance(hook.save_best, str) else hook.save_best
            yield from (("default_hooks.checkpoint.save_best", name) for name in names if name != "auto")
        elif isinstance(hook, EarlyStoppingHook):
            yield "monitor of EarlyStoppingHook", hook.monitor
    for each in each_scheduler(schedule):
        if isinstance(each, Mapping) and "monitor" in each:
            yield f"monitor of {each.get('type')}", each["monitor"]
