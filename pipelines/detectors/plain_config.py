"""Configs of plain values: what mmengine's pure-Python configs name as objects becomes text."""

import importlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import mmdet.registry
import mmengine.registry
import numpy as np
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import Registry

from kdpipe.pipelines.detectors.literal_config import ConfigError

__all__ = ["plain_config"]

_PLAIN = (str, bool, int, float, type(None))
_OWN = ("mmdet", "mmengine", "mmcv", "torch")  # packages whose classes mmdet finds by their registered names


def plain_config(config: Config) -> Config:
    """A config whose values are literals, so that its text can be recorded and read again without running it.

    A class or function is replaced by the name under which it is registered (`ResNet`; `mmengine.Resize` where mmdet
    has another `Resize`), one of another package by its dotted path. Numbers and arrays of NumPy become Python's.

    Args:
        config: as `Config.fromfile` reads it. With mmengine's pure-Python configs, types are imported classes.

    Raises:
        ConfigError: a value can be written neither as a literal nor as a name; where it stands is named.
    """
    values = {}
    for key, value in config._to_lazy_dict().items():
        value = _built(value)
        if callable(value) and _registered_name(value) is None:
            continue  # what the file defines or imports for its own use
        values[key] = _plain(value, key)
    return Config(values, filename=config.filename)


def _built(value: Any) -> Any:
    return value.build() if isinstance(value, LazyObject | LazyAttr) else value


def _plain(value: Any, path: str) -> Any:
    value = _built(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return {_plain(key, f"{path} (a key)"): _plain(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{path}.{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.ndarray | range):
        return _plain(list(value), path)
    if isinstance(value, Path):
        return str(value)
    text = _name(value, path) if callable(value) else None
    if text is None:
        raise ConfigError(
            f"{path} of the config is {value!r}, of type {type(value).__name__}, which cannot be recorded as text. "
            "Expected numbers, text, None, lists, tuples and dictionaries; and classes that can be imported, as types."
        )
    return text


def _name(thing: Any, path: str) -> str | None:
    """How a config written as text names a class or function; None where it cannot."""
    module, name = getattr(thing, "__module__", "") or "", getattr(thing, "__qualname__", "")
    package = module.partition(".")[0]
    if package in _OWN and (registered := _registered_name(thing)):
        return registered
    if module.startswith("mmcv.ops"):  # RoIAlign and nms, which mmdet finds there by their names
        return str(name)
    if path.rpartition(".")[2] != "type" or not module:
        return _registered_name(thing)
    try:
        imported = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return f"{module}.{name}" if imported is thing else None


def _registered_name(thing: Any) -> str | None:
    return _registered().get(thing)


@cache
def _registered() -> dict[Any, str]:
    """The text for each class and function in the registries that mmdet looks into."""
    register_all_modules(init_default_scope=False)
    pairs = []
    for package in (mmdet.registry, mmengine.registry):
        for registry in vars(package).values():
            if isinstance(registry, Registry):
                pairs += [(registry, name, thing) for name, thing in registry.module_dict.items()]
    names: dict[Any, str] = {}
    for registry, name, thing in pairs:
        root = registry.parent or registry
        local = getattr(mmdet.registry, _variable(root), root)
        text = name if local.get(name) is thing else f"{registry.scope}.{name}"
        if thing not in names or name == getattr(thing, "__name__", ""):
            names[thing] = text
    return names


def _variable(registry: Registry) -> str:
    """The name by which mmengine and mmdet hold registries of one kind."""
    return next((name for name, value in vars(mmengine.registry).items() if value is registry), "")
