"""Commands that train and measure detectors: `train-student`, `train-teacher`, `evaluate`."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from kdpipe.pipelines.cli.options import (
    BATCH,
    EPOCHS,
    PATH,
    Scale,
    data_options,
    grouped,
    skip_option,
    training_options,
    trust_option,
    val_options,
)
from kdpipe.pipelines.cli.report import report_trainings_in
from kdpipe.pipelines.cli.student_options import (
    DEFAULT_STUDENT,
    METHODS_HELP,
    distillation_options,
    given_options,
    teacher_options,
)
from kdpipe.pipelines.commands.options import EvaluateOptions, StudentOptions
from kdpipe.pipelines.data.options import DataOptions, ValOptions
from kdpipe.pipelines.runtime.console import command_console
from kdpipe.pipelines.runtime.launch import is_first
from kdpipe.pipelines.runtime.memory import memory_advice
from kdpipe.pipelines.training.options import TrainingOptions
from kdpipe.pipelines.training.process_group import trained_together

__all__ = ["evaluate_command", "train_student_command", "train_teacher_command"]


@click.command("train-student")
@teacher_options
@click.option("--student", default=DEFAULT_STUDENT, show_default=True, help="mmdet config: a zoo name, or a file.")
@click.option("--methods", help=METHODS_HELP)
@distillation_options
@training_options
@click.option("--no-report", is_flag=True, help="Write no report.html into the work directory in the end.")
@click.option(
    "--auto-resume", is_flag=True, help="As --resume where the work directory holds a training; else begin one."
)
@data_options
@val_options
@skip_option
@trust_option
@grouped("student_options", StudentOptions)
@grouped("training", TrainingOptions)
@trained_together
def train_student_command(
    cache: str | None,
    store_options: dict[str, str],
    teacher_ckpt: Path | None,
    teacher_config: str | None,
    student: str,
    methods: str | None,
    student_options: StudentOptions,
    allow_partial: bool,
    data: DataOptions,
    val: ValOptions,
    training: TrainingOptions,
    work_dir: Path | None,
    resume: bool,
    auto_resume: bool,
    no_report: bool,
    trust: bool,
) -> None:
    """Train a student from a cache. Nothing of the teacher is needed.

    Images and annotations are those that the cache names; --ann-file (or --bdd) and --img-dir, or --voc, say
    where they moved.
    With --teacher-ckpt in place of --cache, the teacher runs beside the student (online distillation).
    """
    from kdpipe.cache.read.reader import open_cache
    from kdpipe.cache.store.location import open_location
    from kdpipe.distill.methods import expand_methods
    from kdpipe.pipelines.commands.train_student import train_student
    from kdpipe.pipelines.data.find import cached_source, training_data
    from kdpipe.pipelines.detectors.configs import find_config
    from kdpipe.pipelines.teacher.live import prepare_live_teacher
    from kdpipe.pipelines.training.student_choices import choose_methods, choose_scale
    from kdpipe.pipelines.training.teachers import CachedTrainingTeacher, LiveTrainingTeacher
    from kdpipe.pipelines.training.training_record import config_digest
    from kdpipe.pipelines.training.work_dir import WorkDir

    console = command_console()
    teacher: Any
    if (cache is None) == (teacher_ckpt is None):
        raise click.UsageError("train-student needs either --cache or --teacher-ckpt.")
    for option, idle, of in (
        ("--missing-view", student_options.missing_view is not None and cache is None, "--cache"),
        ("--allow-partial", allow_partial and cache is None, "--cache"),
        ("--store-option", store_options and cache is None, "--cache"),
        ("--local-copy", student_options.local_copy is not None and cache is None, "--cache"),
        (
            "--local-bytes",
            student_options.local_bytes is not None and student_options.local_copy is None,
            "--local-copy",
        ),
        ("--teacher-config", teacher_config is not None and teacher_ckpt is None, "--teacher-ckpt"),
    ):
        if idle:
            raise click.UsageError(f"{option} is for trainings with {of}. Leave it out.")
    config = find_config(student)
    named_methods = method_names(methods)
    expand_methods(named_methods or [], "roi_head" not in config.model)  # before a teacher is loaded
    source: Any
    if cache is not None:
        location = open_location(cache, store_options)
        opened = open_cache(location, allow_partial=allow_partial)
        teacher, source = CachedTrainingTeacher(opened), cached_source(opened, data)
    elif teacher_ckpt is not None:
        info, source = prepare_live_teacher(teacher_ckpt, teacher_config, data, trust=trust)
        teacher = LiveTrainingTeacher(info)
    chosen_methods = choose_methods(named_methods, config, training.overrides, teacher, console)
    command = {"options": given_options(click.get_current_context()), "config": config_digest(config)}
    scale = choose_scale(training, config, teacher, console)
    training = _with_recipe(replace(training, scale=scale), student, config)
    work_dir = work_dir or Path("work_dirs") / f"{Path(student).stem}_{'-'.join(chosen_methods) or 'none'}"
    result = train_student(
        config,
        teacher,
        partial(training_data, source, val),
        chosen_methods,
        training,
        student_options,
        work_dir,
        resume=resume or (auto_resume and WorkDir(work_dir).has_checkpoint),
        console=console,
        command=command,
    )
    if not no_report and is_first():
        report_trainings_in(work_dir)
    _report(console, result)


@click.command("train-teacher")
@click.option("--config", required=True, help="mmdet config: a zoo name, or a file.")
@click.option("--epochs", type=EPOCHS, help="Passes over the images. Default: 12, or the --recipe's.")
@training_options
@data_options
@val_options
@skip_option
@grouped("training", TrainingOptions)
@trained_together
def train_teacher_command(
    config: str, data: DataOptions, val: ValOptions, training: TrainingOptions, work_dir: Path | None, resume: bool
) -> None:
    """Train a plain detector, for those who have no teacher for their data yet."""
    from kdpipe.pipelines.data.find import DataSource, training_data
    from kdpipe.pipelines.detectors.configs import find_config
    from kdpipe.pipelines.training.run import train_detector
    from kdpipe.pipelines.training.training_record import config_digest

    console = command_console()
    if data == DataOptions():
        raise click.UsageError("train-teacher needs --ann-file (or --bdd) and --img-dir, or --voc.")
    detector = find_config(config)
    source = DataSource(data)
    load_data = partial(training_data, source, val)
    work_dir = work_dir or Path("work_dirs") / Path(config).stem
    training = _with_recipe(training, config, detector)
    command = {"options": given_options(click.get_current_context()), "config": config_digest(detector)}
    result = train_detector(detector, load_data, training, work_dir, resume=resume, console=console, command=command)
    _report(console, result)


@click.command("evaluate")
@click.option("--ckpt", type=PATH, required=True, help="Checkpoint of any mmdet detector.")
@click.option("--config", help="Its config: a zoo name, or a file. Default: the checkpoint's own.")
@data_options
@click.option("--scale", type=Scale(), help="Network input. Default: the config's test scale.")
@click.option("--batch-size", type=BATCH, default=1, show_default=True)
@skip_option
@trust_option
@grouped("options", EvaluateOptions)
@memory_advice("Use a smaller --batch-size or --scale.")
def evaluate_command(options: EvaluateOptions) -> None:
    """Print the COCO AP of a checkpoint; of images of a Pascal VOC folder, Pascal VOC's, too."""
    from kdpipe.pipelines.commands.evaluate import evaluate, metrics_tables

    console = command_console(shared=False)
    for table in metrics_tables(evaluate(options, console)):
        console.print(table)


