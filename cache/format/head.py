"""How the weights of the teacher's RPN and RoI head lie in a cache: one array per parameter."""

import math
from collections.abc import Mapping
from typing import Any

from kdpipe.cache.format.layout import ArrayLayout, array_layout

# Key of the group.
HEAD = "head"
_DTYPES = ("float32", "int64", "int32", "int16", "int8", "uint8", "bool")
# Numbers in all parameters together: those of the largest detectors have a tenth of it.
_MAX_NUMBERS = 1 << 30
_MOST_DIMENSIONS, _MOST_LETTERS = 16, 200


def is_parameter_name(name: str) -> bool:
    """Whether an array can have that name on every file system and in every store."""
    letters = name.isprintable() and not set("/\\") & set(name) and len(name) <= _MOST_LETTERS
    return letters and bool(name.strip(".")) and not name.startswith("__") and not name.endswith(".json")


def is_head(parameters: Any) -> bool:
    """Whether JSON values describe parameters by name, each by its `shape` and `dtype`, as they can be stored."""
    if not isinstance(parameters, dict) or not all(map(is_parameter_name, parameters)):
        return False
    if not all(isinstance(entry, dict) and entry.keys() == {"shape", "dtype"} for entry in parameters.values()):
        return False
    shapes = [entry["shape"] for entry in parameters.values()]
    if not all(isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS for shape in shapes):
        return False
    if any(type(side) is not int or not 0 <= side <= _MAX_NUMBERS for shape in shapes for side in shape):
        return False
    numbers = sum(math.prod(shape) for shape in shapes)
    return numbers <= _MAX_NUMBERS and all(entry["dtype"] in _DTYPES for entry in parameters.values())


def parameter_layout(entry: Mapping[str, Any], codec: str) -> tuple[ArrayLayout, int]:
    """The layout and the number of rows of a parameter's array: one row without dimensions, none without values.

    Args:
        entry: `shape` and `dtype` of the parameter.
        codec: of the cache.
    """
    shape, dtype = entry["shape"], entry["dtype"]
    if 0 in shape:
        return array_layout("", (), dtype, codec), 0
    return array_layout("", tuple(shape[1:]), dtype, codec), shape[0] if shape else 1
