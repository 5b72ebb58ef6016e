"""The config that a training runs by: the user's model and pipelines with our data, schedule and optimiser."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from rich.console import Console

from kdpipe.pipelines.data.coco_entries import DataError
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.mask_check import check_masks
from kdpipe.pipelines.detectors.configs import apply_known_options, apply_options, set_num_classes
from kdpipe.pipelines.detectors.literal_config import ConfigError
from kdpipe.pipelines.training.data import (
    annotation_copy,
    coco_dataset,
    pipeline_of,
    training_dataset,
    training_samplers,
    with_filter,
)
from kdpipe.pipelines.training.optimisers import check_own_recipe, optim_wrapper, own_epochs
from kdpipe.pipelines.training.options import TrainingOptions
from kdpipe.pipelines.training.replaced import report_replaced
from kdpipe.pipelines.training.run_settings import set_run
from kdpipe.pipelines.training.transforms import set_scale

__all__ = [
    "SCHEDULES",
    "Recipe",
    "make_recipe",
    "own_config",
    "set_validation",
    "training_config",
    "with_overrides",
    "world_size",
]

SCHEDULES = {"1x": 12, "2x-ms": 24}
MULTI_SCALE = (0.8, 1.0)  # 2x-ms: the short side is drawn from this range of the full scale (640 to 800 pixels)

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


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained.

    Attributes:
        epochs: Number of passes over the training images.
        batch_size: Images per step and process.
        lr: Peak learning rate; None: see `optim_wrapper`.
        seed: Seed of everything random.
        scale: `(w, h)` of mmdet's Resize; None keeps the resizing of the config.
        multi_scale: Draw the scale of each training image from 0.8 to 1.0 of `scale`.
        amp: Mixed precision.
        workers: Loader workers; None chooses by the number of cores.
        options: `KEY=VALUE` overrides of the config, applied last.
        strict_data: Refuse data of which some would be left out.
        skip_bad_images: Leave out images that cannot be read or are not as annotated.
        source: `paper`, or `config`: optimiser, schedule, epochs and mixed precision are those of the config.
    """

    epochs: int
    batch_size: int = 8
    lr: float | None = None
    seed: int = 0
    scale: tuple[int, int] | None = None
    multi_scale: bool = False
    amp: bool = False
    workers: int | None = None
    options: Sequence[str] = ()
    strict_data: bool = False
    skip_bad_images: bool = False
    source: str = "paper"


def make_recipe(config: Config, options: TrainingOptions, schedule: str = "1x") -> Recipe:
    """What options and config say together, of which the options have the last word.

    Args:
        config: The user's, with the overrides in it that it knows the place of.
        options: Of the command line.
        schedule: One of `SCHEDULES`: the number of epochs where nothing else says it, and several scales or one.

    Raises:
        KdpipeError: The recipe is to be the config's, and options contradict it, or it has none.
    """
    epochs, multi_scale = options.epochs or SCHEDULES[schedule], schedule == "2x-ms"
    if options.source == "config":
        check_own_recipe(config, options.epochs, options.lr, options.amp, multi_scale)
        epochs = own_epochs(config)
    batch_size, seed = options.batch_size, options.seed
    return Recipe(
        epochs=epochs,
        batch_size=(config.get("train_dataloader") or {}).get("batch_size", 2) if batch_size is None else batch_size,
        lr=options.lr,
        seed=(config.get("randomness") or {}).get("seed") or 0 if seed is None else seed,
        scale=options.scale,
        multi_scale=multi_scale,
        amp=options.amp,
        workers=options.workers,
        options=options.options,
        strict_data=options.strict_data,
        skip_bad_images=options.skip_bad_images,
        source=options.source,
    )


def world_size() -> int:
    """Number of training processes, as torchrun and Slurm announce it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_config(config: Config, recipe: Recipe) -> Config:
    """A user's config with their overrides, as far as it knows the places of these: what decides what is kept of it."""
    return apply_known_options(with_filter(config), recipe.options)


