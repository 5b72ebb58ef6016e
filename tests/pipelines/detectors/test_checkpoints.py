"""Checkpoints of all layouts are read, malicious ones are refused before anything of them runs."""

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from kdpipe.pipelines.detectors.checkpoints import CheckpointError, class_names, load_checkpoint, load_strict

if TYPE_CHECKING:
    from tests.conftest import Forks


def small_model() -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4), head=nn.Linear(4, 2)))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Touch:
    """Pickles as a call that creates a file."""

    def __init__(self, call: Callable[..., Any], path: Path) -> None:
        self.call, self.path = call, path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return self.call, (f"touch {self.path}" if self.call is os.system else str(self.path),)


def mmdet3_content(state: dict[str, Tensor]) -> dict[str, Any]:
    history = HistoryBuffer([0.5, 0.25], [1, 1])
    return {
        "meta": {"epoch": 12, "cfg": "model = dict(type='A')", "dataset_meta": {"classes": ("cat", "dog")}},
        "state_dict": state,
        "message_hub": {
            "log_scalars": OrderedDict({"train/loss": history}),
            "runtime_info": OrderedDict(best_score=np.float64(0.4), eta=np.float32(3.0), iter=np.int64(7)),
            "resumed_keys": OrderedDict(best_score=True),
        },
        "optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9).state_dict(),
        "param_schedulers": [{"last_step": 3, "_last_value": [0.1]}],
        "ema_state_dict": OrderedDict(state),
    }


def test_mmdet3_layout(tmp_path: Path) -> None:
    state = small_model().state_dict()
    torch.save(mmdet3_content(state), tmp_path / "epoch_12.pth")
    checkpoint = load_checkpoint(tmp_path / "epoch_12.pth")
    assert same(checkpoint.state_dict, state)
    assert class_names(checkpoint) == ("cat", "dog")
    assert checkpoint.meta["epoch"] == 12


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-torch-1.6"])
def test_mmdet2_layout_with_module_prefix_and_averages(tmp_path: Path, zipped: bool) -> None:
    state = small_model().state_dict()
    stored = OrderedDict({f"module.{name}": value for name, value in state.items()})
    stored |= {f"module.ema_{name.replace('.', '_')}": value + 1 for name, value in state.items()}
    meta = {
        "mmdet_version": "2.25.0",
        "config": "model = dict()",
        "CLASSES": ["cat"],
        "hook_msgs": {"best": np.float64(1)},
    }
    torch.save({"meta": meta, "state_dict": stored}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert same(checkpoint.state_dict, state)
    assert class_names(checkpoint) == ("cat",)


def test_bare_state_dict(tmp_path: Path) -> None:
    state = small_model().state_dict()
    torch.save(state, tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    assert same(checkpoint.state_dict, state)
    assert checkpoint.meta == {}
    assert class_names(checkpoint) is None


@pytest.mark.parametrize("call", [os.system, os.mkdir, eval], ids=lambda call: call.__name__)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-torch-1.6"])
def test_malicious_pickle_does_not_run(tmp_path: Path, call: Callable[..., Any], zipped: bool) -> None:
    content = mmdet3_content(small_model().state_dict())
    content["meta"]["hook_msgs"] = Touch(call, tmp_path / "payload")
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"{call.__name__}.*--trust-checkpoint"):
        load_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "payload").exists()
    if call is not eval:  # the payload is real: it runs where the user insists
        load_checkpoint(tmp_path / "a.pth", trust=True)
        assert (tmp_path / "payload").exists()


