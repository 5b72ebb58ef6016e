"""Types and options that several commands share."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from kdpipe.pipelines.data.options import DataOptions, ValOptions
from kdpipe.pipelines.training.options import AMP_TYPES

__all__ = [
    "BATCH",
    "COUNT",
    "EPOCHS",
    "IMAGE_ID",
    "LEVELS",
    "PATH",
    "PLACE",
    "PROPOSALS",
    "Bytes",
    "Choices",
    "FiniteRange",
    "Scale",
    "Shard",
    "WholeRange",
    "chosen_device",
    "combined",
    "data_options",
    "fields_among",
    "grouped",
    "recipe_options",
    "skip_option",
    "store_option",
    "training_options",
    "trust_option",
    "val_options",
]

PATH = click.Path(path_type=Path)


class WholeRange(click.IntRange):
    """As click's, which calls a number "integer range"."""

    name = "integer"


class FiniteRange(click.FloatRange):
    """As click's, in which NaN lies within any range."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class Scale(click.ParamType):  # type: ignore[type-arg]
    """`1333x800` -> `(1333, 800)`."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", value)
        if match is None:
            self.fail(f"{value!r} is no size; expected WIDTHxHEIGHT in pixels, such as 1333x800.", param, ctx)
        if any(len(side) > 9 or int(side) not in _SIDES for side in match.groups()):
            self.fail(
                f"{value!r} is no size of pictures; expected sides of {_SIDES.start} to {_SIDES.stop - 1} pixels.",
                param,
                ctx,
            )
        return int(match[1]), int(match[2])


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """`1GiB` -> 1073741824."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", value, re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is no size; expected such as 512MiB or 1GiB.", param, ctx)
        power = "kmgt".find(match[2][0].lower()) + 1 if match[2] else 0
        size = float(match[1]) * 1024**power
        if not 1 <= size <= _LARGEST:
            self.fail(f"{value!r} is no size; expected from 1 byte to 1024TiB, such as 512MiB or 1GiB.", param, ctx)
        return int(size)


class Choices(click.ParamType):  # type: ignore[type-arg]
    """Names separated by commas, in the order of `allowed`."""

    name = "NAMES"

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self.allowed = allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = [name.strip() for name in value.split(",")]
        if not set(names) <= set(self.allowed) or len(set(names)) < len(names):
            self.fail(f"{value!r}: expected some of {', '.join(self.allowed)}, separated by commas.", param, ctx)
        return tuple(name for name in self.allowed if name in names)


class Shard(click.ParamType):  # type: ignore[type-arg]
    """`0/8` -> `(0, 8)`, and `/8` -> `(None, 8)`."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | None, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,6})?/(\d{1,6})", value.replace(" ", ""))
        if match is None or not int(match[2]) or int(match[1] or 0) >= int(match[2]):
            self.fail(
                f"{value!r} is no shard; expected I/N with I from 0 to N - 1, such as 0/8 (or /8 in an indexed job of "
                "Kubernetes, which says I).",
                param,
                ctx,
            )
        return int(match[1]) if match[1] else None, int(match[2])


class Place(click.ParamType):  # type: ignore[type-arg]
    """A path, or the URL of a cache in an object store."""

    name = "PATH|URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value):
            self.fail("expected a path, or a URL such as s3://bucket/coco.zarr.", param, ctx)
        return str(value)


class Assignments(click.ParamType):  # type: ignore[type-arg]
    """`KEY=VALUE` -> `(KEY, VALUE)`; a value is never shown, since it may be a key to a store."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, content = value.partition("=")
        if not key.strip() or not equals:
            self.fail("expected KEY=VALUE, such as endpoint=http://127.0.0.1:9000.", param, ctx)
        return key.strip().lower(), content.strip()


PLACE = Place()
COUNT = WholeRange(1, 10**9)
IMAGE_ID = WholeRange(-(1 << 63), (1 << 63) - 1)  # what a cache can hold
LEVELS = Choices(tuple(f"P{number}" for number in range(1, 9)))
PROPOSALS = WholeRange(1, 100_000)
EPOCHS = WholeRange(1, 100_000)
BATCH = WholeRange(1, 100_000)
SEED = WholeRange(0, (1 << 32) - 1)  # numpy's
WORKERS = WholeRange(0, 1_000)
_SIDES = range(16, 20_001)  # of a network input, pixels
_LARGEST = 1 << 50  # of sizes, bytes


def chosen_device(name: str | None) -> Any:
    """The `torch.device` of `--device`.

    Raises:
        UsageError: There is no such device.
    """
    from kdpipe.pipelines.runtime.devices import DeviceError, torch_device

    try:
        return torch_device(name)
    except DeviceError as error:
        raise click.UsageError(str(error)) from error


def combined(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several click options as one decorator."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def fields_among(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some values that have the names of a dataclass's fields."""
    return {field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values}


