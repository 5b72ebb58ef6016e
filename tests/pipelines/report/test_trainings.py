"""Which trainings lie in a folder, and what they logged."""

import json
from pathlib import Path
from typing import Any

import pytest

from kdpipe.cache.errors import KdpipeError
from kdpipe.distill.methods import LOSSES
from kdpipe.pipelines.report.found import Found
from kdpipe.pipelines.report.page import NOTHING, Cell
from kdpipe.pipelines.report.provenance import command_line
from kdpipe.pipelines.report.training_figures import ap_figures, group_colors, loss_figures
from kdpipe.pipelines.report.training_report import training_sections
from kdpipe.pipelines.report.trainings import find_trainings, group_trainings, names_beside


def training(
    folder: Path, *, seed: int = 0, methods: tuple[str, ...] = (), ap: float | None = 0.4, **more: Any
) -> Path:
    """A work directory with what a training records."""
    config = {"model": {"type": "FCOS", "backbone": {"type": "ResNet", "depth": 18}}, "randomness": {"seed": seed}}
    record = {
        **{"kdpipe": "0.1.0", "training": "student", "epochs": 4, "saved": True, "data": "d", "validation": "v"},
        **{"config": config, "distillation": {"methods": list(methods)}},
        **more,
    }
    (folder / "kdpipe").mkdir(parents=True)
    (folder / "kdpipe" / "recipe.json").write_text(json.dumps(record))
    if ap is not None:
        (folder / "result.json").write_text(json.dumps({"epoch": 4, "metrics": {"bbox_mAP": ap}}))
    return folder


def log(folder: Path, start: str, *rows: object) -> None:
    place = folder / start / "vis_data"
    place.mkdir(parents=True)
    (place / "scalars.json").write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in rows))


def test_seeds_belong_together_and_students_without_distillation_come_first(tmp_path: Path) -> None:
    training(tmp_path / "a" / "seed-1", seed=1, methods=("sgfi", "ckd"), ap=0.5)
    training(tmp_path / "a" / "seed-0", seed=0, methods=("sgfi", "ckd"), ap=0.4)
    training(tmp_path / "b" / "seed-0", ap=0.3)
    groups = group_trainings(find_trainings(tmp_path))
    assert [(group.label, group.aps, group.is_plain) for group in groups] == [
        ("plain", [0.3], True),
        ("sgfi + ckd", [0.4, 0.5], False),
    ]
    assert groups[1].ap == pytest.approx(0.45)
    assert groups[0].first.student == "FCOS ResNet-18"


def test_a_mean_between_two_decimals_is_rounded_in_one_way(tmp_path: Path) -> None:
    for seed, ap in enumerate((0.345, 0.389, 0.358, 0.362)):  # the mean is 0.3635, as floats or a little more
        training(tmp_path / f"seed-{seed}", seed=seed, ap=ap)
    (group,) = group_trainings(find_trainings(tmp_path))
    assert f">{group.ap:.3f}<" in ap_figures([group], None)[0].html


def test_what_methods_do_not_tell_apart_is_told_by_student_or_folder(tmp_path: Path) -> None:
    training(tmp_path / "a", command={"options": {"student": "x/fcos.py"}}, epochs=4)
    training(tmp_path / "b", command={"options": {"student": "retina"}}, epochs=5)
    assert [group.label for group in group_trainings(find_trainings(tmp_path))] == ["fcos, plain", "retina, plain"]
    training(tmp_path / "c" / "seed-1", command={"options": {"student": "retina"}}, epochs=6, seed=1)
    training(tmp_path / "d", training="teacher")
    groups = group_trainings(find_trainings(tmp_path))
    assert sorted(group.label for group in groups) == ["a", "b", "c", "teacher"]
    assert group_colors(groups).keys() == {"a", "b", "c"}
    assert names_beside(groups[:1]) == {groups[0].label: groups[0].first.methods_text}


