"""The weights that a detector starts from: a config's `load_from` and `init_cfg`, loaded, counted and said."""

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.error import URLError

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModule, PretrainedInit
from mmengine.model.wrappers import is_model_wrapper
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner.checkpoint import CheckpointLoader
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from kdpipe.pipelines.detectors.building import building
from kdpipe.pipelines.detectors.checkpoints import (
    CheckpointError,
    load_checkpoint,
    refused_type,
    register_safe_types,
    unwrapped,
)
from kdpipe.pipelines.detectors.config_types import resolve_type

__all__ = ["Fit", "StartWeightsHook", "check_start_weights", "load_fitting", "pretrained_options"]

_SHOWN = 3
_COUNTER = "num_batches_tracked"  # no layer reads it


@dataclass(frozen=True)
class Fit:
    """How weights fit a module, by the names of its tensors.

    Attributes:
        loaded: Taken over.
        shaped: In both, with other shapes: `name: found, wanted`.
        missing: Of the module only.
        unexpected: Of the weights only.
    """

    loaded: tuple[str, ...]
    shaped: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    @property
    def is_little(self) -> bool:
        """Whether neither half of the module's tensors nor half of the weights' has been of use."""
        num_model = len(self.loaded) + len(self.shaped) + len(self.missing)
        num_weights = len(self.loaded) + len(self.shaped) + len(self.unexpected)
        return (2 * len(self.loaded) < num_model and 2 * len(self.loaded) < num_weights) or not self.loaded

    def __str__(self) -> str:
        """All counts, and the first examples of what is not loaded."""
        total = len(self.loaded) + len(self.shaped) + len(self.missing)
        parts = [f"{len(self.loaded)} of {total} tensors"]
        others = ("of another shape", self.shaped), ("missing", self.missing), ("not used", self.unexpected)
        for state, names in others:
            if names:
                more = ", ..." if len(names) > _SHOWN else ""
                parts.append(f"{len(names)} {state} ({', '.join(names[:_SHOWN])}{more})")
        return "; ".join(parts)


class StartWeightsHook(Hook):  # type: ignore[misc]
    """Puts the start weights of a config into the bare detector, a student's in a distillation, too.

    Args:
        load_from: Of the config, or None.
    """

    priority = "VERY_HIGH"

    def __init__(self, load_from: str | None) -> None:
        self.load_from = load_from

    def before_train(self, runner: Any) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        _load_all(getattr(model, "student", model), self.load_from)
        if hasattr(model, "keep_transferred_heads"):
            model.keep_transferred_heads()


def check_start_weights(recorded: Config, console: Console) -> None:
    """Load all start weights of a config into a detector that is thrown away, and say what fits.

    Args:
        recorded: Of the training: `model`, a plain detector, and `load_from`.
        console: Where it is said.

    Raises:
        CheckpointError: Start weights cannot be had or read, or little of them fits.
    """
    register_all_modules(init_default_scope=True)
    with building("The detector"):
        detector = MODELS.build(recorded.model)
    try:
        for source, fit in _load_all(detector, recorded.get("load_from")):
            if fit.is_little:
                raise CheckpointError(f"{source}: little of them fits the detector: {fit}.")
            console.print(escape(f"{source}: {fit}."))
    except CheckpointError as error:
        options = [*pretrained_options(recorded.model), *(["load_from=None"] if recorded.get("load_from") else [])]
        raise CheckpointError(
            f"{error}\nName start weights that are there and of a detector with the same layers, or go without: "
            + " ".join(f"-o {option}" for option in options)
        ) from error


def pretrained_options(model: Mapping[str, Any], path: str = "model") -> list[str]:
    """The overrides by which no part of a detector's config names start weights."""
    options = [f"{path}.init_cfg=None"] if _pretrained(model.get("init_cfg")) else []
    for key, value in model.items():
        for place, part in enumerate(value) if isinstance(value, list | tuple) else [(None, value)]:
            if isinstance(part, Mapping) and key != "init_cfg":
                options += pretrained_options(part, f"{path}.{key}" + ("" if place is None else f".{place}"))
    return options


