"""What a training does otherwise than its config says, in words."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config
from rich.console import Console
from rich.markup import escape

from kdpipe.pipelines.detectors.config_types import type_name
from kdpipe.pipelines.training.data import dataset_kinds, dropped_keys
from kdpipe.pipelines.training.transform_types import step_name
from kdpipe.pipelines.training.transforms import resizing_steps

__all__ = ["replaced_parts", "report_replaced"]

# Where a config says how it trains. Files and processes are the command's to name; the rest of a config stays as it is.
_COMPARED = (
    *("optim_wrapper", "param_scheduler", "train_cfg", "auto_scale_lr.enable", "randomness.seed", "default_hooks"),
    *("train_dataloader.sampler", "train_dataloader.collate_fn", "train_dataloader.num_batch_per_epoch"),
    *(f"val_evaluator.{name}" for name in ("type", "metric", "classwise", "proposal_nums", "iou_thrs", "metric_items")),
)
_WHOLE = ("param_scheduler", "optim_wrapper.paramwise_cfg", "train_dataloader.collate_fn")  # said by name only


def report_replaced(config: Config, used: Config, recipe: str | None, console: Console) -> None:
    """Say in one line what of a config a training does not use, and in another whose optimiser it has.

    Args:
        config: The user's, with its overrides.
        used: That of the training.
        recipe: As `TrainingOptions` has it.
        console: Where it is said.
    """
    is_kdpipes = used.get("param_scheduler") is None
    schedule = "kdpipe's warm-up and cosine" if is_kdpipes else "its schedule"
    optimizer = (used.optim_wrapper or {}).get("optimizer") or {}
    name = type_name(optimizer["type"]) if "type" in optimizer else "optimisers"
    rate = f", peak rate {optimizer['lr']:g}" if "lr" in optimizer else ""
    if recipe == "config":
        epochs = f"{used.train_cfg.max_epochs} epochs with {schedule}"
        console.print(escape(f"Recipe: the config's: {name}{rate}, {epochs}. --recipe paper takes the paper's."))
    elif is_kdpipes and not name.endswith("SGD"):
        console.print(escape(f"Optimiser: {name} of the config{rate}, with {schedule}."))
    if parts := replaced_parts(config, used):
        advice = " --recipe config keeps its optimiser and schedule." if recipe != "config" and is_kdpipes else ""
        console.print(escape(f"Not used of the config: {'; '.join(parts)}.{advice}"))


def replaced_parts(config: Config, used: Config) -> list[str]:
    """What of a config is not used, each with the values that it has and that are used: `a.b 1 -> 2`.

    Args:
        config: The user's.
        used: That of the training.
    """
    lines: list[str] = []
    for path in _COMPARED:
        if not path.startswith("val_") or used.get("val_evaluator"):
            lines += _differences(path, _at(config, path), _at(used, path))
    if _at(used, "default_hooks.checkpoint.save_best") and not used.get("val_evaluator"):
        lines.append("default_hooks.checkpoint.save_best (there are no validation images)")
    config_dataset, used_dataset = _at(config, "train_dataloader.dataset"), _at(used, "train_dataloader.dataset")
    before, after = (" of ".join(dataset_kinds(each)) for each in (config_dataset or {}, used_dataset))
    if before != after:
        lines.append(f"train_dataloader.dataset {before} -> {after}")
    before, after = (_resizing(each or {}) for each in (config_dataset, used_dataset))
    if before != after:
        lines.append(f"resizing {before} -> {after}")
    return lines + [f"train_dataloader.dataset.{key}" for key in dropped_keys(config_dataset or {})]


def _at(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping | Config) else None
    return value


def _differences(path: str, config_value: Any, used: Any) -> Iterator[str]:
    if config_value is None or config_value == used:
        return
    if path in _WHOLE:
        yield path
    elif isinstance(config_value, Mapping) and isinstance(used, Mapping):
        for key, value in config_value.items():
            if key != "_scope_":  # mmengine's note of where a base came from
                yield from _differences(f"{path}.{key}", value, used.get(key))
    else:
        yield f"{path} {_text(config_value)} -> {_text(used)}"


def _resizing(dataset: Mapping[str, Any]) -> str:
    """The steps that resize training images, each with its scales."""
    return ", ".join(
        dict.fromkeys(
            " ".join([step_name(step), _scales(step.get("scales", step.get("scale", step.get("scale_factor"))))])
            for step in resizing_steps(dataset)
        )
    )


def _scales(value: Any) -> str:
    """One scale or several, as `WxH`."""
    if isinstance(value, list | tuple) and all(isinstance(x, int) for x in value):
        return "x".join(map(str, value))
    return " ".join(map(_scales, value)) if isinstance(value, list | tuple) else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return type_name(value.get("type", "dict"))
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
