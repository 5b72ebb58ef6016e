"""From a runnable config to a finished training: what `train-teacher` and `train-student` share."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.device import get_device
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.data.class_matching import match_classes
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.picture_checks import usable_images
from kdpipe.pipelines.data.report import report_data
from kdpipe.pipelines.detectors.building import building
from kdpipe.pipelines.detectors.checkpoints import register_safe_types
from kdpipe.pipelines.detectors.mmdet2 import kept_ratio_scale, test_steps
from kdpipe.pipelines.detectors.start_weights import StartWeightsHook, check_start_weights
from kdpipe.pipelines.runtime.console import silent_stdout
from kdpipe.pipelines.runtime.devices import describe_device
from kdpipe.pipelines.runtime.launch import is_first
from kdpipe.pipelines.training.config import own_config, training_config, world_size
from kdpipe.pipelines.training.data import left_out_by, pipeline_of
from kdpipe.pipelines.training.faults import training_faults
from kdpipe.pipelines.training.guard import CollapseHook, FiniteHook, SharesHook, UsefulLossesHook
from kdpipe.pipelines.training.monitored import check_monitored
from kdpipe.pipelines.training.options import TrainingOptions
from kdpipe.pipelines.training.plain_checkpoints import PlainCheckpointHook, SameBuffersHook
from kdpipe.pipelines.training.progress import PeakMemoryHook, ProgressHook
from kdpipe.pipelines.training.reading import pipeline_decoding
from kdpipe.pipelines.training.runner import FormattedConfig, QuietRunner
from kdpipe.pipelines.training.schedule import cosine_schedule, doubt_of_warmup
from kdpipe.pipelines.training.student_check import build_detector
from kdpipe.pipelines.training.training_record import check_resumed, check_saving, training_record
from kdpipe.pipelines.training.voc_metric import with_voc_metric
from kdpipe.pipelines.training.work_dir import DETECTIONS, WorkDir
from kdpipe.pipelines.training.work_dir_hook import WorkDirHook
from kdpipe.pipelines.training.workers import end_workers, preload_workers
from kdpipe.pipelines.training.wrapping import with_seeds

__all__ = ["TrainingResult", "run_training", "train_detector", "training_copies"]


@dataclass(frozen=True)
class TrainingResult:
    """Where a training left its files, and what it reached. The figures are in `result.json` of the work directory.

    Attributes:
        checkpoint: The bare detector's newest checkpoint.
        ap: COCO AP on the validation images after the last epoch, or None without validation.
        metrics: All validation metrics, as `ap_metrics` gives them.
        seconds_per_step: Median over all steps, the first of each epoch excepted; NaN where there is no other.
    """

    checkpoint: Path
    ap: float | None
    metrics: Mapping[str, float]
    seconds_per_step: float


def train_detector(
    config: Config,
    load_data: Callable[[], tuple[DetectionData, DetectionData | None]],
    options: TrainingOptions,
    work_dir: Path,
    *,
    resume: bool,
    console: Console,
    command: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train a plain detector; its newest checkpoint is `teacher.pth`.

    Args:
        config: mmdet config of the detector; its number of classes follows the data.
        load_data: Reads training images, and validation images or None. It is called when the work directory is right.
        options: How it is trained.
        work_dir: Where logs and checkpoints go.
        resume: Go on from the newest checkpoint in `work_dir`.
        console: Where progress is shown.
        command: What is recorded of the command that asks for it, as JSON values.

    Raises:
        KdpipeError: Anything that does not fit, before the first step.
    """
    work = WorkDir(work_dir)
    work.check(resume)
    build_detector(config, options.overrides)
    train, val = load_data()
    val = val and match_classes(val, train.class_names, f"the training images {train.ann_file}")
    config = own_config(config, options)
    train, val = training_copies(train, val, config, options, work, console)
    cfg = training_config(config, train, val, options, console)
    record = training_record("teacher", cfg, world_size(), train, val, command=command)
    data = [train] if val is None else [train, val]
    return run_training(with_seeds(cfg), cfg, data, work, record, resume=resume, console=console)


