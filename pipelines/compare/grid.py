"""What a comparison is told beside the options of `train-student`: rows by name, on the command line or in a file."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdpipe.cache.errors import KdpipeError

__all__ = ["Arguments", "Grid", "GridRow", "argument_words", "merged", "read_grid", "row_name"]

Arguments = Mapping[str, list[str]]  # option such as `--epochs` -> its values; a flag has none

_REPEATED = ("--cfg-options", "--store-option")
_OWN = ("work-dir", "resume", "auto-resume", "seed")
_NAME = re.compile(r"[\w+=][\w.+=-]*")
_EXAMPLE = '[rows.NAME] with options of train-student, such as student = "retinanet_r18_fpn_1x_coco"'


@dataclass(frozen=True)
class GridRow:
    """A student of a comparison.

    Attributes:
        name: Of the student, and of its folder.
        arguments: Options of `train-student`.
        methods: As `--methods` has them, each of which is trained; empty takes those of the command.
        baseline: Row without distillation that it is compared with; None finds it.
    """

    name: str
    arguments: Arguments
    methods: tuple[str, ...] = ()
    baseline: str | None = None


@dataclass(frozen=True)
class Grid:
    """The rows of a file.

    Attributes:
        rows: Its rows, options for all of them included.
        seeds: How many seeds; None leaves that to the command.
    """

    rows: list[GridRow] = field(default_factory=list)
    seeds: int | None = None


def read_grid(path: Path) -> Grid:
    """Read a grid, such as

        seeds = 3
        [options]                     # of train-student, for all rows
        cache = "coco.zarr"
        epochs = 12
        [rows.r18]
        student = "retinanet_r18_fpn_1x_coco"
        methods = ["none", "sgfi,ckd"]
        cfg-options = { "model.bbox_head.stacked_convs" = 2 }

    Raises:
        KdpipeError: It cannot be read, or has something else in it.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise KdpipeError(f"--grid {path} cannot be read ({error}).") from error
    except tomllib.TOMLDecodeError as error:
        raise KdpipeError(f"--grid {path} is not TOML: {error}.") from error
    if unknown := sorted(content.keys() - {"seeds", "options", "rows"}):
        raise KdpipeError(f"{path} has {unknown[0]}; expected seeds, [options] and {_EXAMPLE}.")
    rows, seeds, options = content.get("rows"), content.get("seeds"), content.get("options", {})
    if not isinstance(rows, dict) or not rows or not all(isinstance(row, dict) for row in (options, *rows.values())):
        raise KdpipeError(f"{path} names no rows; expected {_EXAMPLE}.")
    if seeds is not None and (not isinstance(seeds, int) or isinstance(seeds, bool) or not 1 <= seeds <= 1000):
        raise KdpipeError(f"{path} has seeds = {seeds!r}; expected how many seeds there are, such as 3.")
    found = [_row(path, name, options, row) for name, row in rows.items()]
    names = {row.name for row in found}
    for row in found:
        if row.baseline is not None and row.baseline not in names:
            raise KdpipeError(f"{path}: row {row.name} has baseline {row.baseline!r}; rows are {', '.join(names)}.")
    return Grid(found, seeds)


def _row(path: Path, name: str, options: Mapping[str, Any], own: Mapping[str, Any]) -> GridRow:
    row_name(name)
    arguments: Arguments = {}
    for each in (options, own):
        values = {key: value for key, value in each.items() if key not in ("methods", "baseline")}
        for key in values:
            if key in _OWN:
                raise KdpipeError(f"{path}, row {name}: {key} is set by compare (seeds = N at the top). Leave it out.")
        given = {f"--{key}": _values(path, name, key, value) for key, value in values.items() if value is not False}
        dropped = {f"--{key}" for key, value in values.items() if value is False}
        arguments = merged({key: value for key, value in arguments.items() if key not in dropped}, given)
    methods = own.get("methods", options.get("methods", []))
    methods = [methods] if isinstance(methods, str) else methods
    baseline = own.get("baseline")
    if not isinstance(methods, list) or not all(isinstance(each, str) for each in methods):
        raise KdpipeError(f'{path}, row {name}: methods = {methods!r}; expected such as ["none", "sgfi,ckd,pred"].')
    if baseline is not None and not isinstance(baseline, str):
        raise KdpipeError(f"{path}, row {name}: baseline = {baseline!r}; expected the name of a row.")
    return GridRow(name, arguments, tuple(methods), baseline)


def _values(path: Path, row: str, key: str, value: Any) -> list[str]:
    """A value of TOML as those of an option."""
    if value is True:
        return []
    if isinstance(value, dict):
        return [f"{name}={_text(each)}" for name, each in value.items()]
    if isinstance(value, list):
        if f"--{key}" not in _REPEATED:
            raise KdpipeError(
                f"{path}, row {row}: {key} = {value!r}; expected one value. Several are several rows; only methods, "
                "cfg-options and store-option take a list."
            )
        return [str(each) for each in value]
    if isinstance(value, str | int | float):
        return [str(value)]
    raise KdpipeError(f"{path}, row {row}: {key} = {value!r}; expected text, a number, or true.")


def _text(value: Any) -> str:
    """A value as `-o KEY=VALUE` has it."""
    return value if isinstance(value, str) else repr(value)


def row_name(name: str) -> str:
    """The name of a student, if it can be that of a folder.

    Raises:
        KdpipeError: It cannot.
    """
    if _NAME.fullmatch(name) is None:
        raise KdpipeError(f"{name!r} cannot name a student: letters, digits and . _ + = - make the name of its folder.")
    return name


def merged(first: Arguments, *more: Arguments) -> Arguments:
    """Options of which later ones replace earlier ones; those that can be repeated add to them."""
    result = dict(first)
    for arguments in more:
        for option, values in arguments.items():
            earlier = result.get(option, []) if option in _REPEATED else []
            result[option] = [*earlier, *values]
    return result


def argument_words(arguments: Arguments) -> list[str]:
    """Options as words of a command line."""
    words = []
    for option, values in arguments.items():
        words += [option] if not values else [word for value in values for word in (option, value)]
    return words
