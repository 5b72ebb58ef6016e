"""Start weights that a config names reach the bare detector, distilled or not; how much fits is said."""

import pickle
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import BaseModule
from rich.console import Console
from torch import Tensor, nn

from kdpipe.pipelines.detectors.checkpoints import CheckpointError
from kdpipe.pipelines.detectors.start_weights import Fit, _read, check_start_weights, load_fitting, pretrained_options

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


def names(count: int) -> tuple[str, ...]:
    return tuple(str(index) for index in range(count))


@pytest.mark.parametrize(
    ("loaded", "missing", "unexpected", "little"),
    [
        (0, 4, 4, True),
        (0, 0, 0, True),
        (1, 3, 3, True),
        (2, 2, 99, False),  # half of the module
        (2, 99, 2, False),  # half of the weights, those of a backbone in a large detector
        (4, 0, 0, False),
    ],
)
def test_little_fits(loaded: int, missing: int, unexpected: int, little: bool) -> None:
    fit = Fit(names(loaded), (), names(missing), names(unexpected))
    assert fit.is_little is little


def test_what_fits_is_loaded_and_counted() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    state = OrderedDict((name, torch.full_like(value, 7)) for name, value in module.state_dict().items())
    for name in ("0.bias", "1.num_batches_tracked"):
        del state[name]
    state["2.weight"] = torch.zeros(5, 3)
    state["fc.weight"] = torch.zeros(1)
    fit = load_fitting(module, state)
    assert str(fit) == (
        "6 of 8 tensors; 1 of another shape (2.weight: 5x3, wanted 1x3); 1 missing (0.bias); 1 not used (fc.weight)"
    )
    values = module.state_dict()
    assert set(values["0.weight"].flatten().tolist()) == {7}
    assert set(values["1.running_var"].tolist()) == {7}
    assert 7 not in values["2.weight"].flatten().tolist()


def test_the_options_that_go_without() -> None:
    pretrained = {"type": "Pretrained", "checkpoint": "torchvision://resnet50"}
    scoped = {**pretrained, "type": "mmengine.Pretrained"}
    model = {
        "type": "X",
        "backbone": {"init_cfg": pretrained, "dcn": {"type": "DCN"}},
        "neck": [{"type": "A"}, {"type": "B", "init_cfg": [{"type": "Kaiming"}, scoped]}],
        "roi_head": {"shared_head": {"init_cfg": pretrained}, "bbox_head": {"init_cfg": {"type": "Normal"}}},
    }
    places = ["model.backbone", "model.neck.1", "model.roi_head.shared_head"]
    assert pretrained_options(model) == [f"{place}.init_cfg=None" for place in places]


