"""The command line: `kdpipe cache-teacher`, `train-student`, `train-teacher`, `evaluate`, `verify`, `inspect`, ..."""

import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.schema import CODECS, DTYPES, TIERS, VIEWS
from kdpipe.pipelines.console import bytes_text, error_text, stop
from kdpipe.pipelines.launch import ToldError, adopt_slurm, is_first

__all__ = ["main"]

DEFAULT_STUDENT = "faster-rcnn_r50_fpn_1x_coco"
EXIT_ERROR, EXIT_INTERNAL, EXIT_INTERRUPTED = 1, 3, 130


class Scale(click.ParamType):  # type: ignore[type-arg]
    """`1333x800` -> `(1333, 800)`."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9]\d*)[xX]([1-9]\d*)", value)
        if match is None:
            self.fail(f"{value!r} is no size; expected WIDTHxHEIGHT in pixels, such as 1333x800.", param, ctx)
        return int(match[1]), int(match[2])


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """`1GiB` -> 1073741824."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", value, re.IGNORECASE)
        if match is None or float(match[1]) <= 0:
            self.fail(f"{value!r} is no size; expected such as 512MiB or 1GiB.", param, ctx)
        power = "kmgt".find(match[2][0].lower()) + 1 if match[2] else 0
        return int(float(match[1]) * 1024**power)


class Choices(click.ParamType):  # type: ignore[type-arg]
    """Names separated by commas, in the order of `allowed`."""

    name = "NAMES"

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self.allowed = allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = [name.strip() for name in value.split(",")]
        if not set(names) <= set(self.allowed) or len(set(names)) < len(names):
            self.fail(f"{value!r}: expected some of {', '.join(self.allowed)}, separated by commas.", param, ctx)
        return tuple(name for name in self.allowed if name in names)


def _path(**options: Any) -> click.Path:
    return click.Path(path_type=Path, **options)


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several click options as one decorator."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


