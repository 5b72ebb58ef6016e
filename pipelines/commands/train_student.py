"""`kdpipe train-student`: train a detector from a cache, or beside its teacher."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.console import Console

from kdpipe.cache.read.local_copy import LocalCopy
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.store.location import share_location
from kdpipe.distill.methods import check_contract, expand_methods, needed_fields
from kdpipe.pipelines.commands.options import StudentOptions
from kdpipe.pipelines.data.class_matching import match_classes
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.training.config import own_config, training_config, world_size
from kdpipe.pipelines.training.distill_options import distill_options, other_options, unused_options
from kdpipe.pipelines.training.options import TrainingOptions
from kdpipe.pipelines.training.run import TrainingResult, run_training, training_copies
from kdpipe.pipelines.training.student_check import build_detector, check_student
from kdpipe.pipelines.training.student_choices import choose_roi_source
from kdpipe.pipelines.training.teachers import TrainingTeacher
from kdpipe.pipelines.training.training_record import training_record
from kdpipe.pipelines.training.work_dir import WorkDir
from kdpipe.pipelines.training.wrapping import with_distillation, with_seeds

__all__ = ["train_student"]


def train_student(
    config: Config,
    teacher: TrainingTeacher,
    load_data: Callable[[], tuple[DetectionData, DetectionData | None]],
    methods: Sequence[str],
    training: TrainingOptions,
    options: StudentOptions,
    work_dir: Path,
    *,
    resume: bool,
    console: Console,
    command: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train a student.

    Args:
        config: mmdet config of the student.
        teacher: In a cache, where images that it lacks are left out; or to run beside the student.
        load_data: Reads the images that were cached, or any, and the validation images, or None. It is called when all
            that can be checked without them is right.
        methods: Some of `METHODS`; empty trains without distillation.
        training: How it is trained.
        options: How the student is shown its teacher.
        work_dir: Where logs and checkpoints go.
        resume: Go on from the newest checkpoint in `work_dir`.
        console: Where progress is shown.
        command: What is recorded of the command that asks for it, as JSON values.

    Raises:
        KdpipeError: Anything that does not fit, before the first step.
    """
    work = WorkDir(work_dir)
    work.check(resume)
    begun = (work.record() or {}) if resume else {}
    missing_view = options.missing_view or "mirror"
    dense = "roi_head" not in config.model
    losses = expand_methods(methods, dense)
    check_contract(teacher.spec, losses)
    distill = distill_options(training.overrides, losses, options.ckd_branch)
    if idle := unused_options(training.overrides, losses):
        console.print(f"Not used: {', '.join(idle)}, since --methods names no loss that they are for.")
    teacher.check(begun, work_dir)
    strides: Sequence[int] | None = None
    if methods:
        strides = check_student(config, training.overrides, teacher.spec.num_classes).strides
    else:
        build_detector(config, training.overrides, teacher.spec.num_classes)
    roi_source = choose_roi_source(teacher, options.roi_source, distill, dense, console) if losses else None
    train, val = load_data()
    if val is None:
        console.print("No validation images: AP is not measured. Name them with --val-ann-file and --val-img-dir.")
    train, images = teacher.with_data(train, begun, work_dir, console)
    if val is not None:
        val = match_classes(val, teacher.spec.class_names, teacher.name)
    plain = replace(training, overrides=tuple(other_options(training.overrides)))
    config = own_config(config, plain)
    train, val = training_copies(train, val, config, plain, work, console)
    cfg = training_config(config, train, val, plain, console)
    record = training_record(
        "student",
        cfg,
        world_size(),
        train,
        val,
        teacher=teacher.record,
        images=images,
        distillation={
            **{key: value for key, value in distill.items() if key != "share_interval"},
            "methods": methods,
            "rois": {**distill.rois, "of": roi_source},
            "missing_view": missing_view,
        },
        command=command,
    )
    running = cfg
    if methods:
        running = with_distillation(cfg, teacher, methods, losses, distill, roi_source, missing_view, strides)
    cache = teacher.cache
    with ExitStack() as stack:
        if cache is not None:
            share_location(cache.location)
            if options.local_copy is not None and losses:
                fields = _read_fields(cache.spec, needed_fields(losses, dense), roi_source)
                say = partial(console.print, markup=False)
                stack.enter_context(LocalCopy(cache.location, options.local_copy, options.local_bytes, fields, say))
        running = with_seeds(running, None if cache is None else cache.location)
        data = [train] if val is None else [train, val]
        return run_training(running, cfg, data, work, record, resume=resume, console=console)


def _read_fields(spec: CacheSpec, needs: Collection[str], roi_source: str | None) -> list[str]:
    """What loader workers read of a cache."""
    read = {"features"} if roi_source == "student" else {*needs, *({"features"} if "roi_features" in needs else ())}
    return [field for field in spec.fields if field in read | {"boxes"}]