def method_names(methods: str | None) -> list[str] | None:
    """What `--methods` names; None where that is the default of teacher and student."""
    if methods is None or methods == "default":
        return None
    return [] if methods == "none" else [name.strip() for name in methods.split(",")]


def _with_recipe(training: TrainingOptions, name: str, config: Any) -> TrainingOptions:
    """The options of a training, with whose recipe it has.

    Args:
        training: As they were given.
        name: Of the config, or its file.
        config: What that is.

    Raises:
        UsageError: An option and an override of the config say different things of one matter.
    """
    from kdpipe.pipelines.detectors.configs import apply_known_options, is_of_zoo

    config = apply_known_options(config, training.overrides)
    overridden = {override.partition("=")[0].strip() for override in training.overrides}
    for value, flag, key in (
        (training.epochs, "--epochs", "train_cfg.max_epochs"),
        (training.batch_size, "--batch-size", "train_dataloader.batch_size"),
        (training.lr, "--lr", "optim_wrapper.optimizer.lr"),
        (training.seed, "--seed", "randomness.seed"),
    ):
        if key in overridden and value is not None:
            other: Any = config
            for part in key.split("."):
                other = (other or {}).get(part)
            if other is not None and other != value:
                raise click.UsageError(f"{flag} {value} and -o {key}={other} contradict each other: give one.")
    return replace(training, recipe=training.recipe or ("paper" if is_of_zoo(name) else "config"))


def _report(console: Console, result: Any) -> None:
    ap = "AP not measured" if result.ap is None else f"AP {result.ap:.3f}"
    pace = "" if math.isnan(result.seconds_per_step) else f", {result.seconds_per_step:.2f} s per step"
    console.print(f"{result.checkpoint}: {ap}{pace}")
