"""From a runnable config to a finished training: what `train-teacher` and `train-student` share."""

import copy
import errno
import json
import resource
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dist import is_main_process
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.building import building
from kdpipe.pipelines.checked_dataset import CheckedDataset
from kdpipe.pipelines.checkpoints import register_safe_types
from kdpipe.pipelines.class_matching import match_classes
from kdpipe.pipelines.configs import apply_options, set_num_classes
from kdpipe.pipelines.console import silent_stdout
from kdpipe.pipelines.data_report import report_data
from kdpipe.pipelines.datasets import DetectionData
from kdpipe.pipelines.guard import FiniteHook, UsefulLossesHook
from kdpipe.pipelines.layouts import kept_ratio_scale
from kdpipe.pipelines.parcel import pack_batch
from kdpipe.pipelines.picture_checks import training_images
from kdpipe.pipelines.plain_checkpoints import PlainCheckpointHook, SameBuffersHook
from kdpipe.pipelines.progress import ProgressHook, coco_metrics
from kdpipe.pipelines.runner import FormattedConfig, QuietRunner
from kdpipe.pipelines.schedule import cosine_schedule
from kdpipe.pipelines.seeding import EpochSampler, SeededDataset, SeedStepHook
from kdpipe.pipelines.training_config import Recipe, detector_config
from kdpipe.pipelines.worker import end_workers, init_worker, preload_workers

__all__ = ["COPIES", "TrainingResult", "check_work_dir", "run_training", "train_detector", "training_copies"]

COPIES = "kdpipe"  # folder of the work directory that holds what is neither a checkpoint nor a log


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


def train_detector(
    config: Config,
    load_data: Callable[[], tuple[DetectionData, DetectionData | None]],
    recipe: Recipe,
    work_dir: Path,
    *,
    resume: bool,
    console: Console,
) -> TrainingResult:
    """Train a plain detector; its newest checkpoint is `teacher.pth`.

    Args:
        config: mmdet config of the detector; its number of classes follows the data.
        load_data: Reads training images, and validation images or None. It is called when the work directory is right.
        recipe: Schedule and options.
        work_dir: Where logs and checkpoints go.
        resume: Go on from the newest checkpoint in `work_dir`.
        console: Where progress is shown.

    Raises:
        KdpipeError: Anything that does not fit, before the first step.
    """
    check_work_dir(work_dir, resume)
    train, val = load_data()
    val = val and match_classes(val, train.class_names, f"the training images {train.ann_file}")
    train, val = training_copies(train, val, config, recipe, work_dir, console)
    cfg = detector_config(config, train, val, recipe)
    set_num_classes(cfg.model, len(train.class_names))
    cfg = apply_options(cfg, recipe.options)
    for data in (train, val):
        if data is not None:
            data.write_copy()
    return run_training(cfg, copy.deepcopy(cfg), work_dir, name="teacher", resume=resume, console=console)


def training_copies(
    train: DetectionData,
    val: DetectionData | None,
    config: Config,
    recipe: Recipe,
    work_dir: Path,
    console: Console,
) -> tuple[DetectionData, DetectionData | None]:
    """Say what of the data is left out, and where mmdet will read them: from copies in a folder of our own.

    They are not written yet (`DetectionData.write_copy`). All images are checked.

    Raises:
        DataError: The recipe is strict, and something is left out.
        ImageError: There are bad images.
    """
    report_data(train, console, trained=True, strict=recipe.strict_data)
    if val is not None:
        report_data(val, console, trained=False, strict=recipe.strict_data)
    scale, skip = kept_ratio_scale(config, recipe.scale), recipe.skip_bad_images and not recipe.strict_data
    train, val = training_images(train, val, console, scale=scale, skip=skip)
    if val is not None:
        val = val.copied_to(work_dir / COPIES / "val.json")
    return train.copied_to(work_dir / COPIES / "train.json"), val


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
    cfg.experiment_name = name
    # pycocotools prints as it reads, and its tables; they are in the log, too
    with silent_stdout(), building("The training"):
        runner = QuietRunner.from_cfg(FormattedConfig(cfg))
        runner.build_loops()
    if cfg.get("param_scheduler") is None:
        cfg.param_scheduler = cosine_schedule(runner.max_iters)
    runner.set_schedule(cfg.param_scheduler)
    recorded.param_scheduler = cfg.param_scheduler
    recorded = FormattedConfig(recorded)
    runner.cfg = recorded
    progress = ProgressHook(console, name)
    runner.register_hook(progress)
    runner.register_hook(SameBuffersHook())
    runner.register_hook(FiniteHook())
    runner.register_hook(UsefulLossesHook(console))
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
    if cfg.val_dataloader is not None:
        cfg.val_dataloader.dataset = {"type": CheckedDataset.__name__, "dataset": cfg.val_dataloader.dataset}
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        if loader is not None:
            loader.worker_init_fn = {"type": init_worker.__name__}
            if loader.num_workers:
                loader.collate_fn = {"type": pack_batch.__name__}
