"""The config that a training runs by: the user's model and pipelines with our data, schedule and optimiser."""

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.data.coco_entries import DataError
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.mask_check import check_masks
from kdpipe.pipelines.detectors.configs import apply_known_options, apply_options, set_num_classes
from kdpipe.pipelines.detectors.literal_config import ConfigError
from kdpipe.pipelines.detectors.mmdet2 import kept_ratio_scale
from kdpipe.pipelines.training.data import (
    annotation_copy,
    coco_dataset,
    pipeline_of,
    training_dataset,
    training_samplers,
    with_filter,
)
from kdpipe.pipelines.training.options import MULTI_SCALE, TrainingOptions
from kdpipe.pipelines.training.recipe import set_recipe
from kdpipe.pipelines.training.replaced import report_replaced
from kdpipe.pipelines.training.run_settings import set_run
from kdpipe.pipelines.training.transforms import set_scale
from kdpipe.pipelines.training.workers import default_workers

__all__ = [
    "own_config",
    "set_validation",
    "training_config",
    "with_overrides",
    "world_size",
]

_SCALES = (0.8, 1.0)  # of `MULTI_SCALE`: the short side is drawn from this range of the full scale (640 to 800 pixels)

_BATCHES = "Its loaders hand samples on as mmdet's pipelines make them. Leave it out."
# What overrides of the config cannot change.
_FIXED = {
    "work_dir": "Use --work-dir.",
    "launcher": "Start several processes with torchrun or srun.",
    "experiment_name": "Leave it out.",
    **{
        f"{split}_dataloader.{part}": _BATCHES
        for split in ("train", "val")
        for part in ("collate_fn", "worker_init_fn")
    },
}


def world_size() -> int:
    """Number of training processes, as torchrun and Slurm announce it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def own_config(config: Config, options: TrainingOptions) -> Config:
    """A user's config with their overrides, as far as it knows the places of these: what decides what is kept of it."""
    return apply_known_options(with_filter(config), options.overrides)


def training_config(
    config: Config, train: DetectionData, val: DetectionData | None, options: TrainingOptions, console: Console
) -> Config:
    """The training config of a plain detector, which nothing changes any more: `wrapping` only puts things around it.

    Three layers: the user's config, of which model, hooks and how images are read stay; what kdpipe sets (images,
    number of classes, what options of the command line say, and the paper's optimiser and schedule where the recipe is
    not the config's); and the overrides.

    Args:
        config: The user's, as `own_config` gives it.
        train: Training images; the detector gets their classes.
        val: Validation images, or None.
        options: Of the command.
        console: Told what of the config is not used.

    Raises:
        KdpipeError: There is nothing to train on; the config's data set or pipelines cannot be used; or an override is
            of what kdpipe sets itself, or leads nowhere.
    """
    cfg = _detector_config(config, train, val, options)
    set_num_classes(cfg.model, len(train.class_names))
    cfg = with_overrides(cfg, options)
    check_masks(cfg, train)
    report_replaced(config, cfg, options.recipe, console)
    return cfg


def _detector_config(
    config: Config, train: DetectionData, val: DetectionData | None, options: TrainingOptions
) -> Config:
    if not any(image.num_gt for image in train.images):
        raise DataError(f"{train.ann_file} has no image with an annotated object: there is nothing to train on.")
    cfg = copy.deepcopy(config)
    workers = default_workers() if options.workers is None else options.workers
    loader = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "multiprocessing_context": "forkserver" if workers else None,
        "pin_memory": torch.cuda.is_available(),
    }
    batch_size = options.batch_size or (config.get("train_dataloader") or {}).get("batch_size", 2)
    cfg.train_dataloader = {
        "batch_size": batch_size,
        **loader,
        **training_samplers(config),
        "dataset": training_dataset(config, train, *_training_scales(config, options)),
    }
    if val is None:
        _set_test_view(cfg, train.class_names, options.scale)
    else:
        set_validation(cfg, val, options.scale, batch_size, loader)
    set_recipe(cfg, config, options, batch_size * world_size())
    seed = (config.get("randomness") or {}).get("seed") or 0 if options.seed is None else options.seed
    set_run(cfg, config, seed)
    cfg.launcher = "pytorch" if world_size() > 1 else "none"
    return cfg


