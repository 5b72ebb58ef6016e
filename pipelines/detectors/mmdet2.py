"""The two layouts of mmdet's configs, 2.x and 3.x: what they say of the model, of its view and of its data."""

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from kdpipe.pipelines.detectors.literal_config import ConfigError

__all__ = [
    "dataset_paths",
    "dictionaries",
    "for_inference",
    "for_record",
    "kept_ratio_scale",
    "modernise",
    "test_steps",
]

_TRAINING_ONLY = (
    *("train_pipeline", "train_pipeline_stage1", "train_pipeline_stage2", "albu_train_transforms", "load_pipeline"),
    *("custom_hooks", "optim_wrapper", "param_scheduler", "auto_scale_lr", "train_cfg", "load_from", "resume"),
    *("optimizer", "optimizer_config", "lr_config", "resume_from", "workflow"),
)
_RECORDED = ("default_scope", "custom_imports", "model", "test_dataloader", "val_dataloader", "data")
_OLD_FORMATTING = ("ImageToTensor", "Collect", "DefaultFormatBundle")  # of mmdet 2.x
_SECTIONS = (  # dictionaries, where a config has them
    *("data", "train_dataloader", "val_dataloader", "test_dataloader", "img_norm_cfg", "data_preprocessor"),
    *("default_hooks", "optim_wrapper", "train_cfg", "val_cfg", "test_cfg", "auto_scale_lr", "env_cfg", "randomness"),
)
_WRAPPERS = ("RepeatDataset", "ClassBalancedDataset", "MultiImageMixDataset", "ConcatDataset")


def modernise(config: Config) -> Config:
    """What mmdet 3.3 needs to build the model, and to see images as it did in training.

    A config of mmdet 2.x loses ``pretrained`` and gets a ``data_preprocessor`` from the Normalize and Pad of its test
    pipeline; names that changed since 2.0 are replaced. Its ``data`` stays as it is: `test_steps` and `dataset_paths`
    read both layouts. A config of mmdet 3.x is returned as a copy.

    Raises:
        ConfigError: there is no model, a section is laid out as none of mmdet is, or a config of mmdet 2.x does not say
            how it normalises images.
    """
    config = copy.deepcopy(config)
    model = config.get("model")
    if not isinstance(model, MutableMapping) or "type" not in model:
        raise ConfigError("the config has no model: expected model=dict(type=...). Give the config of a detector.")
    _check_sections(config)
    config.setdefault("default_scope", "mmdet")
    if "data_preprocessor" in config:  # as mmengine's Runner does
        model.setdefault("data_preprocessor", config["data_preprocessor"])
    is_old = "data" in config or "img_norm_cfg" in config or "pretrained" in model
    if "data_preprocessor" in model or not is_old:
        return config
    for name in ("train_cfg", "test_cfg"):  # outside of the model before mmdet 2.7
        if name in config:
            value = config.pop(name)
            model.setdefault(name, value)
    model.pop("pretrained", None)
    for part in dictionaries(model):
        _rename(part)
    model["data_preprocessor"] = _preprocessor(config)
    return config


def _check_sections(config: Config) -> None:
    for name in _SECTIONS:
        if not isinstance(config.get(name), Mapping | None):
            raise ConfigError(f"the config has {name} = {config[name]!r:.100}, expected {name}=dict(...). Correct it.")
    loaders = {f"{split}_dataloader": config.get(f"{split}_dataloader") for split in ("train", "val", "test")}
    for name, loader in loaders.items():
        if not isinstance(dataset := (loader or {}).get("dataset"), Mapping | None):
            raise ConfigError(f"the config has {name}.dataset = {dataset!r:.100}, expected dict(type=...). Correct it.")
    pipelines = [
        part["pipeline"] for part in dictionaries([config.get("data"), *loaders.values()]) if "pipeline" in part
    ]
    for steps in (*pipelines, config.get("test_pipeline")):
        if steps is not None and not (
            isinstance(steps, list | tuple) and all(isinstance(step, Mapping) and "type" in step for step in steps)
        ):
            raise ConfigError(
                f"the config has a pipeline {steps!r:.100}, expected a list of dict(type=...). Correct it."
            )