def training_config(
    config: Config, train: DetectionData, val: DetectionData | None, recipe: Recipe, console: Console
) -> Config:
    """The training config of a plain detector, which nothing changes any more: `wrapping` only puts things around it.

    Three layers: the user's config, of which model, hooks and how images are read stay; what kdpipe sets (images,
    number of classes, what options of the command line say, and the paper's optimiser and schedule unless the recipe is
    the config's); and the overrides.

    Args:
        config: The user's, as `own_config` gives it.
        train: Training images; the detector gets their classes.
        val: Validation images, or None.
        recipe: Schedule and options.
        console: Told what of the config is not used.

    Raises:
        KdpipeError: There is nothing to train on; the config's data set or pipelines cannot be used; or an override is
            of what kdpipe sets itself, or leads nowhere.
    """
    cfg = _detector_config(config, train, val, recipe)
    set_num_classes(cfg.model, len(train.class_names))
    cfg = with_overrides(cfg, recipe.options, recipe.source)
    check_masks(cfg, train)
    report_replaced(config, cfg, console)
    return cfg


def _detector_config(config: Config, train: DetectionData, val: DetectionData | None, recipe: Recipe) -> Config:
    if not any(image.num_gt for image in train.images):
        raise DataError(f"{train.ann_file} has no image with an annotated object: there is nothing to train on.")
    cfg = copy.deepcopy(config)
    workers = recipe.workers if recipe.workers is not None else max(1, min(4, (os.cpu_count() or 1) // 2))
    loader = {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "multiprocessing_context": "forkserver" if workers else None,
        "pin_memory": torch.cuda.is_available(),
    }
    cfg.train_dataloader = {
        "batch_size": recipe.batch_size,
        **loader,
        **training_samplers(config),
        "dataset": training_dataset(config, train, recipe.scale, MULTI_SCALE if recipe.multi_scale else None),
    }
    if val is None:
        _set_test_view(cfg, train.class_names, recipe.scale)
    else:
        set_validation(cfg, val, recipe.scale, recipe.batch_size, loader)
    if recipe.source == "paper":
        _set_recipe(cfg, config, recipe)
    else:
        cfg.train_cfg = {**cfg.train_cfg, "type": "EpochBasedTrainLoop"}
        cfg.train_cfg.pop("by_epoch", None)
        cfg.param_scheduler = cfg.param_scheduler or []  # a constant rate; None is for kdpipe's own, see below
    set_run(cfg, config, recipe.seed)
    cfg.launcher = "pytorch" if world_size() > 1 else "none"
    return cfg


def _set_recipe(cfg: Config, config: Config, recipe: Recipe) -> None:
    loop = config.get("train_cfg") or {}
    by_epoch = "max_iters" not in loop
    kept = {key: loop[key] for key in ("val_begin", "val_interval", "dynamic_intervals") if by_epoch and key in loop}
    cfg.train_cfg = {"type": "EpochBasedTrainLoop", "max_epochs": recipe.epochs, "val_interval": 1, **kept}
    cfg.optim_wrapper = optim_wrapper(config, recipe.lr, recipe.batch_size * world_size(), recipe.amp)
    cfg.param_scheduler = None  # that of kdpipe, made when the number of steps is known (run_training)


def with_overrides(cfg: Config, options: Sequence[str], source: str) -> Config:
    """A training config with the user's overrides, which have the last word but in one matter.

    mmengine's `auto_scale_lr` would multiply a rate with the batch that has been already: it is for `--recipe config`.

    Raises:
        ConfigError: As `apply_options` does; or an override is of what kdpipe sets itself.
    """
    for option in options:
        key = option.partition("=")[0].strip()
        for fixed, advice in _FIXED.items():
            if key == fixed or key.startswith(f"{fixed}."):
                raise ConfigError(f"option {option!r}: kdpipe sets {fixed} itself. {advice}")
    cfg = apply_options(cfg, options)
    if source == "paper" and (cfg.get("auto_scale_lr") or {}).get("enable"):
        cfg.auto_scale_lr.enable = False
    return cfg


def set_validation(
    cfg: Config, val: DetectionData, scale: tuple[int, int] | None, batch_size: int, loader: Mapping[str, Any]
) -> None:
    """Point validation and test of a config at a data set, measured as COCO AP."""
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
    named = cfg.get("val_dataloader") or cfg.get("test_dataloader")
    view = named and {"pipeline": _test_pipeline(cfg, scale), "metainfo": {"classes": class_names}}
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
