"""The command line: `kdpipe cache-teacher`, `train-student`, `train-teacher`, `evaluate`, `verify`, `inspect`, ..."""

import contextlib
import os
import signal
import sys
import threading
import warnings
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.cli.cache import cache_teacher_command, inspect_command, verify_command
from kdpipe.pipelines.cli.compare import compare_command
from kdpipe.pipelines.cli.demo import demo_command
from kdpipe.pipelines.cli.report import report_command
from kdpipe.pipelines.cli.training import evaluate_command, train_student_command, train_teacher_command
from kdpipe.pipelines.runtime.console import command_console, error_text, robust_output, stop
from kdpipe.pipelines.runtime.launch import is_first
from kdpipe.pipelines.runtime.memory import memory_shortage

__all__ = ["end_interrupted", "main"]

EXIT_ERROR, EXIT_INTERNAL, EXIT_INTERRUPTED = 1, 3, 130
_SECONDS_OF_AN_IMPORT = 0.05  # after which it is looked at again


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--debug", is_flag=True, help="Show tracebacks and warnings.")
@click.version_option(version("kdpipe"), prog_name="kdpipe")
def cli(debug: bool) -> None:
    """Distil object detectors offline: cache the teacher once, then train any number of students from the cache."""
    if not debug:
        warnings.simplefilter("ignore")
    try:
        Path.cwd()
    except OSError as error:
        raise KdpipeError(
            f"The current folder cannot be used ({error.strerror}): it was deleted or moved. Go to another one (cd)."
        ) from error


@cli.command("doctor")
def doctor_command() -> None:
    """Show versions, devices and mmcv's ops, and what is wrong with them."""
    from kdpipe.pipelines.commands.doctor import run_doctor

    sys.exit(run_doctor(command_console(shared=False)))


for command in (
    cache_teacher_command,
    train_student_command,
    compare_command,
    train_teacher_command,
    evaluate_command,
    verify_command,
    inspect_command,
    report_command,
    demo_command,
):
    cli.add_command(command)


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a run as Ctrl-C does: files are left whole, helper processes are ended.

    An import is finished first: cut off in that of torch, the process would abort.
    """
    if _importing(frame):
        again = threading.Timer(_SECONDS_OF_AN_IMPORT, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    stop.ask()


def _importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code is not main.__code__:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def main(args: list[str] | None = None) -> None:
    """Entry point: one message and an exit code for whatever goes wrong; `--debug` shows where.

    Exit codes: 0 done, 1 the input or the machine, 2 the command line, 3 a fault of kdpipe, 130 interrupted.
    """
    args = sys.argv[1:] if args is None else args
    stop.forget()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _terminate)
    # torch is not loaded yet; it would print its C++ stack where the connection to another process ends
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with robust_output():
        _run(args, debug="--debug" in args)


def _run(args: list[str], *, debug: bool) -> None:
    try:
        cli.main(args, prog_name="kdpipe", standalone_mode=False)
    except click.ClickException as error:
        if is_first():
            error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        end_interrupted()
    except Exception as error:
        if _was_interrupted(error):
            end_interrupted()
        if debug:
            raise
        message = _user_message(error)
        if message is None:
            message = f"Internal error: {type(error).__name__}: {error_text(error)}\nkdpipe --debug ... shows where."
            click.echo(message, err=True)
            sys.exit(EXIT_INTERNAL)
        click.echo(f"Error: {message}", err=True)
        sys.exit(EXIT_ERROR)


def end_interrupted() -> NoReturn:
    """End as a command does that was interrupted. Signals that come now are not heard: it is ending already.

    Linux sends that of a parent's death once for each of its threads.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()  # in a log of both streams, what was printed before stands before
    click.echo("Interrupted.", err=True)
    sys.exit(EXIT_INTERRUPTED)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an interrupt led to an error, as where mmengine makes a SyntaxError of one while it formats a config."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _user_message(error: Exception) -> str | None:
    """What to say of an error that is the input's or the machine's; None for a fault of kdpipe."""
    if isinstance(error, KdpipeError | OSError):
        return error_text(error)
    if isinstance(error, UnicodeEncodeError):
        return (
            f"A path or name cannot be written as UTF-8: {ascii(error.object)[1:-1][:200]}. Give it a name in UTF-8, "
            "or where it is one, set PYTHONUTF8=1."
        )
    if (shortage := memory_shortage(error)) is not None:
        return (
            f"There is too little memory: {shortage}\nUse a smaller --scale or --batch-size, fewer --workers, or a "
            "machine or device with more of it."
        )
    return None
