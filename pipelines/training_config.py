"""The config that a training runs by: the user's model and pipelines with our data, schedule and optimiser."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.datasets import DataError, DetectionData
from kdpipe.pipelines.transforms import set_scale

__all__ = ["SCHEDULES", "Recipe", "detector_config", "set_validation", "world_size"]

BASE_LR = 0.03  # at BASE_BATCH images per step (G-DetKD, section 5)
BASE_BATCH = 16
SCHEDULES = {"1x": 12, "2x-ms": 24}
MULTI_SCALE = (0.8, 1.0)  # 2x-ms: the short side is drawn from this range of the full scale (640 to 800 pixels)


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained.

    Attributes:
        epochs: Number of passes over the training images.
        batch_size: Images per step and process.
        lr: Peak learning rate; None scales 0.03 (at 16 images per step) with the batch.
        seed: Seed of everything random.
        scale: `(w, h)` of mmdet's Resize; None keeps the resizing of the config.
        multi_scale: Draw the scale of each training image from 0.8 to 1.0 of `scale`.
        amp: Mixed precision.
        workers: Loader workers; None chooses by the number of cores.
        options: `KEY=VALUE` overrides of the config, applied last.
        strict_data: Refuse data of which some would be left out.
        skip_bad_images: Leave out images that cannot be read or are not as annotated.
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


def world_size() -> int:
    """Number of training processes, as torchrun and Slurm announce it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def detector_config(
    config: Config,
    train: DetectionData,
    val: DetectionData | None,
    recipe: Recipe,
) -> Config:
    """A runnable training config for a plain detector.

    Keeps what the user's config says of the model, the pipelines and the hooks; sets data, schedule and optimiser.

    Args:
        config: mmdet config of the detector.
        train: Training images.
        val: Validation images, or None.
        recipe: Schedule and options.

    Raises:
        KdpipeError: There is nothing to train on, or the config's pipelines cannot be used.
    """
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
        "sampler": {"type": "DefaultSampler", "shuffle": True},
        "batch_sampler": {"type": "AspectRatioBatchSampler"},
        "dataset": _dataset(cfg, "train_dataloader", train, recipe),
    }
    cfg.train_dataloader.dataset.filter_cfg = {"filter_empty_gt": True, "min_size": 0}
    cfg.train_cfg = {"type": "EpochBasedTrainLoop", "max_epochs": recipe.epochs, "val_interval": 1}
    if val is None:
        _set_test_view(cfg, train.class_names, recipe.scale)
    else:
        set_validation(cfg, val, recipe.scale, recipe.batch_size, loader)

    # mmdet leaves out images without annotations
    images = sum(image.num_gt > 0 for image in train.images)
    if not images:
        raise DataError(f"{train.ann_file} has no image with an annotated object: there is nothing to train on.")
    cfg.param_scheduler = None  # that of kdpipe, made when the number of steps is known (run_training)
    lr = recipe.lr if recipe.lr is not None else BASE_LR * recipe.batch_size * world_size() / BASE_BATCH
    wrapper = "OptimWrapper"
    if recipe.amp:
        wrapper = "AmpOptimWrapper" if torch.cuda.is_available() else "Bfloat16OptimWrapper"
    cfg.optim_wrapper = {
        "type": wrapper,
        "optimizer": {"type": "SGD", "lr": lr, "momentum": 0.9, "weight_decay": 1e-4},
        "clip_grad": {"max_norm": 10, "norm_type": 2},
    }
    hooks = cfg.setdefault("default_hooks", ConfigDict())
    hooks.checkpoint = {"type": "CheckpointHook", "interval": 1, "max_keep_ckpts": 2}
    hooks.logger = {"type": "LoggerHook", "interval": 10}
    cfg.visualizer = {
        "type": "DetLocalVisualizer",
        "vis_backends": [{"type": "LocalVisBackend"}, {"type": "TensorboardVisBackend"}],
    }
    cfg.env_cfg = {
        "cudnn_benchmark": False,
        "dist_cfg": {"backend": "nccl" if torch.cuda.is_available() else "gloo"},
    }
    cfg.randomness = {"seed": recipe.seed}
    cfg.launcher = "pytorch" if world_size() > 1 else "none"
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
        "dataset": {**_coco_dataset(val), "test_mode": True, "pipeline": pipeline},
    }
    cfg.val_evaluator = {"type": "CocoMetric", "ann_file": str(_copy(val)), "metric": "bbox"}
    cfg.val_cfg = {"type": "ValLoop"}
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = cfg.val_dataloader, cfg.val_evaluator, {"type": "TestLoop"}


def _copy(data: DetectionData) -> Path:
    """The file that mmdet and pycocotools are handed, never the user's own."""
    assert data.coco_file is not None, "DetectionData.copied_to says where"
    return data.coco_file.resolve()


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
    pipeline = _pipeline(cfg, "val_dataloader" if cfg.get("val_dataloader") else "test_dataloader")
    return pipeline if scale is None else set_scale(pipeline, scale)


def _coco_dataset(data: DetectionData) -> dict[str, Any]:
    return {
        "type": "CocoDataset",
        "ann_file": str(_copy(data)),
        "data_prefix": {"img": f"{data.img_dir.resolve()}/"},
        "metainfo": {"classes": data.class_names},
    }


def _pipeline(cfg: Config, loader: str) -> list[Any]:
    dataset = (cfg.get(loader) or {}).get("dataset", {})
    while "pipeline" not in dataset and "dataset" in dataset:
        dataset = dataset["dataset"]
    if "pipeline" not in dataset:
        raise KdpipeError(
            f"The config has no pipeline at {loader}.dataset.pipeline. Expected an mmdet 3.x detector config; "
            "name or start from one of mmdet's own, such as faster-rcnn_r50_fpn_1x_coco."
        )
    return list(dataset["pipeline"])


def _dataset(cfg: Config, loader: str, data: DetectionData, recipe: Recipe) -> dict[str, Any]:
    pipeline = _pipeline(cfg, loader)
    if recipe.scale is not None:
        pipeline = set_scale(pipeline, recipe.scale, MULTI_SCALE if recipe.multi_scale else None)
    return {**_coco_dataset(data), "pipeline": pipeline}
