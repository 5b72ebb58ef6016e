"""Configs that came with a file: reading a checkpoint of somebody else must not run their code.

mmengine imports and calls whatever a `type` names by a dotted path, and libraries evaluate, open or download what other
texts name. So every `type` has to be a registered name, the texts of what is built hold no dotted name, path or call,
and what reaches out of the file is left aside.
"""

import copy
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mmdet.registry
import mmengine.registry
from mmdet.utils import register_all_modules
from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS, Registry
from mmengine.utils import import_modules_from_strings

from kdpipe.pipelines.detectors.config_types import resolve_type
from kdpipe.pipelines.detectors.credentials import masked
from kdpipe.pipelines.detectors.literal_config import ConfigError
from kdpipe.pipelines.runtime.console import command_console, plain

__all__ = ["restrict", "trusted"]

# Keys whose text is looked up as the text of `type` is: `RandomResize(resize_type=...)` builds what it names.
_TYPE_KEYS = ("type", "runner_type", "constructor", "ema_type", "resize_type", "conv_type", "padding_mode")
_SCOPE_KEYS = ("_scope_", "default_scope")
_SCOPES = ("mmdet", "mmengine")
_PACKAGES = ("mmdet", "mmengine", "mmcv", "kdpipe")  # whose registered classes may be written as a dotted path
# `type`s that no registry holds: mmdet looks them up in tables of its own, or only mmdet 2.x knew them.
_OTHER_NAMES = re.compile(
    r"""nms|soft_nms|nms_match|RoIAlign|RoIPool|SimpleRoIAlign|DeformRoIPoolPack|ModulatedDeformRoIPoolPack  # mmcv.ops
    |conv|interpolation_conv|last_conv|dilation|offset  # FPG, Cascade RPN
    |zeros|circular|constant|edge|symmetric  # padding_mode
    |BboxParams|Blur|ChannelShuffle|HueSaturationValue|JpegCompression|MedianBlur|OneOf|RGBShift  # albumentations, in
    |RandomBrightnessContrast|ShiftScaleRotate  # mmdet's configs
    |Collect|DefaultFormatBundle|ToDataContainer|LoadImageFromWebcam|Translate|Shear|BrightnessTransform  # mmdet 2.x
    |ContrastTransform|EqualizeTransform|CustomDataset|(Distributed)?GroupSampler|InfiniteGroupBatchSampler
    |(EpochBased|IterBased)Runner|(Text|Tensorboard|Wandb|Mlflow|Neptune|Pavi)LoggerHook|MMDetWandbHook|(Dist)?EvalHook
    |(Exp|Linear)MomentumEMAHook|SyncRandomSizeHook|(GradientCumulative)?(Fp16)?OptimizerHook
    |(Default|LayerDecay)OptimizerConstructor|MOTChallengeMetrics""",
    re.VERBOSE,
)
# Registered, but they open, import or evaluate what their arguments name, and no detector needs them.
_REACHING_TYPES = ("LiveTeacher", "CameraMotionCompensation", "RFSearchHook")
_BUILT_KEYS = ("model", "tta_model", "data_preprocessor", "train_cfg", "test_cfg")  # and every pipeline
_DATA_KEYS = ("label_map_file",)  # of pipelines: read as JSON
_NOT_PLAIN = re.compile(r"[()/\\]|[A-Za-z_]\w*\.[A-Za-z_]")  # a call, a path, a dotted name
_OUTSIDE_KEYS = ("backend_args", "file_client_args", "teacher_ckpt")
_OUTSIDE_SECTIONS = ("custom_imports", "load_from", "resume_from")
# Modules of kdpipe that register what a recorded config may name; some of them import this one.
_REGISTERING = ("kdpipe.distill.detector", "kdpipe.pipelines.training.run", "kdpipe.pipelines.training.transforms")
_SHOWN = 3


