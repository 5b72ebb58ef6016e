"""Hooks, logs, randomness and environment of a training: the config's, with what kdpipe needs of them."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from kdpipe.pipelines.detectors.config_types import resolve_type, type_name

__all__ = ["set_run"]

_CHECKPOINT = {"type": "CheckpointHook", "interval": 1, "max_keep_ckpts": 2}
# Of mmengine's checkpoints; those to resume from lie in the work directory, one per epoch.
_FIXED = {"by_epoch": True, "out_dir": None, "filename_tmpl": None}
_TENSORBOARD = {"type": "TensorboardVisBackend"}


def set_run(cfg: Config, config: Config, seed: int) -> None:
    """Set hooks, visualizer, environment and randomness of a training.

    Args:
        cfg: Is changed in place.
        config: The user's.
        seed: Of everything random.
    """
    hooks = ConfigDict(copy.deepcopy(config.get("default_hooks") or {}))
    hooks.checkpoint = _checkpoint(hooks.get("checkpoint"))
    hooks.logger = {"type": "LoggerHook", "interval": 10, **(hooks.get("logger") or {})}
    hooks.sampler_seed = hooks.get("sampler_seed") or {"type": "DistSamplerSeedHook"}  # counts epochs for the sampler
    cfg.default_hooks = hooks
    visualizer = copy.deepcopy(config.get("visualizer") or {"type": "DetLocalVisualizer"})
    visualizer.pop("name", None)  # mmengine would go on with the one that another training of this process made
    backends = list(visualizer.get("vis_backends") or [{"type": "LocalVisBackend"}])
    if not any(type_name(backend["type"]).endswith(_TENSORBOARD["type"]) for backend in backends):
        backends.append(dict(_TENSORBOARD))
    cfg.visualizer = {**visualizer, "vis_backends": backends}
    environment = dict(config.get("env_cfg") or {})
    on_gpu = torch.cuda.is_available()
    backend = {"backend": "nccl"} | dict(environment.get("dist_cfg") or {}) if on_gpu else {"backend": "gloo"}
    cfg.env_cfg = {"cudnn_benchmark": False, **environment, "dist_cfg": backend}
    cfg.randomness = {**(config.get("randomness") or {}), "seed": seed}


def _checkpoint(hook: Any) -> dict[str, Any]:
    """What the config says of checkpoints, where epochs and the work directory stay what they are."""
    if not isinstance(hook, Mapping) or resolve_type(hook.get("type", "CheckpointHook"), HOOKS) is not CheckpointHook:
        return dict(_CHECKPOINT)
    options = {key: value for key, value in hook.items() if key not in _FIXED}
    if not hook.get("by_epoch", True):
        options.pop("interval", None)  # of steps
    return {**_CHECKPOINT, **options}
