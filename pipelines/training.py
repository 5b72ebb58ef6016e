"""From a detector's config to a finished training: what `train-teacher` and `train-student` share."""

import copy
import errno
import itertools
import json
import os
import resource
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.building import building
from kdpipe.pipelines.checkpoints import register_safe_types
from kdpipe.pipelines.configs import apply_options, set_num_classes
from kdpipe.pipelines.console import silent_stdout
from kdpipe.pipelines.datasets import DataError, DetectionData, check_classes
from kdpipe.pipelines.guard import FiniteHook, UsefulLossesHook
from kdpipe.pipelines.parcel import pack_batch
from kdpipe.pipelines.runner import FormattedConfig, PlainCheckpointHook, ProgressHook, QuietRunner, coco_metrics
from kdpipe.pipelines.seeding import EpochSampler, SeededDataset, SeedStepHook
from kdpipe.pipelines.transforms import set_scale
from kdpipe.pipelines.worker import end_workers, init_worker, preload_workers

__all__ = [
    "Recipe",
    "TrainingResult",
    "check_work_dir",
    "complete",
    "detector_config",
    "run_training",
    "train_detector",
    "world_size",
]

BASE_LR = 0.03  # at BASE_BATCH images per step (G-DetKD, section 5)
BASE_BATCH = 16
WARMUP_STEPS = 500
SCHEDULES = {"1x": 12, "2x-ms": 24}
_RUNS = itertools.count(1)  # trainings of this process
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


@dataclass(frozen=True)
class TrainingResult:
    """Where a training left its files, and what it reached. The figures are in `result.json` of the work directory.

    Attributes:
        checkpoint: The bare detector's newest checkpoint.
        ap: COCO AP on the validation images after the last epoch, or None without validation.
        metrics: All validation metrics, by mmdet's names (`bbox_mAP`, ...).
        seconds_per_step: Median over all steps, the first of each epoch excepted; NaN where there is no other.
    """

    checkpoint: Path
    ap: float | None
    metrics: Mapping[str, float]
    seconds_per_step: float


