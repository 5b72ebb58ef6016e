"""What a training was begun with is compared with what it is to go on with."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.config import Config

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.training.training_record import check_resumed, check_saving, training_record

CONFIG: dict[str, Any] = {
    "model": {"type": "FasterRCNN", "backbone": {"depth": 18}, "ranges": [[-1.0, 64.0], [64.0, float("inf")]]},
    "train_dataloader": {
        "batch_size": 4,
        "num_workers": 2,
        "dataset": {"ann_file": "/here/train.json", "pipeline": [{"type": "Resize", "scale": (64, 48)}]},
    },
    "train_cfg": {"type": "EpochBasedTrainLoop", "max_epochs": 12, "val_interval": 1},
    "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}},
    "custom_hooks": [{"type": "EMAHook", "momentum": 0.1}, {"type": "EarlyStoppingHook", "patience": 3}],
    "randomness": {"seed": 0},
    "param_scheduler": None,
}
DATA: Any = SimpleNamespace(digest=lambda: "abc")


def record(*changes: tuple[str, Any], processes: int = 2, val: Any = None, **more: Any) -> dict[str, Any]:
    """A record, as it is read again, of a config with some changes."""
    config = Config(copy.deepcopy(CONFIG))
    config.merge_from_dict(dict(changes))
    return dict(json.loads(json.dumps(training_record("student", config, processes, DATA, val, **more))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("train_cfg.max_epochs", 24), "epochs 12 -> 24"),
        (("train_dataloader.batch_size", 1), "batch_size 4 -> 1"),
        (("optim_wrapper.optimizer.lr", 0.5), "lr 0.01 -> 0.5"),
    ],
)
def test_what_may_change_is_said(change: tuple[str, Any], message: str) -> None:
    (line,) = check_resumed(record(), record(change), "w")
    assert message in line
    (line,) = check_resumed(record(), record(change, processes=8), "w")
    assert "processes 2 -> 8" in line
    assert message in line


@pytest.mark.parametrize(
    ("change", "name_in_message"),
    [
        (("model.backbone.depth", 50), "config.model.backbone.depth: found 18, wanted 50"),
        (("train_dataloader.dataset.pipeline.0.scale", (8, 8)), "pipeline.0.scale: found [64, 48], wanted [8, 8]"),
        (("optim_wrapper.optimizer.momentum", 0.5), "config.optim_wrapper.optimizer.momentum: found 0.9, wanted 0.5"),
        (("optim_wrapper.type", "AmpOptimWrapper"), 'wanted "AmpOptimWrapper"'),
        (("randomness.seed", 1), "config.randomness.seed: found 0, wanted 1"),
        (("custom_hooks.0.momentum", 0.2), "config.custom_hooks.0.momentum: found 0.1, wanted 0.2"),
        (("param_scheduler", [{"type": "ConstantLR"}]), 'wanted "ConstantLR"'),
    ],
)
def test_what_must_not_change_is_named(change: tuple[str, Any], name_in_message: str) -> None:
    with pytest.raises(KdpipeError) as refusal:
        check_resumed(record(), record(change), "w")
    assert name_in_message in str(refusal.value)
    assert "begin anew in another --work-dir" in str(refusal.value)


def test_what_else_decides_is_compared() -> None:
    others: dict[str, Any] = {"methods": (["cls"], ["sgfi"]), "rois": ("student", "teacher"), "teacher": ({"a": 1}, {})}
    for name, values in others.items():
        with pytest.raises(KdpipeError, match=name):
            check_resumed(record(**{name: values[0]}), record(**{name: values[1]}), "w")
    other: Any = SimpleNamespace(digest=lambda: "xyz")
    (line,) = check_resumed(record(val=DATA), record(val=other), "w")
    assert "validation images" in line


@pytest.mark.parametrize(
    "change",
    [
        ("train_dataloader.num_workers", 0),
        ("train_dataloader.dataset.ann_file", "/there/train.json"),
        ("custom_hooks.1.patience", 9),
        ("train_cfg.val_interval", 5),
        ("kdpipe_is_not_asked", 1),
    ],
)
def test_what_changes_nothing_that_is_learned(change: tuple[str, Any]) -> None:
    assert check_resumed(record(), record(change), "w") == []


@pytest.mark.parametrize(
    ("change", "name_in_message"),
    [
        (("default_hooks.checkpoint.out_dir", "/x"), "default_hooks.checkpoint.out_dir"),
        (("default_hooks.checkpoint.filename_tmpl", "a_{}.pth"), "default_hooks.checkpoint.filename_tmpl"),
        (("default_hooks.checkpoint.by_epoch", False), "default_hooks.checkpoint.by_epoch"),
        (("train_cfg.type", "IterBasedTrainLoop"), "IterBasedTrainLoop"),
    ],
)
def test_checkpoints_that_could_not_be_resumed(change: tuple[str, Any], name_in_message: str) -> None:
    config = Config(copy.deepcopy(CONFIG))
    check_saving(config)
    config.merge_from_dict(dict([change]))
    with pytest.raises(KdpipeError, match=name_in_message):
        check_saving(config)


def test_records_of_classes_and_functions() -> None:
    """Of pure-Python configs: the same in every process."""
    values = record(("model.type", Path), ("model.act", len))
    assert values["config"]["model"]["type"] == "pathlib.Path"
    assert values["config"]["model"]["act"] == "builtins.len"
