"""The command line itself: help, exit codes, messages."""

import os
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

from kdpipe.cache.errors import CacheError, KdpipeError
from kdpipe.pipelines.cli import main as cli
from kdpipe.pipelines.cli import options as cli_options
from kdpipe.pipelines.cli.student_options import given_options
from kdpipe.pipelines.cli.training import train_student_command
from kdpipe.pipelines.runtime.console import Stop, error_text
from kdpipe.pipelines.teacher.teacher import Teacher

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

COMMANDS = sorted(cli.cli.commands)


def test_help_names_every_command(kit: "Kit") -> None:
    out = kit.run("--help").out
    for name in COMMANDS:
        assert re.search(rf"^  {name}  +\w", out, re.MULTILINE), out  # with a line of explanation
    assert kit.run("-h").out == out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(kit: "Kit", name: str) -> None:
    out = kit.run(name, "--help").out
    command = cli.cli.commands[name]
    assert command.help
    assert command.help.split("\n")[0] in " ".join(out.split())
    assert out.startswith(f"Usage: kdpipe {name} [OPTIONS]")
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            assert f"[OPTIONS] {parameter.make_metavar(click.Context(command))}" in out
            continue
        assert isinstance(parameter, click.Option)
        assert re.search(rf"(^|[ /,]){re.escape(parameter.opts[0])}\b", out, re.MULTILINE)
        explained = parameter.help or parameter.show_default or isinstance(parameter.type, click.Choice)
        assert explained, f"{parameter.name} is not explained"
    assert max(map(len, out.splitlines())) <= 110