def _training_scales(
    config: Config, options: TrainingOptions
) -> tuple[tuple[int, int] | None, tuple[float, float] | None]:
    """The scale that replaces the resizing of training images, and the range of factors that it is drawn from.

    Raises:
        KdpipeError: Several scales are asked for, and it is not known of what.
    """
    if options.schedule != MULTI_SCALE:
        return options.scale, None
    scale = kept_ratio_scale(config, options.scale)
    if scale is None:
        raise KdpipeError(
            f"--schedule {MULTI_SCALE} takes factors of a scale, and the test pipeline of the config has none that "
            "keeps the ratio. Name it: --scale 1333x800."
        )
    return scale, _SCALES


def with_overrides(cfg: Config, options: TrainingOptions) -> Config:
    """A training config with the user's overrides, which have the last word but in one matter.

    mmengine's `auto_scale_lr` multiplies a rate with the batch: the config's own, not the paper's and that of `--lr`.

    Raises:
        ConfigError: As `apply_options` does; or an override is of what kdpipe sets itself.
    """
    for override in options.overrides:
        key = override.partition("=")[0].strip()
        for fixed, advice in _FIXED.items():
            if key == fixed or key.startswith(f"{fixed}."):
                raise ConfigError(f"option {override!r}: kdpipe sets {fixed} itself. {advice}")
    cfg = apply_options(cfg, options.overrides)
    is_peak = options.recipe != "config" or options.lr is not None
    if is_peak and (cfg.get("auto_scale_lr") or {}).get("enable"):
        cfg.auto_scale_lr.enable = False
    return cfg


def set_validation(
    cfg: Config, val: DetectionData, scale: tuple[int, int] | None, batch_size: int, loader: Mapping[str, Any]
) -> None:
    """Point validation and test of a config at a data set, measured as COCO AP.

    Args:
        cfg: Is changed in place.
        val: Validation images.
        scale: `(w, h)` that replaces the resizing; None keeps it.
        batch_size: Images per forward pass.
        loader: Options of the data loader.
    """
    pipeline = _test_pipeline(cfg, scale)
    cfg.val_dataloader = {
        "batch_size": batch_size,
        **loader,
        "drop_last": False,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": {**coco_dataset(val), "test_mode": True, "pipeline": pipeline},
    }
    cfg.val_evaluator = {"type": "CocoMetric", "ann_file": str(annotation_copy(val)), "metric": "bbox"}
    cfg.val_cfg = {"type": "ValLoop"}
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = cfg.val_dataloader, cfg.val_evaluator, {"type": "TestLoop"}


def _set_test_view(cfg: Config, class_names: Sequence[str], scale: tuple[int, int] | None) -> None:
    """Leave out validation, and keep of the test what says how the detector sees images, without any data."""
    loader = cfg.get("val_dataloader") or cfg.get("test_dataloader")
    view = loader and {"pipeline": _test_pipeline(cfg, scale), "metainfo": {"classes": class_names}}
    for key in ("val_dataloader", "val_evaluator", "val_cfg", "test_dataloader", "test_evaluator", "test_cfg"):
        cfg[key] = None
    if not view:
        return
    cfg.test_dataloader = {
        "batch_size": 1,
        "num_workers": 0,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": {"type": "CocoDataset", "test_mode": True, **view},
    }
    cfg.test_evaluator, cfg.test_cfg = {"type": "CocoMetric", "metric": "bbox"}, {"type": "TestLoop"}


def _test_pipeline(cfg: Config, scale: tuple[int, int] | None) -> list[Any]:
    loader = "val_dataloader" if cfg.get("val_dataloader") else "test_dataloader"
    pipeline = pipeline_of((cfg.get(loader) or {}).get("dataset") or {}, f"{loader}.dataset.pipeline")
    return pipeline if scale is None else set_scale(pipeline, scale)
