"""The command that shows the whole way: `demo`."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import click

from kdpipe.pipelines.cli.cache import cache_teacher_command
from kdpipe.pipelines.cli.compare import compare_command
from kdpipe.pipelines.cli.options import PATH
from kdpipe.pipelines.cli.report import report_command
from kdpipe.pipelines.cli.training import train_teacher_command
from kdpipe.pipelines.runtime.console import command_console
from kdpipe.pipelines.runtime.launch import check_alone

__all__ = ["demo_command"]

_COMMANDS = {
    str(command.name): command
    for command in (cache_teacher_command, compare_command, report_command, train_teacher_command)
}


@click.command("demo")
@click.option("--out", type=PATH, default=Path("demo"), show_default=True, help="Folder for what it makes.")
@click.option("--fresh", is_flag=True, help="Delete what an earlier demo left there.")
@click.option(
    "--train-teacher", "only_teacher", is_flag=True, help="Make the teacher that comes with kdpipe, and stop."
)
def demo_command(out: Path, fresh: bool, only_teacher: bool) -> None:
    """Draw pictures, cache a teacher that comes with kdpipe, and compare a student with and without distillation.

    Shows the commands that it runs. Stopped, it goes on.
    """
    check_alone(os.environ, "The demo")
    from kdpipe.pipelines.demo.run import run_demo
    from kdpipe.pipelines.demo.train_teacher import train_teacher

    if only_teacher and fresh:
        raise click.UsageError("--fresh is for the demo. To make the teacher anew, choose another --out.")
    console = command_console()
    if only_teacher:
        train_teacher(out, run_command, console=console)
    else:
        run_demo(out, run_command, fresh=fresh, console=console)


def run_command(words: Sequence[str]) -> None:
    """Show a command of kdpipe, and run it in this process.

    Args:
        words: What stands behind `kdpipe`.

    Raises:
        SystemExit: It failed, and has said why.
    """
    name, *arguments = words
    click.echo(f"\n$ {shlex.join(['kdpipe', *words])}")
    try:
        _COMMANDS[name].main(arguments, prog_name=f"kdpipe {name}", standalone_mode=False)
    except SystemExit as end:
        if end.code:
            raise
