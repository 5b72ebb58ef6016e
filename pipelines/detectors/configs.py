"""Configs of detectors: from a checkpoint, from mmdet's zoo or from a file, and the options that change them."""

import copy
import difflib
import re
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mmdet
from mmengine.config import Config

from kdpipe.pipelines.detectors.building import missing_package
from kdpipe.pipelines.detectors.checkpoints import Checkpoint
from kdpipe.pipelines.detectors.config_types import type_name
from kdpipe.pipelines.detectors.literal_config import ConfigError, parse_literal_config, parse_value
from kdpipe.pipelines.detectors.mmdet2 import dictionaries, modernise
from kdpipe.pipelines.detectors.plain_config import plain_config
from kdpipe.pipelines.detectors.untrusted import restrict, trusted

__all__ = [
    "apply_known_options",
    "apply_options",
    "config_from_checkpoint",
    "config_from_file",
    "find_config",
    "is_of_zoo",
    "set_num_classes",
    "zoo",
]

_RESERVED = ("filename", "text", "pretty_text", "env_variables")  # names that mmengine's Config keeps to itself


def config_from_checkpoint(checkpoint: Checkpoint) -> Config | None:
    """The config that a checkpoint carries, as `modernise` leaves it; None where it carries none.

    Raises:
        ConfigError: it carries one that is more than plain values, or names what is not known as harmless.
    """
    content = checkpoint.meta.get("cfg") or checkpoint.meta.get("config")
    if not isinstance(content, Mapping) and not (isinstance(content, str) and content.strip()):
        return None
    return config_from_file(content, f"the config inside checkpoint {checkpoint.path}", trust=checkpoint.trusted)


def config_from_file(content: str | Mapping[str, Any], origin: str, *, trust: bool) -> Config:
    """A config that came with a checkpoint or a cache, as `modernise` leaves it. Its text is never executed.

    Args:
        content: its text, or its values.
        origin: where it came from, as messages call it.
        trust: let it name anything, as `trusted` does; else as `restrict` does.

    Raises:
        ConfigError: it is more than plain values, or names what is not known as harmless.
    """
    try:
        values = parse_literal_config(content) if isinstance(content, str) else content
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from error
    values = {key: value for key, value in values.items() if key not in _RESERVED}
    try:
        return modernise(Config(trusted(values, origin) if trust else restrict(values, origin)))
    except RecursionError as error:
        raise ConfigError(f"{origin} is nested too deeply to be read. Name the detector's config: --config.") from error


def find_config(name_or_path: str | Path) -> Config:
    """A config file (the user's own: it may execute), or a config of mmdet's zoo by name.

    Args:
        name_or_path: a file, or e.g. ``faster-rcnn_r50_fpn_1x_coco``; the spelling of mmdet 2.x
            (``faster_rcnn_r50_fpn_1x_coco``), a folder before it and ``.py`` behind it are fine too.

    Raises:
        ConfigError: there is neither; the closest names of the zoo are listed. Or the file cannot be read.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = _zoo_file(str(name_or_path))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # mmengine's, for `_base_ = "mmdet::..."`
            return modernise(plain_config(Config.fromfile(path)))
    except ConfigError:
        raise
    except Exception as error:  # a config is a program: it may raise anything
        if package := missing_package(error):
            raise ConfigError(
                f"config {path} needs the package {package}, which is not installed: pip install {package}"
            ) from error
        reason = str(error) or "a pure-Python config that calls what it imports, and mmengine lets it name that only"
        raise ConfigError(f"config {path} cannot be read: {type(error).__name__}: {reason}") from error


def is_of_zoo(name_or_path: str | Path) -> bool:
    """Whether `find_config` takes this for a config that mmdet ships, and not for a file of the user's."""
    path = Path(name_or_path)
    return not path.is_file() or path.resolve().is_relative_to(zoo().resolve())


def zoo() -> Path:
    """The folder of the configs that mmdet ships."""
    package = Path(mmdet.__file__).parent
    folders = [folder for folder in (package / ".mim" / "configs", package.parent / "configs") if folder.is_dir()]
    if not folders:
        raise ConfigError(f"mmdet in {package} came without its configs. Install it from its wheel: pip install mmdet")
    return folders[0]


