"""`kdpipe train-student`: train a detector from a cache, or beside its teacher."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.identity import difference
from kdpipe.cache.read.local_copy import LocalCopy
from kdpipe.cache.read.reader import TeacherCache
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.store.location import share_location
from kdpipe.distill.methods import check_contract, expand_methods, needed_fields
from kdpipe.pipelines.commands.options import StudentOptions
from kdpipe.pipelines.data.class_matching import match_classes
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.teacher.live import LiveTeacherInfo
from kdpipe.pipelines.training.config import own_config, training_config, world_size
from kdpipe.pipelines.training.distill_options import distill_options, other_options, unused_options
from kdpipe.pipelines.training.options import TrainingOptions
from kdpipe.pipelines.training.run import TrainingResult, run_training, training_copies
from kdpipe.pipelines.training.student_check import build_detector, check_student
from kdpipe.pipelines.training.student_choices import choose_roi_source, teacher_name
from kdpipe.pipelines.training.training_record import check_resumed, plain_values, training_record
from kdpipe.pipelines.training.work_dir import WorkDir
from kdpipe.pipelines.training.wrapping import with_distillation, with_seeds

__all__ = ["check_data", "train_student"]


def check_data(cache: TeacherCache, data: DetectionData) -> DetectionData:
    """Refuse images and annotations that are not those that the teacher saw.

    Returns:
        The same data, with the classes of the cache.

    Raises:
        KdpipeError: Naming what differs.
    """
    data = match_classes(data, cache.spec.class_names, f"the cache {cache.location.title}")
    lines = difference({"data": cache.identity.get("data")}, {"data": data.digest()})
    if not lines:
        return data
    given_ids = {image.image_id for image in data.images}
    cached_ids = set(cache.image_ids.tolist()) | {int(image["image_id"]) for image in cache.skipped}
    raise KdpipeError(
        f"The cache {cache.location} was made from another data set than {data.ann_file}: "
        f"{len(given_ids - cached_ids)} images are only in the annotation file, {len(cached_ids - given_ids)} only in "
        "the cache"
        + ("" if given_ids != cached_ids else " (the same ids, but other names, sizes or boxes)")
        + ". Use the annotation file that was cached, or cache the teacher on this one."
    )


def train_student(
    config: Config,
    teacher: TeacherCache | LiveTeacherInfo,
    load_data: Callable[[], tuple[DetectionData, DetectionData | None]],
    methods: Sequence[str],
    training: TrainingOptions,
    options: StudentOptions,
    work_dir: Path,
    *,
    resume: bool,
    console: Console,
) -> TrainingResult:
    """Train a student.

    Args:
        config: mmdet config of the student.
        teacher: The teacher's cache; images that it lacks are left out. Or the teacher, to run beside the student.
        load_data: Reads the images that were cached, or any, and the validation images, or None. It is called when all
            that can be checked without them is right.
        methods: Some of `METHODS`; empty trains without distillation.
        training: How it is trained.
        options: How the student is shown its teacher.
        work_dir: Where logs and checkpoints go.
        resume: Go on from the newest checkpoint in `work_dir`.
        console: Where progress is shown.

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
    cache = teacher if isinstance(teacher, TeacherCache) else None
    if cache is not None:
        _check_cached(cache, begun)
        _check_teacher(cache, begun, work_dir)
    if methods:
        check_student(config, training.overrides, teacher.spec.num_classes)
    else:
        build_detector(config, training.overrides, teacher.spec.num_classes)
    roi_source = choose_roi_source(teacher, options.roi_source, distill, dense, console) if losses else None
    train, val = load_data()
    if val is None:
        console.print("No validation images: AP is not measured. Name them with --val-ann-file and --val-img-dir.")
    if cache is not None:
        train = check_data(cache, train)
    elif isinstance(teacher, LiveTeacherInfo):
        teacher, train = teacher.with_data(train)
        _check_teacher(teacher, begun, work_dir)
    if val is not None:
        val = match_classes(val, teacher.spec.class_names, teacher_name(teacher))
    images = None
    if cache is not None:
        images = _cached_images(cache, train, begun, console)
        train = train if images is None else train.only(images)
        if skipped := {image["image_id"] for image in cache.skipped}:
            train = train.only([image.image_id for image in train.images if image.image_id not in skipped])
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
        teacher=_identity(teacher),
        images=images,
        distillation={
            **{key: value for key, value in distill.items() if key != "share_interval"},
            "methods": methods,
            "rois": {**distill.rois, "of": roi_source},
            "missing_view": missing_view,
        },
    )
    running = cfg
    if methods:
        running = with_distillation(cfg, teacher, methods, losses, distill, roi_source, missing_view)
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


def _check_cached(cache: TeacherCache, begun: Mapping[str, Any]) -> None:
    """Refuse a cache that is not finished where nothing can be learned from it, or several processes would train.

    Raises:
        KdpipeError: Nothing is cached yet, or several processes train, which might not see the same.
    """
    if cache.is_complete or begun.get("images") is not None:
        return
    if not len(cache):
        raise KdpipeError(f"The cache {cache.location} has no finished part yet. Wait for one.")
    if world_size() > 1:
        raise KdpipeError(
            f"The cache {cache.location} is still being made, and may grow while several processes open it. Train on "
            "it in one process, or when it is finished."
        )


def _cached_images(
    cache: TeacherCache, train: DetectionData, begun: Mapping[str, Any], console: Console
) -> list[int] | None:
    """Ids of the images of a cache, of which some may be missing still; None where all are there.

    A training that is resumed has the images that it began with, whatever the cache has got meanwhile.

    Raises:
        KdpipeError: The cache lacks images that the training began with.
    """
    begun_ids: list[int] | None = begun.get("images")
    if begun_ids is not None:
        cached_ids = {*cache.image_ids.tolist(), *(image["image_id"] for image in cache.skipped)}
        if missing := len(set(begun_ids) - cached_ids):
            raise KdpipeError(
                f"The cache {cache.location} lacks {missing} of the {len(begun_ids)} images that the training began "
                "with. Make them again with cache-teacher, or begin anew in another --work-dir."
            )
        return begun_ids
    if cache.is_complete:
        return None
    console.print(f"The cache is not finished: training on {len(cache)} of {len(train.images)} images.")
    return list(cache.image_ids.tolist())


def _check_teacher(teacher: TeacherCache | LiveTeacherInfo, begun: Mapping[str, Any], work_dir: Path) -> None:
    """Refuse to go on with another cache or teacher than a training began with, as soon as that is known.

    Raises:
        KdpipeError: Naming what differs.
    """
    if "teacher" in begun:
        check_resumed({"teacher": begun["teacher"]}, {"teacher": plain_values(_identity(teacher))}, str(work_dir))


def _identity(teacher: TeacherCache | LiveTeacherInfo) -> dict[str, Any]:
    return {**teacher.identity, "spec": teacher.spec.to_json()}