def test_a_gain_is_over_the_same_training(tmp_path: Path) -> None:
    """Two schedules and a rate of one student: each distilled one beside its own, and named by its folder."""
    for name, epochs, plain, distilled in (("short", 4, 0.30, 0.35), ("long", 8, 0.40, 0.45)):
        training(tmp_path / name / "none", ap=plain, epochs=epochs)
        training(tmp_path / name / "sgfi", methods=("sgfi",), ap=distilled, epochs=epochs)
    training(tmp_path / "slow" / "sgfi", methods=("sgfi",), ap=0.5, epochs=8, lr=0.001)
    results, *_ = training_sections(group_trainings(find_trainings(tmp_path)), Found())
    (table,) = results.tables
    rows = {str(row[0]): row[table.columns.index("gain")] for row in table.rows}
    assert rows.keys() == {"short/none", "long/none", "short/sgfi", "long/sgfi", "slow/sgfi"}
    gains = {name: gain.text for name, gain in rows.items() if isinstance(gain, Cell)}
    assert (gains["short/sgfi"], gains["long/sgfi"], gains["slow/sgfi"]) == ("+5.0", "+5.0", NOTHING)
    assert "trained in the same way" in " ".join(results.notes)  # the best has none beside it


def test_a_training_that_has_not_ended(tmp_path: Path) -> None:
    work = training(tmp_path / "a", ap=None)
    (work / "kdpipe" / "validation.json").write_text(json.dumps({"epoch": 2, "metrics": {"bbox_mAP": 0.1}}))
    (found,) = find_trainings(work)
    assert (found.state, found.ap, found.name) == ("2 of 4 epochs, not finished", 0.1, "a")
    training(tmp_path / "b", ap=None, saved=False)  # has not got to its first step
    assert len(find_trainings(tmp_path)) == 1


def test_a_log_of_several_starts(tmp_path: Path) -> None:
    work = training(tmp_path / "a")
    steps = [
        {"loss": 10.0 - step, "loss_sgfi": 1, "epoch": 1 + step // 6, "iter": step, "step": step} for step in (3, 5, 9)
    ]
    log(work, "20260101_000000", *steps[:2], {"coco/bbox_mAP": 0.1, "step": 1}, '{"loss": 3, "ep')
    log(work, "20260102_000000", {**steps[1], "loss": 4.5}, steps[2], {"coco/bbox_mAP": 0.2, "step": 2})
    (found,) = find_trainings(work)
    assert found.curve("loss") == [(0.6, 7.0), (1.0, 4.5), (1.8, 1.0)]
    assert found.curve("ap") == [(1.0, 0.1), (2.0, 0.2)]
    assert found.logged("loss_") == ["loss_sgfi"]
    assert found.curve("nothing") == []


@pytest.mark.parametrize("name", [loss.log_name for loss in LOSSES.values()])
def test_each_distillation_loss_is_drawn_with_those_of_the_distillation(tmp_path: Path, name: str) -> None:
    work = training(tmp_path / "a", methods=("sgfi",))
    log(work, "20260101_000000", {"loss": 2.0, "loss_bbox": 1.0, name: 1.0, "epoch": 1, "step": 1})
    figures = loss_figures(group_trainings(find_trainings(work)))
    assert [figure.name for figure in figures] == ["losses", "distillation-losses"]


def test_a_folder_without_trainings(tmp_path: Path) -> None:
    with pytest.raises(KdpipeError, match="holds no training of kdpipe"):
        find_trainings(tmp_path)


def test_the_command_line(tmp_path: Path) -> None:
    options = {
        **{"cache": "/c d.zarr", "student": "fcos", "methods": "sgfi", "roi_source": "teacher", "seed": 3},
        **{"allow_partial": True, "amp": False, "scale": [192, 144], "overrides": ["a=1", "b=2"]},
    }
    work = training(tmp_path / "a", command={"options": options})
    line = (
        "kdpipe train-student --cache '/c d.zarr' --student fcos --methods sgfi --rois teacher --seed 3 "
        "--allow-partial --scale 192x144 -o a=1 -o b=2"
    )
    assert command_line(find_trainings(work)[0]) == line
    assert command_line(find_trainings(training(tmp_path / "b"))[0]) is None
