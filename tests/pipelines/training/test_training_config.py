"""Who has the last word in a training config: overrides, then options of the command line, then the user's config."""

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from mmengine.config import Config
from rich.console import Console

from kdpipe.pipelines.data.datasets import DetectionData, load_coco
from kdpipe.pipelines.training.config import own_config, training_config
from kdpipe.pipelines.training.options import TrainingOptions
from kdpipe.pipelines.training.wrapping import with_seeds

if TYPE_CHECKING:
    from pathlib import Path

    from tests.pipelines.conftest import Kit

CUDA = torch.cuda.is_available()
ADAM = {"type": "AdamW", "lr": 1e-4, "weight_decay": 0.1}
STEPS = {"type": "MultiStepLR", "by_epoch": True, "milestones": [1, 2], "gamma": 0.5}
OWN: dict[str, Any] = {
    "optim_wrapper": {
        "type": "OptimWrapper",
        "optimizer": {"type": "SGD", "lr": 0.5, "momentum": 0.3},
        "clip_grad": {"max_norm": 3},
        "paramwise_cfg": {"norm_decay_mult": 0.0},
    },
    "param_scheduler": [STEPS],
    "train_cfg": {"type": "EpochBasedTrainLoop", "max_epochs": 3, "val_interval": 2},
    "custom_hooks": [{"type": "NumClassCheckHook"}],
    "randomness": {"seed": 7, "deterministic": True},
}


@pytest.fixture
def data(kit: "Kit", work: "Path") -> DetectionData:
    return load_coco(kit.ann, kit.img).copied_to(work / "train.json")


def built(kit: "Kit", data: DetectionData, sections: dict[str, Any] | None = None, **options: Any) -> Config:
    """The training config of the tiny detector with sections of the user's own; the user's config stays as it was."""
    config = kit.config()
    config.merge_from_dict(copy.deepcopy(sections or {}))
    training = TrainingOptions(**{"batch_size": 2, **options})
    before = copy.deepcopy(config.to_dict())
    cfg = training_config(own_config(config, training), data, data, training, Console(quiet=True))
    assert config.to_dict() == before
    return cfg


def at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = config[name]
    return config


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("train_dataloader.sampler.type", "ClassAwareSampler", "ClassAwareSampler"),
        ("train_dataloader.sampler.shuffle", "False", False),
        ("train_dataloader.batch_sampler", "None", None),
        ("train_dataloader.batch_size", "3", 3),
        ("train_dataloader.num_workers", "0", 0),
        ("train_dataloader.dataset.filter_cfg.min_size", "9", 9),
        ("val_dataloader.batch_size", "3", 3),
        ("val_evaluator.classwise", "True", True),
        ("optim_wrapper.clip_grad.max_norm", "35", 35),
        ("optim_wrapper.optimizer.momentum", "0.5", 0.5),
        ("optim_wrapper.optimizer.type", "AdamW", "AdamW"),
        ("optim_wrapper.type", "AmpOptimWrapper", "AmpOptimWrapper"),
        ("param_scheduler", str([STEPS]), [STEPS]),
        ("train_cfg.max_epochs", "9", 9),
        ("default_hooks.logger.interval", "1", 1),
        ("randomness.seed", "5", 5),
        ("model.backbone.base_channels", "4", 4),
        ("model.roi_head.bbox_head.num_classes", "9", 9),
    ],
)
@pytest.mark.parametrize("recipe", ["paper", "config"])
def test_an_override_has_the_last_word(
    kit: "Kit", data: DetectionData, recipe: str, path: str, text: str, value: Any
) -> None:
    cfg = built(kit, data, OWN, recipe=recipe, overrides=(f"{path}={text}",), scale=(96, 64), seed=1)
    assert at(cfg, path) == value