def training_copies(
    train: DetectionData,
    val: DetectionData | None,
    config: Config,
    options: TrainingOptions,
    work: WorkDir,
    console: Console,
) -> tuple[DetectionData, DetectionData | None]:
    """Say what of the data is left out, and where mmdet will read them: from copies in a folder of our own.

    They are not written yet (`DetectionData.write_copy`). All images are checked.

    Args:
        train: Training images.
        val: Validation images, or None.
        config: The user's, as `own_config` gives it.
        options: Of the command.
        work: Where the copies will lie.
        console: Told what is left out.

    Raises:
        DataError: The options are strict, and something is left out.
        ImageError: There are bad images.
    """
    report_data(train, console, trained=True, strict=options.strict_data, filter_cfg=left_out_by(config))
    if val is not None:
        report_data(val, console, trained=False, strict=options.strict_data)
    scale, skip = kept_ratio_scale(config, options.scale), options.skip_bad_images and not options.strict_data
    dataset = (config.get("train_dataloader") or {}).get("dataset") or {}
    reading = pipeline_decoding(pipeline_of(dataset, "train_dataloader.dataset.pipeline"))
    train = usable_images(train, console, scale=scale, decoding=reading, skip=skip)
    if val is not None:
        reading = pipeline_decoding(test_steps(config))
        val = usable_images(val, console, scale=scale, decoding=reading, skip=skip)
        val = val.copied_to(work.folder / "val.json")
    return train.copied_to(work.folder / "train.json"), val


def run_training(
    cfg: Config,
    recorded: Config,
    data: Sequence[DetectionData],
    work: WorkDir,
    record: Mapping[str, Any],
    *,
    resume: bool,
    console: Console,
) -> TrainingResult:
    """Train by mmengine's Runner.

    Args:
        cfg: The config that runs, as `with_seeds` gives it.
        recorded: The plain detector's config, which checkpoints carry.
        data: The training and, if any, the validation images that the config reads, whose copies are written.
        work: Where logs and checkpoints go.
        record: What the training is begun with, as `training_record` gives it.
        resume: Go on from the newest checkpoint in the work directory.
        console: Where progress is shown.

    Raises:
        KdpipeError: The config cannot be built, the training that is resumed or its checkpoint does not fit, or data
            cannot be read.
    """
    check_saving(cfg)
    register_all_modules(init_default_scope=True)
    register_safe_types()
    if cfg.train_dataloader.get("num_workers"):
        preload_workers()
    if cfg.get("work_dir"):
        console.print(f"work_dir={cfg.work_dir} of the config is not used: --work-dir says {work.path}.")
    cfg.work_dir = str(work.path)
    cfg.experiment_name = record["training"]
    _choose_start(cfg, work, record, resume, console)
    if not cfg.get("resume"):
        check_start_weights(recorded, console)
        cfg.load_from = None  # our hook loads it, where mmengine would miss the student in a distillation
    if not torch.cuda.is_available():  # by itself, mmengine names a GPU to each process
        unused = cfg.get("find_unused_parameters", False)
        wrapper = {"broadcast_buffers": False, "find_unused_parameters": unused, **(cfg.get("model_wrapper_cfg") or {})}
        cfg.model_wrapper_cfg = {**wrapper, "device_ids": None}
    with work.opened(record, resume=resume, console=console):
        if is_first():
            for each in data:
                each.write_copy()
        _keep_detections(cfg, work)
        for each in data[1:]:
            cfg.val_evaluator = with_voc_metric(cfg.get("val_evaluator"), each)
        return _train(cfg, recorded, work, record, console)