@pytest.fixture(scope="module")
def weights(kit: "Kit", tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files with the weights of the student of the kit, one way of naming them each."""
    register_all_modules(init_default_scope=True)
    torch.manual_seed(3)
    model = MODELS.build(Config.fromfile(kit.student).model)
    state = {name: torch.randn_like(value.float()).to(value.dtype) for name, value in model.state_dict().items()}
    folder = tmp_path_factory.mktemp("weights")

    def save(name: str, content: Any) -> Path:
        torch.save(content, folder / name)
        return folder / name

    def prefixed(prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}{name}": value for name, value in state.items()}

    def inner(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    other = {**state, "roi_head.bbox_head.fc_cls.weight": torch.zeros(81, 24)}
    del other["neck.lateral_convs.0.conv.weight"]
    return {
        "plain": save("plain.pth", {"state_dict": state}),
        "module": save("module.pth", prefixed("module.")),
        "model": save("model.pth", {"model": state}),
        "student": save("student.pth", {"state_dict": {**prefixed("student."), "ckd.queue": torch.zeros(2)}}),
        "backbone": save("backbone.pth", {"state_dict": inner("backbone.")}),
        "neck": save("neck.pth", {"state_dict": {f"neck.{name}": value for name, value in inner("neck.").items()}}),
        "other": save("other.pth", {"state_dict": other}),
        "stranger": save("stranger.pth", {"state_dict": {"conv.weight": torch.zeros(1)}}),
    }


def checked(kit: "Kit", *, load_from: Any = None, **parts: Any) -> str:
    """What is said of the start weights of the student of the kit."""
    config = Config.fromfile(kit.student)
    for place, init in parts.items():
        (config.model if place == "model" else config.model[place])["init_cfg"] = init
    config.load_from = load_from and str(load_from)
    console = Console(record=True, width=1000)
    check_start_weights(config, console)
    return console.export_text()


def pretrained(path: Path | str, **options: str) -> dict[str, Any]:
    return {"type": "Pretrained", "checkpoint": str(path), **options}


@pytest.mark.parametrize("name", ["plain", "module", "model", "student"])
def test_load_from_under_any_name(kit: "Kit", weights: Mapping[str, Path], name: str) -> None:
    assert re.search(r"load_from=\S+: (\d+) of \1 tensors", checked(kit, load_from=weights[name]))


def test_what_is_said_of_parts(kit: "Kit", weights: Mapping[str, Path]) -> None:
    printed = checked(kit, backbone=pretrained(weights["backbone"]), neck=pretrained(weights["plain"], prefix="neck"))
    assert re.search(r"Start weights of backbone, all of \S+: (\d+) of \1 tensors\.", printed)
    assert re.search(r"Start weights of neck, neck of \S+: (\d+) of \1 tensors\.", printed)
    printed = checked(kit, model=[{"type": "Normal", "layer": "Conv2d"}, pretrained(weights["plain"])])
    assert re.search(r"Start weights of the model, all of \S+: (\d+) of \1 tensors\.", printed)
    printed = checked(kit, load_from=weights["other"])
    assert "1 of another shape (roi_head.bbox_head.fc_cls.weight: 81x24, wanted 7x24)" in printed
    assert "1 missing (neck.lateral_convs.0.conv.weight)" in printed
    assert checked(kit) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_from": "stranger"}, "little of them fits.*1 not used .conv.weight.*-o load_from=None"),
        ({"backbone": "plain"}, "little of them fits.*-o model.backbone.init_cfg=None"),
        ({"model": "backbone"}, "little of them fits.*-o model.init_cfg=None"),
        ({"load_from": "nowhere.pth"}, "nowhere.pth does not exist.*-o load_from=None"),
        ({"backbone": "nowhere.pth"}, "nowhere.pth does not exist.*-o model.backbone.init_cfg=None"),
        ({"backbone": "torchvision://nothing"}, "torchvision://nothing cannot be read: KeyError"),
    ],
)
def test_refusals(kit: "Kit", weights: Mapping[str, Path], options: dict[str, str], message: str) -> None:
    for place, name in options.items():
        value = weights.get(name, Path(name) if "://" not in name else name)
        with pytest.raises(CheckpointError, match=re.compile(message, re.DOTALL)):
            checked(kit, **{place: value if place == "load_from" else pretrained(value)})


@pytest.mark.parametrize("methods", ["sgfi,ckd,pred", "none", "ht,cls"])
def test_a_student_starts_from_what_its_baseline_starts_from(
    kit: "Kit", work: Path, weights: Mapping[str, Path], methods: str
) -> None:
    student, source = kit.student, weights["plain"]
    if "ht" in methods:  # takes a head as wide as the teacher's
        student, source = work / "wide.py", kit.teacher
        student.write_text(kit.config().pretty_text)
    still = ("--lr", "1e-12", "-o", "optim_wrapper.optimizer.weight_decay=0")
    ended = kit.train_student(
        work / "w", "--student", student, "--methods", methods, *still, "-o", f"load_from={source}"
    )
    assert re.search(r"load_from=\S*: (\d+) of \1 tensors", ended.out.replace("\n", "")), ended.out
    expected = torch.load(source, weights_only=True)["state_dict"]
    actual = torch.load(work / "w" / "student.pth", weights_only=True)["state_dict"]
    trained = [name for name in actual if "running" not in name and "num_batches" not in name]
    assert all(torch.allclose(actual[name], expected[name], atol=1e-6) for name in trained)


def test_the_rest_is_initialised_as_ever(kit: "Kit", work: Path, weights: Mapping[str, Path]) -> None:
    init = f"model.backbone.init_cfg={pretrained(weights['backbone'])}"
    rate = ("--lr", "1e-12", "-o", "optim_wrapper.optimizer.weight_decay=0")
    kit.train_student(work / "distilled", "--methods", "sgfi", *rate, "-o", init)
    kit.train_student(work / "baseline", "--methods", "none", *rate, "-o", init)
    one, other = (
        torch.load(work / name / "student.pth", weights_only=True)["state_dict"] for name in ("distilled", "baseline")
    )
    source = torch.load(weights["plain"], weights_only=True)["state_dict"]
    assert torch.allclose(one["backbone.conv1.weight"], source["backbone.conv1.weight"], atol=1e-6)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one if "running" not in name)


class Evil:
    """What is unpickled as a file that appears."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_is_downloaded_is_loaded_as_weights_only(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a config's `load_from`, and by mmengine itself where a part of a model names its start weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder, address = served
    layer = nn.Linear(2, 3)
    torch.save({"state_dict": layer.state_dict()}, folder / "good.pth")
    torch.save({"state_dict": layer.state_dict(), "meta": Evil(tmp_path / "run")}, folder / "evil.pth")
    assert torch.equal(_read(f"{address}/good.pth")["weight"], layer.weight)
    with pytest.raises(CheckpointError, match=r"evil.pth were refused: the file holds pathlib.*nothing of it has run"):
        _read(f"{address}/evil.pth")
    module = BaseModule(init_cfg={"type": "Pretrained", "checkpoint": f"{address}/evil.pth"})
    with pytest.raises(pickle.UnpicklingError):
        module.init_weights()
    assert not (tmp_path / "run").exists()
