"""What a training is begun with: recorded in its work directory, and compared when it is resumed."""

import json
import math
from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any

from mmengine.config import Config

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.identity import difference, digest_json
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.detectors.credentials import masked

__all__ = ["check_resumed", "check_saving", "config_digest", "plain_values", "recorded_values", "training_record"]

# May be others when a training is resumed: its schedule is made anew for what is left.
_SCHEDULE = ("epochs", "batch_size", "processes", "lr")
# Sections of a config that decide what is learned.
_SECTIONS = (
    *("model", "train_dataloader", "optim_wrapper", "auto_scale_lr", "param_scheduler", "custom_hooks", "randomness"),
)
# Of a loader: where files lie and who reads them, and what is compared by itself.
_PLACES = ("ann_file", "data_prefix", "data_root", "num_workers", "persistent_workers", "multiprocessing_context")
_LOADER = (*_PLACES, "pin_memory", "prefetch_factor", "batch_size")
_LINES = 12


def training_record(
    name: str,
    cfg: Config,
    processes: int,
    train: DetectionData,
    val: DetectionData | None,
    **more: Any,
) -> dict[str, Any]:
    """What a training is begun with, as JSON values, without credentials.

    Args:
        name: `student` or `teacher`.
        cfg: The plain detector's training config, options applied.
        processes: Number of training processes.
        train: Training images.
        val: Validation images, or None.
        more: What else decides what is learned, such as the identity of a teacher.
    """
    config = {section: plain_values(cfg.get(section)) for section in _SECTIONS}
    config["train_dataloader"] = plain_values(cfg.train_dataloader, _LOADER)
    optimizer = config["optim_wrapper"].get("optimizer", {})
    hooks = [hook for hook in cfg.get("custom_hooks") or [] if not str(hook.get("type")).endswith("EarlyStoppingHook")]
    values = {
        "kdpipe": version("kdpipe"),
        "training": name,
        "epochs": cfg.train_cfg.get("max_epochs"),
        "batch_size": cfg.train_dataloader.get("batch_size"),
        "processes": processes,
        "lr": optimizer.pop("lr", None),
        "data": train.digest(),
        "validation": val and val.digest(),
        "config": config | {"custom_hooks": plain_values(hooks)},
        **{key: plain_values(value) for key, value in more.items()},
    }
    return recorded_values(values)


def recorded_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values as a record has them: plain, and without credentials."""
    recorded: dict[str, Any] = json.loads(masked(json.dumps(plain_values(values))))
    return recorded


def config_digest(config: Config) -> str:
    """What a config says, as 64 hexadecimal digits."""
    return digest_json(plain_values(config.to_dict()))


def check_resumed(begun: Mapping[str, Any], resumed: Mapping[str, Any], place: str) -> list[str]:
    """Compare what a training was begun with and what it is to go on with.

    Args:
        begun: As `training_record` gave it when the training was begun.
        resumed: As it gives it now.
        place: Where the former lies, for messages.

    Returns:
        Lines that say what is different and may be: epochs, batch size, processes, rate, validation images.

    Raises:
        KdpipeError: Something else is different; old and new values are named.
    """
    allowed = ("kdpipe", "saved", "command", *_SCHEDULE, "validation")
    lines = difference(
        *({key: value for key, value in each.items() if key not in allowed} for each in (begun, resumed))
    )
    if lines:
        more = f"\n  and {len(lines) - _LINES} more" if len(lines) > _LINES else ""
        raise KdpipeError(
            f"{place} holds a training from something else:\n  "
            + "\n  ".join(lines[:_LINES])
            + more
            + "\nResume with the cache or teacher, the config, the options and the --methods that the training began "
            "with (--epochs, --batch-size, --lr, --workers and the number of processes may change), or begin anew in "
            "another --work-dir."
        )
    changes = [
        f"{key} {begun.get(key)} -> {resumed.get(key)}" for key in _SCHEDULE if begun.get(key) != resumed.get(key)
    ]
    notes = []
    if changes:
        notes.append(f"Changed: {', '.join(changes)}. The learning rate goes on as in a training begun with these.")
    if begun.get("validation") != resumed.get("validation"):
        notes.append("Changed: the validation images. AP is not comparable with that of earlier epochs.")
    return notes


def check_saving(cfg: Config) -> None:
    """Refuse options under which a training could not be resumed from its work directory.

    Raises:
        KdpipeError: Naming the option.
    """
    hook = cfg.get("default_hooks", {}).get("checkpoint") or {}
    wrong = [f"default_hooks.checkpoint.{name}" for name in ("out_dir", "filename_tmpl") if hook.get(name) is not None]
    if not hook.get("by_epoch", True):
        wrong.append("default_hooks.checkpoint.by_epoch")
    if wrong:
        raise KdpipeError(
            f"{wrong[0]} cannot be set: checkpoints are named epoch_N.pth, are saved at the end of an epoch, and lie "
            "in --work-dir. Leave it out."
        )
    if cfg.train_cfg.get("type") != "EpochBasedTrainLoop":
        raise KdpipeError(
            f"train_cfg.type is {cfg.train_cfg.get('type')}: kdpipe trains by epochs (EpochBasedTrainLoop). Give "
            "--epochs in place of a number of steps."
        )


def plain_values(value: Any, left_out: Collection[str] = ()) -> Any:
    """JSON values of a config, lists of dictionaries as dictionaries, so that differences have names."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(entry, left_out) for key, entry in value.items() if key not in left_out}
    if isinstance(value, list | tuple):
        entries = [plain_values(entry, left_out) for entry in value]
        nested = any(isinstance(entry, dict) for entry in entries)
        return {str(index): entry for index, entry in enumerate(entries)} if nested else entries
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
