"""The optimiser of a training: the paper's SGD, another one that the config names, or all that the config says."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.detectors.config_types import resolve_type, type_name

__all__ = ["check_own_recipe", "optim_wrapper", "own_epochs"]

BASE_LR = 0.03  # at BASE_BATCH images per step (G-DetKD, section 5)
BASE_BATCH = 16


def optim_wrapper(config: Config, lr: float | None, images: int, amp: bool) -> dict[str, Any]:
    """mmengine's `optim_wrapper`: the paper's where the config names SGD or nothing, else the config's.

    Args:
        config: The user's.
        lr: Peak rate; None takes 0.03 per 16 images for the paper's SGD. For another optimiser it is that of the
            config, scaled with the batch where the config names a batch that it is for (`auto_scale_lr`).
        images: Per step, of all processes.
        amp: Mixed precision.
    """
    own = config.get("optim_wrapper") or {}
    if not _is_other(own.get("optimizer")):
        rate = lr if lr is not None else BASE_LR * images / BASE_BATCH
        return {
            "type": _amp_wrapper() if amp else "OptimWrapper",
            "optimizer": {"type": "SGD", "lr": rate, "momentum": 0.9, "weight_decay": 1e-4},
            "clip_grad": {"max_norm": 10, "norm_type": 2},
        }
    kept = copy.deepcopy(dict(own))
    if amp:
        kept["type"] = _amp_wrapper()
    kept.setdefault("type", "OptimWrapper")
    base = (config.get("auto_scale_lr") or {}).get("base_batch_size")
    if lr is not None:
        kept["optimizer"]["lr"] = lr
    elif base and "lr" in kept["optimizer"]:
        kept["optimizer"]["lr"] *= images / base
    return kept


def _is_other(optimizer: Any) -> bool:
    """Whether a config's optimiser is another than SGD."""
    if not isinstance(optimizer, Mapping) or "type" not in optimizer:
        return False
    return resolve_type(optimizer["type"], OPTIMIZERS) is not torch.optim.SGD


def _amp_wrapper() -> str:
    return "AmpOptimWrapper" if torch.cuda.is_available() else "Bfloat16OptimWrapper"


def own_epochs(config: Config) -> int:
    """The number of epochs that a config trains for.

    Raises:
        KdpipeError: It says nothing of that, or counts steps.
    """
    loop = config.get("train_cfg") or {}
    epochs = loop.get("max_epochs")
    if not isinstance(epochs, int) or epochs < 1 or type_name(loop.get("type", "")) == "IterBasedTrainLoop":
        found = f"train_cfg is {dict(loop)}" if loop else "there is no train_cfg"
        raise KdpipeError(
            f"--recipe config needs a config that trains for a number of epochs, and {found}. Expected "
            "train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=...). Leave --recipe away for kdpipe's own recipe."
        )
    return epochs


def check_own_recipe(config: Config, epochs: int | None, lr: float | None, amp: bool, multi_scale: bool) -> None:
    """Refuse options that contradict the recipe of a config, or a config that has none.

    Args:
        config: The user's, with its overrides.
        epochs: Of `--epochs`, or None.
        lr: Of `--lr`, or None.
        amp: `--amp` is given.
        multi_scale: `--schedule 2x-ms` is given.

    Raises:
        KdpipeError: Naming the option and what the config says.
    """
    own = own_epochs(config)
    for key in ("optim_wrapper", "param_scheduler"):
        if key not in config:
            raise KdpipeError(
                f"--recipe config keeps the config's own recipe, and the config has no {key}. Add it to the config, or "
                "leave --recipe away for kdpipe's own recipe."
            )
    wrapper = type_name((config.optim_wrapper or {}).get("type", "OptimWrapper"))
    lacks_amp = not wrapper.endswith(("AmpOptimWrapper", "Bfloat16OptimWrapper"))
    for contradicts, option, what, key in (
        (epochs not in (None, own), f"--epochs {epochs}", f"trains for {own}", f"train_cfg.max_epochs={epochs}"),
        (lr is not None, f"--lr {lr}", "has its own rate", f"optim_wrapper.optimizer.lr={lr}"),
        (amp and lacks_amp, "--amp", f"has {wrapper}", f"optim_wrapper.type={_amp_wrapper()}"),
        (multi_scale, "--schedule 2x-ms", "has its own schedule", "train_cfg.max_epochs=24"),
    ):
        if contradicts:
            raise KdpipeError(
                f"--recipe config keeps the recipe of the config, which {what}; {option} contradicts that. Leave it "
                f"out, or change the config's: -o {key}"
            )
