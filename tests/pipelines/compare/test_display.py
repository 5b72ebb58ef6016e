"""What is shown while cells run."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from kdpipe.pipelines.compare.cells import Cell
from kdpipe.pipelines.compare.display import Display
from kdpipe.pipelines.compare.process import Outcome
from kdpipe.pipelines.compare.results import read_losses, read_progress, read_validations

LINE = (
    "11/27 22:50:26 - mmengine - INFO - Epoch(train)  [{}][ {}/26]  lr: 1.0e-02  eta: 0:01:20  time: 0.35  loss: 2.7\n"
)


def begun(folder: Path, *steps: tuple[int, int], name: str = "20261127_225026", epochs: int = 4) -> None:
    """A training that has written these epochs and steps to its log."""
    (folder / "kdpipe").mkdir(parents=True, exist_ok=True)
    (folder / "kdpipe" / "recipe.json").write_text(json.dumps({"kdpipe": "0", "training": "student", "epochs": epochs}))
    (folder / name).mkdir(exist_ok=True)
    (folder / name / f"{name}.log").write_text("".join(LINE.format(*step) for step in steps))


def test_progress_is_that_of_the_newest_log_with_a_step(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    begun(tmp_path)
    assert read_progress(tmp_path) is None
    begun(tmp_path, (1, 10), (2, 20))
    progress = read_progress(tmp_path)
    assert progress is not None
    assert (progress.epoch, progress.step, progress.steps) == (2, 20, 26)
    assert progress.share == pytest.approx((1 + 20 / 26) / 4)
    begun(tmp_path, name="20261127_225027")  # has just been started again
    assert read_progress(tmp_path) == progress
    begun(tmp_path, (3, 10), name="20261127_225028")
    assert read_progress(tmp_path) != progress


def test_figures_of_a_training_that_was_gone_on_with(tmp_path: Path) -> None:
    def write(name: str, *lines: dict[str, float]) -> None:
        folder = tmp_path / name / "vis_data"
        folder.mkdir(parents=True)
        (folder / "scalars.json").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"loss": 1, "st')

    write("20261127_225026", {"loss": 3, "step": 10}, {"coco/bbox_mAP": 0.1, "step": 1}, {"loss": 2, "step": 20})
    write("20261127_225027", {"loss": 1, "step": 20}, {"coco/bbox_mAP": 0.2, "step": 2})
    assert read_losses(tmp_path) == [{"loss": 3, "step": 10}, {"loss": 1, "step": 20}]
    assert [(line["epoch"], line["coco/bbox_mAP"]) for line in read_validations(tmp_path)] == [(1, 0.1), (2, 0.2)]


@pytest.fixture
def cells(tmp_path: Path) -> list[Cell]:
    return [Cell(seed, tmp_path / "a" / "none" / f"seed-{seed}", (), {}) for seed in range(3)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("kdpipe.pipelines.compare.display.time.monotonic", lambda: now[0])
    return now


def test_lines_where_there_is_no_terminal(cells: list[Cell], clock: list[float]) -> None:
    said = io.StringIO()
    begun(cells[0].folder, (2, 26))  # half of it was done before
    with Display(cells, 1, Console(file=said, width=300)) as shown:
        shown.started(cells[0])
        shown.started(cells[1])
        begun(cells[0].folder, (4, 13))
        clock[0] += 70
        shown.update()
        clock[0] += 1
        shown.update()
        shown.ended(cells[1], Outcome(1, "a bad picture"))
        (cells[0].folder / "result.json").write_text(json.dumps({"ap": 0.5}))
        shown.ended(cells[0], Outcome(0))
    lines = said.getvalue().splitlines()
    assert lines[:2] == ["a/none/seed-0: started", "a/none/seed-1: started"]
    # of four, 1.5 were done, and 0.375 came in 70 s: 2.125 are left
    assert lines[2] == (
        "1 of 4 done, 2 running, 1 waiting, 0:06:37 left: a/none/seed-0 epoch 4/4, step 13/26; a/none/seed-1 starting"
    )
    assert lines[3:5] == ["a/none/seed-1: failed: a bad picture", f"  {cells[1].log}"]
    assert lines[5:] == ["a/none/seed-0: done, AP 0.500"]


def test_a_table_in_a_terminal(cells: list[Cell], clock: list[float]) -> None:
    said = io.StringIO()
    begun(cells[1].folder, (1, 13))
    with Display(cells, 0, Console(file=said, width=120, force_terminal=True)) as shown:
        shown.started(cells[0])
        shown.started(cells[1])
        clock[0] += 2
        shown.update()
        shown.ended(cells[0], None)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.getvalue())
    assert re.search(r"a/none/seed-1 .*━.* epoch 1/4, step 13/26", text)
    assert "0 of 3 done, 2 running, 1 waiting" in text
    assert "a/none/seed-0: its machine or process was lost" in text