def world_size() -> int:
    """Number of training processes, as torchrun and Slurm announce it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def detector_config(
    config: Config,
    train: DetectionData,
    val: DetectionData | None,
    recipe: Recipe,
    left_out: Collection[int] = (),
) -> Config:
    """A runnable training config for a plain detector.

    Keeps what the user's config says of the model, the pipelines and the hooks; sets data, schedule and optimiser.

    Args:
        config: mmdet config of the detector.
        train: Training images.
        val: Validation images, or None.
        recipe: Schedule and options.
        left_out: Ids of training images that will not be trained on.

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
        for key in ("val_dataloader", "val_evaluator", "val_cfg", "test_dataloader", "test_evaluator", "test_cfg"):
            cfg[key] = None
    else:
        set_validation(cfg, val, recipe.scale, recipe.batch_size, loader)

    # mmdet leaves out images without annotations
    images = sum(image.num_gt > 0 and image.image_id not in left_out for image in train.images)
    if not images:
        raise DataError(f"{train.ann_file} has no image with an annotated object: there is nothing to train on.")
    steps_per_epoch = -(-images // (recipe.batch_size * world_size()))
    total = recipe.epochs * steps_per_epoch
    warmup = min(WARMUP_STEPS, total // 6)
    cfg.param_scheduler = [
        {"type": "CosineAnnealingLR", "by_epoch": False, "begin": warmup, "end": total, "T_max": total - warmup},
    ]
    if warmup:
        start = {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": warmup}
        cfg.param_scheduler.insert(0, start)
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
    pipeline = _pipeline(cfg, "val_dataloader")
    if scale is not None:
        pipeline = set_scale(pipeline, scale)
    cfg.val_dataloader = {
        "batch_size": batch_size,
        **loader,
        "drop_last": False,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": {**_coco_dataset(val), "test_mode": True, "pipeline": pipeline},
    }
    cfg.val_evaluator = {"type": "CocoMetric", "ann_file": str(val.ann_file), "metric": "bbox"}
    cfg.val_cfg = {"type": "ValLoop"}
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = cfg.val_dataloader, cfg.val_evaluator, {"type": "TestLoop"}


def _coco_dataset(data: DetectionData) -> dict[str, Any]:
    return {
        "type": "CocoDataset",
        "ann_file": str(data.ann_file.resolve()),
        "data_prefix": {"img": f"{data.img_dir.resolve()}/"},
        "metainfo": {"classes": data.class_names},
    }


def _pipeline(cfg: Config, loader: str) -> list[Any]:
    dataset = cfg.get(loader, {}).get("dataset", {})
    while "pipeline" not in dataset and "dataset" in dataset:
        dataset = dataset["dataset"]
    if "pipeline" not in dataset:
        raise KdpipeError(
            f"The config has no pipeline at {loader}.dataset.pipeline. Expected an mmdet 3.x detector config; "
            "start from one of mmdet's own, such as faster-rcnn_r50_fpn_1x_coco."
        )
    return list(dataset["pipeline"])


def _dataset(cfg: Config, loader: str, data: DetectionData, recipe: Recipe) -> dict[str, Any]:
    pipeline = _pipeline(cfg, loader)
    if recipe.scale is not None:
        pipeline = set_scale(pipeline, recipe.scale, MULTI_SCALE if recipe.multi_scale else None)
    return {**_coco_dataset(data), "pipeline": pipeline}


def complete(data: DetectionData, path: Path) -> DetectionData:
    """The same data, from an annotation file that has every field that mmdet and pycocotools read."""
    return data if data.is_complete else replace(data, ann_file=data.save_coco(path), is_complete=True)


def train_detector(
    config: Config,
    train: DetectionData,
    val: DetectionData | None,
    recipe: Recipe,
    work_dir: Path,
    *,
    resume: bool,
    console: Console,
) -> TrainingResult:
    """Train a plain detector; its newest checkpoint is `teacher.pth`.

    Args:
        config: mmdet config of the detector; its number of classes follows the data.
        train: Training images.
        val: Validation images, or None.
        recipe: Schedule and options.
        work_dir: Where logs and checkpoints go.
        resume: Go on from the newest checkpoint in `work_dir`.
        console: Where progress is shown.

    Raises:
        KdpipeError: Anything that does not fit, before the first step.
    """
    check_work_dir(work_dir, resume)
    if val is not None:
        check_classes(val, train.class_names, f"the training images {train.ann_file}")
    train, val = complete(train, work_dir / "train.json"), val and complete(val, work_dir / "val.json")
    cfg = detector_config(config, train, val, recipe)
    set_num_classes(cfg.model, len(train.class_names))
    cfg = apply_options(cfg, recipe.options)
    return run_training(cfg, copy.deepcopy(cfg), work_dir, name="teacher", resume=resume, console=console)


def check_work_dir(work_dir: Path, resume: bool) -> None:
    """Refuse to begin where there is a training already, and to resume where there is none.

    Raises:
        KdpipeError: `resume` without a checkpoint, or a work directory that already holds a training.
    """
    has_checkpoint = (work_dir / "last_checkpoint").exists()
    if resume and not has_checkpoint:
        raise KdpipeError(f"Nothing to resume: {work_dir} has no checkpoint. Leave --resume away to start.")
    if has_checkpoint and not resume:
        raise KdpipeError(
            f"{work_dir} already holds a training. Add --resume to go on with it, or choose another --work-dir."
        )


def run_training(
    cfg: Config,
    recorded: Config,
    work_dir: Path,
    *,
    name: str,
    resume: bool,
    console: Console,
    only_in: Path | None = None,
) -> TrainingResult:
    """Train by mmengine's Runner.

    Args:
        cfg: The config that runs.
        recorded: The plain detector's config, which checkpoints carry.
        work_dir: Where logs and checkpoints go.
        name: `student` or `teacher`; names the plain checkpoint.
        resume: Go on from the newest checkpoint in `work_dir`.
        console: Where progress is shown.
        only_in: Train on the images that this cache holds, and leave out the others.

    Raises:
        KdpipeError: The config cannot be built, the checkpoint to resume from does not fit, or data cannot be read.
    """
    register_all_modules(init_default_scope=True)
    register_safe_types()
    preload_workers()
    cfg.work_dir = str(work_dir)
    cfg.resume = resume
    if resume:
        cfg.load_from = None  # mmengine would resume from there
    _make_reproducible(cfg, only_in)
    if not torch.cuda.is_available():  # by itself, mmengine names a GPU to each process
        unused = cfg.get("find_unused_parameters", False)
        wrapper = {"broadcast_buffers": False, "find_unused_parameters": unused, **(cfg.get("model_wrapper_cfg") or {})}
        cfg.model_wrapper_cfg = {**wrapper, "device_ids": None}
    # mmengine keeps log and figures by this name, of which a process may have several in one second
    cfg.experiment_name = f"{name}_{next(_RUNS)}"
    recorded = FormattedConfig(recorded)
    # pycocotools prints as it reads, and its tables; they are in the log, too
    with silent_stdout(), building("The training"):
        runner = QuietRunner.from_cfg(FormattedConfig(cfg))
        runner.build_loops()
    runner.cfg = recorded
    progress = ProgressHook(console, name)
    runner.register_hook(progress)
    runner.register_hook(FiniteHook())
    runner.register_hook(UsefulLossesHook())
    runner.register_hook(PlainCheckpointHook(name, recorded.pretty_text))
    first_step = runner.iter
    try:
        with silent_stdout():
            runner.train()
    except URLError as error:
        raise KdpipeError(
            f"The pretrained weights that the config names could not be downloaded ({error.reason}). Put them into "
            f"{torch.hub.get_dir()}/checkpoints, or start from scratch: -o model.backbone.init_cfg=None"
        ) from error
    except torch.OutOfMemoryError as error:
        raise KdpipeError(
            f"The device has too little memory: {str(error).splitlines()[0]}\n"
            "Make steps smaller (--batch-size, --scale, --amp), and go on with --resume where an epoch was finished."
        ) from error
    except RuntimeError as error:
        if runner.iter > first_step:
            raise
        raise KdpipeError(
            f"The first training step failed: {str(error).strip()}\nDo the layers of the config fit each other "
            "(channels of backbone, neck and heads, levels, strides)? kdpipe --debug shows where it happened."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise KdpipeError(
            f"The disk or quota of {work_dir} is full ({error.strerror}). What was saved before is intact: free space "
            "and go on with --resume, or begin anew where nothing was saved yet."
        ) from error
    finally:
        progress.close()
        end_workers(loop.dataloader for loop in (runner._train_loop, runner._val_loop) if loop is not None)
    metrics = progress.metrics
    if metrics is None:  # not measured, or resumed where nothing was left to do
        scalars = {key: value.current() for key, value in runner.message_hub.log_scalars.items() if "coco/" in key}
        metrics = coco_metrics(scalars) if scalars else {}
    result = TrainingResult(
        checkpoint=work_dir / f"{name}.pth",
        ap=metrics.get("bbox_mAP"),
        metrics=metrics,
        seconds_per_step=statistics.median(progress.step_times) if progress.step_times else float("nan"),
    )
    if is_main_process():
        seconds = result.seconds_per_step if progress.step_times else None
        values = {"ap": result.ap, "metrics": metrics, "seconds_per_step": seconds, "peak_memory": _peak_memory()}
        (work_dir / "result.json").write_text(json.dumps(values, indent=2) + "\n")
    return result


def _peak_memory() -> int:
    """Most bytes that this process held at a time: on the GPU where there is one, else of main memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _make_reproducible(cfg: Config, only_in: Path | None) -> None:
    """Add what makes every random choice a function of seed, epoch and image, and what ends loader workers with us.

    Not part of the recorded config, which stock mmdet reads without kdpipe.
    """
    cfg.train_dataloader.dataset = {
        "type": SeededDataset.__name__,
        "dataset": cfg.train_dataloader.dataset,
        "seed": cfg.randomness.seed,
        "only_in": only_in and str(only_in.resolve()),
    }
    cfg.train_dataloader.sampler.type = EpochSampler.__name__
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), {"type": SeedStepHook.__name__}]
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        if loader is not None:
            loader.worker_init_fn = {"type": init_worker.__name__}
            if loader.num_workers:
                loader.collate_fn = {"type": pack_batch.__name__}
