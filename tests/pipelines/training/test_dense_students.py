"""Dense students from the cache of a two-stage teacher: commands, files, and the same losses as beside it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

pytestmark = pytest.mark.filterwarnings("ignore:.*meshgrid:UserWarning")  # of mmdet's FCOS head

FAMILIES = ("retinanet", "fcos")
QUEUE = ("-o", "distill.ckd.queue_size=256")


def student(kit: "Kit", work: Path, family: str) -> Path:
    """A narrow student of a family, in a file."""
    path = work / f"{family}.py"
    path.write_text(kit.dense(family).pretty_text)
    return path


def train(kit: "Kit", work: Path, family: str, name: str, *options: object, cache: Path | None = None) -> Any:
    arguments = ("--student", student(kit, work, family), *options)
    return kit.train_student(work / name, *QUEUE, *arguments, cache=cache)


def log(work_dir: Path) -> list[dict[str, float]]:
    (file,) = work_dir.glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path / "student.pth", weights_only=True)["state_dict"]
    return state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rois", ["student", "teacher"])
def test_trains_from_the_cache_of_a_two_stage_teacher(kit: "Kit", work: Path, family: str, rois: str) -> None:
    options = ("--methods", "sgfi,ckd,pred", "--rois", rois, "-o", "distill.rois.num=64", "--epochs", 2)
    ended = train(kit, work, family, "w", *options)
    assert f"RoIs: those of the {rois} (asked for)." in ended.out
    for row in log(work / "w"):
        assert {"loss_sgfi", "loss_ckd", "loss_kd_cls", "sgfi_level4", "kd_unpaired", "share_ckd"} <= row.keys()
        assert 0 < row["kd_positive"] + row["kd_negative"] <= 4 * 64
        assert row["kd_unpaired"] > 0 if rois == "teacher" else row["kd_unpaired"] <= row["kd_positive"]
    saved = torch.load(work / "w" / "student.pth", weights_only=True)
    model = MODELS.build(Config.fromstring(saved["meta"]["cfg"], ".py").model)
    model.load_state_dict(saved["state_dict"], strict=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rois", ["student", "teacher"])
def test_boxes_relations_and_the_teachers_head(kit: "Kit", work: Path, family: str, rois: str) -> None:
    train(kit, work, family, "w", "--methods", "reg,box,cross,dist", "--rois", rois, "--epochs", 2, "--amp")
    for row in log(work / "w"):
        for name in ("loss_kd_reg", "loss_kd_box", "loss_cross", "cross_cls", "cross_box", "loss_dist"):
            assert 0 < row[name] < 100, name


@pytest.mark.parametrize("rois", ["student", "teacher"])
def test_mixed_precision(kit: "Kit", work: Path, rois: str) -> None:
    train(kit, work, "retinanet", "w", "--methods", "sgfi,ckd,pred", "--rois", rois, "--amp")
    assert all(row["loss_sgfi"] > 0 and row["loss_ckd"] > 0 and row["loss_kd_cls"] > 0 for row in log(work / "w"))


def test_boxes_that_meet_no_object_yet_do_not_end_a_training(kit: "Kit", work: Path) -> None:
    """FCOS begins with boxes of two pixels: the annotations are all that is positive, and they are for sgfi."""
    path = student(kit, work, "fcos")
    config = Config.fromfile(path)
    del config.model.bbox_head.init_cfg
    path.write_text(config.pretty_text)
    options = (*QUEUE, "--student", path, "--methods", "sgfi,ckd", "--rois", "student")
    kit.run(*kit.student_command(work / "w", *options))
    for row in log(work / "w"):
        assert row["kd_positive"] == row["kd_unpaired"] > 0
        assert row["loss_ckd"] > 0
        assert row["loss_sgfi"] > 0


def test_a_config_of_the_zoo_by_name(kit: "Kit", work: Path) -> None:
    narrow = (
        "model.backbone.base_channels=8",
        "model.backbone.init_cfg=None",
        "model.neck.in_channels=[8, 16, 32, 64]",
        "model.neck.out_channels=8",
        "model.bbox_head.in_channels=8",
        "model.bbox_head.feat_channels=8",
        "model.bbox_head.anchor_generator.octave_base_scale=2",
    )
    options = [part for option in narrow for part in ("-o", option)]
    command = kit.student_command(work / "w", "--methods", "sgfi,ckd", *options, *QUEUE, "--ckd-branch", "combined")
    kit.run(*[kit.DENSE["retinanet"] if part == kit.student else part for part in command])
    assert {"loss_sgfi", "loss_ckd"} <= log(work / "w")[0].keys()


def test_resumed_is_undisturbed(kit: "Kit", work: Path) -> None:
    options = ("--methods", "sgfi,ckd,pred", "--epochs", 2)
    train(kit, work, "retinanet", "straight", *options)
    command = kit.student_command(work / "w", *QUEUE, "--student", student(kit, work, "retinanet"), *options)
    kit.interrupted(*command)
    kit.run(*command, "--resume")
    one, two = weights(work / "straight"), weights(work / "w")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("loss", "name"), [("ckd", "loss_ckd"), ("cls", "loss_kd_cls")])
def test_a_loss_that_is_not_finite_ends_a_training(kit: "Kit", work: Path, loss: str, name: str) -> None:
    path = student(kit, work, "retinanet")
    options = ("--student", path, "--methods", "ckd,pred", "-o", f"distill.weights.{loss}=3.4e38")
    message = kit.refused(*kit.student_command(work / "w", *QUEUE, *options))
    assert f"At step 1, {name} is inf (images " in message
    assert not list((work / "w").glob("*.pth"))


def test_the_branch_changes_what_is_learned(kit: "Kit", work: Path) -> None:
    for branch in ("classification", "localization", "combined"):
        train(kit, work, "retinanet", branch, "--methods", "ckd", "--ckd-branch", branch)
    train(kit, work, "retinanet", "default", "--methods", "ckd")
    losses = {
        name: log(work / name)[0]["loss_ckd"] for name in ("classification", "localization", "combined", "default")
    }
    assert losses.pop("default") == losses["classification"]
    assert len(set(losses.values())) == 3


def test_what_does_not_fit_is_said(kit: "Kit", work: Path) -> None:
    path = student(kit, work, "retinanet")
    for method in ("careg", "ht"):
        message = kit.refused(*kit.student_command(work / "w", "--student", path, "--methods", method))
        assert f"--methods {method} needs the box head of a two-stage student" in message
    message = kit.refused(*kit.student_command(work / "w", "--student", path, "--ckd-branch", "both"), code=2)
    assert "'classification', 'localization', 'combined'" in message
    message = kit.refused(*kit.student_command(work / "w", "--student", "vfnet_r50_fpn_1x_coco"))
    assert "its head VFNetHead computes its outputs in a way of its own. Expected a two-stage detector" in message
    message = kit.refused(*kit.student_command(work / "w", "--ckd-branch", "combined"))
    assert "--ckd-branch combined is for students that predict boxes densely" in message
    assert not (work / "w" / "student.pth").exists()


def test_a_cache_without_pyramid_serves_the_teachers_rois_only(kit: "Kit", work: Path) -> None:
    cache = work / "x.zarr"
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--targets", "embeddings", "--out", cache)
    ended = train(kit, work, "retinanet", "w", "--methods", "ckd,pred", cache=cache)
    assert "RoIs: those of the teacher" in ended.out
    path = student(kit, work, "retinanet")
    command = kit.student_command(work / "v", "--student", path, "--methods", "ckd", "--rois", "student", cache=cache)
    assert "cannot serve --rois student: its tier 'embeddings' holds no feature pyramid" in kit.refused(*command)


def test_cached_training_is_that_beside_the_live_teacher(kit: "Kit", work: Path) -> None:
    cache = work / "x.zarr"
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--dtype", "float32", "--views", "identity,hflip", "--out", cache)
    options = ("--methods", "sgfi,ckd,pred", "--epochs", 3, "--lr", 0.002)
    train(kit, work, "retinanet", "cached", *options, "--rois", "student", cache=cache)
    beside = ("--student", student(kit, work, "retinanet"), *QUEUE, *options)
    kit.run(*kit.online_command(work / "live", *beside))
    for step, (cached, live) in enumerate(zip(log(work / "cached"), log(work / "live"), strict=True)):
        for name, value in cached.items():
            if "loss" in name or name == "kd_positive":
                assert live[name] == pytest.approx(value, rel=1e-5 if step == 0 else 1e-4), name
    one, two = weights(work / "cached"), weights(work / "live")
    for name, weight in one.items():
        if weight.is_floating_point():
            assert (two[name] - weight).norm() <= 1e-4 * weight.norm().clamp(min=1e-6), name


def test_beside_a_live_teacher_at_its_own_rois(kit: "Kit", work: Path) -> None:
    options = ("--student", student(kit, work, "retinanet"), *QUEUE, "--epochs", 1, "--methods", "sgfi,ckd,pred")
    ended = kit.run(*kit.online_command(work / "w", *options, "--rois", "teacher", "-o", "distill.rois.num=32"))
    assert "RoIs: those of the teacher (asked for)." in ended.out
    for row in log(work / "w"):
        assert all(row[name] > 0 for name in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "kd_positive", "kd_unpaired"))
        assert (row["kd_positive"] + row["kd_negative"], row["kd_exact"]) == (4 * 32, 4)
