"""`train-student --teacher-ckpt`, as users type it: the student of a float32 cache, without one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


@pytest.mark.parametrize("epochs", [5, pytest.param(25, marks=pytest.mark.slow)])
def test_the_student_is_that_of_a_cache(kit: "Kit", work: Path, epochs: int) -> None:
    cache = work / "x.zarr"
    exact = ("--dtype", "float32", "--views", "identity,hflip", "--out", cache)
    kit.run("cache-teacher", *kit.source, *kit.VIEW, *exact)
    options = ("--epochs", epochs, "--lr", 0.002, "-o", "distill.ckd.queue_size=256")
    kit.train_student(work / "cached", *options, "--rois", "student", cache=cache)
    ended = kit.run(*kit.online_command(work / "online", *options))
    assert "RoIs: those of the student" in ended.out
    weights = [
        torch.load(work / name / "student.pth", weights_only=True)["state_dict"] for name in ("cached", "online")
    ]
    assert torch.load(work / "online" / "student.pth", weights_only=True)["meta"]["iter"] == 2 * epochs
    compared = 0
    for name, value in weights[0].items():
        if value.is_floating_point():
            assert (weights[1][name] - value).norm() <= 1e-4 * value.norm(), name
            compared += 1
    assert compared > 100


def test_resumes_and_refuses_another_teacher(kit: "Kit", work: Path) -> None:
    options = ("--epochs", 2, "--methods", "cls")
    kit.run(*kit.online_command(work / "straight", *options))
    kit.interrupted(*kit.online_command(work / "w", *options))
    kit.run(*kit.online_command(work / "w", *options, "--resume"))
    one, two = (torch.load(work / x / "student.pth", weights_only=True)["state_dict"] for x in ("straight", "w"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    recorded = json.loads((work / "w" / "kdpipe" / "recipe.json").read_text())["teacher"]
    assert recorded["spec"]["dtype"] == "float32"
    message = kit.refused(*kit.student_command(work / "w", *options, "--resume"))
    assert "holds a training from something else:" in message
    assert "\n  teacher." in message


def test_command_lines_that_cannot_be(kit: "Kit", work: Path) -> None:
    ended = kit.run("train-student", "--student", kit.student, code=2)
    assert "needs either --cache or --teacher-ckpt" in ended.err
    assert kit.run(*kit.student_command(work / "w", "--teacher-ckpt", kit.teacher), code=2).err == ended.err
    for options in (("--missing-view", "skip"), ("--missing-view", "mirror"), ("--allow-partial",)):
        ended = kit.run(*kit.online_command(work / "w", *options), code=2)
        assert f"{options[0]} is for trainings with --cache. Leave it out." in ended.err
    ended = kit.run(*kit.student_command(work / "w", "--teacher-config", "faster-rcnn_r50_fpn_1x_coco"), code=2)
    assert "--teacher-config is for trainings with --teacher-ckpt" in ended.err
    assert not (work / "w").exists()


def test_at_the_rois_of_the_teacher(kit: "Kit", work: Path) -> None:
    """Asked for, and of a teacher whose head has convolutions by itself."""
    options = ("--epochs", 1, "--methods", "sgfi,ckd,cls,careg,reg", "-o", "distill.rois.num=24")
    ended = kit.run(*kit.online_command(work / "w", *options, "--rois", "teacher"))
    assert "RoIs: those of the teacher (asked for)" in ended.out
    head = kit.config()
    head.model.roi_head.bbox_head.update(type="Shared4Conv1FCBBoxHead", conv_out_channels=16)
    convs = ("--teacher-ckpt", kit.save_detector(work / "convs.pth", head))
    ended = kit.run(*kit.online_command(work / "convs", *options, *convs))
    assert "RoIs: those of the teacher" in ended.out
    assert "it has roi_head.bbox_head.shared_convs.0.conv" in ended.out
    for folder in ("w", "convs"):
        (file,) = (work / folder).glob("*/vis_data/scalars.json")
        steps = [json.loads(line) for line in file.read_text().splitlines() if "loss" in line]
        for step in steps:
            assert all(
                step[name] > 0 for name in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_careg", "loss_kd_reg")
            )
            assert step["kd_positive"] + step["kd_negative"] == 4 * 24
    message = kit.refused(*kit.online_command(work / "v", *convs, "--rois", "student"))
    assert "shared_convs.0.conv" in message
    assert "Use --rois teacher" in message
    assert not (work / "v").exists()
