"""What a `type` of a config means: `Resize`, `mmdet.Resize`, a dotted path and the class itself are one class."""

import sys
from typing import Any

from mmengine.registry import Registry

__all__ = ["resolve_type", "type_name"]


def resolve_type(kind: Any, registry: Registry) -> Any:
    """What a registry of mmdet's would build for a `type`, found without importing what the text names.

    Args:
        kind: The `type` of a part of a config: a registered name, with or without scope (`mmdet.Expand`), a dotted path
            to something registered (as mmengine writes a pure-Python config), or the class itself.
        registry: Such as `mmdet.registry.TRANSFORMS`.

    Returns:
        The class, or the function that is registered in its place; what is no text is returned as it is. None where
        the registry and its parents do not know the text.
    """
    if not isinstance(kind, str):
        return kind
    scope, dot, name = kind.partition(".")
    if not dot:
        return _lookup(kind, registry)
    root = registry
    while root.parent is not None:
        root = root.parent
    scopes = {each.scope: each for each in (root, *root.children.values())}
    if scope in scopes and (registered := _lookup(name, scopes[scope])) is not None:
        return registered
    module, _, name = kind.rpartition(".")
    registered = getattr(sys.modules.get(module), name, None)
    all_types = [each for owner in scopes.values() for each in owner.module_dict.values()]
    return registered if any(registered is each for each in all_types) else None


def type_name(kind: Any) -> str:
    """A `type` as messages write it: its text, or the name of the class."""
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def _lookup(name: str, registry: Registry | None) -> Any:
    """What a registry or the next of its parents has under a name."""
    while registry is not None:
        registry.import_from_location()
        if name in registry.module_dict:
            return registry.module_dict[name]
        registry = registry.parent
    return None
