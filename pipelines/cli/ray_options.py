"""Options of commands that a Ray cluster can do the work of."""

from collections.abc import Callable
from typing import Any

import click

from kdpipe.pipelines.cli.options import FiniteRange, combined, grouped
from kdpipe.pipelines.commands.options import RayOptions

__all__ = ["check_ray_options", "ray_options"]


def ray_options(help_text: str) -> Callable[[Any], Any]:
    """`--ray` and what each task takes, as a `RayOptions` called `ray`; the text says what the cluster does."""
    return combined(
        click.option("--ray", "address", help=f"{help_text}: HOST:PORT, auto, or local to start one here."),
        click.option("--ray-cpus", "cpus", type=FiniteRange(0.01, 1000), help="Of each task. Default: 1."),
        click.option(
            "--ray-gpus",
            "gpus",
            type=FiniteRange(0, 1000),
            help="Of each task, such as 0.5. Default: 1 if there are any.",
        ),
        grouped("ray", RayOptions),
    )


def check_ray_options(ray: RayOptions) -> None:
    """Refuse options of tasks that Ray cannot give, or without a cluster.

    Raises:
        UsageError: Naming the option.
    """
    if ray.address is None and (ray.cpus is not None or ray.gpus is not None):
        raise click.UsageError("--ray-cpus and --ray-gpus are for --ray. Leave them out.")
    for name, number in (("--ray-cpus", ray.cpus), ("--ray-gpus", ray.gpus)):
        if number is not None and number > 1 and number != int(number):
            raise click.UsageError(f"{name} {number}: Ray gives whole ones, or a share of one.")
