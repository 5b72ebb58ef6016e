"""Python config text, and values of options, read without executing them."""

import ast
import copy
import math
from collections.abc import Mapping
from typing import Any

from kdpipe.cache.errors import KdpipeError

__all__ = ["ConfigError", "parse_literal_config", "parse_value"]

_NAMED = {"inf": math.inf, "nan": math.nan}  # how Python prints these floats


class ConfigError(KdpipeError):
    """A config cannot be read, found, or used."""


class _NotLiteralError(Exception):
    """Holds the node that is more than a literal."""

    def __init__(self, node: ast.expr | ast.stmt) -> None:
        self.node = node


def parse_literal_config(text: str) -> dict[str, Any]:
    """Reads config text as ``mmengine.Config.pretty_text`` and mmcv 1.x write it. Nothing is executed.

    Allowed are assignments to names, of constants, lists, tuples, dictionaries, ``dict(key=value, **name)``, names
    assigned before, ``+ - * /`` on numbers and ``+`` on strings.

    Args:
        text: the whole config, its base configs merged in.

    Returns:
        The assigned values by name, in order.

    Raises:
        ConfigError: the text is not Python, or holds anything else; the line is named.
    """
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"the config text cannot be parsed: {line}{error}. Give --config instead.") from error
    values: dict[str, Any] = {}
    for statement in module.body:
        try:
            match statement:
                case ast.Expr(value=ast.Constant()):  # a docstring
                    pass
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    values[name] = _value(value, values)
                case _:
                    raise _NotLiteralError(statement)
        except (_NotLiteralError, RecursionError) as error:
            node = error.node if isinstance(error, _NotLiteralError) else statement
            code = (ast.get_source_segment(text, node) or "").split("\n")[0][:80]
            raise ConfigError(
                f"line {node.lineno} of the config text is not a plain value: {code!r}. Text that came with a "
                "checkpoint is never executed; only constants, lists, tuples, dict(...) and names assigned before are "
                "read. Give the config as --config."
            ) from None
    return values


def parse_value(text: str) -> Any:
    """The value of an option ``KEY=VALUE``: a literal, ``true`` or ``false``, or else the text itself.

    Raises:
        ConfigError: the text opens a list, tuple or dictionary, and is none.
    """
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        if text.strip().startswith(("[", "(", "{")):
            raise ConfigError(
                f"{text} is not a list, tuple or dictionary of literals: quote the strings in it, as in ['a', 'b']."
            ) from error
        return text


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as constant):
            return constant
        case ast.Name(id=name) if name in names:
            return copy.deepcopy(names[name])
        case ast.Name(id=name) if name in _NAMED:
            return _NAMED[name]
        case ast.List(elts=items):
            return [_value(item, names) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item, names) for item in items)
        case ast.Dict(keys=keys, values=items):
            pairs = zip(keys, items, strict=True)
            return _mapping(node, [(_value(key, names) if key else None, item) for key, item in pairs], names)
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords) if "dict" not in names:
            return _mapping(node, [(keyword.arg, keyword.value) for keyword in keywords], names)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            number = _value(operand, names)
            if _is_number(number):
                return -number if isinstance(node.op, ast.USub) else number
        case ast.BinOp(left=left, op=operator, right=right):
            return _arithmetic(node, operator, _value(left, names), _value(right, names))
    raise _NotLiteralError(node)


def _mapping(node: ast.expr, items: list[tuple[Any, ast.expr]], names: Mapping[str, Any]) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key, item in items:
        value = _value(item, names)
        if key is None and isinstance(value, dict):  # **value
            result.update(value)
        elif isinstance(key, str | int | float | tuple):
            result[key] = value
        else:
            raise _NotLiteralError(node)
    return result


def _arithmetic(node: ast.expr, operator: ast.operator, left: Any, right: Any) -> Any:
    if isinstance(operator, ast.Add) and isinstance(left, str) and isinstance(right, str):
        return left + right
    if _is_number(left) and _is_number(right):
        match operator:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div() if right != 0:
                return left / right
    raise _NotLiteralError(node)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