def test_help_does_not_wait_for_heavy_imports() -> None:
    heavy = "{'torch', 'zarr', 'tensorstore', 'mmdet', 'mmcv', 'matplotlib', 'scipy', 'jinja2', 'ray'}"
    code = f"import sys, kdpipe.pipelines.cli.main; print(*sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_version(kit: "Kit") -> None:
    assert re.fullmatch(r"kdpipe, version \d+\.\d+\.\d+\S*\n", kit.run("--version").out)


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("cache-teacher",),
        ("cache-teacher", "--ckpt", "t.pth", "--targets", "everything"),
        ("cache-teacher", "--ckpt", "t.pth", "--scale", "1333"),
        ("cache-teacher", "--ckpt", "t.pth", "--scale", "0x800"),
        ("cache-teacher", "--ckpt", "t.pth", "--part-size", "big"),
        ("cache-teacher", "--ckpt", "t.pth", "--views", "identity,vflip"),
        ("cache-teacher", "--ckpt", "t.pth", "--views", "identity,identity"),
        ("cache-teacher", "--ckpt", "t.pth", "--proposals", "0"),
        ("train-student", "--cache", "x.zarr", "--epochs", "0"),
        ("train-student", "--cache", "x.zarr", "--schedule", "3x"),
        ("train-student", "--cache", "x.zarr", "--lr", "-1"),
        ("evaluate", "--ckpt"),
    ],
)
def test_wrong_usage(kit: "Kit", work: Path, arguments: tuple[str, ...]) -> None:
    kit.refused(*arguments, code=2)
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("1KiB", 1024), ("1.5 MB", 3 << 19), ("2g", 2 << 30), ("1TiB", 1 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert cli_options.Bytes().convert(text, None, None) == size


def test_names_come_in_the_order_of_the_format() -> None:
    assert cli_options.Choices(("identity", "hflip")).convert("hflip, identity", None, None) == ("identity", "hflip")
    assert cli_options.Scale().convert("1333X800", None, None) == (1333, 800)


@pytest.mark.usefixtures("work")
def test_what_is_recorded_of_a_command_holds_in_any_folder(work: Path) -> None:
    (work / "mine.py").touch()
    paths = ["--teacher-ckpt", "t.pth", "--teacher-config", "mine.py", "--student", "of_the_zoo"]
    context = train_student_command.make_context("train-student", [*paths, "--scale", "128x96", "--work-dir", "w"])
    assert given_options(context) == {
        "teacher_ckpt": str(work / "t.pth"),
        "teacher_config": str(work / "mine.py"),
        "student": "of_the_zoo",
        "scale": [128, 96],
    }


def test_debug_raises_what_is_a_message_otherwise(kit: "Kit") -> None:
    assert "There is no cache at x.zarr" in kit.refused("train-student", "--cache", "x.zarr")
    with pytest.raises(CacheError, match=r"There is no cache at x\.zarr"):
        kit.run("--debug", "train-student", "--cache", "x.zarr")


@pytest.mark.slow
def test_debug_shows_the_traceback(work: Path) -> None:
    """Of the mmdet that is installed, too, where the current folder is a clone of mmdetection."""
    (work / "mmdet").mkdir()
    (work / "mmdet" / "__init__.py").write_text("raise RuntimeError('the mmdet of the current folder')")
    command = (sys.executable, "-m", "kdpipe.pipelines.cli", "--debug", "train-student", "--cache", "x.zarr")
    done = subprocess.run(command, capture_output=True, text=True, cwd=work)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "CacheError: There is no cache at x.zarr" in done.stderr


def test_a_fault_of_kdpipe_is_told_apart(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, allow_partial: bool) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("kdpipe.cache.read.reader.open_cache", fail)
    ended = kit.run("train-student", "--cache", "x.zarr", code=3)
    assert ended.err.splitlines() == ["Internal error: ZeroDivisionError: by zero", "kdpipe --debug ... shows where."]
    with pytest.raises(ZeroDivisionError):
        kit.run("--debug", "train-student", "--cache", "x.zarr")


def test_interrupt_that_mmengine_takes_for_a_syntax_error(
    kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it formats a config."""

    def interrupted(text: str, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("mmengine.config.config.FormatCode", interrupted)
    ended = kit.run(*kit.student_command(work / "w"), code=130)
    assert ended.err.strip() == "Interrupted."


def test_interrupted_is_the_last_line_of_a_log(tmp_path: Path) -> None:
    """Of both streams, even after a print that Python still holds back."""
    program = """
import click
from kdpipe.pipelines.cli import main as cli

@cli.cli.command("interrupted")
def interrupted():
    print("before")
    raise KeyboardInterrupt

cli.main(["interrupted"])
"""
    log = tmp_path / "log"
    held_back = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with log.open("w") as both:
        code = subprocess.run([sys.executable, "-c", program], stdout=both, stderr=both, env=held_back).returncode
    assert (code, log.read_text().split()) == (130, ["before", "Interrupted."])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_import_is_finished_before_an_interrupt(number: int, tmp_path: Path) -> None:
    """That of torch would abort."""
    (tmp_path / "slow.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(0.2)\n")
    program = """
import time
from kdpipe.pipelines.cli import main as cli

@cli.cli.command("interrupted")
def interrupted():
    import slow
    print("imported", flush=True)
    time.sleep(60)
    print("went on", flush=True)

cli.main(["interrupted"])
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout.split(), ended.stderr.split()) == (130, ["imported"], ["Interrupted."])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_that_python_drops(kit: "Kit", work: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised in a callback of Python's own it is lost; the work that goes on notices all the same."""

    class Thing:
        pass

    def told() -> None:
        thing = Thing()
        reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), number))
        del thing
        assert reference() is None

    record = Teacher.record

    def record_told(self: Teacher, *args: Any, **options: Any) -> Any:
        told()
        return record(self, *args, **options)

    monkeypatch.setattr(Teacher, "record", record_told)
    dropped: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda event: dropped.append(event.exc_type))
    command = ("cache-teacher", *kit.source, *kit.VIEW, "--out", "x.zarr")
    assert kit.run(*command, code=130).err.strip() == "Interrupted."
    assert set(dropped) == {KeyboardInterrupt}
    assert not (work / "x.zarr").exists()  # noticed before anything is written


def test_a_step_of_training_is_not_interrupted_unless_asked_twice() -> None:
    stop = Stop()
    with pytest.raises(KeyboardInterrupt):
        stop.ask()
    stop.forget()
    stop.check()
    stop.between_steps = True
    stop.ask()
    with pytest.raises(KeyboardInterrupt):
        stop.check()
    with pytest.raises(KeyboardInterrupt):
        stop.ask()


WRAPPED = """Caught CacheError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "reader.py", line 1, in read
ValueError: CacheError: bytes

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "reader.py", line 2, in read
    raise CacheError(
kdpipe.cache.errors.CacheError: part 3 is damaged:
  features. Run it again.
"""


def test_message_of_an_error_from_a_loader_worker() -> None:
    assert error_text(CacheError(WRAPPED)) == "part 3 is damaged:\n  features. Run it again."
    missing = "Caught FileNotFoundError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n"
    text = f"{missing}  File 'a.py'\nFileNotFoundError: [Errno 2] No such file: 'a.jpg'\n"
    assert error_text(FileNotFoundError(text)) == "[Errno 2] No such file: 'a.jpg'"
    assert error_text(KdpipeError("plain: text")) == "plain: text"