def _keep_detections(cfg: Config, work: WorkDir) -> None:
    """Let mmdet's COCO metric leave the detections that it measures, which it writes anyway, in the work directory."""
    evaluator = cfg.get("val_evaluator")
    if isinstance(evaluator, dict) and evaluator.get("type") == "CocoMetric":
        evaluator.setdefault("outfile_prefix", str(work.folder / DETECTIONS.partition(".")[0]))


def _choose_start(cfg: Config, work: WorkDir, record: Mapping[str, Any], resume: bool, console: Console) -> None:
    """Let the Runner start from the checkpoint that is resumed, if the training that left it was the same.

    Raises:
        KdpipeError: It was another one; what differs is named.
    """
    if resume:
        cfg.load_from = str(work.newest())  # that of the options is what the training began with
        begun = work.record()
    elif cfg.get("resume"):
        if not cfg.get("load_from"):
            raise KdpipeError("-o resume=True needs the checkpoint: -o load_from=FILE. Or use --resume.")
        begun = WorkDir(Path(cfg.load_from).parent).record()
        console.print(f"Going on from {cfg.load_from}, in {work.path}.")
    else:
        return
    cfg.resume = True
    if begun is None:
        console.print(f"What the training of {cfg.load_from} was begun with is not recorded: it is not compared.")
        return
    for line in check_resumed(begun, record, f"{Path(cfg.load_from).parent}"):
        console.print(line)


def _train(cfg: Config, recorded: Config, work: WorkDir, record: Mapping[str, Any], console: Console) -> TrainingResult:
    name = record["training"]
    # pycocotools prints as it reads, and its tables; they are in the log, too
    with silent_stdout(), building("The training"):
        runner = QuietRunner.from_cfg(FormattedConfig(cfg))
        runner.build_loops()
    if cfg.get("param_scheduler") is None:
        cfg.param_scheduler = cosine_schedule(runner.max_iters)
    elif doubt := doubt_of_warmup(cfg.param_scheduler, runner.max_iters):
        console.print(f"Warning: {doubt}")
    check_monitored(cfg.get("val_evaluator"), runner.hooks, cfg.param_scheduler)
    runner.set_schedule(cfg.param_scheduler)
    recorded.param_scheduler = cfg.param_scheduler
    recorded = FormattedConfig(recorded)
    runner.cfg = recorded
    console.print(f"Training on {describe_device(get_device())}.")
    progress, memory = ProgressHook(console, name), PeakMemoryHook()
    for hook in (
        progress,
        memory,
        SameBuffersHook(),
        FiniteHook(),
        UsefulLossesHook(console),
        CollapseHook(console),
        SharesHook(console),
        PlainCheckpointHook(name, recorded.pretty_text),
        WorkDirHook(work, record, progress),
    ):
        runner.register_hook(hook)
    if not cfg.get("resume"):
        runner.register_hook(StartWeightsHook(recorded.get("load_from")))
    try:
        with silent_stdout(), training_faults(runner, work.path):
            runner.train()
    finally:
        progress.close()
        end_workers(loop.dataloader for loop in (runner._train_loop, runner._val_loop) if loop is not None)
    return _keep_result(runner, progress, memory, work, name)


def _keep_result(
    runner: QuietRunner, progress: ProgressHook, memory: PeakMemoryHook, work: WorkDir, name: str
) -> TrainingResult:
    """Write `result.json`; pace and memory of a training that had nothing left to do are those that it had."""
    metrics = progress.metrics or {}
    seconds = statistics.median(progress.step_times) if progress.step_times else None
    if is_first():
        costs = {"seconds_per_step": seconds, "peak_memory": memory.peak}
        if not progress.trained:
            costs |= work.read("result.json") or {}
        values = {"epoch": runner.epoch, "ap": metrics.get("bbox_mAP"), "metrics": metrics}
        work.write("result.json", costs | values)
    pace = float("nan") if seconds is None else seconds
    return TrainingResult(work.path / f"{name}.pth", metrics.get("bbox_mAP"), metrics, pace)