def _zoo_file(name: str) -> Path:
    def key(text: str) -> str:
        return text.removesuffix(".py").replace("-", "_").lower()

    files = {
        key(file.relative_to(zoo()).as_posix()): file for file in zoo().rglob("*.py") if "_base_" not in file.parts
    }
    searched = key(name.strip().removeprefix("./").removeprefix("configs/"))
    matches = [file for zoo_name, file in files.items() if f"/{zoo_name}".endswith(f"/{searched}")]
    matches = matches or [file for old, file in _renamed().items() if key(old) == searched]
    if matches:
        return matches[0]
    stems = {key(file.stem): file.stem for file in files.values()}
    close = [stems[match] for match in difflib.get_close_matches(searched.split("/")[-1], stems, n=5, cutoff=0.6)]
    near = f" The closest names: {', '.join(close)}." if close else ""
    raise ConfigError(f"config {name} is neither a file nor a config of mmdet's zoo.{near}")


def _renamed() -> dict[str, Path]:
    """The zoo's configs by the names that they had in mmdet 2.x, which live on in the addresses of the weights."""
    names: dict[str, Path] = {}
    for metafile in sorted(zoo().glob("*/metafile.yml")):
        for model in metafile.read_text(encoding="utf-8").split("- Name: "):
            config = re.search(r"Config: configs/(\S+\.py)", model)
            weights = re.search(r"Weights: \S+/([\w.-]+)/[^/\s]+\.pth", model)
            if config and weights:
                names.setdefault(weights[1], zoo() / config[1])
    return names


def apply_options(config: Config, options: Sequence[str]) -> Config:
    """A copy of a config with values replaced.

    Args:
        config: stays as it is.
        options: ``KEY=VALUE`` each, e.g. ``model.backbone.base_channels=16``, or with the index of a list item,
            ``model.roi_head.bbox_head.0.fc_out_channels=256``. Values are literals, ``true``/``false``, or text.

    Raises:
        ConfigError: an option has no ``=``, or its key leads nowhere. The last name of a key of two or more may be new,
            since configs leave out what has a default.
    """
    config = copy.deepcopy(config)
    for option in options:
        key, equals, text = option.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise ConfigError(f"option {option!r} is not of the form KEY=VALUE, as in model.backbone.depth=18.")
        target: Any = config
        for depth, name in enumerate(names[:-1]):
            target = target[_place(target, name, names[: depth + 1], option)]
        last = names[-1]
        if len(names) == 1 or isinstance(target, list) or not isinstance(target, MutableMapping):
            target[_place(target, last, names, option)] = parse_value(text)
        else:
            target[last] = parse_value(text)
    return config


def apply_known_options(config: Config, options: Sequence[str]) -> Config:
    """As `apply_options`, with those options only whose keys lead somewhere in the config as it is."""
    for option in options:
        with suppress(ConfigError):  # of keys that a training adds; whoever adds them applies all options again
            config = apply_options(config, [option])
    return config


def _place(target: Any, name: str, path: Sequence[str], option: str) -> str | int:
    """The index of `name` in a dictionary or list; an error that names the whole path where there is none."""
    if isinstance(target, list) and name.isdecimal() and int(name) < len(target):
        return int(name)
    if isinstance(target, list):
        names = [str(index) for index in range(len(target))]
    elif isinstance(target, Mapping | Config):
        names = [str(key) for key in target]
        if name in names:
            return name
    else:
        raise ConfigError(
            f"option {option!r}: {'.'.join(path[:-1])} is {target!r}, which holds no {name!r}; only dictionaries and "
            "lists do."
        )
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(names)}."
    raise ConfigError(f"option {option!r}: the config has no {'.'.join(path)}. {hint}")


def set_num_classes(model: MutableMapping[str, Any], count: int) -> None:
    """Sets the number of object classes in every box and mask head of a model config, in place.

    The classes of a semantic branch are of another kind, and stay; so does the one class of the RPN.
    """
    roi_head = model.get("roi_head") or {}
    for head in dictionaries([model.get("bbox_head"), roi_head.get("bbox_head")]):
        if type_name(head.get("type", "")).endswith("Head"):
            head["num_classes"] = count
    others = ("rpn_head", "roi_head", "semantic_head")
    for owner in (model, roi_head):
        heads = [part for name, part in owner.items() if name.endswith("_head") and name not in others]
        for part in dictionaries(heads):
            if "num_classes" in part:
                part["num_classes"] = count
