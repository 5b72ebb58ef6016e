import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.cli.demo import demo_command, run_command
from kdpipe.pipelines.cli.training import train_student_command
from kdpipe.pipelines.commands.evaluate import evaluate
from kdpipe.pipelines.commands.options import EvaluateOptions
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.demo.run import draw, run_demo
from kdpipe.pipelines.demo.settings import DemoSettings, Width
from kdpipe.pipelines.demo.teacher import SHIPPED, DemoTeacher
from kdpipe.pipelines.demo.train_teacher import train_teacher
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint

TINY = DemoSettings(
    train=16,
    val=6,
    size=(64, 96),
    student=Width(8, 16, 32),
    epochs=1,
    teacher=Width(8, 16, 32),
    teacher_train=20,
    teacher_epochs=1,
    batch_size=1,
    rois=16,
    proposals=40,
)


class Commands:
    """Stands in for `kdpipe`: writes down what it is asked, and leaves the files by which a demo knows its own."""

    def __init__(self) -> None:
        self.lines: list[list[str]] = []

    def __call__(self, words: Sequence[str]) -> None:
        self.lines.append(list(words))
        if words[0] == "compare":
            log = Path(self.option("--work-dir")) / "student" / "none" / "seed-0.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()

    def option(self, name: str) -> str:
        words = self.lines[-1]
        return words[words.index(name) + 1]

    @property
    def names(self) -> list[str]:
        return [words[0] for words in self.lines]


def run(out: Path, commands: Any, *, fresh: bool = False, teacher: DemoTeacher = SHIPPED) -> str:
    """Runs the demo and returns what it printed itself."""
    console = Console(file=io.StringIO(), width=200)
    run_demo(out, commands, fresh=fresh, console=console, settings=TINY, teacher=teacher)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_demo_is_three_commands_and_ends_with_the_report(tmp_path: Path) -> None:
    commands = Commands()
    printed = run(tmp_path, commands)
    assert commands.names == ["cache-teacher", "compare", "report"]
    assert str(tmp_path / "compared" / "report.html") in printed.splitlines()[-1]
    assert len(list((tmp_path / "shapes" / "train").glob("*.jpg"))) == TINY.train


def test_students_differ_in_the_methods_only(tmp_path: Path) -> None:
    """A config file of the demo and the words of its comparison are those that train-student understands."""
    commands = Commands()
    run(tmp_path, commands)
    words = commands.lines[1]
    own = ("--methods", "--jobs", "--teacher-ap", "--work-dir")
    pairs = list(zip(words[1::2], words[2::2], strict=True))
    assert [value for name, value in pairs if name == "--methods"] == ["none", "sgfi,ckd,pred"]
    shared = [word for pair in pairs if pair[0] not in own for word in pair]
    train_student_command.make_context("train-student", shared)


def test_the_same_call_goes_on(tmp_path: Path) -> None:
    run(tmp_path, Commands())
    picture = tmp_path / "shapes" / "train" / "shapes_000000.jpg"
    drawn = picture.stat().st_mtime_ns
    commands = Commands()
    run(tmp_path, commands)
    assert commands.names == ["cache-teacher", "compare", "report"]
    assert picture.stat().st_mtime_ns == drawn


def test_a_command_that_fails_ends_the_demo(tmp_path: Path) -> None:
    asked = []

    def fail(words: Sequence[str]) -> None:
        asked.append(words[0])
        raise SystemExit(1)

    with pytest.raises(SystemExit):
        run(tmp_path, fail)
    assert asked == ["cache-teacher"]


def test_fresh_starts_anew_and_deletes_nothing_else(tmp_path: Path) -> None:
    run(tmp_path, Commands())
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "compared" / "compare.json").touch()
    (tmp_path / "shapes" / "train" / "shapes_000000.jpg").write_bytes(b"damaged")
    for name in ("train", "val"):  # as where the drawing was interrupted
        (tmp_path / "shapes" / "annotations" / f"{name}.json").unlink()
    commands = Commands()
    run(tmp_path, commands, fresh=True)
    assert commands.names == ["cache-teacher", "compare", "report"]
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "compared" / "compare.json").exists()
    assert (tmp_path / "shapes" / "train" / "shapes_000000.jpg").read_bytes() != b"damaged"


@pytest.mark.parametrize("name", ["shapes", "shapes.zarr", "compared"])
def test_a_folder_that_the_demo_did_not_make_is_left_alone(tmp_path: Path, name: str) -> None:
    run(tmp_path, Commands())
    if (tmp_path / name).exists():
        shutil.rmtree(tmp_path / name)
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KdpipeError, match=name):
        run(tmp_path, Commands(), fresh=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("fresh", [False, True])
def test_a_config_that_the_demo_did_not_write_is_left_alone(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "student.py").write_text("mine = 1\n")
    commands = Commands()
    with pytest.raises(KdpipeError, match=r"student\.py is there, and no demo wrote it"):
        run(tmp_path, commands, fresh=fresh)
    assert (tmp_path / "student.py").read_text() == "mine = 1\n"
    assert commands.names == []


def test_an_interrupted_deletion_leaves_what_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, Commands())
    remove = shutil.rmtree

    def stop(path: Path, **options: Any) -> None:
        if path.name == "shapes":
            raise KeyboardInterrupt
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr("kdpipe.pipelines.demo.run.shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, Commands(), fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes", "student.py"]
    run(tmp_path, Commands())


