"""What came with a file runs no code: every place of a config that could name some is refused by name."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmdet.registry
import mmengine.registry
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import Registry

import kdpipe.pipelines.teacher.live
import kdpipe.pipelines.training.run  # noqa: F401  these two register what is refused, and what is not
from kdpipe.pipelines.detectors.checkpoints import Checkpoint
from kdpipe.pipelines.detectors.configs import config_from_checkpoint, find_config
from kdpipe.pipelines.detectors.literal_config import ConfigError
from kdpipe.pipelines.detectors.untrusted import restrict, trusted

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

HOSTILE: tuple[Any, ...] = (
    *("os.system", "subprocess.run", "torch.hub.load", "builtins.exec", "Unknown", "os", "torch.nn.Linear"),
    *("torch.optim.SGD", "mmengine.fileio.load", "mmdet.apis.init_detector", "mmcv.imread", "mmpretrain.ResNet"),
    *("__import__('os').system('false')", "mmdet.utils.misc.os.system", "", ".", "mmdet.", "ResNet.x", "ResNet "),
    *(["ResNet"], {"type": "ResNet"}, 5, None),
)
LOOKED_UP = ("type", "runner_type", "constructor", "ema_type", "resize_type", "conv_type", "padding_mode")
SCOPES = ("_scope_", "default_scope")
ZOO = [
    *("faster-rcnn_r50_fpn_1x_coco", "faster-rcnn_r50-caffe-c4_1x_coco", "mask-rcnn_r50_fpn_albu-1x_coco"),
    *(
        "cascade-mask-rcnn_r50_fpn_1x_coco",
        "htc_r50_fpn_1x_coco",
        "retinanet_r18_fpn_1x_coco",
        "detectors_htc-r50_1x_coco",
    ),
    *("fcos_r50-caffe_fpn_gn-head_1x_coco", "atss_r50_fpn_1x_coco", "gfl_r50_fpn_1x_coco", "paa_r50_fpn_1x_coco"),
    *("faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco", "faster-rcnn_r50_fpg_crop640-50e_coco", "yolox_s_8xb8-300e_coco"),
    *(
        "faster-rcnn_r50_fpn_mdpool_1x_coco",
        "faster-rcnn_r50_fpn_attention_1111_dcn_1x_coco",
        "retinanet_pvt-t_fpn_1x_coco",
    ),
    *("mask-rcnn_swin-t-p4-w7_fpn_1x_coco", "detr_r50_8xb2-150e_coco", "faster-rcnn_r50_fpn_1x_voc0712"),
]
COMPLETE = {
    "runner_type": "Runner",
    "default_scope": "mmdet",
    "_scope_": "mmdet",
    "env_cfg": {"dist_cfg": {"backend": "nccl", "type": "Runner"}},
    "optim_wrapper": {"type": "OptimWrapper", "constructor": "LearningRateDecayOptimizerConstructor"},
    "custom_hooks": [{"type": "EMAHook", "ema_type": "ExpMomentumEMA", "_scope_": "mmdet"}],
    "train_dataloader": {
        "sampler": {"type": "DefaultSampler"},
        "collate_fn": {"type": "pseudo_collate"},
        "worker_init_fn": {"type": "worker_init_fn"},
    },
    "model_wrapper_cfg": {"type": "MMDistributedDataParallel"},
    "test_pipeline": ({"type": "RandomResize", "resize_type": "Resize", "transforms": ({"type": "RandomFlip"},)},),
    "model": {
        "type": "FasterRCNN",
        "backbone": {"type": "ResNet", "padding_mode": "zeros", "init_cfg": [{"type": "Normal"}, {"type": "Constant"}]},
        "head": {"init_cfg": {"type": "Normal", "override": {"type": "Constant", "name": "fc"}}},
        "embed": {"conv_type": "Conv2d"},
    },
}


def values(name: str) -> dict[str, Any]:
    config: dict[str, Any] = find_config(name).to_dict()
    return config


def type_places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a config says what to build: the keys that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        if key in (*LOOKED_UP, *SCOPES):
            yield (*place, key)
        else:
            yield from type_places(item, (*place, key))


def replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a place; what is not on the way there is shared."""
    if not place:
        return new
    first, *rest = place
    if isinstance(value, dict):
        return {**value, first: replaced(value[first], tuple(rest), new)}
    return type(value)(replaced(item, tuple(rest), new) if i == first else item for i, item in enumerate(value))


