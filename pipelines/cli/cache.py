"""Commands that make caches and look into them: `cache-teacher`, `verify`, `inspect`."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from kdpipe.cache.spec import CODECS, DTYPES, TIERS, VIEWS
from kdpipe.pipelines.cli.options import (
    COUNT,
    IMAGE_ID,
    LEVELS,
    PATH,
    PLACE,
    PROPOSALS,
    Bytes,
    Choices,
    Scale,
    Shard,
    chosen_device,
    data_options,
    grouped,
    store_option,
    trust_option,
)
from kdpipe.pipelines.cli.ray_options import check_ray_options, ray_options
from kdpipe.pipelines.commands.options import RayOptions, TeacherCheckOptions
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.runtime.console import bytes_text, command_console
from kdpipe.pipelines.runtime.launch import Rank, doubts, find_shard
from kdpipe.pipelines.runtime.memory import LESS_FOR_A_CACHE, memory_advice
from kdpipe.pipelines.teacher.options import CacheOptions, tier_defaults

__all__ = ["cache_teacher_command", "inspect_command", "verify_command"]

_PYRAMID, _OBJECTS = tier_defaults("pyramid"), tier_defaults("objects")


@click.command("cache-teacher")
@click.option("--ckpt", type=PATH, required=True, help="The teacher's checkpoint.")
@click.option("--config", help="Its config: a name of mmdet's zoo, or a file. Default: the checkpoint's own.")
@data_options
@click.option("--out", type=PLACE, help="The cache; may be s3://bucket/path, ... Default: named after the data set.")
@store_option
@click.option("--targets", "tier", type=click.Choice(TIERS), default="pyramid", show_default=True, help="What is kept.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help=f"How features are kept. Default: {_OBJECTS.dtype}, or {_PYRAMID.dtype} for pyramid.",
)
@click.option("--levels", type=LEVELS, help="Kept of the pyramid, such as P3,P4,P5,P6 (P2 has stride 4). Default: all.")
@click.option("--codec", type=click.Choice(CODECS), default="zstd", show_default=True)
@click.option(
    "--proposals",
    type=PROPOSALS,
    help=f"Best boxes kept per image. Default: {_PYRAMID.proposals}, or {_OBJECTS.proposals} for objects.",
)
@click.option("--scale", type=Scale(), help="The teacher's view, ratio kept. Default: the config's test scale.")
@click.option(
    "--views",
    type=Choices(VIEWS),
    help=f"Of each image. Default: {','.join(_PYRAMID.views)}, or {','.join(_OBJECTS.views)} for objects.",
)
@click.option("--part-size", type=Bytes(), default="1GiB", show_default=True, help="Unit of commit and of resuming.")
@click.option("--limit", type=COUNT, help="Only the first N images.")
@click.option("--device", help="Such as cuda:1. Default: cuda where there is one, else cpu.")
@click.option(
    "--shard",
    "given_shard",
    type=Shard(),
    help="Make part i only where i % N is I, from 0. Default: all, or by torchrun, srun or a Slurm array.",
)
@ray_options("Let a Ray cluster make the parts")
@click.option("--skip-bad-images", is_flag=True, help="Go on past unreadable images, and record them.")
@click.option("--dry-run", is_flag=True, help="Only show what it would cost in bytes and time.")
@trust_option
@grouped("options", CacheOptions)
@memory_advice(LESS_FOR_A_CACHE)
def cache_teacher_command(
    ckpt: Path,
    config: str | None,
    data: DataOptions,
    out: str | None,
    store_options: dict[str, str],
    options: CacheOptions,
    limit: int | None,
    device: str | None,
    given_shard: tuple[int | None, int] | None,
    ray: RayOptions,
    dry_run: bool,
    trust: bool,
) -> None:
    """Run the teacher once over a data set and keep what it says.

    Interrupted, the cache stays valid; the same command goes on with it. Several processes, on any machines, may fill
    one cache: docs/guides/machines.md.
    """
    from kdpipe.cache.store.location import open_location
    from kdpipe.pipelines.commands.cache_teacher import cache_teacher
    from kdpipe.pipelines.commands.dry_run import estimate, print_estimate
    from kdpipe.pipelines.data.find import find_data
    from kdpipe.pipelines.data.report import report_data
    from kdpipe.pipelines.detectors.checkpoints import class_names, load_checkpoint
    from kdpipe.pipelines.teacher.setup import prepare_teacher, with_classes
    from kdpipe.pipelines.teacher.teacher import teacher_config

    shard = _shard(given_shard, ray)
    run_on = chosen_device("cpu" if ray.address and not dry_run else device)  # a cluster has its own
    console = command_console(shared=False, live=shard.count == 1)
    if shard.variables:
        console.print(f"Shard {shard}, by {shard.source}.")
    is_interactive = sys.stdin is not None and sys.stdin.isatty()
    for doubt in doubts(shard, os.environ, is_interactive=is_interactive) if ray.address is None else []:
        console.print(f"Warning: {doubt}")
    location = None if out is None else open_location(out, store_options)
    try:
        checkpoint = load_checkpoint(ckpt, trust=trust)
        cfg = teacher_config(checkpoint, config)
        source = find_data(cfg, data, limit)
        location = location or open_location(source.cache_path(), store_options)
        if dry_run:
            teacher, spec = prepare_teacher(checkpoint, cfg, options, run_on)
            spec, images = with_classes(spec, source.load(), class_names(checkpoint), f"the teacher {ckpt.name}")
            report_data(images, console, trained=True, strict=options.strict_data)
            costs = estimate(teacher, images, images.images, spec)
            print_estimate(console, costs, spec, len(images.images), location)
            return
        config_text = str(Path(config).resolve()) if config and Path(config).exists() else config
        how: dict[str, Any]
        if ray.address is None:
            how = {"shard": shard}
        else:
            from kdpipe.pipelines.commands.cache_on_ray import deal_parts, part_job

            given: dict[str, Any] = {"ckpt": ckpt, "config": config_text, "trust": trust, "device": device}
            job = part_job(source, location, options, store_options=store_options, **given)
            how = {"deal": partial(deal_parts, job=job, options=ray, console=console)}
        how |= {"device": run_on, "console": console, "config": config_text}
        result = cache_teacher(checkpoint, cfg, source, location, options, **how)
    except KeyboardInterrupt:
        console.print("Stopped. What is cached is valid; the same command goes on from there.")
        raise
    if result.missing_parts:
        console.print(
            f"Shard {shard} is done: {result.new_images} new images in {result.seconds:.1f} s. Other shards still have "
            f"to make {result.missing_parts} of {result.parts} parts; kdpipe inspect {result.location} names them."
        )
        return
    if shard.count > 1:
        console.print(f"Shard {shard} is done, and the cache is complete.")
    console.print(
        f"{result.location}: {result.images} images, {result.skipped} skipped, {bytes_text(result.disk_bytes)} on disk "
        f"({100 * result.disk_bytes / max(1, result.raw_bytes):.0f} % of the raw bytes), and "
        f"{bytes_text(result.head_bytes)} of the teacher's heads; "
        f"{result.new_images} new images in {result.seconds:.1f} s"
    )


def _shard(given: tuple[int | None, int] | None, ray: RayOptions) -> Rank:
    """The shard that this process makes; a cluster makes all."""
    check_ray_options(ray)
    if ray.address is None:
        return find_shard(os.environ, given)
    if given is not None:
        raise click.UsageError("--ray deals the parts by itself: leave --shard out.")
    return Rank()


@click.command("verify")
@click.argument("cache", metavar="CACHE", type=PLACE)
@store_option
@click.option("--repair", is_flag=True, help="Remove what is bad, so that cache-teacher makes it anew.")
@click.option("--ckpt", type=PATH, help="The teacher: compare with what it says of some images.")
@click.option("--config", help="Its config: a zoo name, or a file. Default: the one that the cache records.")
@click.option("--sample", type=COUNT, default=16, show_default=True, help="How many images, with --ckpt.")
@click.option("--device", help="Where the teacher runs. Default: cuda where there is one, else cpu.")
@click.option("--ap", is_flag=True, help="Compute the teacher's AP from the cache alone.")
@data_options
@trust_option
@grouped("options", TeacherCheckOptions)
@memory_advice("Let the teacher run where there is more (--device, such as cpu).")
def verify_command(cache: str, store_options: dict[str, str], repair: bool, options: TeacherCheckOptions) -> None:
    """Check every byte of a cache: complete, as it was written, finite. Exit code 1 where it is not.

    Where its images are at hand, they are compared with those that the teacher saw.
    """
    from kdpipe.cache.store.location import open_location
    from kdpipe.pipelines.commands.verify import check_ckpt, verify_files, verify_teacher
    from kdpipe.pipelines.data.picture_comparison import verify_pictures

    console = command_console(shared=False)
    location = open_location(cache, store_options)
    if options.ckpt is not None or options.device is not None:
        chosen_device(options.device)  # refused before the cache is read
    if options.ckpt is not None:
        check_ckpt(options.ckpt, options.config, trust=options.trust)
    good = verify_files(location, repair=repair, console=console)
    if good:
        good = verify_pictures(location, img_dir=options.data.img_dir, voc=options.data.voc, console=console)
    if good and (options.ckpt is not None or options.ap):
        good = verify_teacher(location, options, console)
    sys.exit(0 if good else 1)


@click.command("inspect")
@click.argument("cache", metavar="CACHE", type=PLACE)
@store_option
@click.option("--image", type=IMAGE_ID, help="Show what is kept of the image with this id.")
@click.option("--view", type=click.Choice(VIEWS), help="In this view. Default: the first of the cache.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def inspect_command(
    cache: str, store_options: dict[str, str], image: int | None, view: str | None, as_json: bool
) -> None:
    """Show what a cache is, what it holds, how large it is, and which losses it serves."""
    from kdpipe.cache.store.location import open_location
    from kdpipe.pipelines.commands.inspect import inspect_cache

    inspect_cache(
        open_location(cache, store_options), image, view, as_json=as_json, console=command_console(shared=False)
    )
