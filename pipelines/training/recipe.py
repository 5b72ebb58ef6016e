"""Optimiser, schedule and epochs of a training: the paper's, or what the config says of them."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.detectors.config_types import resolve_type, type_name
from kdpipe.pipelines.training.options import SCHEDULES, TrainingOptions

__all__ = ["optim_wrapper", "set_recipe"]

BASE_LR = 0.03  # at BASE_BATCH images per step (G-DetKD, section 5)
BASE_BATCH = 16
_AMP_WRAPPERS = ("AmpOptimWrapper", "Bfloat16OptimWrapper")
_OF_AMP = ("type", "dtype", "loss_scale", "use_fsdp")  # options of these that others do not have
_VALIDATION = ("val_begin", "val_interval", "dynamic_intervals")


def set_recipe(cfg: Config, config: Config, options: TrainingOptions, images: int) -> None:
    """Set epochs, optimiser and schedule of a training.

    Args:
        cfg: Is changed in place.
        config: The user's, with the overrides that it knows the places of.
        options: Of the command.
        images: Per step, of all processes.

    Raises:
        KdpipeError: The recipe is the config's, and it counts steps, or has no optimiser for `--lr`; or there is no GPU
            for float16.
    """
    is_own = options.recipe == "config"
    epochs = options.epochs or SCHEDULES.get(options.schedule or "") or (_own_epochs(config) if is_own else None)
    loop = dict(config.get("train_cfg") or {})
    if not is_own:
        loop = {key: loop[key] for key in _VALIDATION if "max_iters" not in loop and key in loop}
    cfg.train_cfg = {
        "val_interval": 1,
        **{key: value for key, value in loop.items() if key not in ("by_epoch", "max_iters")},
        "type": "EpochBasedTrainLoop",
        "max_epochs": epochs or SCHEDULES["1x"],
    }
    if is_own and config.get("optim_wrapper"):
        cfg.optim_wrapper = _own_optim_wrapper(config, options)
    else:
        cfg.optim_wrapper = optim_wrapper(config, options.lr, images, options.amp)
    if is_own and "param_scheduler" in config and options.schedule is None:
        cfg.param_scheduler = copy.deepcopy(config.param_scheduler) or []  # a constant rate
    else:
        cfg.param_scheduler = None  # kdpipe's, made when the number of steps is known (`run_training`)


def _own_epochs(config: Config) -> int | None:
    """The number of epochs that a config trains for; None where it says nothing of that."""
    loop = config.get("train_cfg") or {}
    epochs = loop.get("max_epochs")
    if "max_iters" in loop or type_name(loop.get("type", "")) == "IterBasedTrainLoop":
        raise KdpipeError(
            f"The config trains for a number of steps (train_cfg is {dict(loop)}), and kdpipe trains by epochs. Say "
            "for how many: --epochs. Or take the paper's optimiser and schedule: --recipe paper."
        )
    if epochs is not None and (not isinstance(epochs, int) or epochs < 1):
        raise KdpipeError(f"train_cfg.max_epochs of the config is {epochs!r}, expected a positive number.")
    return epochs


def _own_optim_wrapper(config: Config, options: TrainingOptions) -> dict[str, Any]:
    """That of a config, with the rate and the mixed precision of options."""
    wrapper = copy.deepcopy(dict(config.optim_wrapper))
    if options.lr is not None:
        if not isinstance(wrapper.get("optimizer"), Mapping):
            raise KdpipeError(
                f"--lr {options.lr} is for an optimiser, and optim_wrapper of the config has no `optimizer`: leave "
                "--lr out, change the rates with -o, or take the paper's optimiser and schedule (--recipe paper)."
            )
        wrapper["optimizer"]["lr"] = options.lr
    is_mixed = type_name(wrapper.get("type", "")).endswith(_AMP_WRAPPERS)
    if options.amp is None or (is_mixed and options.amp == "auto"):
        return wrapper
    mixed = _amp_wrapper(options.amp)
    kept = ("loss_scale",) if mixed["type"] == wrapper.get("type") else ()
    return {key: value for key, value in wrapper.items() if key in kept or key not in _OF_AMP} | mixed


def optim_wrapper(config: Config, lr: float | None, images: int, amp: str | None) -> dict[str, Any]:
    """mmengine's `optim_wrapper`: the paper's where the config names SGD or nothing, else the config's.

    Args:
        config: The user's.
        lr: Peak rate; None takes 0.03 per 16 images for the paper's SGD. For another optimiser it is that of the
            config, scaled with the batch where the config names a batch that it is for (`auto_scale_lr`).
        images: Per step, of all processes.
        amp: Mixed precision, as `TrainingOptions` has it.

    Raises:
        KdpipeError: There is no GPU for float16.
    """
    wrapper = copy.deepcopy(dict(config.get("optim_wrapper") or {}))
    if not _is_other(wrapper.get("optimizer")):
        rate = lr if lr is not None else BASE_LR * images / BASE_BATCH
        return {
            **(_amp_wrapper(amp) if amp else {"type": "OptimWrapper"}),
            "optimizer": {"type": "SGD", "lr": rate, "momentum": 0.9, "weight_decay": 1e-4},
            "clip_grad": {"max_norm": 10, "norm_type": 2},
        }
    if amp:
        wrapper = {key: value for key, value in wrapper.items() if key not in _OF_AMP} | _amp_wrapper(amp)
    wrapper.setdefault("type", "OptimWrapper")
    base = (config.get("auto_scale_lr") or {}).get("base_batch_size")
    if lr is not None:
        wrapper["optimizer"]["lr"] = lr
    elif base and "lr" in wrapper["optimizer"]:
        wrapper["optimizer"]["lr"] *= images / base
    return wrapper


def _is_other(optimizer: Any) -> bool:
    """Whether a config's optimiser is another than SGD."""
    if not isinstance(optimizer, Mapping) or "type" not in optimizer:
        return False
    return resolve_type(optimizer["type"], OPTIMIZERS) is not torch.optim.SGD


def _amp_wrapper(amp: str) -> dict[str, Any]:
    """Type and options of mmengine's `optim_wrapper` for `--amp`.

    bfloat16 is the choice where there is one: it has the range of float32, so that nothing overflows and no loss has to
    be scaled.
    """
    if amp == "auto":
        on_old_gpu = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "float16" if on_old_gpu else "bfloat16"
    if amp == "bfloat16":
        return {"type": "Bfloat16OptimWrapper"}
    if not torch.cuda.is_available():
        raise KdpipeError("--amp float16 needs a GPU, and torch finds none here. Use --amp bfloat16.")
    return {"type": "AmpOptimWrapper", "dtype": amp}
