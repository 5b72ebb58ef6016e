"""`kdpipe compare`: trainings of one epoch, in this process where they need none of their own."""

import csv
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from kdpipe.pipelines.cli.compare_rows import RowBuilder
from kdpipe.pipelines.commands import compare as commands
from kdpipe.pipelines.compare import run
from kdpipe.pipelines.compare.grid import read_grid
from kdpipe.pipelines.compare.process import Outcome
from kdpipe.pipelines.compare.results import (
    find_trainings,
    read_detections,
    read_losses,
    read_progress,
    read_validations,
)

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


class InThisProcess:
    """A stand-in for `CellProcess`."""

    kit: "Kit"
    started: list[list[str]]

    def __init__(self, words: Sequence[str], log: Path, environment: Mapping[str, str], shown: str) -> None:
        self.started.append(list(words))
        ended = self.kit.run(*words, code=None)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"$ {shown}\n{ended.out}{ended.err}")
        last = ended.err.strip().removeprefix("Error: ")
        self._outcome = Outcome(ended.code, last)

    def poll(self) -> Outcome:
        return self._outcome

    def stop(self) -> None: ...

    def end(self) -> None: ...


@pytest.fixture
def started(kit: "Kit", monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Lets cells run in this process; the words of each."""
    monkeypatch.setattr(InThisProcess, "kit", kit, raising=False)
    monkeypatch.setattr(InThisProcess, "started", [], raising=False)
    monkeypatch.setattr(run, "CellProcess", InThisProcess)
    return InThisProcess.started


def command(kit: "Kit", *options: object, epochs: int = 1) -> tuple[object, ...]:
    small = ("--recipe", "paper", "--epochs", epochs, "--batch-size", 4, "--workers", 0)
    return ("compare", "--cache", kit.cache, "--student", kit.student, *small, *kit.val, "--work-dir", "w", *options)


BOTH = ("--methods", "none", "--methods", "sgfi,pred")


def test_students_from_one_cache(kit: "Kit", work: Path, started: list[list[str]]) -> None:
    both = command(kit, *BOTH, "--seeds", 2, "--seed", 5, "--teacher-ap", 0.9)
    out = kit.run(*both).out
    names = [f"student/{methods}/seed-{seed}" for seed in (5, 6) for methods in ("none", "sgfi-pred")]
    assert [line.split(":")[0] for line in out.splitlines() if line.endswith(": started")] == names
    assert find_trainings(work / "w") == sorted(work / "w" / name for name in names)
    summary = json.loads((work / "w" / "compare.json").read_text())
    plain, distilled = summary["rows"]
    assert (plain["student"], plain["methods"], plain["gain"], plain["baseline"]) == ("student", "none", None, None)
    assert (distilled["methods"], distilled["baseline"]) == ("sgfi,pred", "student, none")
    results = {name: json.loads((work / "w" / name / "result.json").read_text()) for name in names}
    gains = [results[names[2 * i + 1]]["ap"] - results[names[2 * i]]["ap"] for i in (0, 1)]
    assert distilled["gain"] == {
        "mean": pytest.approx(sum(gains) / 2),
        "pairs": 2,
        "interval": None,
        "within_noise": None,
    }
    before = (results[names[0]]["ap"] + results[names[2]]["ap"]) / 2
    assert distilled["gap_closed"] == pytest.approx(sum(gains) / 2 / (0.9 - before))
    assert distilled["cells"][1]["seed"] == 6
    assert distilled["cells"][1]["metrics"] == results[names[3]]["metrics"]
    student = torch.load(work / "w" / names[0] / "student.pth", weights_only=True)["state_dict"]
    buffers = sum(value.numel() for name, value in student.items() if "running_" in name or "num_batches" in name)
    assert plain["parameters"] == sum(value.numel() for value in student.values()) - buffers
    assert plain["gflops"] > 0
    assert plain["input_size"] == [128, 96]
    lines = list(csv.DictReader((work / "w" / "compare.csv").open()))
    assert [line["methods"] for line in lines] == ["none", "sgfi,pred"]
    assert float(lines[1]["ap_seed_6"]) == results[names[3]]["ap"]
    assert "within noise" not in out
    assert "Fewer than 3 seeds" in out
    assert "Teacher: AP 0.900 (--teacher-ap)." in out

    # again: nothing is trained, and the same is said
    started.clear()
    again = kit.run(*both).out
    assert started == []
    assert "4 trainings in w, 4 of which are finished." in again
    assert json.loads((work / "w" / "compare.json").read_text()) == summary


def test_what_a_cell_leaves_can_be_read(kit: "Kit", work: Path, started: list[list[str]]) -> None:
    kit.run(*command(kit, "--methods", "pred", epochs=2))
    folder = work / "w" / "student" / "pred" / "seed-0"
    progress = read_progress(folder)
    assert progress is not None
    assert (progress.epoch, progress.step, progress.steps, progress.epochs, progress.share) == (2, 2, 2, 2, 1.0)
    assert [line["step"] for line in read_losses(folder)] == [2, 4]
    assert "loss_kd_cls" in read_losses(folder)[0]
    validations = read_validations(folder)
    assert [line["epoch"] for line in validations] == [1, 2]
    result = json.loads((folder / "result.json").read_text())
    assert validations[1]["coco/bbox_mAP"] == result["ap"]
    detections = read_detections(folder)
    assert detections is not None
    images = {image["id"] for image in json.loads((folder / "kdpipe" / "val.json").read_text())["images"]}
    assert {detection["image_id"] for detection in detections} <= images
    assert (work / "w" / "student" / "pred" / "seed-0.log").read_text().startswith("$ kdpipe train-student --student /")


def test_other_options_are_refused(kit: "Kit", work: Path, started: list[list[str]]) -> None:
    kit.run(*command(kit, "--methods", "none"))
    started.clear()
    message = kit.refused(*command(kit, "--methods", "none", "-o", "model.test_cfg.rpn.max_per_img=20", epochs=2))
    assert "student/none/seed-0 was trained with other options:" in message
    assert "epochs: found 1, wanted 2" in message
    assert "overrides: found nothing" in message
    assert started == []
    other = work / "student.py"
    other.write_text(kit.student.read_text() + "\nfind_unused_parameters = True\n")
    assert "config of the student (digest)" in kit.refused(
        *("compare", "--cache", kit.cache, "--student", other, "--recipe", "paper", "--epochs", 1),
        *("--batch-size", 4, "--work-dir", "w", "--methods", "none", *kit.val),
    )
    # one that has no checkpoint yet begins anew
    begun = work / "w" / "student" / "pred" / "seed-0" / "kdpipe"
    begun.mkdir(parents=True)
    record = json.loads((work / "w" / "student" / "none" / "seed-0" / "kdpipe" / "recipe.json").read_text())
    (begun / "recipe.json").write_text(json.dumps(record))
    kit.run(*command(kit, "--methods", "pred"))
    assert len(started) == 1
    started.clear()
    # how many loaders there are changes nothing
    kit.run(*command(kit, "--methods", "none", "--workers", 1))
    assert started == []


def test_a_cell_that_fails_leaves_the_others_alone(kit: "Kit", work: Path, started: list[list[str]]) -> None:
    ended = kit.run(*command(kit, "--methods", "ht", "--methods", "none"), code=1)
    assert len(started) == 2
    log = work / "w" / "student" / "ht" / "seed-0.log"
    assert f"Failed: student/ht/seed-0: {log.read_text().partition('Error: ')[2].splitlines()[0]}" in ended.out
    assert f"\n  {log}\n" in ended.out
    rows = json.loads((work / "w" / "compare.json").read_text())["rows"]
    assert [row["cells"][0]["state"] for row in rows] == ["failed", "done"]
    assert rows[0]["ap"] is None


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(folder / "student.pth", weights_only=True)["state_dict"])


def same(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_stopped_it_goes_on(kit: "Kit", work: Path, started: list[list[str]]) -> None:
    kit.run(*command(kit, "--methods", "pred", "--work-dir", "undisturbed", epochs=2))
    out = kit.interrupted(*command(kit, "--methods", "pred", epochs=2), code=1).out
    assert "student/pred/seed-0: failed: it was interrupted, and can go on" in out
    out = kit.run(*command(kit, "--methods", "pred", epochs=2)).out
    place = Path("student", "pred", "seed-0")
    assert "1 of 2 epochs are done; the others follow" in (work / "w" / place.with_name("seed-0.log")).read_text()
    assert same(work / "w" / place, work / "undisturbed" / place)


def test_printed_commands_do_the_same(kit: "Kit", work: Path, started: list[list[str]]) -> None:
    rest = (*BOTH, "-o", "optim_wrapper.clip_grad={'max_norm': 0.1}")
    lines = kit.run(*command(kit, *rest, "--print-commands", "--work-dir", "by hand")).out.splitlines()
    assert len(lines) == 2
    assert not (work / "by hand").exists()
    kit.run(*command(kit, *rest))
    started.clear()
    (work / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work / "elsewhere")  # paths are absolute
        for line in lines:
            words = shlex.split(line)
            assert words[:2] == ["kdpipe", "train-student"]
            kit.run(*words[1:])
        kit.run(*shlex.split(lines[0])[1:])  # one that has been run changes nothing
    for name in ("none", "sgfi-pred"):
        place = Path("student", name, "seed-0")
        assert same(work / "w" / place, work / "by hand" / place)
    assert "2 of which are finished" in kit.run(*command(kit, *rest, "--work-dir", "by hand")).out
    assert started == []


GRID = """
seeds = 2
[options]
epochs = 1
[rows.student]
methods = ["none", "pred"]
[rows.student-teacher-rois]
methods = "pred"
rois = "teacher"
cfg-options = { "distill.rois.num" = 16 }
[rows.narrow]
methods = "pred"
cfg-options = { "model.test_cfg.rcnn.max_per_img" = 20 }
"""


def test_a_grid(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "run_cells", lambda *args: {})
    (work / "grid.toml").write_text(GRID)
    rest = ("--cache", kit.cache, "--recipe", "paper", "--batch-size", 4, "--workers", 0, *kit.val)
    named = ("--grid", "grid.toml", "-o", "model.rpn_head.loss_bbox.loss_weight=2.0")
    lines = kit.run("compare", *named, *rest, "--print-commands").out.splitlines()
    assert len(lines) == 8
    assert all("--cfg-options model.rpn_head.loss_bbox.loss_weight=2.0 " in line for line in lines)
    assert ["--rois teacher" in line for line in lines] == [False] * 4 + [True] * 2 + [False] * 2
    grid = work / "grid.toml"
    grid.write_text(f'{GRID}\n[rows.other]\nmethods = "pred"\nbaseline = "student"\n')
    grid.write_text(
        grid.read_text().replace("seeds = 2", "seeds = 1").replace("[options]", f'[options]\nstudent = "{kit.student}"')
    )
    kit.run("compare", *named, *rest, "--work-dir", "w")
    rows = json.loads((work / "w" / "compare.json").read_text())["rows"]
    assert [(row["student"], row["baseline"]) for row in rows] == [
        ("student", None),
        ("student", "student, none"),
        ("student-teacher-rois", "student, none"),  # differs in its distillation only
        ("narrow", None),
        ("other", "student, none"),
    ]
    assert kit.run("compare", *named, "--student", "x", *rest, code=2).err.count("leave --student and --methods out")
    grid.write_text("[rows.a]\nepoch = 3")
    assert "student a: No such option" in kit.run("compare", *named, *rest, code=2).err


def test_the_default_methods_have_a_name(kit: "Kit", work: Path) -> None:
    rest = ("--cache", kit.cache, "--student", kit.student, "--print-commands")
    unnamed = kit.run("compare", *rest).out
    assert kit.run("compare", *rest, "--methods", "none", "--methods", "default").out == unnamed
    assert "--methods sgfi,ckd,pred " in unnamed


def test_what_cannot_be_compared(kit: "Kit", work: Path, started: list[list[str]]) -> None:
    start = ("compare", "--student", kit.student)
    assert "needs either --cache or --teacher-ckpt" in kit.run(*start, code=2).err
    assert "No such option" in kit.run(*start, "--resume", code=2).err
    assert "name its methods" in kit.run(*start, "--teacher-ckpt", kit.teacher, code=2).err
    cached = (*start, "--cache", kit.cache)
    assert "Two of --student are called student" in kit.run(*cached, "--student", "a/student.py", code=2).err
    assert "neither a file nor a config" in kit.refused(*cached, "--student", "nothing")
    assert "sgfo" in kit.refused(*cached, "--methods", "sgfo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        message = kit.refused(*cached)
        assert "A comparison runs in one process, and this is one of 2." in message
    assert "student: there are no validation images, so that AP would not" in kit.refused(*cached)
    (work / "grid.toml").write_text('[rows.a]\nmethods = "ckd"\n[rows.b]\nmethods = "sgfi"\nbaseline = "a"')
    named = ("compare", "--cache", kit.cache, "--grid", "grid.toml", *kit.val)
    assert "Row b has baseline a, which is not trained without" in kit.run(*named, code=2).err
    (work / "w").mkdir()
    (work / "w" / "compare.json").write_text("{}")
    assert "no comparison wrote it" in kit.refused(*cached, "--work-dir", "w")
    assert started == []


def test_students_that_see_other_sizes_are_no_baseline(kit: "Kit", work: Path) -> None:
    """Without --scale, that of the cache is the student's."""
    kit.run("cache-teacher", *kit.source, "--scale", "64x48", "--proposals", 40, "--out", "small.zarr")
    lines = ('[rows.a]\nmethods = "none"', '[rows.b]\nmethods = "ckd"\ncache = "small.zarr"')
    same = '[rows.c]\nmethods = "ckd"\ncache = "small.zarr"\nscale = "128x96"'
    (work / "grid.toml").write_text(
        "\n".join([f'[options]\nstudent = "{kit.student}"\ncache = "{kit.cache}"', *lines, same])
    )
    grid = read_grid(work / "grid.toml")
    builder = RowBuilder({}, {}, work / "w", 0, 1)
    rows = [each for row in grid.rows for each in builder.rows(row)]
    assert [row.scale for row in rows] == [(128, 96), (64, 48), (128, 96)]
    assert [each and each.student for each in (row.find_baseline(rows) for row in rows)] == [None, None, "a"]
