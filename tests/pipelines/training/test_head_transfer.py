"""`train-student --methods ...,ht`, as users type it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kdpipe.cache.read.reader import open_cache
from kdpipe.distill.methods import METHODS
from kdpipe.pipelines.detectors.checkpoints import register_safe_types

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


@pytest.fixture
def like_teacher(kit: "Kit", work: Path) -> Path:
    """Config of a student with the teacher's heads on another backbone."""
    config = kit.config()
    config.model.backbone.base_channels = 4
    config.model.neck.in_channels = [4, 8, 16, 32]
    (work / "student.py").write_text(config.pretty_text)
    return work / "student.py"


def load(path: Path) -> Any:
    register_safe_types()
    return torch.load(path, weights_only=True)


def train_with_a_stop(kit: "Kit", work: Path, *options: object) -> dict[str, torch.Tensor]:
    """Weights of a training that went on after an interruption, in `w`: those of one that was left alone."""
    kit.interrupted(*kit.student_command(work / "w", *options))
    kit.train_student(work / "w", *options, "--resume")
    kit.train_student(work / "straight", *options)
    student, straight = (load(work / name / "student.pth")["state_dict"] for name in ("w", "straight"))
    assert all(torch.equal(student[name], straight[name]) for name in student)
    return dict(student)


@pytest.mark.parametrize("methods", ["ht", "sgfi,ckd,pred,ht"])
def test_the_teachers_heads_end_up_in_the_student(kit: "Kit", work: Path, like_teacher: Path, methods: str) -> None:
    options = ("--methods", methods, "--student", like_teacher, "--epochs", 2, "-o", "distill.ckd.queue_size=256")
    student = train_with_a_stop(kit, work, *options)
    first = load(work / "w" / "epoch_1.student.pth")["state_dict"]
    head = open_cache(kit.cache).head()
    assert len(head) == 14
    assert all(torch.equal(student[name], value) for name, value in head.items())
    assert not torch.equal(student["neck.lateral_convs.0.conv.weight"], first["neck.lateral_convs.0.conv.weight"])
    checkpoint = load(work / "w" / "epoch_2.pth")
    frozen = [name for name in checkpoint["state_dict"] if name.removeprefix("student.") in head]
    assert len(frozen) == len(head)
    with_momentum = sum("momentum_buffer" in state for state in checkpoint["optimizer"]["state"].values())
    assert with_momentum == len(checkpoint["optimizer"]["param_groups"][0]["params"]) - len(head)


def test_inherited_heads_learn_on_also_after_an_interruption(kit: "Kit", work: Path, like_teacher: Path) -> None:
    options = ("--methods", "dist,inherit", "--student", like_teacher, "--epochs", 2)
    student = train_with_a_stop(kit, work, *options)
    for name, value in open_cache(kit.cache).head().items():
        moved = (student[name] - value).norm() / value.norm().clamp(min=1)
        assert 0 < moved < 0.5, name


def test_a_narrower_student_is_refused(kit: "Kit", work: Path) -> None:
    message = kit.refused(*kit.student_command(work / "w", "--methods", "cls,ht"))
    assert "roi_head.bbox_head.fc_cls.weight: [7, 32] in the teacher, [7, 24] in the student" in message
    assert not (work / "w" / "student.pth").exists()


def test_beside_a_live_teacher(kit: "Kit", work: Path, like_teacher: Path) -> None:
    options = ("--student", like_teacher, "--epochs", 1, "--methods", "ht,cls")
    kit.run(*kit.online_command(work / "w", *options))
    student, teacher = load(work / "w" / "student.pth")["state_dict"], load(kit.teacher)["state_dict"]
    heads = [name for name in teacher if name.startswith(("rpn_head.", "roi_head."))]
    assert len(heads) == 14
    assert all(torch.equal(student[name], teacher[name]) for name in heads)


def test_inspect_says_whether_the_heads_are_there(kit: "Kit") -> None:
    assert f"serves   {', '.join(METHODS)}" in kit.run("inspect", kit.cache).out