def test_the_sampler_of_an_override_is_the_one_that_runs(kit: "Kit", data: DetectionData) -> None:
    cfg = built(kit, data, overrides=("train_dataloader.sampler.type=ClassAwareSampler",))
    running = with_seeds(cfg)
    assert running.train_dataloader.sampler.type == "EpochSampler"
    assert running.train_dataloader.sampler.sampler.type == "ClassAwareSampler"
    assert cfg.train_dataloader.sampler.type == "ClassAwareSampler"  # and is recorded without kdpipe's


def test_optimiser_and_schedule_of_the_users_config_stay_where_it_is_the_recipe(
    kit: "Kit", data: DetectionData
) -> None:
    cfg = built(kit, data, OWN, recipe="config")
    expected = kit.config()
    expected.merge_from_dict(OWN)
    for section in ("optim_wrapper", "param_scheduler", "train_cfg", "custom_hooks"):
        assert cfg[section] == expected[section], section


def test_another_optimiser_of_the_users_config_stays_in_the_papers_schedule(kit: "Kit", data: DetectionData) -> None:
    sections = {**OWN, "optim_wrapper": {**OWN["optim_wrapper"], "optimizer": ADAM}}
    cfg = built(kit, data, sections, epochs=5)
    assert cfg.optim_wrapper.optimizer.type == "AdamW"
    assert cfg.optim_wrapper.optimizer.weight_decay == 0.1
    assert cfg.optim_wrapper.clip_grad.max_norm == 3
    assert cfg.optim_wrapper.paramwise_cfg == {"norm_decay_mult": 0.0}
    assert (cfg.train_cfg.max_epochs, cfg.train_cfg.val_interval) == (5, 2)
    assert cfg.param_scheduler is None  # kdpipe's own, once the number of steps is known


def test_what_else_the_users_config_says_stays(kit: "Kit", data: DetectionData) -> None:
    cfg, expected = built(kit, data, OWN, scale=None), kit.config()
    assert cfg.train_dataloader.dataset.pipeline == expected.train_dataloader.dataset.pipeline
    assert cfg.train_dataloader.sampler == expected.train_dataloader.sampler
    assert cfg.train_dataloader.batch_sampler == expected.train_dataloader.batch_sampler
    assert cfg.custom_hooks == OWN["custom_hooks"]
    assert cfg.randomness.deterministic is True
    assert cfg.model.neck == expected.model.neck


@pytest.mark.parametrize(
    ("options", "path", "value"),
    [
        ({"batch_size": 7}, "train_dataloader.batch_size", 7),
        ({"workers": 3}, "train_dataloader.num_workers", 3),
        ({"seed": 5}, "randomness.seed", 5),
        ({"lr": 0.25}, "optim_wrapper.optimizer.lr", 0.25),
        ({"epochs": 8}, "train_cfg.max_epochs", 8),
        ({"schedule": "2x-ms"}, "train_cfg.max_epochs", 24),
        ({"schedule": "2x-ms", "epochs": 8}, "train_cfg.max_epochs", 8),
        ({"schedule": "1x"}, "param_scheduler", None),
        ({"amp": "bfloat16"}, "optim_wrapper.type", "Bfloat16OptimWrapper"),
        ({"scale": (80, 48)}, "val_dataloader.dataset.pipeline.1.scale", (80, 48)),
    ],
)
@pytest.mark.parametrize("recipe", ["paper", "config"])
def test_an_option_of_the_command_line_stands_over_the_users_config(
    kit: "Kit", data: DetectionData, recipe: str, options: dict[str, Any], path: str, value: Any
) -> None:
    cfg: Any = built(kit, data, OWN, recipe=recipe, **options)
    for name in path.split("."):
        cfg = cfg[int(name) if name.isdecimal() else name]
    assert cfg == value


def test_the_detector_gets_the_classes_of_the_images(kit: "Kit", data: DetectionData) -> None:
    cfg = built(kit, data, {"model": {"roi_head": {"bbox_head": {"num_classes": 80}}}})
    assert cfg.model.roi_head.bbox_head.num_classes == len(data.class_names)
