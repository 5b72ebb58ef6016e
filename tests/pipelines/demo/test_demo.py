import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.demo import run as demo
from kdpipe.pipelines.demo.journal import Outcome
from kdpipe.pipelines.demo.run import DemoSettings, Width, run_demo
from kdpipe.pipelines.training.run import TrainingResult

NAMES = ["data set", "teacher", "cache", "student", "distilled student"]
TINY = DemoSettings(
    train=16,
    val=6,
    size=(64, 96),
    teacher=Width(8, 16, 32),
    student=Width(8, 16, 32),
    teacher_epochs=2,
    student_epochs=1,
    rois=16,
    proposals=40,
    queue=256,
)


def run(out: Path, *, fresh: bool = False, settings: DemoSettings = TINY) -> str:
    """Runs the demo and returns what it printed."""
    console = Console(file=io.StringIO(), width=100)
    run_demo(out, fresh=fresh, console=console, settings=settings)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(printed: str) -> dict[str, list[str]]:
    """The cells of each row of the last table."""
    lines = printed.rpartition("kdpipe demo")[2].splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    return {name: values for name, *values in cells}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that do nothing but write their names down, and a file each."""
    done: list[str] = []

    def step(name: str, folder: str, outcome: Any) -> Any:
        def call(out: Path, settings: DemoSettings, console: Console, *more: Any) -> Any:
            chosen = (more[0], more[0]) if more else (name, folder)
            done.append(chosen[0])
            (out / chosen[1]).mkdir(exist_ok=True)
            return outcome

        return call

    trained = Outcome(ap=0.25, seconds_per_step=0.5)
    monkeypatch.setattr(demo, "_draw", step("draw", "shapes", Outcome(size=2048)))
    monkeypatch.setattr(demo, "_teacher", step("teacher", "teacher", trained))
    monkeypatch.setattr(demo, "_cache", step("cache", "shapes.zarr", Outcome(size=3 << 20)))
    monkeypatch.setattr(demo, "_student", step("", "", trained))
    return done


ALL = ["draw", "teacher", "cache", "student", "distilled"]


def test_a_table_ends_the_demo(tmp_path: Path, steps: list[str]) -> None:
    table = rows(run(tmp_path / "demo"))
    assert steps == ALL
    assert list(table) == [*NAMES, "all"]
    assert table["teacher"][:2] == ["0.250", "0.50"]
    assert table["cache"] == ["", "", "0 s", "3.0 MiB"]


def test_finished_steps_are_not_repeated(tmp_path: Path, steps: list[str]) -> None:
    first = run(tmp_path)
    second = run(tmp_path)
    assert steps == ALL
    assert rows(second) == rows(first)
    assert second.count("done before") == len(NAMES)


def test_an_interrupted_demo_goes_on(tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_cache", stop)
        patch.setattr("kdpipe.pipelines.demo.run.time.perf_counter", iter(range(0, 1000, 7)).__next__)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    table = rows(run(tmp_path))
    assert steps == ALL
    assert table["teacher"][2] == "7 s"
    assert table["cache"][2] == "7 s"  # of the attempt that was stopped; the other one took no time


def test_fresh_starts_anew_and_deletes_nothing_else(tmp_path: Path, steps: list[str]) -> None:
    run(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "teacher" / "epoch_1.pth").touch()
    assert "done before" not in run(tmp_path, fresh=True)
    assert steps == ALL * 2
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert list((tmp_path / "teacher").iterdir()) == []


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_the_demo_did_not_make_is_left_alone(
    tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "_teacher", stop)
        run(tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "mine.txt").write_text("mine")
    with pytest.raises(KdpipeError, match="student is there, and this demo did not make it"):
        run(tmp_path, fresh=fresh)
    assert (tmp_path / "student" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["[]", '{"scenes": []}', "", "mine"])
def test_a_journal_of_something_else_is_left_alone(tmp_path: Path, steps: list[str], text: str) -> None:
    (tmp_path / "demo.json").write_text(text)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "mine.txt").write_text("mine")
    with pytest.raises(KdpipeError, match="is not the journal of a demo"):
        run(tmp_path, fresh=True)
    with pytest.raises(KdpipeError, match="cannot be read"):
        run(tmp_path)
    assert (tmp_path / "demo.json").read_text() == text
    assert (tmp_path / "teacher" / "mine.txt").read_text() == "mine"
    assert steps == []


def test_half_deleted_is_not_continued(tmp_path: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("kdpipe.pipelines.demo.journal.shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, fresh=True)
    with pytest.raises(KdpipeError, match="--fresh"):
        run(tmp_path)
    assert "done before" not in run(tmp_path, fresh=True)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, steps: list[str], fresh: bool) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "precious.pth").touch()
    with pytest.raises(KdpipeError, match=r"holds no demo.*--out"):
        run(tmp_path, fresh=fresh)
    assert [path.name for path in tmp_path.rglob("*")] == ["teacher", "precious.pth"]
    assert steps == []


def test_a_demo_of_another_size_is_not_continued(tmp_path: Path, steps: list[str]) -> None:
    run(tmp_path)
    with pytest.raises(KdpipeError, match=r"another version or size.*--fresh"):
        run(tmp_path, settings=DemoSettings())


def test_a_damaged_journal_is_named(tmp_path: Path, steps: list[str]) -> None:
    run(tmp_path)
    (tmp_path / "demo.json").write_text('{"identity"')
    with pytest.raises(KdpipeError, match=r"demo\.json cannot be read.*--fresh"):
        run(tmp_path)
    run(tmp_path, fresh=True)


@pytest.mark.parametrize("begun", [False, True])
def test_training_resumes_where_there_is_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """And a training that was stopped before its validation is measured."""
    seen: list[bool] = []

    def train(*args: Any, resume: bool, **more: Any) -> TrainingResult:
        seen.append(resume)
        return TrainingResult(tmp_path / "teacher" / "teacher.pth", None, {}, float("nan"))

    def measure(ckpt: Path, **more: Any) -> dict[str, float]:
        assert ckpt.name == "teacher.pth"
        return {"bbox_mAP": 0.75}

    console = Console(file=io.StringIO())
    demo._draw(tmp_path, TINY, console)
    monkeypatch.setattr(demo, "train_detector", train)
    monkeypatch.setattr(demo, "evaluate", measure)
    (tmp_path / "teacher").mkdir()
    if begun:
        (tmp_path / "teacher" / "last_checkpoint").touch()
    outcome = demo._teacher(tmp_path, TINY, console)
    assert seen == [begun]
    assert (outcome.ap, outcome.seconds_per_step) == (0.75, None)


def test_both_students_differ_in_the_methods_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes: dict[Sequence[str], Any] = {}

    def train(config: Any, cache: Any, data: Any, methods: Sequence[str], recipe: Any, *_: Any, **more: Any) -> Any:
        recipes[tuple(methods)] = recipe
        return TrainingResult(tmp_path, 0.5, {}, 0.1)

    def teacher(out: Path, settings: DemoSettings, console: Console) -> Any:
        return Outcome(ap=0.5)

    monkeypatch.setattr(demo, "train_student", train)
    monkeypatch.setattr(demo, "open_cache", lambda path: None)
    for name in ("_teacher", "_cache"):
        monkeypatch.setattr(demo, name, teacher)
    run(tmp_path)
    plain, distilled = recipes[()], recipes[TINY.methods]
    assert plain.seed == distilled.seed
    assert (plain.epochs, plain.batch_size) == (distilled.epochs, distilled.batch_size)
    assert plain.options == distilled.options


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path) -> None:
    printed = run(tmp_path)
    table = rows(printed)
    assert list(table) == [*NAMES, "all"]
    for name in ("teacher", "student", "distilled student"):
        assert 0 <= float(table[name][0]) <= 1
        assert float(table[name][1]) > 0
    assert table["cache"][3].endswith("iB")
    for name in ("student", "distilled"):
        assert (tmp_path / name / "student.pth").is_file()
        assert list((tmp_path / name).rglob("events.out.tfevents.*"))
    assert json.loads((tmp_path / "demo.json").read_text())["steps"]["cache"]["finished"]
    assert rows(run(tmp_path)) == table