data_options = _options(
    click.option("--ann-file", type=_path(), help="COCO JSON of the images."),
    click.option("--img-dir", type=_path(), help="Folder of the images."),
)
val_options = _options(
    click.option("--val-ann-file", type=_path(), help="COCO JSON to measure AP on."),
    click.option("--val-img-dir", type=_path(), help="Folder of its images. Default: --img-dir."),
)
training_options = _options(
    click.option("--batch-size", type=click.IntRange(1), help="Images per step and process. Default: the config's."),
    click.option("--lr", type=click.FloatRange(0, min_open=True), help="Peak rate. Default: 0.03 per 16 images."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    click.option("--scale", type=Scale(), help="Network input, ratio kept."),
    click.option("--work-dir", type=_path(), help="Where logs and checkpoints go. Default: work_dirs/..."),
    click.option("--resume", is_flag=True, help="Go on from the newest checkpoint of the work directory."),
    click.option("--amp", is_flag=True, help="Mixed precision: float16 on a GPU, bfloat16 on the CPU."),
    click.option("--workers", type=click.IntRange(0), help="Loader processes. Default: half the cores, at most 4."),
    click.option("-o", "--cfg-options", "options", multiple=True, metavar="KEY=VALUE", help="Override the config."),
)
trust_option = click.option(
    "--trust-checkpoint",
    "trust",
    is_flag=True,
    help="Unpickle a checkpoint that holds more than weights.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--debug", is_flag=True, help="Show tracebacks and warnings.")
@click.version_option(version("kdpipe"), prog_name="kdpipe")
def cli(debug: bool) -> None:
    """Distil object detectors offline: cache the teacher once, then train any number of students from the cache."""
    if not debug:
        warnings.simplefilter("ignore")


@cli.command("cache-teacher")
@click.option("--ckpt", type=_path(), required=True, help="The teacher's checkpoint.")
@click.option("--config", help="Its config: a name of mmdet's zoo, or a file. Default: the checkpoint's own.")
@data_options
@click.option("--voc", type=_path(), help="Pascal VOC folder (Annotations, ImageSets, JPEGImages).")
@click.option("--split", default="train", show_default=True, help="Image set of the VOC folder.")
@click.option("--out", type=_path(), help="The cache. Default: named after the data set, such as coco.zarr.")
@click.option("--targets", "tier", type=click.Choice(TIERS), default="pyramid", show_default=True, help="What is kept.")
@click.option("--dtype", type=click.Choice(DTYPES), default="int8", show_default=True, help="How features are kept.")
@click.option("--codec", type=click.Choice(CODECS), default="zstd", show_default=True)
@click.option("--proposals", type=click.IntRange(1), default=512, show_default=True, help="Best boxes kept per image.")
@click.option("--scale", type=Scale(), help="The teacher's view, ratio kept. Default: the config's test scale.")
@click.option("--views", type=Choices(VIEWS), default="identity", show_default=True, help="Views of each image.")
@click.option("--part-size", type=Bytes(), default="1GiB", show_default=True, help="Unit of commit and of resuming.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N images.")
@click.option("--device", help="Such as cuda:1. Default: cuda where there is one, else cpu.")
@click.option("--skip-bad-images", is_flag=True, help="Go on past unreadable images, and record them.")
@click.option("--dry-run", is_flag=True, help="Only show what it would cost in bytes and time.")
@trust_option
def cache_teacher_command(
    ckpt: Path,
    config: str | None,
    ann_file: Path | None,
    img_dir: Path | None,
    voc: Path | None,
    split: str,
    out: Path | None,
    tier: str,
    dtype: str,
    codec: str,
    proposals: int,
    scale: tuple[int, int] | None,
    views: tuple[str, ...],
    part_size: int,
    limit: int | None,
    device: str | None,
    skip_bad_images: bool,
    dry_run: bool,
    trust: bool,
) -> None:
    """Run the teacher once over a data set and keep what it says.

    Interrupted, the cache stays valid; the same command goes on with it. Started by torchrun or srun, processes share
    the work.
    """
    from kdpipe.pipelines.cache_teacher import CacheOptions, cache_teacher, prepare_teacher
    from kdpipe.pipelines.checkpoints import load_checkpoint
    from kdpipe.pipelines.dry_run import estimate, print_estimate
    from kdpipe.pipelines.ranks import Ranks
    from kdpipe.pipelines.sources import find_data, torch_device
    from kdpipe.pipelines.teacher import teacher_config

    console = _console()
    try:
        with Ranks.launched() as ranks:
            checkpoint = load_checkpoint(ckpt, trust=trust)
            cfg = teacher_config(checkpoint, config)
            source = find_data(cfg, ann_file=ann_file, img_dir=img_dir, voc=voc, split=split, out=out, limit=limit)
            options = CacheOptions(
                tier=tier,
                dtype=dtype,
                codec=codec,
                proposals=proposals,
                views=views,
                scale=scale,
                part_size=part_size,
                skip_bad_images=skip_bad_images,
            )
            if dry_run:
                teacher, spec = prepare_teacher(checkpoint, cfg, source.data, options, torch_device(device))
                images = source.data.images
                print_estimate(console, estimate(teacher, source.data, images, spec), spec, len(images), source.out)
                return
            result = cache_teacher(
                checkpoint,
                cfg,
                source.data,
                source.out,
                options,
                source=source.record(),
                device=torch_device(device),
                console=console,
                ranks=ranks,
            )
    except KeyboardInterrupt:
        console.print("Stopped. What is cached is valid; the same command goes on from there.")
        raise
    console.print(
        f"{result.path}: {result.images} images, {result.skipped} skipped, {bytes_text(result.disk_bytes)} on disk "
        f"({100 * result.disk_bytes / max(1, result.raw_bytes):.0f} % of the raw bytes); "
        f"{result.new_images} new images in {result.seconds:.1f} s"
    )


@cli.command("train-student")
@click.option("--cache", "cache_path", type=_path(), help="The cache that cache-teacher wrote.")
@click.option("--teacher-ckpt", type=_path(), help="In place of a cache: the teacher, which runs in every step.")
@click.option("--teacher-config", help="Its config: a name of mmdet's zoo, or a file. Default: the checkpoint's own.")
@click.option("--student", default=DEFAULT_STUDENT, show_default=True, help="mmdet config: a zoo name, or a file.")
@click.option(
    "--methods",
    default="sgfi,ckd,pred",
    show_default=True,
    help="Some of sgfi, ckd, pred (cls and careg), reg, ht; or none.",
)
@click.option("--epochs", type=click.IntRange(1), help="Passes over the images. Default: the schedule's.")
@click.option(
    "--schedule",
    type=click.Choice(["1x", "2x-ms"]),
    default="1x",
    show_default=True,
    help="12 epochs, or 24 with multi-scale.",
)
@click.option(
    "--rois",
    type=click.Choice(["teacher", "student"]),
    help="Who chooses the RoIs. Default: the student, where the cache can serve that.",
)
@click.option(
    "--ckd-branch",
    type=click.Choice(["classification", "localization", "combined"]),
    help="Branch of a dense student's head that ckd compares. Default: classification.",
)
@click.option(
    "--missing-view",
    type=click.Choice(["mirror", "skip"]),
    help="Flipped images of which that view is not cached: mirrored targets (default), or none.",
)
@click.option("--allow-partial", is_flag=True, help="Train on what is there of a cache that is still being made.")
@training_options
@data_options
@val_options
@trust_option
def train_student_command(
    cache_path: Path | None,
    teacher_ckpt: Path | None,
    teacher_config: str | None,
    student: str,
    methods: str,
    epochs: int | None,
    schedule: str,
    rois: str | None,
    ckd_branch: str | None,
    missing_view: str | None,
    allow_partial: bool,
    ann_file: Path | None,
    img_dir: Path | None,
    val_ann_file: Path | None,
    val_img_dir: Path | None,
    trust: bool,
    **training: Any,
) -> None:
    """Train a student from a cache. Nothing of the teacher is needed.

    Images and annotations are those that the cache names; --ann-file and --img-dir say where they moved. With
    --teacher-ckpt in place of --cache, the teacher runs beside the student (online distillation).
    """
    from kdpipe.cache.reader import open_cache
    from kdpipe.pipelines.configs import find_config
    from kdpipe.pipelines.live_teacher import online_teacher
    from kdpipe.pipelines.sources import cached_data, named_data
    from kdpipe.pipelines.train_student import train_student
    from kdpipe.pipelines.training import SCHEDULES

    console = _console()
    teacher: Any
    if (cache_path is None) == (teacher_ckpt is None):
        raise click.UsageError("train-student needs either --cache or --teacher-ckpt.")
    for option, idle, of in (
        ("--missing-view", missing_view is not None and cache_path is None, "--cache"),
        ("--allow-partial", allow_partial and cache_path is None, "--cache"),
        ("--teacher-config", teacher_config is not None and teacher_ckpt is None, "--teacher-ckpt"),
    ):
        if idle:
            raise click.UsageError(f"{option} is for trainings with {of}. Leave it out.")
    config = find_config(student)
    if cache_path is not None:
        teacher = open_cache(cache_path, allow_partial=allow_partial)
        train, val = cached_data(teacher, ann_file=ann_file, img_dir=img_dir)
    elif teacher_ckpt is not None:
        teacher, train, val = online_teacher(
            teacher_ckpt, teacher_config, ann_file=ann_file, img_dir=img_dir, trust=trust
        )
    if val_ann_file is not None:
        val = named_data(val_ann_file, val_img_dir or train.img_dir)
    chosen = [] if methods == "none" else [name.strip() for name in methods.split(",")]
    work_dir = training.pop("work_dir") or Path("work_dirs") / f"{Path(student).stem}_{methods.replace(',', '-')}"
    resume = training.pop("resume")
    training["scale"] = training["scale"] or teacher.spec.scale
    recipe = _recipe(config, epochs=epochs or SCHEDULES[schedule], multi_scale=schedule == "2x-ms", **training)
    if val is None:
        console.print("No validation images: AP is not measured. Name them with --val-ann-file and --val-img-dir.")
    result = train_student(
        config,
        teacher,
        train,
        val,
        chosen,
        recipe,
        work_dir,
        rois=rois,
        ckd_branch=ckd_branch,
        missing_view=missing_view or "mirror",
        resume=resume,
        console=console,
    )
    _report(console, result)


@cli.command("train-teacher")
@click.option("--config", required=True, help="mmdet config: a zoo name, or a file.")
@click.option("--epochs", type=click.IntRange(1), default=12, show_default=True, help="Passes over the images.")
@training_options
@data_options
@val_options
def train_teacher_command(
    config: str,
    epochs: int,
    ann_file: Path | None,
    img_dir: Path | None,
    val_ann_file: Path | None,
    val_img_dir: Path | None,
    **training: Any,
) -> None:
    """Train a plain detector, for those who have no teacher for their data yet."""
    from kdpipe.pipelines.configs import find_config
    from kdpipe.pipelines.sources import named_data
    from kdpipe.pipelines.training import train_detector

    console = _console()
    if ann_file is None or img_dir is None:
        raise click.UsageError("train-teacher needs --ann-file and --img-dir.")
    found = find_config(config)
    train = named_data(ann_file, img_dir)
    val = named_data(val_ann_file, val_img_dir or img_dir) if val_ann_file else None
    work_dir = training.pop("work_dir") or Path("work_dirs") / Path(config).stem
    resume = training.pop("resume")
    recipe = _recipe(found, epochs=epochs, **training)
    _report(console, train_detector(found, train, val, recipe, work_dir, resume=resume, console=console))


@cli.command("evaluate")
@click.option("--ckpt", type=_path(), required=True, help="Checkpoint of any mmdet detector.")
@click.option("--config", help="Its config: a zoo name, or a file. Default: the checkpoint's own.")
@data_options
@click.option("--scale", type=Scale(), help="Network input. Default: the config's test scale.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@trust_option
def evaluate_command(
    ckpt: Path,
    config: str | None,
    ann_file: Path | None,
    img_dir: Path | None,
    scale: tuple[int, int] | None,
    batch_size: int,
    trust: bool,
) -> None:
    """Print the COCO AP of a checkpoint."""
    from kdpipe.pipelines.evaluate import evaluate, metrics_table

    console = _console()
    metrics = evaluate(
        ckpt,
        config=config,
        ann_file=ann_file,
        img_dir=img_dir,
        scale=scale,
        batch_size=batch_size,
        trust=trust,
        console=console,
    )
    console.print(metrics_table(metrics))


@cli.command("verify")
@click.argument("cache_path", metavar="CACHE", type=_path())
@click.option("--repair", is_flag=True, help="Remove what is bad, so that cache-teacher makes it anew.")
@click.option("--ckpt", type=_path(), help="The teacher: compare with what it says of some images.")
@click.option("--config", help="Its config: a zoo name, or a file. Default: the one that the cache records.")
@click.option("--sample", type=click.IntRange(1), default=16, show_default=True, help="How many images, with --ckpt.")
@click.option("--device", help="Where the teacher runs. Default: cuda where there is one, else cpu.")
@click.option("--ap", is_flag=True, help="Compute the teacher's AP from the cache alone.")
@data_options
@trust_option
def verify_command(
    cache_path: Path,
    repair: bool,
    ckpt: Path | None,
    config: str | None,
    sample: int,
    device: str | None,
    ap: bool,
    ann_file: Path | None,
    img_dir: Path | None,
    trust: bool,
) -> None:
    """Check every byte of a cache: complete, as it was written, finite. Exit code 1 where it is not."""
    from kdpipe.pipelines.verify import verify_files, verify_teacher

    console = _console()
    good = verify_files(cache_path, repair=repair, console=console)
    if good and (ckpt is not None or ap):
        verify_teacher(
            cache_path,
            ckpt,
            config=config,
            sample=sample,
            device=device,
            ap=ap,
            ann_file=ann_file,
            img_dir=img_dir,
            trust=trust,
            console=console,
        )
    sys.exit(0 if good else EXIT_ERROR)


@cli.command("inspect")
@click.argument("cache_path", metavar="CACHE", type=_path())
@click.option("--image", type=int, help="Show what is kept of the image with this id.")
@click.option("--view", type=click.Choice(VIEWS), help="In this view. Default: the first of the cache.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def inspect_command(cache_path: Path, image: int | None, view: str | None, as_json: bool) -> None:
    """Show what a cache is, what it holds, how large it is, and which losses it serves."""
    from kdpipe.pipelines.inspect import inspect_cache

    inspect_cache(cache_path, image, view, as_json=as_json, console=_console())


@cli.command("doctor")
def doctor_command() -> None:
    """Show versions, devices and mmcv's ops, and what is wrong with them."""
    from kdpipe.pipelines.doctor import run_doctor

    sys.exit(run_doctor(_console()))


@cli.command("demo")
@click.option("--out", type=_path(), default=Path("demo"), show_default=True, help="Folder for what it makes.")
@click.option("--fresh", is_flag=True, help="Delete what an earlier demo left there.")
def demo_command(out: Path, fresh: bool) -> None:
    """Draw a data set, train a teacher, cache it, and train a student with and without distillation."""
    from kdpipe.pipelines.demo import run_demo

    run_demo(out, fresh=fresh, console=_console())


def _console() -> Console:
    """Standard output of the first process; silence in the others of a distributed run."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=not is_first())


def _recipe(config: Any, **values: Any) -> Any:
    from kdpipe.pipelines.training import Recipe

    if values["batch_size"] is None:
        values["batch_size"] = config.get("train_dataloader", {}).get("batch_size", 2)
    return Recipe(**values)


def _report(console: Console, result: Any) -> None:
    ap = "AP not measured" if result.ap is None else f"AP {result.ap:.3f}"
    pace = "" if math.isnan(result.seconds_per_step) else f", {result.seconds_per_step:.2f} s per step"
    console.print(f"{result.checkpoint}: {ap}{pace}")


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a run as Ctrl-C does: files are left whole, helper processes are ended."""
    stop.ask()


def main(args: list[str] | None = None) -> None:
    """Entry point: one message and an exit code for whatever goes wrong; `--debug` shows where.

    Exit codes: 0 done, 1 the input or the machine, 2 the command line, 3 a fault of kdpipe, 130 interrupted.
    """
    args = sys.argv[1:] if args is None else args
    stop.forget()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _terminate)
    debug = "--debug" in args
    # torch is not loaded yet; it would print its C++ stack where the connection to another process ends
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        adopt_slurm(os.environ)
        cli.main(args, prog_name="kdpipe", standalone_mode=False)
    except click.ClickException as error:
        if is_first():
            error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        if is_first():
            click.echo("Interrupted.", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except ToldError:
        sys.exit(EXIT_ERROR)
    except (KdpipeError, OSError) as error:
        if debug:
            raise
        click.echo(f"Error: {error_text(error)}", err=True)
        sys.exit(EXIT_ERROR)
    except Exception as error:
        if debug:
            raise
        click.echo(
            f"Internal error: {type(error).__name__}: {error_text(error)}\nkdpipe --debug ... shows where.",
            err=True,
        )
        sys.exit(EXIT_INTERNAL)


if __name__ == "__main__":
    main()
