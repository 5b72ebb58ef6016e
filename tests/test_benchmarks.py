"""Benchmarks that can only be run elsewhere still run."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from kdpipe.pipelines.cli.main import cli
from kdpipe.pipelines.compare.grid import read_grid

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gpu_benchmark_measures_every_row_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(out), "--device", "cpu", "--small"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    ended = subprocess.run([*command, "--seconds", "840"], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()][1:]
    assert {row["row"]: row["note"] for row in rows if row["note"]} == {}
    listed = subprocess.run([*command, "--list"], env=environment, capture_output=True, text=True, check=True)
    assert [row["row"] for row in rows] == listed.stdout.splitlines()
    cells = {row["row"]: row["cells"] for row in rows}
    from_cache = cells["train/faster-rcnn/float32/pyramid, student's RoIs"]
    assert from_cache["s/step"] > 0
    assert from_cache["positive"] > 0
    assert cells["teacher/x101/pyramid"]["to the end, x forward pass"] > 0
    stages = cells["stages/x101/pyramid"]
    assert "not found" not in stages, "a function whose time is taken has another name by now"
    assert sum(isinstance(value, float) and value > 0 for value in stages.values()) > 10
    table = (out / "gpu.md").read_text()
    assert all(f"| {row['row'].partition('/')[2]} |" in table for row in rows)
    assert not list(tmp_path.glob("kdpipe-gpu-*"))


def test_gpu_benchmark_without_a_gpu_is_a_usage_error(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path)]
    ended = subprocess.run(
        command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "no CUDA device" in ended.stderr


@pytest.mark.parametrize("data_set", ["bccd", "cards"])
def test_questions_of_ap_are_grids(data_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every study is a grid that `compare` reads, and every row gains over a student without distillation."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bccd = importlib.import_module("bccd")
    for name, study in bccd.studies(bccd.DATA[data_set], tmp_path).items():
        file = tmp_path / f"{name}.toml"
        file.write_text(bccd.grid(tmp_path, bccd.DATA[data_set], tmp_path, study, study.rows))
        rows = {row.name: row for row in read_grid(file).rows}
        assert rows.keys() == {row.name for row in study.rows}
        aps = {f"{row.name}, {methods}": {0: 0.25, 1: 0.5} for row in study.rows for methods in row.methods}
        aps |= {row: {0: 0.375, 2: 1.0} for row in aps if not row.endswith(", none")}
        lines = [line for line in bccd.table(study, aps).splitlines() if line.startswith("| ")][1:]
        assert len(lines) == len(aps)
        assert all(line.endswith("|  |" if ", none |" in line else "| +12.5 |") for line in lines)
        for one, other in study.differences:
            assert {one, other} <= aps.keys()
            assert f"- {one} less {other}: +0.0" in bccd.table(study, aps)


def test_rows_that_are_asked_for_bring_what_they_gain_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bccd = importlib.import_module("bccd")
    rows = bccd.studies(bccd.DATA["bccd"], Path())["two-stage"].rows
    names = [(row.name, list(row.methods)) for row in bccd.asked_for(rows, ["student-rois, sgfi"])]
    assert names == [("plain", ["none"]), ("student-rois", ["sgfi"])]
    whole = [(row.name, list(row.methods)) for row in bccd.asked_for(rows, ["teacher-rois"])]
    assert whole == [("plain", ["none"]), ("teacher-rois", list(rows[1].methods))]
    assert bccd.asked_for(rows, []) == list(rows)


def test_what_questions_of_ap_ask_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers, also those that were stopped, caches, and the last look at the test photographs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bccd = importlib.import_module("bccd")
    data_set = bccd.DATA["bccd"]
    (tmp_path / data_set.images).mkdir()
    for name in ("teacher", "cascade-teacher", "student"):
        (tmp_path / name).mkdir()
    for name in (
        "train.json",
        "test.json",
        "teacher/teacher.pth",
        "cascade-teacher/teacher.pth",
        "student/student.pth",
    ):
        (tmp_path / name).write_text("{}")
    asked = []

    def run(arguments: list[str], log: Path) -> None:
        assert isinstance(cli, click.Group)
        context = cli.commands[arguments[0]].make_context(arguments[0], list(arguments[1:]))
        asked.append((arguments[0], context.params.get("resume")))
        log.write_text("AP 0.500")

    monkeypatch.setattr(bccd, "run", run)
    bccd.prepare(tmp_path, data_set, tmp_path, ["pyramid", "cascade"])
    (tmp_path / "teacher" / "last_checkpoint").write_text("epoch_1.pth")
    bccd.train_teacher(tmp_path, data_set, "teacher", tmp_path / "teacher")
    bccd.test_ap(tmp_path, data_set, tmp_path / "student")
    made = [("train-teacher", False), ("cache-teacher", None)]
    assert asked == [*made, *made, ("train-teacher", True), ("evaluate", None)]
    assert json.loads((tmp_path / "student" / "test.json").read_text()) == {"ap": 0.5}
