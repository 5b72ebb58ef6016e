"""How the weights of the teacher's RPN and RoI head lie in a cache: one array per parameter."""

from collections.abc import Mapping
from typing import Any

from kdpipe.cache.format.layout import ArrayLayout, array_layout

# Key of the group.
HEAD = "head"
_DTYPES = ("float32", "int64", "int32", "int16", "int8", "uint8", "bool")


def parameter_layout(entry: Mapping[str, Any], codec: str) -> tuple[ArrayLayout, int]:
    """The layout and the number of rows of a parameter's array: one row without dimensions, none without values.

    Args:
        entry: `shape` and `dtype` of the parameter, as the record of the head has them.
        codec: of the cache.

    Raises:
        ValueError: they are none of a parameter.
    """
    shape, dtype = entry["shape"], entry["dtype"]
    if dtype not in _DTYPES or any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"a parameter of shape {shape} and type {dtype} is none that is stored")
    if 0 in shape:
        return array_layout("", (), dtype, codec), 0
    return array_layout("", tuple(shape[1:]), dtype, codec), shape[0] if shape else 1