def _load_all(detector: nn.Module, load_from: str | None) -> list[tuple[str, Fit]]:
    """Load what each part names as pretrained, inner parts first as mmengine does, then `load_from`.

    Parts whose class converts weights of another layout (Swin, PVT) do that themselves, when mmengine initialises them.

    Returns:
        What was loaded where, and how it fits.
    """
    loaded = []
    for name, module in reversed(list(detector.named_modules())):
        for init in _pretrained(getattr(module, "init_cfg", None)):
            state, prefix = _read(init["checkpoint"]), (init.get("prefix") or "").rstrip(".")
            source = f"Start weights of {name or 'the model'}, {prefix or 'all'} of {init['checkpoint']}"
            if prefix:
                state = {key[len(prefix) + 1 :]: state[key] for key in state if key.startswith(f"{prefix}.")}
            if not _converts(module):
                loaded.append((source, load_fitting(module, state)))
    if load_from:
        state, names = _read(load_from), detector.state_dict().keys()
        student = {key.removeprefix("student."): state[key] for key in state if key.startswith("student.")}
        best = max([*unwrapped(state), student], key=lambda each: len(each.keys() & names))
        loaded.append((f"Start weights, load_from={load_from}", load_fitting(detector, best)))
    return loaded


def _pretrained(init: Any) -> list[Mapping[str, Any]]:
    inits = init if isinstance(init, list | tuple) else [init]
    return [
        each
        for each in inits
        if isinstance(each, Mapping) and resolve_type(each.get("type"), WEIGHT_INITIALIZERS) is PretrainedInit
    ]


def _converts(module: nn.Module) -> bool:
    method = getattr(type(module), "init_weights", None)
    return method is not BaseModule.init_weights and "init_cfg" in method.__code__.co_names  # type: ignore[union-attr]


def load_fitting(module: nn.Module, state: Mapping[str, Tensor]) -> Fit:
    """Load those weights whose names and shapes are those of a module.

    Args:
        module: Is changed in place.
        state: Weights by name.
    """
    module_state = module.state_dict()
    shaped = [name for name, value in state.items() if name in module_state and value.shape != module_state[name].shape]
    fitting = OrderedDict((name, value) for name, value in state.items() if name not in shaped)
    vars(fitting)["_metadata"] = getattr(state, "_metadata", OrderedDict())
    result = module.load_state_dict(fitting, strict=False)
    missing = [name for name in result.missing_keys if name not in shaped and not name.endswith(_COUNTER)]
    unloaded = {*shaped, *missing}
    return Fit(
        loaded=tuple(name for name in module_state if name not in unloaded and not name.endswith(_COUNTER)),
        shaped=tuple(f"{name}: {_size(state[name])}, wanted {_size(module_state[name])}" for name in shaped),
        missing=tuple(missing),
        unexpected=tuple(result.unexpected_keys),
    )


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _read(address: str) -> Mapping[str, Tensor]:
    """Weights from a file, or from where mmengine finds them (`https://`, `torchvision://`, `open-mmlab://`).

    Raises:
        CheckpointError: They cannot be had, or are no weights.
    """
    if "://" not in address:
        return load_checkpoint(address).state_dict
    register_safe_types()  # and what is downloaded is loaded by them only
    try:
        content = CheckpointLoader.load_checkpoint(address, map_location="cpu", logger="silent")
    except URLError as error:
        raise CheckpointError(
            f"Pretrained weights could not be downloaded: {address} ({error.reason}). They may also be put into "
            f"{torch.hub.get_dir()}/checkpoints."
        ) from error
    except pickle.UnpicklingError as error:
        kind = refused_type(error) or "something else than weights"
        raise CheckpointError(
            f"start weights {address} were refused: the file holds {kind}, which is not a type known as harmless. "
            "Loading it could run code of whoever made the file; nothing of it has run."
        ) from error
    except Exception as error:  # an address that mmengine does not know, or a file that is no checkpoint
        raise CheckpointError(f"start weights {address} cannot be read: {type(error).__name__}: {error}.") from error
    return dict(content.get("state_dict", content))