def test_pictures_of_another_origin_are_left_alone(tmp_path: Path) -> None:
    annotations = tmp_path / "shapes" / "annotations" / "train.json"
    annotations.parent.mkdir(parents=True)
    annotations.write_text('{"images": []}')
    commands = Commands()
    for fresh in (False, True):
        with pytest.raises(KdpipeError, match="was not drawn by kdpipe"):
            run(tmp_path, commands, fresh=fresh)
    assert annotations.read_text() == '{"images": []}'
    assert commands.names == []


def test_commands_are_shown_and_their_failure_is_passed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KdpipeError, match=r"missing\.pth does not exist"):
        run_command(["cache-teacher", "--ckpt", str(tmp_path / "missing.pth")])
    assert f"$ kdpipe cache-teacher --ckpt {tmp_path}/missing.pth" in capsys.readouterr().out
    with pytest.raises(click.UsageError, match="compare needs either --cache or --teacher-ckpt"):
        run_command(["compare", "--work-dir", str(tmp_path)])


def test_the_option_makes_the_teacher_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Path]] = []
    for module, name in (("run", "run_demo"), ("train_teacher", "train_teacher")):
        monkeypatch.setattr(
            f"kdpipe.pipelines.demo.{module}.{name}", lambda out, run, name=name, **more: asked.append((name, out))
        )
    out = ["--out", str(tmp_path)]
    for options in ([], ["--train-teacher"]):
        result = CliRunner().invoke(demo_command, [*out, *options], catch_exceptions=False)
        assert result.exit_code == 0
    assert asked == [("run_demo", tmp_path), ("train_teacher", tmp_path)]
    result = CliRunner().invoke(demo_command, [*out, "--train-teacher", "--fresh"])
    assert result.exit_code == 2
    assert "choose another --out" in result.output


def test_the_teacher_that_is_shipped_is_small_and_half_precision() -> None:
    assert SHIPPED.checkpoint.stat().st_size < 5_000_000
    checkpoint = load_checkpoint(SHIPPED.checkpoint)
    assert {str(value.dtype) for value in checkpoint.state_dict.values()} == {"torch.float16", "torch.int64"}
    assert "/" not in checkpoint.meta["cfg"].replace("data/coco/", "")  # no path of the machine that made it


def test_the_teacher_that_is_shipped_is_of_the_demo() -> None:
    settings = DemoSettings()
    record = SHIPPED.record
    assert record["command"] == "kdpipe demo --train-teacher"
    recorded = (record["seed"], record["train"], record["val"], tuple(record["size"]), record["epochs"])
    wanted = (settings.seed, settings.teacher_train, settings.val, settings.size, settings.teacher_epochs)
    assert recorded == wanted


@pytest.mark.slow
def test_the_teacher_that_is_shipped_has_the_ap_of_its_record(tmp_path: Path) -> None:
    settings, console = DemoSettings(), Console(file=io.StringIO())
    draw(tmp_path / "shapes", 1, settings, console)
    data = DataOptions(tmp_path / "shapes" / "annotations" / "val.json", tmp_path / "shapes" / "val")
    metrics = evaluate(EvaluateOptions(SHIPPED.checkpoint, data=data), console)
    assert metrics["bbox_mAP"] == pytest.approx(SHIPPED.ap, abs=0.003)  # rounding of other CPUs may swap detections


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    teacher = train_teacher(tmp_path, run_command, console=console, settings=TINY)
    assert teacher.record["command"] == "kdpipe demo --train-teacher"
    assert 0 <= teacher.ap <= 1
    teacher.record_file.write_text(json.dumps(teacher.record | {"ap": 0.25}))  # so small a teacher finds nothing
    teacher = DemoTeacher(teacher.folder)
    begun = teacher.checkpoint.stat().st_mtime_ns
    run(tmp_path, run_command, teacher=teacher)
    assert teacher.checkpoint.stat().st_mtime_ns == begun
    summary = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert [row["methods"] for row in summary["rows"]] == ["none", "sgfi,ckd,pred"]
    assert [cell["state"] for row in summary["rows"] for cell in row["cells"]] == ["done", "done"]
    assert summary["teacher"]["ap"] == 0.25
    page = (tmp_path / "compared" / "report.html").read_text()
    assert "sgfi" in page
    students = sorted((tmp_path / "compared").rglob("student.pth"))
    before = [path.stat().st_mtime_ns for path in students]
    assert len(before) == 2
    run(tmp_path, run_command, teacher=teacher)
    assert [path.stat().st_mtime_ns for path in students] == before
