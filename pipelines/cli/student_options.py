"""Options of `train-student` that `compare` hands on to each of its trainings, and what is recorded of them."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kdpipe.pipelines.cli.options import EPOCHS, PATH, PLACE, Bytes, combined, store_option
from kdpipe.pipelines.training.options import SCHEDULES

__all__ = [
    "DEFAULT_STUDENT",
    "METHODS_HELP",
    "absolute_path",
    "distillation_options",
    "given_options",
    "teacher_options",
]

DEFAULT_STUDENT = "faster-rcnn_r50_fpn_1x_coco"
METHODS_HELP = (
    "Losses by name, such as sgfi,ckd,pred (an unknown one lists all); none; or default, which is sgfi,ckd,pred, "
    "sgfi,ckd,cls,reg where teacher or student gives one box for all classes, sgfi,cross for a dense student."
)
# What decides where and how fast a training runs, and not what is learned.
_PLACES = (
    *("work_dir", "resume", "auto_resume", "workers", "store_options", "local_copy", "local_bytes"),
    *("trust", "strict_data", "no_report"),
)
_PATH_OR_NAME = ("cache", "student", "teacher_config", "config")

teacher_options = combined(
    click.option("--cache", type=PLACE, help="The cache that cache-teacher wrote; may be s3://bucket/path, ..."),
    store_option,
    click.option(
        "--local-copy", type=PATH, help="Folder of a local disk to keep a part of the cache in, for later epochs."
    ),
    click.option(
        "--local-bytes", type=Bytes(), help="That may take this much, such as 200GiB. Default: 90 % of the free."
    ),
    click.option("--teacher-ckpt", type=PATH, help="In place of a cache: the teacher, which runs in every step."),
    click.option(
        "--teacher-config", help="Its config: a name of mmdet's zoo, or a file. Default: the checkpoint's own."
    ),
)
distillation_options = combined(
    click.option("--epochs", type=EPOCHS, help="Passes over the images. Default: those of --schedule or --recipe."),
    click.option(
        "--schedule",
        type=click.Choice(list(SCHEDULES)),
        help="12 epochs, or 24 with multi-scale, and warm-up and cosine. Default: 1x, or that of --recipe config.",
    ),
    click.option(
        "--rois",
        "roi_source",
        type=click.Choice(["teacher", "student"]),
        help="Who chooses the RoIs. Default: the teacher with --cache, the student with --teacher-ckpt.",
    ),
    click.option(
        "--ckd-branch",
        type=click.Choice(["classification", "localization", "combined"]),
        help="Branch of a dense student's head that ckd compares. Default: classification.",
    ),
    click.option(
        "--missing-view",
        type=click.Choice(["mirror", "skip"]),
        help="Flipped images of which that view is not cached: mirrored targets (default), or none.",
    ),
    click.option("--allow-partial", is_flag=True, help="Train on what is there of a cache that is still being made."),
)


def given_options(context: click.Context) -> dict[str, Any]:
    """The options that a training was given and that decide what it learns, as JSON values with absolute paths.

    Args:
        context: Of a command line of `train-student` or `train-teacher`.
    """
    options = {option.name: option for option in context.command.params}
    return {
        name: list(value) if isinstance(value, tuple) else absolute_path(options[name], value)
        for name, value in context.params.items()
        if name not in _PLACES and context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


def absolute_path(option: click.Parameter, value: Any) -> Any:
    """A value of an option of `train-student`: where it is a path, that as absolute text; any other as it is."""
    if isinstance(option.type, click.Path) or (option.name in _PATH_OR_NAME and Path(value).exists()):
        return str(Path(value).absolute())
    return value
