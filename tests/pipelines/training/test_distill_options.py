"""Every option of the distillation takes finite numbers in range, and nothing else."""

from typing import Any

import pytest
from mmengine.config import Config

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.training.distill_options import (
    DISTILL_DEFAULTS,
    ckd_queue_size,
    distill_options,
    other_options,
    unused_options,
)

NO_NUMBER = ("nan", "inf", "-inf", "text", "None", "True", "[1]", "''", "1e999")
# option -> values that are allowed, and that are not
VALUES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "rois.num": ((1, 512), (0, -1, 1.5, "512.0", 10**9)),
    "rois.positive_fraction": ((0, 0.25, 1), (-0.1, 1.01)),
    "stagewise": ((True, False), (1, "yes")),
    "weights.sgfi": ((0, 0.5, 3, 1e38), (-1, -1e-9)),
    "sgfi.kernel_size": ((1, 3), (0, 2, -1, 1.0, 33)),
    "sgfi.normalize": ((True, False), (1, "yes")),
    "ckd.dim": ((1, 128), (0, -1, 12.8)),
    "ckd.queue_size": ((1, 81920, None), (0, -1, 10**10)),
    "ckd.temperature": ((0.07, 1), (0, -0.07)),
    "ckd.exclude_iou": ((0, 0.5, 1), (-0.5, 1.5)),
    "ckd.branch": (("localization", "combined"), ("both", 1)),
    "ckd.projection": (("linear", "nonlinear"), ("cubic", 2)),
    "share_interval": ((0, 50), (-1, 0.5)),
    "transforms": (("[MyJitter]", "['MyJitter']"), (1, "{'a': 1}")),
}


def test_every_option_is_in_the_table() -> None:
    keys = {
        f"{section}.{name}" if name else section
        for section, value in DISTILL_DEFAULTS.items()
        for name in (value if isinstance(value, dict) else [""])
    }
    assert keys | {"weights.sgfi"} == set(VALUES)


@pytest.mark.parametrize("key", VALUES)
def test_values(key: str) -> None:
    section, _, name = key.partition(".")
    for value in VALUES[key][0]:
        actual = distill_options([f"distill.{key}={value}"], ["sgfi"])[section]
        assert str(actual[name] if name else actual).replace("'", "") == str(value).replace("'", "")
    no_number = [value for value in NO_NUMBER if value not in map(str, VALUES[key][0]) and key != "transforms"]
    for value in (*VALUES[key][1], *no_number):
        with pytest.raises(KdpipeError, match=rf"distill\.{key}|distill.transforms|nan|inf"):
            distill_options([f"distill.{key}={value}"], ["sgfi"])


@pytest.mark.parametrize(
    ("rois", "model", "batch", "size"),
    [
        ("teacher", {"roi_head": {}}, 8, 10 * 8 * 96),
        ("student", {"roi_head": {}, "train_cfg": {"rcnn": {"sampler": {"num": 128}}}}, 4, 10 * 4 * 128),
        ("student", {"roi_head": {}, "train_cfg": {"rcnn": [{"sampler": {"num": 64}}] * 3}}, 2, 10 * 2 * 64),
        ("student", {"bbox_head": {}}, 2, 10 * 2 * 96),
    ],
)
def test_the_queue_holds_the_rois_of_ten_steps_of_all_processes(
    rois: str, model: dict[str, Any], batch: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = Config({"model": model, "train_dataloader": {"batch_size": batch}})
    assert ckd_queue_size(cfg, rois, 96) == size
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert ckd_queue_size(cfg, rois, 96) == 3 * size


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("distill.colour=1", r"Unknown option distill\.colour. There are: rois, stagewise, weights"),
        ("distill.ckd.colour=1", r"Unknown option distill\.ckd\.colour. There are: dim"),
        ("distill.sgfi.anchors=2", r"Unknown option distill\.sgfi\.anchors"),
        ("distill.rois.colour=1", r"Unknown option distill\.rois\.colour"),
        ("distill.weights.reg=1", r"distill\.weights\.reg: .* none of the losses sgfi"),
        ("distill.ckd=3", r"distill\.ckd is 3; expected distill\.ckd\.NAME=VALUE"),
        ("distill.weights=2", r"distill\.weights is 2"),
        ("distill=1", r"distill is 1; expected distill\.NAME=VALUE"),
    ],
)
def test_names(option: str, message: str) -> None:
    with pytest.raises(KdpipeError, match=message):
        distill_options([option], ["sgfi"])


@pytest.mark.parametrize(
    ("losses", "unused"),
    [
        (["ckd", "sgfi"], []),
        (["ckd"], ["distill.sgfi.kernel_size"]),
        (["cls"], ["distill.ckd.dim", "distill.sgfi.kernel_size"]),
        ([], ["distill.ckd.dim", "distill.sgfi.kernel_size", "distill.share_interval"]),
    ],
)
def test_options_of_losses_that_are_not_distilled(losses: list[str], unused: list[str]) -> None:
    options = ["distill.ckd.dim=8", "distill.sgfi.kernel_size=3", "distill.share_interval=2", "model.type=X"]
    assert unused_options(options, losses) == unused


def test_the_branch_of_the_command_line_has_the_last_word() -> None:
    options = ["distill.ckd.branch=combined", "model.backbone.depth=18"]
    assert distill_options(options, ["ckd"]).ckd.branch == "combined"
    assert distill_options(options, ["ckd"], "localization").ckd.branch == "localization"
    assert other_options(options) == ["model.backbone.depth=18"]
    assert (
        distill_options(["distill.ckd={'dim': 8}"], ["ckd"]).ckd.temperature == DISTILL_DEFAULTS["ckd"]["temperature"]
    )
    assert DISTILL_DEFAULTS["ckd"]["branch"] == "classification"