def restrict(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A copy of a config that came with a file, safe to build; what is left out of it is printed.

    Args:
        config: As it was read: plain values.
        origin: Where it came from, as messages call it.

    Raises:
        ConfigError: It names something that is not known as harmless; nothing of it was imported or built.
    """
    register_all_modules(init_default_scope=False)
    for module in _REGISTERING:
        importlib.import_module(module)

    _refuse(list(_type_faults(config, "")), origin)
    dropped: list[str] = []
    restricted: dict[str, Any] = _without_outside(config, "", dropped)
    _refuse(list(_text_faults(restricted, "", built=False)), origin)
    if dropped:
        command_console().print(
            f"Left out of {plain(origin)}, since it reaches out of the file: {plain(masked(_summary(dropped)))}",
            markup=False,
        )
    return restricted


def _summary(places: Sequence[str]) -> str:
    """Places in a config, of each key the first one."""
    by_key: dict[str, list[str]] = {}
    for place in places:
        by_key.setdefault(re.sub(r"\[\d+\]$", "", place.partition(" ")[0]).rpartition(".")[2], []).append(place)
    return ", ".join(
        f"{first:.200}" + (f" and {len(others)} more" if others else "") for first, *others in by_key.values()
    )


def trusted(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A copy of a config that may run code, the modules that it asks for imported; a missing one is said."""
    imports = config.get("custom_imports")
    if isinstance(imports, Mapping):
        try:
            import_modules_from_strings(**imports)
        except ImportError as error:
            command_console().print(f"{plain(origin)}: custom_imports: {plain(error)}", markup=False)
    return copy.deepcopy(dict(config))


def _refuse(faults: Sequence[str], origin: str) -> None:
    if not faults:
        return
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    raise ConfigError(
        "\n  ".join([f"{origin} was refused, since it could run code of whoever made it:", *faults[:_SHOWN], *more])
        + "\nExpected are plain names of what mmdet, mmengine or kdpipe registers, such as type='ResNet'. Nothing has "
        "run. Name the detector's config (--config, --teacher-config), or give --trust-checkpoint if you trust where "
        "it comes from."
    )


def _type_faults(value: Any, place: str) -> Iterator[str]:
    """Every `type`, and what is looked up in the same way, that is not known; a line each."""
    for key, item, item_place in _items(value, place):
        if key in _TYPE_KEYS:
            fault = _type_fault(item)
        elif key in _SCOPE_KEYS:
            fault = "" if item in (None, *_SCOPES) else f"expected {' or '.join(_SCOPES)}"
        else:
            yield from _type_faults(item, item_place)
            continue
        if fault:
            yield f"{item_place} = {item!r:.200}: {fault}"


def _type_fault(kind: Any) -> str:
    """Why a `type` is refused; empty where it is known."""
    if not isinstance(kind, str):
        return "a type has to be a text"
    if _OTHER_NAMES.fullmatch(kind):
        return ""
    package, dot, _ = kind.partition(".")
    if package in ("mmpretrain", "mmcls"):
        return f"the package {package} is not loaded for a config that came with a file"
    registries = [
        each
        for module in (mmengine.registry, mmdet.registry)
        for each in vars(module).values()
        if isinstance(each, Registry)
    ]
    is_listed = not dot or package in _PACKAGES
    types = [
        each for each in (resolve_type(kind, registry) for registry in registries if is_listed) if each is not None
    ]
    if not types:
        return "no such name is registered"
    reaching = [registry.module_dict.get(name) for registry in registries for name in _REACHING_TYPES]
    if any(each is other for each in types for other in reaching):
        return "it opens or evaluates what its arguments name"
    return ""


def _without_outside(value: Any, place: str, dropped: list[str]) -> Any:
    """A copy without what names files and addresses; `dropped` gets the places."""
    if not isinstance(value, Mapping | list | tuple):
        return copy.deepcopy(value)
    entries: dict[Any, Any] = {}
    for key, item, item_place in _items(value, place):
        outside = key in _OUTSIDE_KEYS or (not place and key in _OUTSIDE_SECTIONS)
        weights = _weights(key, item)
        if (outside and item) or weights:
            dropped.append(f"{item_place} ({weights})" if weights else item_place)
            if isinstance(value, Mapping):
                entries[key] = None
        else:
            entries[key] = _without_outside(item, item_place, dropped)
    return entries if isinstance(value, Mapping) else type(value)(entries.values())


def _weights(key: Any, item: Any) -> str:
    """The file or address of start weights that an entry of a config names; empty where it names none."""
    if key == "pretrained" and isinstance(item, str):
        return item
    if not isinstance(item, Mapping) or "checkpoint" not in item:
        return ""
    is_pretrained = key == "init_cfg" or resolve_type(item.get("type"), WEIGHT_INITIALIZERS) is PretrainedInit
    return str(item["checkpoint"]) if is_pretrained else ""


def _text_faults(value: Any, place: str, built: bool) -> Iterator[str]:
    """Texts in models and pipelines that could be a path, a call or a module, a line each."""
    for key, item, item_place in _items(value, place):
        inside = built or key in _BUILT_KEYS or str(key).endswith("pipeline")
        if key in (*_TYPE_KEYS, *_DATA_KEYS):
            continue
        if inside and isinstance(item, str) and _NOT_PLAIN.search(item):
            yield f"{item_place} = {item!r:.200}: it could be a path, a call or a module"
        yield from _text_faults(item, item_place, inside)


def _items(value: Any, place: str) -> Iterator[tuple[Any, Any, str]]:
    """Key, value and place of what a dictionary, list or tuple holds; nothing of other values."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key, item, f"{place}.{key}" if place else str(key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield index, item, f"{place}[{index}]"