def grouped(name: str, kind: type[Any]) -> Callable[[Any], Any]:
    """Options of a command that it gets as one dataclass: those with the names of its fields.

    Args:
        name: Of the command's argument.
        kind: The dataclass; its fields are options, or groups that were made before. One that the command has no
            option for keeps its default.
    """

    def decorate(command: Any) -> Any:
        @functools.wraps(command)
        def call(*args: Any, **values: Any) -> Any:
            given = fields_among(kind, values)
            others = {option: value for option, value in values.items() if option not in given}
            return command(*args, **others, **{name: kind(**given)})

        return call

    return decorate


data_options = combined(
    click.option("--ann-file", type=PATH, help="COCO JSON of the images."),
    click.option("--img-dir", type=PATH, help="Folder of the images."),
    click.option("--voc", type=PATH, help="Pascal VOC folder (Annotations, ImageSets, JPEGImages), in place of both."),
    click.option("--split", help="Image set of the VOC folder. Default: train, or the one of the cache."),
    click.option("--bdd", type=PATH, help="Detection labels of BDD100K (a JSON), in place of --ann-file."),
    click.option("--strict-data", is_flag=True, help="Refuse data of which annotations or images would be left out."),
    grouped("data", DataOptions),
)
val_options = combined(
    click.option("--val-ann-file", type=PATH, help="COCO JSON to measure AP on."),
    click.option("--val-img-dir", type=PATH, help="Folder of its images. Default: --img-dir."),
    click.option("--val-voc", type=PATH, help="Pascal VOC folder, in place of both. Default, with --val-split: --voc."),
    click.option("--val-split", help="Image set of the VOC folder to measure AP on."),
    click.option("--val-bdd", type=PATH, help="Detection labels of BDD100K to measure AP on, with --val-img-dir."),
    grouped("val", ValOptions),
)
recipe_options = combined(
    click.option(
        "--recipe",
        type=click.Choice(["paper", "config"]),
        help="Whose optimiser, schedule and epochs. Default: those of the config where it is a file of yours, or else "
        "the paper's.",
    ),
    click.option("--batch-size", type=BATCH, help="Images per step and process. Default: the config's."),
    click.option("--lr", type=FiniteRange(0, 1000, min_open=True), help="Peak rate. Default: 0.03 per 16 images."),
    click.option("--seed", type=SEED, help="Of all random numbers. Default: the config's, or 0."),
    click.option("--scale", type=Scale(), help="Network input, ratio kept."),
    click.option(
        "--amp",
        type=click.Choice(AMP_TYPES),
        is_flag=False,
        flag_value="auto",
        help="Mixed precision. Without a type: bfloat16, or float16 on a GPU that has no bfloat16.",
    ),
    click.option("--workers", type=WORKERS, help="Loader processes. Default: half the cores, at most 4; 8 for a GPU."),
    click.option("-o", "--cfg-options", "overrides", multiple=True, metavar="KEY=VALUE", help="Override the config."),
)
training_options = combined(
    recipe_options,
    click.option("--work-dir", type=PATH, help="Where logs and checkpoints go. Default: work_dirs/..."),
    click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the work directory."),
)
store_option = click.option(
    "--store-option",
    "store_options",
    multiple=True,
    type=Assignments(),
    callback=lambda ctx, param, value: dict(value),
    help="Of the object store of a cache s3://, gs:// or az://: endpoint=..., region=..., skip_signature=true, ... "
    "Never recorded.",
)
skip_option = click.option(
    "--skip-bad-images",
    is_flag=True,
    help="Leave out images that cannot be read or are not as annotated. Decodes each once.",
)
trust_option = click.option(
    "--trust-checkpoint",
    "trust",
    is_flag=True,
    help="Unpickle a checkpoint that holds more than weights, and build whatever its config names: may run its code.",
)