def _preprocessor(config: Config) -> dict[str, Any]:
    steps = {step.get("type"): step for step in _steps(_test_pipeline(config))}
    normalise = steps.get("Normalize") or config.get("img_norm_cfg")
    if not normalise:
        raise ConfigError(
            "the config is of mmdet 2.x, and its test pipeline has no Normalize: mean and std of the images are "
            "unknown. Give a config with model.data_preprocessor=dict(type='DetDataPreprocessor', mean=..., std=...)."
        )
    return {
        "type": "DetDataPreprocessor",
        "mean": list(normalise["mean"]),
        "std": list(normalise["std"]),
        "bgr_to_rgb": bool(normalise.get("to_rgb", True)),
        "pad_size_divisor": int(steps.get("Pad", {}).get("size_divisor") or 1),
    }


def _rename(part: MutableMapping[str, Any]) -> None:
    """Replaces, in one dictionary of a model, what mmdet 2.x and mmcv 1.x called otherwise."""
    kind = part.get("type")
    if kind in ("RoIAlign", "RoIPool"):
        _move(part, "out_size", "output_size")
        _move(part, "sample_num", "sampling_ratio")
    if "nms_thr" in part:  # the RPN's: nms_thr=0.7
        part["nms"] = {"type": "nms", "iou_threshold": part.pop("nms_thr")}
        _move(part, "max_num", "max_per_img")
        part.pop("nms_post", None)
        part.pop("nms_across_levels", None)
    if kind in ("nms", "soft_nms"):
        _move(part, "iou_thr", "iou_threshold")
    if (
        "extra_convs_on_inputs" in part
        and not part.pop("extra_convs_on_inputs")
        and part.get("add_extra_convs") is True
    ):
        part["add_extra_convs"] = "on_output"
    if kind in ("DCN", "DCNv2"):
        _move(part, "deformable_groups", "deform_groups")
    if kind == "FusedSemanticHead" and ("ignore_label" in part or "loss_weight" in part):
        loss = {"ignore_index": part.pop("ignore_label", 255), "loss_weight": part.pop("loss_weight", 0.2)}
        part["loss_seg"] = {"type": "CrossEntropyLoss", **loss}


def _move(part: MutableMapping[str, Any], old: str, new: str) -> None:
    if old in part:
        part[new] = part.pop(old)


def dictionaries(value: Any) -> Iterator[MutableMapping[str, Any]]:
    """All dictionaries in nested dictionaries and lists, from the outside in."""
    if isinstance(value, MutableMapping):
        yield value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from dictionaries(item)


def for_inference(config: Config) -> Config:
    """A copy without what only training needs: pipelines (and their packages), hooks, schedules, start weights.

    The data sets stay named, so that `dataset_paths` still finds them.
    """
    config = copy.deepcopy(config)
    for name in _TRAINING_ONLY:
        config.pop(name, None)
    train = [config.get("train_dataloader"), (config.get("data") or {}).get("train")]
    for part in dictionaries(train):
        part.pop("pipeline", None)
    for part in dictionaries(config["model"]):
        start = part.get("init_cfg")
        if isinstance(start, Mapping) and start.get("type") == "Pretrained":
            part["init_cfg"] = None
        if isinstance(part.get("pretrained"), str):
            part["pretrained"] = None
    return config


def for_record(config: Config) -> Config:
    """What a cache records of a config: the model, how it sees images, and of which; nothing of where that lay.

    Args:
        config: As `modernise` gives it.
    """
    record = Config({name: copy.deepcopy(config[name]) for name in _RECORDED if name in config})
    if "data" in record:
        record.data = {name: part for name, part in record.data.items() if name in ("test", "val")}
    return record


