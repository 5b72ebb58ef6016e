"""The table of losses: what each names is there, and what it needs follows from that."""

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdpipe.distill.detector import DistilledDetector
from kdpipe.distill.loss import Loss, Sizes
from kdpipe.distill.methods import LOSSES, METHODS, loss_and_log, needed_fields
from kdpipe.distill.outputs import TeacherOutputs
from kdpipe.distill.pairs import TEACHER_FIELDS, RoiPairs
from kdpipe.distill.teacher.any_box import TeacherView

if TYPE_CHECKING:
    from tests.distill.conftest import Pair


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_names_what_there_is(name: str, dense: bool) -> None:
    inputs = LOSSES[name].inputs(dense)
    offered = {x for x in vars(RoiPairs) if not x.startswith("_")}
    assert inputs
    assert set(inputs) <= offered
    assert {x for x in inputs if x.startswith("teacher_")} <= TEACHER_FIELDS.keys()
    assert needed_fields([name], dense) == {TEACHER_FIELDS[x] for x in inputs if x in TEACHER_FIELDS}
    assert (needed_fields([name], dense) == set()) == (name == "hard")


def test_the_fields_of_the_teacher_are_those_of_its_outputs_and_its_pyramid() -> None:
    assert set(TEACHER_FIELDS.values()) == {field.name for field in fields(TeacherOutputs)} | {"features"}


def test_parameters_are_of_sizes_and_options_have_defaults() -> None:
    sizes = Sizes(3, 4, 5, 6, anchors=2)
    options = {name: loss.options for name, loss in LOSSES.items() if loss.has_parameters}
    assert options["sgfi"] == {"kernel_size": 1, "normalize": False}
    assert options["ckd"].keys() >= {"dim", "queue_size", "temperature", "exclude_iou"}
    assert not set().union(*options.values()) & vars(sizes).keys()
    sgfi = LOSSES["sgfi"].build(sizes, {"kernel_size": 3})
    assert {name: tuple(x.shape) for name, x in sgfi.named_parameters()}["adapt.weight"] == (4, 3, 3, 3)
    ckd: Any = LOSSES["ckd"].build(sizes, {"dim": 8, "queue_size": 16})
    assert (ckd.anchors, ckd.student_dim, ckd.teacher_dim) == (2, 5, 6)
    assert all(loss.options == {} for name, loss in LOSSES.items() if name not in ("sgfi", "ckd"))


def test_every_loss_is_a_method() -> None:
    of_maps = ("whole", "gt-mask", "anchor-mask", "gaussian-mask", "pkd")
    of_rois = ("sgfi", "ckd", "pred", "cls", "reg", "careg", "roifi", "box", "cross", "dist", "hard")
    assert (*of_rois, *of_maps, "ht", "inherit") == METHODS
    assert len({loss.log_name for loss in LOSSES.values()}) == len(LOSSES)


def test_the_levels_of_a_loss_are_among_its_sizes() -> None:
    sizes = Sizes(3, 3, 5, 6, anchors=2, strides=(4, 8, 16))
    whole: Any = LOSSES["whole"].build(sizes, {})
    pkd: Any = LOSSES["pkd"].build(sizes, {})
    assert (whole.imitate.strides, pkd.strides) == ((4, 8, 16), (8, 16))


class Result(NamedTuple):
    loss: Tensor
    height: Tensor
    level: Tensor


def test_what_is_logged_beside_a_loss() -> None:
    one = torch.tensor(1.0)
    assert loss_and_log("x", one) == (one, {})
    loss, logged = loss_and_log("x", Result(one, torch.tensor(2.0), torch.tensor([3.0, 4.0])))
    assert loss is one
    assert {name: float(value) for name, value in logged.items()} == {"x_height": 2, "x_level0": 3, "x_level1": 4}


class Scale(nn.Module):
    """A loss with a parameter, an option, and something to log."""

    def __init__(self, teacher_channels: int, start: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((teacher_channels,), start))

    def forward(self, teacher_roi_features: Tensor, student_logits: Tensor, labels: Tensor) -> Result:
        assert student_logits.shape == (len(labels), 3 + 1)  # classes of `pair`, and background
        height = (teacher_roi_features.mean(dim=(2, 3)) * self.scale).sum()
        return Result(height + 0 * student_logits.sum(), height.detach(), self.scale.detach())


def test_a_new_loss_is_one_line(pair: "type[Pair]", monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given what it names, is among the parameters under its name, and is in the log."""
    monkeypatch.setitem(LOSSES, "cls", Loss("loss_scale", Scale))
    assert needed_fields(["cls"]) == {"roi_features"}
    model = DistilledDetector(
        pair.student(), pair.spec.to_json(), ["cls"], pair.source(pair.state(pair.head())), weights={"cls": 0.5}
    )
    model.train()
    sizes = [64 // stride for stride in pair.spec.strides[: pair.spec.roi_levels]]
    view = TeacherView("exact", np.eye(3), tuple(torch.ones(pair.channels, size, size) for size in sizes))
    prepared: dict[str, Any] = model.data_preprocessor.student(pair.batch(2), True)
    losses = model(prepared["inputs"], prepared["data_samples"], mode="loss", targets=[view, view])
    rois = int(losses["kd_positive"])
    assert rois > 0
    assert float(losses["cls_height"]) == pytest.approx(rois * pair.channels, rel=1e-5)
    assert losses["loss_scale"].item() == pytest.approx(0.5 * rois * pair.channels, rel=1e-5)
    assert [float(losses[f"cls_level{index}"]) for index in range(pair.channels)] == [1.0] * pair.channels
    losses["loss_scale"].backward()
    assert model.get_parameter("cls.scale").grad is not None


def test_dense_students_have_losses_of_their_own() -> None:
    one, two = LOSSES["cls"].of(dense=False), LOSSES["cls"].of(dense=True)
    assert one is not two
    assert replace(LOSSES["cls"], dense=None).of(dense=True) is one


def test_initial_weights_do_not_depend_on_the_order_of_the_methods(pair: "type[Pair]") -> None:
    states = []
    for methods in (("sgfi", "ckd"), ("ckd", "sgfi")):
        torch.manual_seed(0)
        ckd = {"dim": 8, "queue_size": 16}
        source = pair.source(pair.state(pair.head()))
        states.append(DistilledDetector(pair.student(), pair.spec.to_json(), methods, source, ckd=ckd).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