def text(place: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).removeprefix(".")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What hostile types would have run."""
    nodes: list[object] = []

    def note(*args: object, **options: object) -> None:
        nodes.append((args, options))

    monkeypatch.setattr(os, "system", note)
    monkeypatch.setattr(subprocess, "run", note)
    monkeypatch.setattr(torch.hub, "load", note)
    return nodes


@pytest.mark.parametrize("name", ZOO)
def test_configs_of_the_zoo_pass_and_no_type_in_them_can_be_replaced(name: str, calls: list[object]) -> None:
    config = values(name)
    before = copy.deepcopy(config)
    restrict(config, "a file")
    assert config == before
    places = list(type_places(config))
    assert len(places) > 30
    for index, place in enumerate(places[:: max(1, len(places) // 40)]):
        hostile = HOSTILE[index % len(HOSTILE)]
        if place[-1] in SCOPES and hostile is None:
            continue
        with pytest.raises(ConfigError) as error:
            restrict(replaced(config, place, hostile), "a file")
        assert f"{text(place)} = {hostile!r}" in str(error.value)
        assert "--trust-checkpoint" in str(error.value)
    assert calls == []


@pytest.mark.parametrize("hostile", HOSTILE, ids=repr)
def test_no_place_is_left_out(hostile: Any, calls: list[object]) -> None:
    places = list(type_places(COMPLETE))
    assert len(places) > 20
    for place in places:
        if place[-1] in SCOPES and hostile is None:
            continue
        with pytest.raises(ConfigError) as error:
            restrict(replaced(COMPLETE, place, hostile), "a file")
        assert f"{text(place)} = {hostile!r}" in str(error.value)
    assert calls == []


@given(
    section=st.sampled_from(["model", "visualizer", "custom_hooks", "anything"]),
    way=st.lists(st.text("abc_", min_size=1, max_size=3) | st.integers(0, 2), max_size=9),
    sequence=st.sampled_from([list, tuple]),
    key=st.sampled_from(LOOKED_UP),
    hostile=st.sampled_from([each for each in HOSTILE if isinstance(each, str)])
    | st.from_regex(r"\A\w{1,9}(\.\w{1,9}){1,5}\Z"),
)
@settings(max_examples=60)
def test_a_hostile_type_is_found_at_any_depth(
    section: str, way: list[Any], sequence: Any, key: str, hostile: str
) -> None:
    value: Any = {"before": 1, key: hostile, "after": {"type": "ResNet"}}
    for step in reversed(way):
        value = {"type": "ResNet", step: value} if isinstance(step, str) else sequence([*range(step), value])
    with pytest.raises(ConfigError) as error:
        restrict({"default_scope": "mmdet", section: value}, "a file")
    assert f"{text((section, *way, key))} = {hostile!r}" in str(error.value)


@pytest.mark.slow
def test_what_kdpipe_registers_is_known_before_it_is_used() -> None:
    """A training with --amp records its optimiser, which `cache-teacher` has no need to load."""
    registries = {id(each): each for each in vars(mmengine.registry).values() if isinstance(each, Registry)}
    registries |= {id(each): each for each in vars(mmdet.registry).values() if isinstance(each, Registry)}
    registered = {name: part for registry in registries.values() for name, part in registry.module_dict.items()}
    own_names = [
        name for name, part in registered.items() if part.__module__.startswith("kdpipe.") and name != "LiveTeacher"
    ]
    assert {"Bfloat16OptimWrapper", "DistilledDetector", "EpochSampler", "AddTeacherTargets"} <= set(own_names)
    code = (
        "import sys, kdpipe.pipelines\nfrom kdpipe.pipelines.detectors.untrusted import restrict\n"
        "restrict({str(n): {'type': name} for n, name in enumerate(sys.argv[1:])}, 'a file')"
    )
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *own_names], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr


@pytest.mark.parametrize(
    "kind", ["mmdet.Resize", "mmengine.Resize", "mmdet.datasets.transforms.Resize", "mmcv.transforms.processing.Resize"]
)
def test_a_scope_or_path_of_what_is_registered_is_fine(kind: str) -> None:
    """As mmengine writes pure-Python configs."""
    config = {"test_pipeline": [{"type": kind, "scale": (1333, 800)}]}
    assert restrict(config, "a file") == config


@pytest.mark.parametrize(
    ("model", "place"),
    [
        # each runs code, or reads a file that the config chose, through types that are registered
        ({"type": "ConvModule", "padding_mode": "os.system", "padding": "false"}, "model.padding_mode"),
        ({"type": "LiveTeacher", "ckpt": "a.pth", "trust": True}, "model.type"),
        ({"bbox_coder": {"type": "CameraMotionCompensation", "warp_mode": "exit()"}}, "model.bbox_coder.type"),
        ({"type": "KnowledgeDistillationSingleStageDetector", "teacher_config": "a.py"}, "model.teacher_config"),
        ({"type": "KnowledgeDistillationSingleStageDetector", "teacher_config": "../a"}, "model.teacher_config"),
        ({"test_cfg": {"rcnn": {"nms": {"type": "exit()"}}}}, "model.test_cfg.rcnn.nms.type"),
        ({"backbone": {"act": "os.system"}}, "model.backbone.act"),
        ({"backbone": {"act": ["eval('1')"]}}, "model.backbone.act[0]"),
    ],
)
def test_registered_types_cannot_be_used_to_reach_out(model: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError) as error:
        restrict({"model": model}, "a file")
    assert f"\n  {place} = " in str(error.value)


def test_sections_that_are_moved_into_the_model_are_no_way_around() -> None:
    """mmdet before 2.7 had train_cfg and test_cfg outside of the model."""
    with pytest.raises(ConfigError, match=r"test_cfg\.rcnn\.mode = 'os\.system'"):
        restrict({"model": {"type": "FasterRCNN"}, "test_cfg": {"rcnn": {"mode": "os.system"}}}, "a file")


def test_what_reaches_out_of_the_file_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"type": "Pretrained", "checkpoint": "https://me:secret@host/a.pth"}
    config = {
        "custom_imports": {"imports": ["evil"]},
        "load_from": "/tmp/a.pth",
        "resume": True,
        "model": {
            "backbone": {"type": "ResNet", "init_cfg": weights},
            "neck": {"type": "FPN", "init_cfg": [{"type": "Xavier"}, {**weights, "type": "mmengine.Pretrained"}]},
            "bbox_head": {"init_cfg": {"type": "Normal", "override": weights}},
            "shared_head": {"pretrained": "torchvision://resnet50"},
            "backbone2": {"type": "PyramidVisionTransformer", "init_cfg": {"checkpoint": "https://host/b.pth"}},
            "teacher_ckpt": "https://host/c.pth",
        },
        "test_pipeline": [{"type": "LoadImageFromFile", "backend_args": {"backend": "petrel"}, "to_float32": True}],
        "val_pipeline": [{"type": "LoadImageFromFile", "file_client_args": {"backend": "http"}, "backend_args": None}],
        "data_root": "data/coco/",
    }
    restricted = restrict(config, "the config of a file")
    assert restricted == {
        "custom_imports": None,
        "load_from": None,
        "resume": True,
        "model": {
            "backbone": {"type": "ResNet", "init_cfg": None},
            "neck": {"type": "FPN", "init_cfg": [{"type": "Xavier"}]},
            "bbox_head": {"init_cfg": {"type": "Normal", "override": None}},
            "shared_head": {"pretrained": None},
            "backbone2": {"type": "PyramidVisionTransformer", "init_cfg": None},
            "teacher_ckpt": None,
        },
        "test_pipeline": [{"type": "LoadImageFromFile", "backend_args": None, "to_float32": True}],
        "val_pipeline": [{"type": "LoadImageFromFile", "file_client_args": None, "backend_args": None}],
        "data_root": "data/coco/",
    }
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Left out of the config of a file")
    assert "secret" not in line
    for place in (
        "custom_imports",
        "load_from",
        "model.backbone.init_cfg (https://***@host/a.pth) and 2 more",
        "model.bbox_head.init_cfg.override",
        "model.shared_head.pretrained (torchvision://resnet50)",
        "model.teacher_ckpt",
        "test_pipeline[0].backend_args",
        "val_pipeline[0].file_client_args",
    ):
        assert place in line
    restrict(restricted, "the config of a file")
    assert capsys.readouterr().out == ""


def test_commands_refuse_a_hostile_config_and_run_nothing(kit: "Kit", work: Path) -> None:
    config = kit.config()
    config.model.backbone = {"type": "os.system", "command": f"touch {work}/ran"}
    content = torch.load(kit.teacher)
    content["meta"]["cfg"] = config.pretty_text
    torch.save(content, "evil.pth")
    work_dir = ("--work-dir", work / "w", "--student", kit.student, "--epochs", 1)
    commands: list[tuple[object, ...]] = [
        ("cache-teacher", "--ckpt", "evil.pth", *kit.data, *kit.VIEW, "--out", "a.zarr"),
        ("evaluate", "--ckpt", "evil.pth", *kit.data),
        ("train-student", "--teacher-ckpt", "evil.pth", *kit.data, *work_dir),
    ]
    for command in commands:
        message = kit.refused(*command)
        assert "model.backbone.type = 'os.system'" in message
        assert "evil.pth" in message
    assert sorted(path.name for path in work.iterdir()) == ["evil.pth"]
    kit.run(*commands[1], "--trust-checkpoint", code=None)
    assert (work / "ran").exists()  # the payload is real: it runs where the user insists


def test_what_a_cache_records_is_refused_as_well(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = kit.config()
    config.model.roi_head.bbox_head.loss_bbox = {"type": "os.system", "command": f"touch {work}/ran"}
    monkeypatch.setattr("kdpipe.pipelines.commands.cache_teacher.masked", lambda text: config.pretty_text)
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--targets", "predictions", "--out", "c.zarr")
    for options in (("--ap",), ("--ckpt", kit.teacher)):
        message = kit.refused("verify", "c.zarr", *options)
        assert "model.roi_head.bbox_head.loss_bbox.type = 'os.system'" in message
        assert "c.zarr" in message
        assert not (work / "ran").exists()
    kit.run("verify", "c.zarr", "--ap", "--trust-checkpoint", code=None)
    assert (work / "ran").exists()


def test_a_config_that_is_nested_without_end_is_refused() -> None:
    text = "model = dict(type='FasterRCNN', data_preprocessor=dict())\na = dict()\n" + "a = dict(x=a)\n" * 5000
    for levels in (330, 5000):
        short = "\n".join(text.splitlines()[: levels + 2])
        with pytest.raises(ConfigError, match=r"a\.pth"):
            config_from_checkpoint(Checkpoint({}, {"cfg": short}, Path("a.pth")))


def test_a_trusted_config_gets_its_modules_and_a_missing_one_is_said(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "made_for_this_test.py").write_text("")
    monkeypatch.syspath_prepend(str(work))
    config = {"custom_imports": {"imports": ["made_for_this_test"]}, "model": {"type": "made_for_this_test.Detector"}}
    with pytest.raises(ConfigError, match="made_for_this_test"):
        restrict(config, "a file")
    assert "made_for_this_test" not in sys.modules
    assert trusted(config, "a file") == config
    assert sys.modules.pop("made_for_this_test")
    assert capsys.readouterr().out == ""
    config["custom_imports"] = {"imports": ["not_there_at_all"]}
    assert trusted(config, "a file") == config
    assert "not_there_at_all" in capsys.readouterr().out