def test_steps(config: Config) -> list[Any]:
    """The steps of the test pipeline as mmdet 3.x writes them; none where the config has no pipeline.

    Of a pipeline of mmdet 2.x, Normalize and Pad are left out, which `modernise` has put into the preprocessor, and
    what only formats.

    Raises:
        ConfigError: A pipeline of mmdet 2.x has several views, or pads otherwise than to a multiple of a size.
    """
    pipeline = list(_test_pipeline(config))
    if not any("img_scale" in step or step.get("type") in _OLD_FORMATTING for step in _steps(pipeline)):
        return pipeline
    return [modern for step in pipeline for modern in _modern_steps(step)]


test_steps.__test__ = False  # type: ignore[attr-defined]  # no test, whatever its name


def kept_ratio_scale(config: Config, scale: tuple[int, int] | None) -> tuple[int, int] | None:
    """The scale given, or that of the test-time view; None where there is none that keeps the ratio."""
    if scale is not None:
        return scale
    for step in test_steps(config):
        size = step.get("scale")
        if step.get("keep_ratio") and isinstance(size, list | tuple) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None


def _modern_steps(step: Mapping[str, Any], scale: Any = None) -> Iterator[Mapping[str, Any]]:
    """A step of mmdet 2.x as mmdet 3.x writes it."""
    kind, scale = step.get("type"), step.get("img_scale", scale)
    if kind == "MultiScaleFlipAug":
        several = isinstance(scale, list) and len(scale) != 1
        if several or step.get("flip"):
            raise ConfigError(
                "the config's test pipeline has several views of an image (MultiScaleFlipAug). Give it one."
            )
        for inner in step.get("transforms") or ():
            yield from _modern_steps(inner, scale)
    elif kind == "Resize":
        options = {key: value for key, value in step.items() if key != "img_scale"}
        size = scale[0] if isinstance(scale, list) and len(scale) == 1 else scale
        yield {"keep_ratio": True, **options, **({} if size is None else {"scale": tuple(size)})}
    elif kind == "Pad":
        zeros = step.get("pad_val", 0) == 0 and not set(step) - {"type", "size_divisor", "pad_val"}
        if not zeros or not step.get("size_divisor"):
            raise ConfigError(
                f"the config's test pipeline pads images with {dict(step)}; expected a size_divisor alone."
            )
    elif kind == "RandomFlip" and not step.get("flip_ratio"):
        pass  # MultiScaleFlipAug says whether to flip
    elif kind not in (*_OLD_FORMATTING, "Normalize"):
        yield step


def _test_pipeline(config: Config) -> Sequence[Any]:
    sections = [config.get(name) for name in ("test_dataloader", "val_dataloader")]
    sections += [(config.get("data") or {}).get(name) for name in ("test", "val")]
    for section in sections:
        for part in dictionaries(section):
            if part.get("pipeline"):
                return part["pipeline"]  # type: ignore[no-any-return]
    return config.get("test_pipeline") or ()


def _steps(pipeline: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    for step in pipeline:
        if isinstance(step, Mapping):
            yield step
            yield from _steps(step.get("transforms") or ())


def dataset_paths(config: Config, split: str) -> tuple[Path, Path] | None:
    """Annotation file and image folder of a COCO-type data set that the config names.

    Args:
        config: of either layout.
        split: ``train`` or ``val``.

    Returns:
        ``(ann_file, img_dir)``, not looked for on disk; None where the config names none, or several, or another type.
    """
    loader = config.get(f"{split}_dataloader") or {}
    dataset = loader.get("dataset") or (config.get("data") or {}).get(split)
    while isinstance(dataset, Mapping) and dataset.get("type") in _WRAPPERS:
        inner = dataset.get("dataset", dataset.get("datasets"))
        dataset = inner[0] if isinstance(inner, list | tuple) and len(inner) == 1 else inner
    if not isinstance(dataset, Mapping):
        return None
    ann_file = dataset.get("ann_file")
    if isinstance(ann_file, list | tuple) and len(ann_file) == 1:
        ann_file = ann_file[0]
    if not isinstance(ann_file, str) or not ann_file.endswith(".json"):
        return None
    root = Path(dataset.get("data_root") or "")
    prefix = dataset.get("data_prefix") or {"img": dataset.get("img_prefix")}
    images = prefix.get("img") or prefix.get("img_path") or ""
    return root / ann_file, root / images
