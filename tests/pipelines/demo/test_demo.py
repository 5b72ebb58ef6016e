import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.demo import run as demo
from kdpipe.pipelines.demo.run import DemoSettings, Width, run_demo
from kdpipe.pipelines.training.options import TrainingOptions
from kdpipe.pipelines.training.work_dir import WorkDir

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
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Trainings that only write what they came to down, and a cache that is only a root: (name, resumed) of each."""
    done: list[tuple[str, bool]] = []

    def train(*args: Any, resume: bool, **more: Any) -> None:
        (work_dir,) = (value for value in args if isinstance(value, Path))
        (epochs,) = (value.epochs for value in args if isinstance(value, TrainingOptions))
        done.append((work_dir.name, resume))
        work = WorkDir(work_dir)
        work.folder.mkdir(parents=True, exist_ok=True)
        work.write_record({"kdpipe": "1", "training": "x"}, saved=True)
        (work_dir / "last_checkpoint").touch()
        work.write("result.json", {"epoch": epochs, "ap": 0.25, "seconds_per_step": 0.5})

    def cache(*args: Any, **more: Any) -> Any:
        done.append(("cache", False))
        return SimpleNamespace(disk_bytes=3 << 20)

    monkeypatch.setattr(demo, "train_detector", train)
    monkeypatch.setattr(demo, "train_student", train)
    monkeypatch.setattr(demo, "cache_teacher", cache)
    monkeypatch.setattr(demo, "open_cache", lambda *args, **options: None)
    monkeypatch.setattr(demo, "CachedTrainingTeacher", lambda cache: cache)
    monkeypatch.setattr(demo, "load_checkpoint", lambda path: None)
    monkeypatch.setattr(demo, "teacher_config", lambda *args: None)
    return done


ALL = [("teacher", False), ("cache", False), ("student", False), ("distilled", False)]


def test_a_table_ends_the_demo(tmp_path: Path, trainings: list[Any]) -> None:
    table = rows(run(tmp_path / "demo"))
    assert trainings == ALL
    assert list(table) == [*NAMES, "all"]
    assert table["teacher"][:2] == ["0.250", "0.50"]
    assert table["cache"] == ["", "", "0 s", "3.0 MiB"]


def test_a_training_that_is_done_is_not_repeated(tmp_path: Path, trainings: list[Any]) -> None:
    first = run(tmp_path)
    drawn = (tmp_path / "shapes" / "train" / "shapes_000000.jpg").stat().st_mtime_ns
    trainings.clear()
    assert rows(run(tmp_path)).keys() == rows(first).keys()
    assert trainings == [("cache", False)]  # which finds by itself that nothing is missing
    assert (tmp_path / "shapes" / "train" / "shapes_000000.jpg").stat().st_mtime_ns == drawn


@pytest.mark.parametrize("result", [None, {"epoch": 1, "ap": 0.1}, {"epoch": 2, "ap": None}])
@pytest.mark.parametrize("saved", [False, True])
def test_a_training_that_is_not_done_goes_on(
    tmp_path: Path, trainings: list[Any], result: dict[str, Any] | None, saved: bool
) -> None:
    run(tmp_path)
    trainings.clear()
    (tmp_path / "teacher" / "result.json").unlink()
    if result is not None:
        (tmp_path / "teacher" / "result.json").write_text(json.dumps(result))
    if not saved:
        (tmp_path / "teacher" / "last_checkpoint").unlink()
    assert rows(run(tmp_path))["teacher"][0] == "0.250"
    assert trainings == [("teacher", saved), ("cache", False)]


def test_fresh_starts_anew_and_deletes_nothing_else(tmp_path: Path, trainings: list[Any]) -> None:
    run(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "teacher" / "epoch_1.pth").touch()
    (tmp_path / "shapes" / "train" / "shapes_000000.jpg").write_bytes(b"damaged")
    for name in ("train", "val"):  # as where the drawing was interrupted
        (tmp_path / "shapes" / "annotations" / f"{name}.json").unlink()
    trainings.clear()
    run(tmp_path, fresh=True)
    assert trainings == ALL
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "teacher" / "epoch_1.pth").exists()
    assert (tmp_path / "shapes" / "train" / "shapes_000000.jpg").read_bytes() != b"damaged"


@pytest.mark.parametrize("name", ["shapes", "teacher", "shapes.zarr", "student", "distilled"])
def test_a_folder_that_the_demo_did_not_make_is_left_alone(
    tmp_path: Path, trainings: list[Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "open_cache", open_cache)
    run_demo_until_cache(tmp_path)
    if (tmp_path / name).exists():
        shutil.rmtree(tmp_path / name)
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KdpipeError, match=name):
        run(tmp_path, fresh=True)
    assert sorted(tmp_path.rglob("*")) == before


def run_demo_until_cache(folder: Path) -> None:
    """Pictures and teacher are there."""
    console = Console(file=io.StringIO())
    demo._draw(folder, TINY, console)
    demo._teacher(folder, TINY, console)


def test_an_interrupted_deletion_leaves_what_can_go_on(
    tmp_path: Path, trainings: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    remove = shutil.rmtree

    def stop(path: Path, **options: Any) -> None:
        if path.name == "teacher":
            raise KeyboardInterrupt
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr("kdpipe.pipelines.demo.run.shutil.rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes", "teacher"]
    trainings.clear()
    run(tmp_path)
    assert trainings == ALL[1:]


def test_pictures_of_another_origin_are_left_alone(tmp_path: Path, trainings: list[Any]) -> None:
    annotations = tmp_path / "shapes" / "annotations" / "train.json"
    annotations.parent.mkdir(parents=True)
    annotations.write_text('{"images": []}')
    for fresh in (False, True):
        with pytest.raises(KdpipeError, match="was not drawn by kdpipe"):
            run(tmp_path, fresh=fresh)
    assert annotations.read_text() == '{"images": []}'
    assert trainings == []


def test_both_students_differ_in_the_methods_only(
    tmp_path: Path, trainings: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: dict[Sequence[str], Any] = {}
    train: Any = vars(demo)["train_student"]

    def watch(*args: Any, **more: Any) -> Any:
        recipes[tuple(args[3])] = args[4]
        return train(*args, **more)

    monkeypatch.setattr(demo, "train_student", watch)
    run(tmp_path)
    plain, distilled = recipes[()], recipes[TINY.methods]
    assert plain == distilled


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
    again = rows(run(tmp_path))
    for name in NAMES:
        assert [again[name][column] for column in (0, 1, 3)] == [table[name][column] for column in (0, 1, 3)]