class Attribute:
    """Pickles as `getattr(owner, name)`."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, str]]:
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize("value", [Attribute(HistoryBuffer, "__init__"), np.array(["a"], dtype=object)])
def test_allowed_types_are_no_way_around(tmp_path: Path, value: object) -> None:
    torch.save({"state_dict": small_model().state_dict(), "meta": {"x": value}}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"getattr|numpy\.dtype"):
        load_checkpoint(tmp_path / "a.pth")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)
    torch.save(mmdet3_content(small_model().state_dict()), tmp_path / "whole.pth")
    for name, data in {
        "empty.pth": b"",
        "page.pth": b"<html>404 not found</html>",
        "half.pth": (tmp_path / "whole.pth").read_bytes()[:2000],
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"{name}.*bytes\) cannot be read"):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it holds a list"),
        ({"state_dict": {}}, "holds no weights"),
        ({"epoch": 3, "weights": "none"}, "no tensors: epoch, weights"),
    ],
)
def test_not_a_checkpoint(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.pth")


def test_load_strict_loads_everything() -> None:
    source, model = small_model(), small_model()
    state = dict(source.state_dict()) | {"mask_head.conv.weight": torch.zeros(1)}
    del state["bn.num_batches_tracked"]
    load_strict(model, state, ignore_prefixes=["mask_head."])
    assert same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    "rename",
    [
        "_orig_mod.{}",
        "module.{}",
        "model.{}",
        "architecture.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.model.architecture.{}",
    ],
)
@pytest.mark.parametrize("container", ["", "model", "state_dict", "model_state_dict", "module", "model/state_dict"])
def test_what_wrappers_put_before_names_is_taken_off(tmp_path: Path, rename: str, container: str) -> None:
    source, model = small_model(), small_model()
    content: dict[str, Any] = {rename.format(name): value for name, value in source.state_dict().items()}
    for name in reversed(container.split("/") if container else ()):
        content = {name: content, "epoch": 3, "meta": {"epoch": 3}}
    torch.save(content, tmp_path / "a.pth")
    checkpoint = load_checkpoint(tmp_path / "a.pth")
    load_strict(model, checkpoint.state_dict)
    assert same(model.state_dict(), source.state_dict())
    assert checkpoint.meta == ({"epoch": 3} if container else {})


def test_a_compiled_part_is_loaded_with_the_versions_of_its_layers(tmp_path: Path) -> None:
    source, model = small_model(), small_model()
    state = OrderedDict((f"model.{name.replace('.', '._orig_mod.')}", v) for name, v in source.state_dict().items())
    vars(state)["_metadata"] = OrderedDict({"model.bn._orig_mod": {"version": 2}, "model": {"version": 1}})
    torch.save(state, tmp_path / "a.pth")
    versions: list[int] = []

    def note(module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any], *others: Any) -> None:
        versions.append(metadata["version"])

    model.get_submodule("bn").register_load_state_dict_pre_hook(note)
    load_strict(model, load_checkpoint(tmp_path / "a.pth").state_dict)
    assert same(model.state_dict(), source.state_dict())
    assert versions == [2]


def test_prefixes_stay_where_not_everything_would_fit() -> None:
    state = {f"model.{name}": value for name, value in small_model().state_dict().items()}
    for others in ({"criterion.weight": torch.zeros(1)}, {"model.extra": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match=r"unexpected: model\.conv\.weight"):
            load_strict(small_model(), {**state, **others})
    inner = nn.ModuleDict({"model": small_model()})  # a model may have a part of that name
    load_strict(inner, state)


def test_a_checkpoint_to_resume_from_names_the_one_to_use(tmp_path: Path) -> None:
    state = {f"student.{name}": value for name, value in small_model().state_dict().items()}
    state["sgfi.scale"] = torch.zeros(1)
    for beside, name_in_message in (
        (None, "the student.pth of that training"),
        ("student.pth", f"{tmp_path}/student.pth"),
        ("epoch_3.student.pth", f"{tmp_path}/epoch_3.student.pth"),
    ):
        if beside:
            (tmp_path / beside).touch()
        with pytest.raises(CheckpointError) as error:
            load_strict(small_model(), state, path=tmp_path / "epoch_3.pth")
        assert f"The bare detector is in {name_in_message}: use that" in str(error.value)


def test_load_strict_lists_every_disagreement() -> None:
    state = small_model().state_dict()
    state["head.weight"] = torch.zeros(3, 4)
    state["extra.weight"] = state.pop("conv.bias")
    with pytest.raises(CheckpointError) as error:
        load_strict(small_model(), state)
    message = str(error.value)
    assert "1 missing: conv.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "head.weight: checkpoint (3, 4), model (2, 4)" in message


def test_long_lists_are_cut() -> None:
    model = nn.ModuleList([nn.Linear(1, 1) for _ in range(20)])
    with pytest.raises(CheckpointError, match=r"40 missing: .*, and 30 more"):
        load_strict(model, {})


RESUME = """
import sys, torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint, register_safe_types

class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(2, 1)
    def forward(self, inputs, mode="tensor"):
        loss = self.line(torch.stack(inputs)).square().mean()
        return {"loss": loss}

class Data(torch.utils.data.Dataset):
    metainfo = {"classes": ("a", "b")}
    def __len__(self): return 4
    def __getitem__(self, index): return {"inputs": torch.full((2,), float(index))}

def run(epochs, resume):
    loader = dict(batch_size=2, sampler=dict(type="DefaultSampler", shuffle=True), dataset=Data())
    optimizer = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, momentum=0.9))
    runner = Runner(Toy(), sys.argv[1], loader, train_cfg=dict(by_epoch=True, max_epochs=epochs), resume=resume,
                    optim_wrapper=optimizer, param_scheduler=dict(type="MultiStepLR", milestones=[2]),
                    custom_hooks=[dict(type="EMAHook")], randomness=dict(seed=1), experiment_name=f"toy{epochs}")
    runner.train()
    return runner

run(2, False)
register_safe_types()
assert len(load_checkpoint(sys.argv[1] + "/epoch_2.pth").state_dict) == 2  # and leaves what is registered alone
runner = run(3, True)
assert runner.epoch == 3 and runner.iter == 6, (runner.epoch, runner.iter)
assert len(runner.message_hub.get_scalar("train/loss").data[0]) == 6
"""


def test_mmengine_resumes_where_types_are_registered(tmp_path: Path, forks: "Forks") -> None:
    training = forks.start(RESUME, tmp_path, cwd=tmp_path)
    assert training.wait() == 0, training.err[-3000:]
    assert class_names(load_checkpoint(tmp_path / "epoch_2.pth")) == ("a", "b")
