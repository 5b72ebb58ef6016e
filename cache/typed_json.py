"""Values of a specification as JSON has them, and back."""

from typing import Any, get_args, get_origin

from kdpipe.cache.errors import CacheError


def as_json(value: Any) -> Any:
    """A value as JSON gives it back."""
    return [as_json(item) for item in value] if isinstance(value, tuple) else value


def from_json_value(name: str, value: Any, hint: Any) -> Any:
    """A JSON value as the type of an entry: a scalar, or a tuple of them.

    Args:
        name: of the entry, for messages.
        value: of JSON.
        hint: the type.

    Raises:
        CacheError: it is of another type.
    """
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        fixed = len(kinds) if Ellipsis not in kinds else None
        if not isinstance(value, list) or (fixed is not None and len(value) != fixed):
            raise CacheError(f"The entry {name!r} of the cache specification should be a list, found {value!r}.")
        return tuple(from_json_value(name, item, kinds[0]) for item in value)
    if hint is float and type(value) is int and abs(value) < 1 << 53:
        return float(value)
    if type(value) is not hint or (type(value) is int and not -(1 << 63) <= value < 1 << 63):
        raise CacheError(f"The entry {name!r} of the cache specification should be {hint.__name__}, found {value!r}.")
    return value
