"""Trainings with the losses of feature maps, and with roifi: the commands, what is logged, and that a loss falls."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

pytestmark = pytest.mark.filterwarnings("ignore:.*meshgrid:UserWarning")  # of mmdet's FCOS head

LOSSES = ("roifi", "whole", "gt-mask", "anchor-mask", "gaussian-mask", "pkd")
MAPS = ",".join(LOSSES[1:])
FAMILIES = ("faster-rcnn", "retinanet", "fcos")


def train(kit: "Kit", work: Path, family: str, name: str, *options: object, **others: Any) -> list[dict[str, float]]:
    """What the log of a training has of each step."""
    path = work / f"{family}.py"
    config = kit.config(channels=8, fc=16) if family == "faster-rcnn" else kit.dense(family)
    path.write_text(config.pretty_text)
    kit.train_student(work / name, "--student", path, *options, **others)
    return log(work / name)


def log(work_dir: Path) -> list[dict[str, float]]:
    (file,) = work_dir.glob("*/vis_data/scalars.json")
    rows = (json.loads(line) for line in file.read_text().splitlines())
    return [row for row in rows if "loss" in row]


def log_name(loss: str) -> str:
    return f"loss_{loss.replace('-', '_')}"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_falls(kit: "Kit", work: Path, family: str, loss: str) -> None:
    rows = train(kit, work, family, "w", "--methods", loss, "--epochs", 12, "--lr", 0.02, *kit.val)
    values = [row[log_name(loss)] for row in rows]
    third = len(values) // 3
    first, last = sum(values[:third]) / third, sum(values[-third:]) / third
    assert 0 < last < first
    result = json.loads((work / "w" / "result.json").read_text())
    assert math.isfinite(result["ap"])
    assert 0 <= result["ap"] <= 1


@pytest.mark.parametrize("rois", ["student", "teacher"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_them_from_a_cache(kit: "Kit", work: Path, family: str, rois: str) -> None:
    options = ("--methods", f"{MAPS},roifi", "--rois", rois, "--epochs", 1, *kit.val)
    rows = train(kit, work, family, "w", *options, "-o", "distill.weights.gt-mask=0.5", "-o", "distill.weights.pkd=0")
    for row in rows:
        assert all(row[log_name(loss)] > 0 for loss in LOSSES if loss != "pkd")
        assert row["loss_pkd"] == 0
        assert row["share_gt_mask"] > row["share_whole"] > 0
    assert math.isfinite(json.loads((work / "w" / "result.json").read_text())["ap"])


def test_feature_maps_alone_need_no_rois(kit: "Kit", work: Path) -> None:
    """P2 is not in the cache, so that the teacher's head cannot be asked: pkd does not miss it."""
    cache = work / "x.zarr"
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--levels", "P3,P4,P5,P6", "--dtype", "int4", "--out", cache)
    rows = train(kit, work, "faster-rcnn", "w", "--methods", "pkd,gt-mask", "--amp", cache=cache)
    for row in rows:
        assert row["kd_positive"] == row["kd_negative"] == 0
        assert row["kd_exact"] + row["kd_mirrored"] == 4
        assert row["loss_pkd"] > 0
        assert row["loss_gt_mask"] > 0


@pytest.mark.parametrize("rois", ["student", "teacher"])
@pytest.mark.parametrize("family", ["faster-rcnn", "retinanet"])
def test_cached_training_is_that_beside_the_live_teacher(kit: "Kit", work: Path, family: str, rois: str) -> None:
    cache = work / "x.zarr"
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--dtype", "float32", "--views", "identity,hflip", "--out", cache)
    options = ("--methods", MAPS, "--epochs", 2, "--lr", 0.002, "--rois", rois)
    cached = train(kit, work, family, "cached", *options, cache=cache)
    kit.run(*kit.online_command(work / "live", "--student", work / f"{family}.py", *options))
    for step, (of_cache, of_live) in enumerate(zip(cached, log(work / "live"), strict=True)):
        assert all(of_cache[log_name(loss)] > 0 for loss in LOSSES[1:])
        for name, value in of_cache.items():
            if "loss" in name:
                assert of_live[name] == pytest.approx(value, rel=1e-5 if step == 0 else 1e-3), name


def test_what_does_not_fit_is_said(kit: "Kit", work: Path) -> None:
    cache = work / "x.zarr"
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--targets", "objects", "--out", cache)
    message = kit.refused(*kit.student_command(work / "w", "--methods", "pkd", cache=cache))
    assert "The loss 'pkd' needs the teacher's features, which this cache of tier 'objects' does not hold" in message
    assert "--targets pyramid" in message
