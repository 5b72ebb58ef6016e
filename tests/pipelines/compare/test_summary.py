"""What is said of trainings, from results that are written by hand."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kdpipe.cache.identity import digest_tensors
from kdpipe.pipelines.commands.compare import write_summary
from kdpipe.pipelines.compare.cells import Cell, Row
from kdpipe.pipelines.compare.process import Outcome
from kdpipe.pipelines.compare.summary import csv_text
from kdpipe.pipelines.compare.teacher_ap import TeacherAP, known_ap


def training(folder: Path, ap: float | None, **record: Any) -> None:
    """A finished training with that AP."""
    (folder / "kdpipe").mkdir(parents=True)
    recipe = {"kdpipe": "0.1", "training": "student", "saved": True, "validation": "val", "data": "train", **record}
    (folder / "kdpipe" / "recipe.json").write_text(json.dumps(recipe))
    result: dict[str, Any] = {"ap": ap, "epoch": 12, "metrics": {}, "seconds_per_step": 0.5, "peak_memory": 2**30}
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def row(tmp_path: Path) -> Callable[..., Row]:
    def make(student: str, methods: str, aps: Mapping[int, float | None], **record: Any) -> Row:
        """Cells that are finished, and a last one that is not."""
        options = {"student": student, "methods": methods}
        cells = [
            Cell(seed, tmp_path / student / methods / f"seed-{seed}", (), {"options": options, "config": student})
            for seed in [*aps, 9]
        ]
        for cell, ap in zip(cells, aps.values(), strict=False):
            training(cell.folder, ap, **record)
        return Row(student, methods, f"{student}.py", cells)

    return make


PLAIN, DISTILLED = {0: 0.30, 1: 0.32, 2: 0.31}, {0: 0.34, 1: 0.35, 2: 0.36}


def written(tmp_path: Path, rows: list[Row], teacher: TeacherAP | None = None) -> tuple[list[Any], str]:
    """The rows of `compare.json`, and what is printed."""
    said = io.StringIO()
    failed = {rows[-1].cells[-1].name: Outcome(1, "a bad picture")}
    write_summary(rows, tmp_path, failed, teacher, Console(file=said, width=120, soft_wrap=True))
    return json.loads((tmp_path / "compare.json").read_text())["rows"], said.getvalue()


def test_gain_and_gap(tmp_path: Path, row: Callable[..., Row]) -> None:
    noisy = {0: 0.34, 1: 0.28, 2: 0.33}
    rows = [row("a", "none", PLAIN), row("a", "ckd", DISTILLED), row("a", "pred", noisy), row("b", "pred", PLAIN)]
    (plain, distilled, noise, other), said = written(tmp_path, rows, TeacherAP(0.41, "x"))
    assert plain["ap"] == pytest.approx({"mean": 0.31, "deviation": 0.01, "lowest": 0.3, "highest": 0.32, "count": 3})
    # gains 0.04, 0.03, 0.05: mean 0.04, deviation 0.01, and 4.303 of Student's t over the root of 3
    low, high = distilled["gain"]["interval"]
    assert (distilled["gain"]["mean"], low, high) == pytest.approx((0.04, 0.04 - 0.02484, 0.04 + 0.02484), abs=1e-5)
    assert distilled["gain"]["within_noise"] is False
    assert distilled["gap_closed"] == pytest.approx(0.4)
    assert noise["gain"]["within_noise"] is True
    assert (other["baseline"], other["gain"], other["gap_closed"]) == (None, None, None)
    assert [cell["state"] for cell in other["cells"]] == ["done", "done", "done", "failed"]
    assert other["cells"][3]["message"] == "a bad picture"
    assert plain["cells"][3] == {"seed": 9, "folder": str(rows[0].cells[3].folder), "state": "unfinished"}
    line = next(line for line in said.splitlines() if "ckd" in line)
    for text in ("0.350 ± 0.010", "3 of 4", "+0.040 (+0.015 to +0.065)", "40 %"):
        assert text in line
    assert "+0.007 (-0.097 to +0.110, within noise)" in said
    assert "Teacher: AP 0.410 (x)." in said


def test_a_teacher_below_its_student_leaves_no_gap(tmp_path: Path, row: Callable[..., Row]) -> None:
    (_, distilled), _ = written(tmp_path, [row("a", "none", PLAIN), row("a", "ckd", DISTILLED)], TeacherAP(0.3, "x"))
    assert distilled["gap_closed"] is None


def test_trainings_of_which_ap_was_not_measured(tmp_path: Path, row: Callable[..., Row]) -> None:
    (plain, distilled), said = written(tmp_path, [row("a", "none", {0: None}), row("a", "ckd", {0: 0.3})])
    assert plain["ap"] is None
    assert plain["seconds_per_step"] == 0.5
    assert distilled["gain"] is None
    assert "0 of 2" in said


def test_what_was_not_the_same(tmp_path: Path, row: Callable[..., Row]) -> None:
    rows = [row("a", "none", PLAIN), row("a", "ckd", DISTILLED, validation="other", kdpipe="0.2")]
    _, said = written(tmp_path, rows)
    assert "Warning: not all of these had the same validation images." in said
    assert "Warning: not all of these had the same versions of kdpipe." in said
    assert "training images" not in said


def test_csv(tmp_path: Path, row: Callable[..., Row]) -> None:
    written(tmp_path, [row("a", "none", PLAIN), row("a,b", "ckd", {1: 0.5})])
    text = csv_text(json.loads((tmp_path / "compare.json").read_text()))
    assert text == (tmp_path / "compare.csv").read_text()
    header, first, second = text.splitlines()
    assert header.startswith("student,methods,config,ap_mean,ap_deviation,")
    assert header.endswith(",ap_seed_0,ap_seed_1,ap_seed_2,ap_seed_9")
    assert first.endswith(",0.3,0.32,0.31,")
    assert second.startswith('"a,b",ckd,"a,b.py",0.5,,')
    assert second.endswith(",,0.5,,")


def test_the_teachers_ap_is_that_of_its_own_training(tmp_path: Path, row: Callable[..., Row]) -> None:
    weights = {"conv.weight": torch.ones(2, 3)}
    of_teacher = {"teacher": {"teacher": {"weights": digest_tensors(weights)}}}
    cells = row("a", "none", PLAIN, **of_teacher).cells[:3]
    teacher = tmp_path / "teacher" / "teacher.pth"
    assert known_ap(teacher, cells) is None
    training(teacher.parent, 0.5)
    assert known_ap(teacher, cells) is None
    torch.save({"state_dict": weights}, teacher)
    known = known_ap(teacher, cells)
    assert known is not None
    assert (known.ap, known.source) == (0.5, str(teacher.parent / "result.json"))
    assert known_ap(teacher.with_name("epoch_1.pth"), cells) == known  # the last one by another name, it may be
    other_images = row("b", "none", {0: 0.3}, validation="other", **of_teacher).cells[:1]
    assert known_ap(teacher, [*cells, *other_images]) is None
    torch.save({"state_dict": {"conv.weight": torch.zeros(2, 3)}}, teacher)  # it has been trained on since
    assert known_ap(teacher, cells) is None
    training(tmp_path / "unmeasured", None)
    assert known_ap(tmp_path / "unmeasured" / "teacher.pth", cells) is None


@pytest.mark.parametrize("content", ["[]", "{}", "no JSON"])
def test_what_no_comparison_wrote_stays(tmp_path: Path, row: Callable[..., Row], content: str) -> None:
    from kdpipe.cache.errors import KdpipeError
    from kdpipe.pipelines.commands.compare import check_place

    (tmp_path / "compare.json").write_text(content)
    with pytest.raises(KdpipeError, match="no comparison wrote it"):
        check_place(tmp_path, [])
