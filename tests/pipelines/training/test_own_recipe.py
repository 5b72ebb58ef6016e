"""Optimiser, schedule, hooks and randomness of a config: kept, or named on the console where they are not."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from mmengine.config import Config

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.detectors.checkpoints import register_safe_types
from kdpipe.pipelines.detectors.configs import apply_known_options, zoo
from kdpipe.pipelines.detectors.literal_config import parse_literal_config
from kdpipe.pipelines.training.config import with_overrides
from kdpipe.pipelines.training.options import TrainingOptions
from kdpipe.pipelines.training.recipe import optim_wrapper, set_recipe
from kdpipe.pipelines.training.replaced import replaced_parts
from kdpipe.pipelines.training.run_settings import set_run
from kdpipe.pipelines.training.runner import _is_told
from kdpipe.pipelines.training.student_check import check_hooks

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

SGD = {"type": "SGD", "lr": 0.02, "momentum": 0.8}
ADAMW = {"type": "AdamW", "lr": 1e-4, "weight_decay": 0.05}
DECAY = {"norm_decay_mult": 0.0}


@pytest.mark.parametrize(
    ("optimizer", "base", "lr", "expected"),
    [
        (None, None, None, {"type": "SGD", "lr": 0.0075, "momentum": 0.9, "weight_decay": 1e-4}),
        (SGD, 16, None, {"type": "SGD", "lr": 0.0075, "momentum": 0.9, "weight_decay": 1e-4}),
        ({**SGD, "type": "mmengine.SGD"}, None, 0.1, {"type": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}),
        (ADAMW, None, None, ADAMW),
        (ADAMW, 16, None, {**ADAMW, "lr": 1e-4 / 4}),
        (ADAMW, 2, None, {**ADAMW, "lr": 2e-4}),
        (ADAMW, 16, 0.5, {**ADAMW, "lr": 0.5}),
        ({"type": "mmengine.Adam", "lr": 1.0}, 8, None, {"type": "mmengine.Adam", "lr": 0.5}),
        ({"type": "Adadelta"}, 8, None, {"type": "Adadelta"}),
    ],
)
def test_optimisers(optimizer: Any, base: int | None, lr: float | None, expected: dict[str, Any]) -> None:
    config = Config({})
    if optimizer is not None:
        config.optim_wrapper = {"type": "OptimWrapper", "optimizer": optimizer, "paramwise_cfg": DECAY}
    if base is not None:
        config.auto_scale_lr = {"base_batch_size": base, "enable": True}
    before = config.to_dict()
    wrapper = optim_wrapper(config, lr, images=4, amp=None)
    assert wrapper["optimizer"] == expected
    assert wrapper.get("paramwise_cfg") == (None if expected["type"] == "SGD" else DECAY)
    assert wrapper.get("clip_grad") == ({"max_norm": 10, "norm_type": 2} if expected["type"] == "SGD" else None)
    assert config.to_dict() == before


def test_a_rate_is_scaled_once() -> None:
    scaling = Config({"auto_scale_lr": {"enable": False, "base_batch_size": 16}})
    options = TrainingOptions(overrides=("auto_scale_lr.enable=True",))
    assert not with_overrides(scaling, options).auto_scale_lr.enable
    assert with_overrides(scaling, replace(options, recipe="config")).auto_scale_lr.enable
    assert not with_overrides(scaling, replace(options, recipe="config", lr=0.1)).auto_scale_lr.enable


@pytest.mark.parametrize(
    "option",
    [
        "work_dir=x",
        "launcher=pytorch",
        "experiment_name=x",
        "train_dataloader.collate_fn.type=pseudo_collate",
        "val_dataloader.worker_init_fn=None",
    ],
)
def test_what_kdpipe_sets_is_no_option(option: str) -> None:
    with pytest.raises(KdpipeError, match=f"kdpipe sets {option.split('.type')[0].split('=')[0]} itself"):
        with_overrides(Config({}), TrainingOptions(overrides=(option,)))


@pytest.mark.parametrize(
    ("level", "text", "is_told"),
    [
        (logging.ERROR, "anything", True),
        (logging.WARNING, "The prefix is not set in metric class", False),
        (logging.WARNING, "decrease performance because the model has BatchNorm layers.", True),
        (logging.INFO, "Epoch(train)", False),
    ],
)
def test_lines_of_the_log_for_the_console(level: int, text: str, is_told: bool) -> None:
    assert _is_told(logging.LogRecord("mmengine", level, "", 0, text, (), None)) is is_told


@pytest.mark.parametrize("name", ["YOLOXModeSwitchHook", "mmdet.SetEpochInfoHook", "MeanTeacherHook"])
def test_hooks_that_reach_into_the_detector(name: str) -> None:
    check_hooks(Config({"custom_hooks": [{"type": "CheckInvalidLossHook"}, {"type": "EMAHook"}]}))
    with pytest.raises(KdpipeError, match=f"has {name} in custom_hooks"):
        check_hooks(Config({"custom_hooks": [{"type": "CheckInvalidLossHook"}, {"type": name}]}))


STEPS = [{"type": "MultiStepLR", "milestones": [5]}]
OWN = {
    "optim_wrapper": {"type": "OptimWrapper", "optimizer": SGD},
    "param_scheduler": STEPS,
    "train_cfg": {"type": "EpochBasedTrainLoop", "max_epochs": 7},
    "auto_scale_lr": {"enable": True, "base_batch_size": 16},
}
BY_STEP = {"type": "IterBasedTrainLoop", "max_iters": 100, "val_interval": 50}
KDPIPES = {"type": "SGD", "lr": 0.0075, "momentum": 0.9, "weight_decay": 1e-4}  # of 4 images per step


@pytest.mark.parametrize(
    ("changes", "options", "epochs", "optimizer", "schedule"),
    [
        ({}, {}, 7, SGD, STEPS),
        ({}, {"epochs": 3}, 3, SGD, STEPS),
        ({}, {"lr": 0.1}, 7, {**SGD, "lr": 0.1}, STEPS),
        ({}, {"schedule": "2x-ms"}, 24, SGD, None),
        ({"param_scheduler": []}, {}, 7, SGD, []),
        ({"param_scheduler": None}, {}, 7, SGD, []),
        ({"param_scheduler": ...}, {}, 7, SGD, None),
        ({"train_cfg": ...}, {}, 12, SGD, STEPS),
        ({"train_cfg": BY_STEP}, {"epochs": 3}, 3, SGD, STEPS),
        ({"optim_wrapper": ...}, {}, 7, KDPIPES, STEPS),
        ({}, {"recipe": "paper"}, 12, KDPIPES, None),
        ({}, {"recipe": None, "epochs": 2}, 2, KDPIPES, None),
    ],
)
def test_what_a_config_sets_stays_unless_an_option_says_otherwise(
    changes: dict[str, Any], options: dict[str, Any], epochs: int, optimizer: Any, schedule: Any
) -> None:
    config = Config({key: value for key, value in {**OWN, **changes}.items() if value is not ...})
    before, cfg = config.to_dict(), Config({})
    set_recipe(cfg, config, TrainingOptions(**{"recipe": "config", **options}), images=4)
    assert cfg.train_cfg.type == "EpochBasedTrainLoop"
    assert (cfg.train_cfg.max_epochs, cfg.optim_wrapper.optimizer, cfg.param_scheduler) == (epochs, optimizer, schedule)
    assert "max_iters" not in cfg.train_cfg
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"train_cfg": BY_STEP}, {}, "a number of steps .*IterBasedTrainLoop.*--epochs.*--recipe paper"),
        ({"train_cfg": {"max_epochs": 0}}, {}, "max_epochs of the config is 0"),
        ({"optim_wrapper": {"constructor": "Two"}}, {"lr": 0.1}, "--lr 0.1 is for an optimiser.*--recipe paper"),
    ],
)
def test_configs_that_cannot_be_followed(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(KdpipeError, match=message):
        set_recipe(Config({}), Config({**OWN, **changes}), TrainingOptions(recipe="config", **options), images=4)


def test_mixed_precision_of_a_config_stays() -> None:
    config = Config({**OWN, "optim_wrapper": {"type": "AmpOptimWrapper", "optimizer": SGD, "loss_scale": 512.0}})
    for amp in (None, "auto"):
        cfg = Config({})
        set_recipe(cfg, config, TrainingOptions(recipe="config", amp=amp), images=4)
        assert cfg.optim_wrapper == config.optim_wrapper


@pytest.mark.parametrize(
    ("devices", "amp", "expected"),
    [
        ("cpu", "auto", {"type": "Bfloat16OptimWrapper"}),
        ("old GPU", "auto", {"type": "AmpOptimWrapper", "dtype": "float16"}),
        ("GPU", "auto", {"type": "Bfloat16OptimWrapper"}),
        ("GPU", "float16", {"type": "AmpOptimWrapper", "dtype": "float16"}),
        ("cpu", "bfloat16", {"type": "Bfloat16OptimWrapper"}),
    ],
)
def test_types_of_mixed_precision(
    monkeypatch: pytest.MonkeyPatch, devices: str, amp: str, expected: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices != "cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: devices == "GPU")
    for config in ({}, OWN, {**OWN, "optim_wrapper": {"type": "OptimWrapper", "optimizer": {"type": "AdamW"}}}):
        for recipe in ("paper", "config"):
            cfg = Config({})
            set_recipe(cfg, Config(config), TrainingOptions(recipe=recipe, amp=amp), images=4)
            assert {key: cfg.optim_wrapper.get(key) for key in ("type", "dtype")} == {"dtype": None, **expected}


@pytest.mark.parametrize("recipe", ["paper", "config"])
def test_a_named_type_replaces_that_of_a_config(recipe: str) -> None:
    adam = {"type": "AdamW", "betas": (0.9, 0.99)}
    own = {"type": "AmpOptimWrapper", "optimizer": adam, "loss_scale": 512.0, "dtype": "float16"}
    cfg = Config({})
    set_recipe(cfg, Config({"optim_wrapper": own}), TrainingOptions(recipe=recipe, amp="bfloat16"), images=4)
    assert cfg.optim_wrapper == {"type": "Bfloat16OptimWrapper", "optimizer": adam}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_float16_needs_a_gpu() -> None:
    with pytest.raises(KdpipeError, match=r"--amp float16 needs a GPU.*--amp bfloat16"):
        set_recipe(Config({}), Config({}), TrainingOptions(amp="float16"), images=4)


@pytest.mark.parametrize(
    ("config", "used", "lines"),
    [
        ({}, {"optim_wrapper": {"optimizer": SGD}}, []),
        ({"train_cfg": {"max_epochs": 12}}, {"train_cfg": {"max_epochs": 12, "val_interval": 1}}, []),
        ({"train_cfg": {"max_epochs": 12}}, {"train_cfg": {"max_epochs": 1}}, ["train_cfg.max_epochs 12 -> 1"]),
        (
            {"optim_wrapper": {"optimizer": SGD, "paramwise_cfg": DECAY, "_scope_": "mmdet"}},
            {"optim_wrapper": {"optimizer": {**SGD, "lr": 0.01}}},
            ["optim_wrapper.optimizer.lr 0.02 -> 0.01", "optim_wrapper.paramwise_cfg"],
        ),
        ({"param_scheduler": [{"type": "MultiStepLR"}]}, {"param_scheduler": None}, ["param_scheduler"]),
        (
            {"val_evaluator": {"type": "VOCMetric", "metric": "mAP"}},
            {"val_evaluator": {"type": "CocoMetric", "metric": "bbox"}},
            ["val_evaluator.type VOCMetric -> CocoMetric", "val_evaluator.metric mAP -> bbox"],
        ),
        ({"val_evaluator": {"type": "VOCMetric"}}, {"val_evaluator": None}, []),
        (
            {"train_dataloader": {"collate_fn": {"type": "mine"}, "sampler": {"type": "InfiniteSampler"}}},
            {"train_dataloader": {"sampler": {"type": "DefaultSampler", "shuffle": True}}},
            ["train_dataloader.sampler.type InfiniteSampler -> DefaultSampler", "train_dataloader.collate_fn"],
        ),
    ],
)
def test_what_is_replaced_is_named(config: dict[str, Any], used: dict[str, Any], lines: list[str]) -> None:
    data = {"dataset": {"type": "CocoDataset"}}
    configs = [
        Config({**each, "train_dataloader": {**data, **each.get("train_dataloader", {})}}) for each in (config, used)
    ]
    assert replaced_parts(*configs) == lines


def test_a_replaced_data_set_is_named() -> None:
    voc = {"type": "VOCDataset", "ann_file": "a.txt", "proposal_file": "p.pkl", "backend_args": None}
    dataset = {"type": "RepeatDataset", "times": 3, "dataset": {"type": "ConcatDataset", "datasets": [voc, voc]}}
    used = {"type": "RepeatDataset", "times": 3, "dataset": {"type": "CocoDataset"}}
    configs = [Config({"train_dataloader": {"dataset": each}}) for each in (dataset, used)]
    assert replaced_parts(*configs) == [
        "train_dataloader.dataset RepeatDataset of ConcatDataset of 2 of VOCDataset -> RepeatDataset of CocoDataset",
        "train_dataloader.dataset.proposal_file",
    ]


def test_hooks_logs_and_randomness_of_a_config() -> None:
    checkpoint = {"type": "CheckpointHook", "interval": 5, "save_best": "auto", "out_dir": "x", "by_epoch": True}
    sections = {
        "default_hooks": {
            "checkpoint": checkpoint,
            "logger": {"type": "LoggerHook", "interval": 3},
            "timer": {"type": "IterTimerHook"},
            "sampler_seed": None,
        },
        "visualizer": {
            "type": "DetLocalVisualizer",
            "name": "visualizer",
            "vis_backends": [{"type": "WandbVisBackend"}],
        },
        "env_cfg": {"cudnn_benchmark": True},
        "randomness": {"seed": 1, "deterministic": True},
    }
    cfg = Config({})
    set_run(cfg, Config(sections), 4)
    hooks = cfg.default_hooks
    checkpoint_kept = {"type": "CheckpointHook", "interval": 5, "max_keep_ckpts": 2, "save_best": "auto"}
    assert hooks.checkpoint == checkpoint_kept
    assert hooks.logger.interval == 3
    assert hooks.timer.type == "IterTimerHook"
    assert hooks.sampler_seed.type == "DistSamplerSeedHook"
    assert [each["type"] for each in cfg.visualizer.vis_backends] == ["WandbVisBackend", "TensorboardVisBackend"]
    assert "name" not in cfg.visualizer
    assert cfg.env_cfg.cudnn_benchmark is True
    assert cfg.randomness == {"seed": 4, "deterministic": True}


@pytest.mark.parametrize(
    "checkpoint", [None, {"type": "CheckpointHook", "by_epoch": False, "interval": 500}, {"type": "MyHook"}]
)
def test_checkpoints_to_resume_from_are_of_epochs(checkpoint: Any) -> None:
    cfg = Config({})
    set_run(cfg, Config({"default_hooks": {"checkpoint": checkpoint}}), 0)
    assert cfg.default_hooks.checkpoint == {"type": "CheckpointHook", "interval": 1, "max_keep_ckpts": 2}


def test_options_are_part_of_the_config_where_it_knows_them() -> None:
    config = Config({"model": {"type": "X"}, "optim_wrapper": {"optimizer": SGD}})
    applied = apply_known_options(
        config, ["optim_wrapper.optimizer.type=AdamW", "distill.ckd.dim=3", "nothing.at.all=1"]
    )
    assert applied.optim_wrapper.optimizer.type == "AdamW"
    assert "distill" not in applied


def test_adamw_of_a_config_trains_a_student(kit: "Kit", work: Path) -> None:
    ended = kit.train_student(
        *(work / "w", "--methods", "none", "-o", "optim_wrapper.optimizer={'type': 'AdamW', 'lr': 0.0016}"),
        *("-o", "optim_wrapper.clip_grad={'max_norm': 1}", "-o", "randomness={'seed': 7}"),
    )
    printed = ended.out.replace("\n", " ")
    assert "Optimiser: AdamW of the config, peak rate 0.0016, with kdpipe's warm-up and cosine." in printed
    assert "Not used of the config: param_scheduler; train_cfg.max_epochs 12 -> 1. --recipe config keeps" in printed
    register_safe_types()
    state = torch.load(work / "w" / "epoch_1.pth", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert state["meta"]["seed"] == 7


@pytest.mark.parametrize(
    ("flag", "value", "override"),
    [
        ("--epochs", 3, "train_cfg.max_epochs=4"),
        ("--batch-size", 2, "train_dataloader.batch_size=3"),
        ("--lr", 0.1, "optim_wrapper.optimizer.lr=0.2"),
        ("--seed", 1, "randomness.seed=2"),
    ],
)
def test_an_option_and_an_override_contradict_each_other(
    kit: "Kit", work: Path, flag: str, value: float, override: str
) -> None:
    (work / "s.py").write_text(kit.student.read_text() + "\nrandomness = dict(seed=5)\n")
    start = ("train-student", "--cache", kit.cache, "--student", "s.py", "--methods", "none", "--work-dir", work / "w")
    message = kit.refused(*start, flag, value, "-o", override, code=2)
    assert f"{flag} {value} and -o {override} contradict each other" in " ".join(message.split())
    assert not (work / "w").exists()


def test_a_best_checkpoint_needs_validation() -> None:
    data = {"train_dataloader": {"dataset": {"type": "CocoDataset"}}}
    used = Config({**data, "default_hooks": {"checkpoint": {"save_best": "auto"}}, "val_evaluator": None})
    assert replaced_parts(used, used) == ["default_hooks.checkpoint.save_best (there are no validation images)"]
    used.val_evaluator = {"type": "CocoMetric"}
    assert replaced_parts(used, used) == []


def test_the_recipe_of_a_file_of_the_users_is_kept_whole(kit: "Kit", work: Path) -> None:
    options = {
        "optim_wrapper.accumulative_counts": 2,
        "train_cfg.max_epochs": 2,
        "param_scheduler": "[{'type': 'MultiStepLR', 'by_epoch': True, 'milestones': [1], 'gamma': 0.1}]",
        "default_hooks.logger.interval": 1,
    }
    changes = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    start = ("train-student", "--cache", kit.cache, "--student", kit.student, "--methods", "none", "--workers", 0)
    printed = kit.run(*start, "--batch-size", 4, "--work-dir", work / "w", *changes).out.replace("\n", " ")
    assert "Not used" not in printed
    assert "Warning" not in printed
    assert "Recipe: the config's: SGD, peak rate 0.02, 2 epochs with its schedule. --recipe paper takes" in printed
    log = next((work / "w").glob("*/*.log")).read_text()
    assert re.findall(r"Epoch\(train\).* lr: ([\d.e+-]+)", log) == ["2.0000e-02"] * 2 + ["2.0000e-03"] * 2
    register_safe_types()
    meta = torch.load(work / "w" / "student.pth", weights_only=True)["meta"]
    assert parse_literal_config(meta["cfg"])["optim_wrapper"]["accumulative_counts"] == 2


def test_whose_recipe_a_training_has(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = []

    def train(*args: Any, **options: Any) -> Any:
        recipes.append(next(value for value in args if isinstance(value, TrainingOptions)).recipe)
        raise KdpipeError("enough")

    monkeypatch.setattr("kdpipe.pipelines.training.run.train_detector", train)
    name = "faster-rcnn_r50_fpn_1x_coco"
    for config in (name, f"{name}.py", zoo() / "faster_rcnn" / f"{name}.py", kit.student):
        for option in ((), ("--recipe", "paper"), ("--recipe", "config")):
            kit.refused("train-teacher", "--config", config, *kit.data, *option)
    assert recipes == ["paper", "paper", "config"] * 3 + ["config", "paper", "config"]
