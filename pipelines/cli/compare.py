"""`kdpipe compare`: many students from one cache."""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from kdpipe.pipelines.cli.options import (
    PATH,
    FiniteRange,
    WholeRange,
    combined,
    data_options,
    recipe_options,
    skip_option,
    trust_option,
    val_options,
)
from kdpipe.pipelines.cli.ray_options import check_ray_options, ray_options
from kdpipe.pipelines.cli.report import report_trainings_in
from kdpipe.pipelines.cli.student_options import DEFAULT_STUDENT, distillation_options, teacher_options
from kdpipe.pipelines.cli.training import train_student_command
from kdpipe.pipelines.commands.options import RayOptions
from kdpipe.pipelines.compare.grid import Grid, GridRow, read_grid, row_name
from kdpipe.pipelines.runtime.console import command_console
from kdpipe.pipelines.runtime.launch import check_alone

__all__ = ["compare_command"]

_SECRET = "--store-option"
_handed_on = combined(
    teacher_options,
    distillation_options,
    recipe_options,
    data_options,
    val_options,
    skip_option,
    trust_option,
)


@click.command("compare")
@click.option(
    "--student", "students", multiple=True, help=f"A zoo name, or a file; repeat it. Default: {DEFAULT_STUDENT}."
)
@click.option(
    "--methods",
    "methods",
    multiple=True,
    help="As of train-student; repeat it. Default: none, and what train-student takes by default.",
)
@click.option("--seeds", type=WholeRange(1, 1000), help="How many, from --seed on. Default: 1, or the grid's.")
@click.option(
    "--grid", type=PATH, help="TOML file that names students with options of their own: docs/guides/comparing.md."
)
@click.option("--work-dir", type=PATH, default=Path("work_dirs/compare"), show_default=True, help="Where all goes.")
@click.option("--jobs", type=WholeRange(1, 1000), help="Trainings at once. Default: one per GPU, or one.")
@click.option("--print-commands", is_flag=True, help="Print a command line per training, and train nothing.")
@click.option(
    "--teacher-ap",
    type=FiniteRange(0, 1, min_open=True),
    help="AP of the teacher on the validation images.",
)
@ray_options("Let a Ray cluster train")
@_handed_on
def compare_command(
    students: tuple[str, ...],
    methods: tuple[str, ...],
    seeds: int | None,
    grid: Path | None,
    work_dir: Path,
    jobs: int | None,
    print_commands: bool,
    teacher_ap: float | None,
    ray: RayOptions,
    **options: Any,
) -> None:
    """Train many students from one cache, and compare them: each student with each of --methods and each seed.

    All options of train-student are handed on. A seed has the same initial weights and the same order of images for
    all methods. Stopped, the same command goes on; a training that fails leaves the others alone.
    """
    from kdpipe.pipelines.cli.compare_rows import RowBuilder
    from kdpipe.pipelines.commands.compare import check_place, compare
    from kdpipe.pipelines.compare.on_ray import RayEngine
    from kdpipe.pipelines.compare.run import Engine, LocalEngine
    from kdpipe.pipelines.compare.teacher_ap import TeacherAP
    from kdpipe.pipelines.runtime.ray_cluster import ray_cluster

    check_alone(os.environ, "A comparison")
    check_ray_options(ray)
    if ray.address is not None and jobs is not None:
        raise click.UsageError("--ray trains as much at once as the cluster has room for: leave --jobs out.")
    if grid is not None and (students or methods):
        raise click.UsageError("--grid names students and methods: leave --student and --methods out.")
    named = read_grid(grid) if grid is not None else Grid(_rows_of(students or (DEFAULT_STUDENT,), methods))
    given = _arguments(click.get_current_context())
    secret = {_SECRET: given.pop(_SECRET)} if _SECRET in given else {}
    builder = RowBuilder(given, secret, work_dir.absolute(), options["seed"] or 0, seeds or named.seeds or 1)
    rows = [each for row in named.rows for each in builder.rows(row)]
    for row in rows:
        if row.baseline is not None and row.find_baseline(rows) is None:
            raise click.UsageError(
                f"Row {row.student} has baseline {row.baseline}, which is not trained without distillation: add none "
                "to its methods."
            )
    check_place(work_dir, rows)
    if print_commands:
        for row in rows:
            for cell in row.cells:
                click.echo(cell.line)
        if secret:
            click.echo("--store-option is not printed: add it, or set the variables of the object store.", err=True)
        return
    builder.check_validation()
    teacher = builder.teacher_ckpt if teacher_ap is None else TeacherAP(teacher_ap, "--teacher-ap")
    console = command_console(shared=False)
    with ExitStack() as stack:
        engine: Engine
        if ray.address is None:
            engine = LocalEngine(jobs)
        else:
            engine = RayEngine(stack.enter_context(ray_cluster(ray.address)), ray.cpus, ray.gpus, console)
            engine.check_nodes([cell for row in rows for cell in row.cells], work_dir)
        is_complete = compare(rows, work_dir, engine, teacher, console)
    report_trainings_in(work_dir)
    sys.exit(0 if is_complete else 1)


def _rows_of(students: tuple[str, ...], methods: tuple[str, ...]) -> list[GridRow]:
    """A row for each `--student`, named after its config."""
    rows = [GridRow(row_name(Path(student).stem), {"--student": [student]}, methods) for student in students]
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise click.UsageError(f"Two of --student are called {twice[0]}: give them names in a --grid.")
    return rows


def _arguments(context: click.Context) -> dict[str, list[str]]:
    """The options on the command line that are handed on to train-student."""
    known = {option.name for option in train_student_command.params} - {"work_dir", "seed", "student", "methods"}
    arguments = {}
    for option in context.command.params:
        name = option.name or ""
        is_given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if name in known and is_given:
            arguments[max(option.opts, key=len)] = _texts(context.params[name])
    return arguments


def _texts(value: Any) -> list[str]:
    """What a command line says for the value of an option; nothing for a flag."""
    if value is True:
        return []
    if isinstance(value, dict):
        return [f"{key}={content}" for key, content in value.items()]
    if isinstance(value, tuple):
        return ["x".join(map(str, value))] if isinstance(value[0], int) else [str(each) for each in value]
    return [str(value)]
