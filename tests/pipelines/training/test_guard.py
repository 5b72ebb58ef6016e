"""A training that cannot be of use ends with one message, and what was good before stays."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from rich.console import Console
from torch import Tensor

from kdpipe.distill.losses.prediction import classification_kd_loss
from kdpipe.distill.methods import LOSSES
from kdpipe.distill.outputs import BatchRois, TeacherOutputs
from kdpipe.distill.teacher.any_box import apply_teacher_head
from kdpipe.pipelines.training.guard import CollapseHook

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


def spoil(patch: pytest.MonkeyPatch, call: int, value: float) -> None:
    """Make the loss of the class scores what it never is, in one call."""
    calls = []
    right = classification_kd_loss

    def wrong(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        calls.append(1)
        return right(student_logits, teacher_logits) * (value if len(calls) == call else 1.0)

    patch.setitem(LOSSES, "cls", replace(LOSSES["cls"], two_stage=wrong))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    options = ("--methods", "cls,ckd", "--epochs", 2, "-o", "distill.ckd.queue_size=64")
    with monkeypatch.context() as patch:
        spoil(patch, 4, value)  # two steps per epoch
        message = kit.refused(*kit.student_command(work / "w", *options))
    assert f"At step 4, loss_kd_cls is {value} (images " in message
    images = message.split("(images ")[1].split(")")[0].split(", ")
    assert len(set(images)) == 4
    assert set(images) <= {str(i) for i in range(9)}
    assert "The last checkpoint, of epoch 1, is good" in message
    assert "distill.weights" in message
    files = {file.name for file in (work / "w").glob("*.pth")}
    assert files == {"epoch_1.pth", "epoch_1.student.pth", "student.pth"}
    weights = torch.load(work / "w" / "student.pth", weights_only=True)
    assert weights["meta"]["epoch"] == 1
    assert all(torch.isfinite(x).all() for x in weights["state_dict"].values())
    kit.train_student(work / "w", *options, "--resume")
    assert (work / "w" / "epoch_2.student.pth").exists()


def test_the_students_own_loss_and_a_plain_training(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = BBoxHead.loss

    def wrong(self: Any, *args: Any, **options: Any) -> Any:
        return {**loss(self, *args, **options), "loss_bbox": torch.tensor(float("nan"), requires_grad=True)}

    monkeypatch.setattr(BBoxHead, "loss", wrong)
    message = kit.refused(*kit.student_command(work / "w", "--methods", "none"))
    assert "At step 1, loss_bbox is nan (images " in message
    assert "There is no checkpoint yet" in message
    assert "distill.weights" not in message


def test_weights_that_are_not_finite_are_not_saved(kit: "Kit", work: Path) -> None:
    """A finite loss whose gradient is too large, at the last step of an epoch."""
    options = ("--methods", "cls", "--batch-size", 8, "-o", "optim_wrapper.clip_grad=None")
    rate = ("-o", "param_scheduler=[]", "-o", "optim_wrapper.optimizer.lr=3e38")
    message = kit.refused(*kit.student_command(work / "w", *options, *rate))
    assert "are not finite any more" in message
    assert not list((work / "w").glob("*.pth"))


AT_STUDENT = ("--rois", "student")


@pytest.fixture
def _nothing_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_positive(views: Any, rois: BatchRois, *args: Any) -> TeacherOutputs:
        rois.positive[:] = False
        object.__setattr__(rois, "num_positive", 0)
        return apply_teacher_head(views, rois, *args)

    monkeypatch.setattr("kdpipe.distill.teacher.any_box.apply_teacher_head", nothing_positive)


@pytest.mark.usefixtures("_nothing_positive")
def test_a_loss_that_contributes_nothing(kit: "Kit", work: Path) -> None:
    message = kit.refused(*kit.student_command(work / "w", "--methods", "sgfi,cls", *AT_STUDENT))
    assert "loss_sgfi was 0 in every step so far" in message
    assert "0 positive" in message
    assert "8 exact" in message or "mirrored" in message
    assert not (work / "w" / "student.pth").exists()
    kit.train_student(work / "v", "--methods", "sgfi,cls", *AT_STUDENT, "-o", "distill.weights.sgfi=0")


@pytest.mark.usefixtures("_nothing_positive")
def test_a_short_training_in_which_nothing_is_learned_says_so(kit: "Kit", work: Path) -> None:
    """Of a dense student, whose boxes may need some time: a warning on the console, and the student is kept."""
    config = kit.dense("fcos")
    (work / "student.py").write_text(config.pretty_text)
    ended = kit.train_student(work / "w", "--student", work / "student.py", "--methods", "sgfi,cls", *AT_STUDENT)
    _, line = " ".join(ended.out.split()).split("Warning: ")
    assert line.startswith("loss_sgfi was 0 in every step so far: nothing is learned from it")
    assert "0 positive" in line
    assert (work / "w" / "student.pth").exists()
    ended = kit.train_student(work / "v", "--student", work / "student.py", "--methods", "cls", *AT_STUDENT)
    assert "Warning" not in ended.out


def test_shares_of_the_gradient_are_in_the_log(kit: "Kit", work: Path) -> None:
    ended = kit.train_student(work / "w", "--methods", "sgfi,cls", "-o", "distill.share_interval=2", "--epochs", 2)
    said = " ".join(ended.out.split()).partition("Gradient at the pyramid, second half (steps looked at: 1): ")[2]
    shares = {name: int(share) for name, share in re.findall(r"(\w+) (\d+) %", said)}
    assert shares.keys() == {"cls", "bbox", "rpn_cls", "rpn_bbox", "sgfi", "kd_cls"}
    assert 97 <= sum(shares.values()) <= 103
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    (file,) = (work / "w").glob("*/vis_data/scalars.json")
    text = file.read_text()
    names = ("cls", "bbox", "rpn_cls", "rpn_bbox", "sgfi", "kd_cls")
    assert all(f'"share_{name}"' in text for name in names)
    ended = kit.train_student(work / "v", "--methods", "sgfi,cls", "-o", "distill.share_interval=0", "--epochs", 2)
    assert "Gradient at the pyramid" not in ended.out
    (file,) = (work / "v").glob("*/vis_data/scalars.json")
    assert "share_" not in file.read_text()
    one, two = (torch.load(work / x / "epoch_1.student.pth", weights_only=True)["state_dict"] for x in "wv")
    assert all(torch.equal(one[name], two[name]) for name in one)  # looking changes nothing


def test_a_loss_that_dominates_is_named(kit: "Kit", work: Path) -> None:
    options = ("--methods", "sgfi,cls", "-o", "distill.share_interval=1")
    ended = kit.train_student(work / "w", *options, "-o", "distill.weights.sgfi=100")
    assert "sgfi dominates: if AP does not gain by it" in " ".join(ended.out.split())
    ended = kit.train_student(work / "v", *options, "-o", "distill.weights.sgfi=0.001")
    assert "sgfi dominates" not in ended.out


class FakeRunner:
    """As much of a runner as a hook of `after_train_iter` asks for."""

    def __init__(self, max_iters: int) -> None:
        self.max_iters, self.iter = max_iters, 0
        self.warnings: list[str] = []
        self.logger = self

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def warned_at(max_iters: int, spreads: list[float]) -> int | None:
    """The step at which a training with these values of `ckd_spread`, the last one from then on, warns."""
    printed = io.StringIO()
    hook, runner = CollapseHook(Console(file=printed, width=500)), FakeRunner(max_iters)
    first = None
    for step in range(max_iters):
        runner.iter = step
        outputs = {"loss": torch.tensor(1.0), "ckd_spread": torch.tensor(spreads[min(step, len(spreads) - 1)])}
        hook.after_train_iter(runner, step, None, outputs)
        first = step if runner.warnings and first is None else first
    assert len(runner.warnings) <= 1, "once"
    assert printed.getvalue().count("ckd teaches next to nothing") == len(runner.warnings)
    return first


def test_a_projection_that_stays_at_one_point_is_warned_of() -> None:
    assert warned_at(5000, [0.95]) == 599
    assert warned_at(5000, [0.99] * 590 + [0.5]) is None
    assert warned_at(5000, [0.3] * 2000 + [0.97]) == 2099
    assert warned_at(312, [0.95]) == 255  # 12 epochs of 26 steps
    assert warned_at(100, [0.95]) == 99
    assert warned_at(100, [0.95] * 60 + [0.6]) is None
    assert warned_at(1, [0.95]) == 0
