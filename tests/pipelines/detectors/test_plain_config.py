"""mmengine's pure-Python configs, whose types are classes, mean what the same config says as text."""

import sys
from pathlib import Path
from typing import Any

import mmcv.ops
import mmdet.registry
import mmengine.registry
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope, Registry

from kdpipe.pipelines.detectors.configs import find_config, zoo
from kdpipe.pipelines.detectors.literal_config import ConfigError, parse_literal_config
from kdpipe.pipelines.detectors.plain_config import _registered, plain_config

ZOO = (
    "faster-rcnn_r50_fpn_1x_coco",
    "cascade-mask-rcnn_r50_fpn_1x_coco",
    "htc_r50_fpn_1x_coco",
    "yolox_s_8xb8-300e_coco",
    "rtmdet_s_8xb32-300e_coco",
    "deformable-detr_r50_16xb2-50e_coco",
    "faster-rcnn_r50_fpn_1x_voc0712",
    "retinanet_swin-t-p4-w7_fpn_1x_coco",
)


def registries() -> list[Registry]:
    packages = (mmdet.registry, mmengine.registry)
    return [each for package in packages for each in vars(package).values() if isinstance(each, Registry)]


def pure_python(config: Config) -> str:
    """The text of a config in which every type is an imported class, wherever there is one of that name."""
    _registered()  # fills the registries
    imports: dict[Any, str] = {}

    def name(text: str) -> str | None:
        for registry in sorted(registries(), key=lambda registry: registry.scope != "mmdet"):
            thing = registry.module_dict.get(text) or getattr(mmcv.ops, text, None)
            if thing is not None and hasattr(sys.modules[thing.__module__], thing.__name__):
                return imports.setdefault(thing, f"Imported{len(imports)}")
        return None

    def text(value: Any, key: str) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{each!r}: {text(item, each)}" for each, item in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(text(item, "") for item in value) + "]"
        if isinstance(value, tuple):
            return "(" + "".join(text(item, "") + ", " for item in value) + ")"
        return (key == "type" and name(value)) or repr(value)

    body = "\n".join(f"{key} = {text(value, key)}" for key, value in config.to_dict().items())
    lines = [f"from {thing.__module__} import {thing.__name__} as {alias}" for thing, alias in imports.items()]
    return "\n".join([*lines, body])


@pytest.mark.parametrize("name", ZOO)
def test_classes_and_names_are_the_same_config(name: str, tmp_path: Path) -> None:
    written = find_config(name)
    file = tmp_path / "lazy.py"
    file.write_text(pure_python(written))
    assert file.read_text().count("import") > 10
    assert Config._is_lazy_import(str(file))
    config = find_config(file)
    assert differences(config.to_dict(), written.to_dict()) == []
    assert parse_literal_config(config.pretty_text) == config.to_dict()


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [line for key in one for line in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list | tuple) and type(one) is type(other) and len(one) == len(other):
        return [
            line for i, (a, b) in enumerate(zip(one, other, strict=True)) for line in differences(a, b, f"{path}.{i}")
        ]
    return [] if one == other else [f"{path}: {one} and {other}"]


def test_every_registered_class_is_found_by_its_text() -> None:
    names = _registered()
    with DefaultScope.overwrite_default_scope("mmdet"):
        for package in (mmdet.registry, mmengine.registry):
            for kind, registry in vars(package).items():
                if isinstance(registry, Registry) and kind not in ("FUNCTIONS", "LOG_PROCESSORS"):
                    where = getattr(mmdet.registry, kind, registry)
                    for thing in registry.module_dict.values():
                        assert where.get(names[thing]) is thing, (kind, thing)


def test_bases_and_what_a_file_defines_for_itself(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text(
        "from mmdet.models import RetinaNet\nfrom mmdet.datasets import CocoDataset\n"
        "dataset_type = CocoDataset\nmodel = dict(type=RetinaNet, data_preprocessor=None)\n"
    )
    (tmp_path / "own.py").write_text(
        "from mmengine.config import read_base\nfrom mmengine.optim import OptimWrapper\n"
        "from torch.optim import AdamW\nfrom mmdet.datasets.transforms import Resize\n"
        "from mmcv.transforms import Resize as PlainResize\n"
        "with read_base():\n    from .base import *\n"
        "def double(x):\n    return 2 * x\n"
        "optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=0.5))\n"
        "pipeline = [dict(type=Resize), dict(type=PlainResize)]\n"
        "train_dataloader = dict(dataset=dict(type=dataset_type, pipeline=pipeline))\n"
        "scale = double(2)\n"
    )
    config = find_config(tmp_path / "own.py")
    assert (config.model.type, config.dataset_type) == ("RetinaNet", "CocoDataset")
    assert config.optim_wrapper == {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 0.5}}
    steps = config.train_dataloader.dataset.pipeline
    assert [step["type"] for step in steps] == ["Resize", "mmengine.Resize"]
    assert config.scale == 4
    assert "double" not in config
    assert parse_literal_config(config.pretty_text) == config.to_dict()


def test_classes_of_the_user_are_named_by_their_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_of_plain_config.py").write_text("class Backbone:\n    pass\n")
    text = "from mmdet.models import RetinaNet\nfrom mine_of_plain_config import Backbone\n"
    file = tmp_path / "config.py"
    file.write_text(text + "model = dict(type=RetinaNet, data_preprocessor=None, backbone=dict(type=Backbone))\n")
    assert find_config(file).model.backbone.type == "mine_of_plain_config.Backbone"


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ("dict(type=RetinaNet, backbone=dict(type=lambda: 1))", "model.backbone.type"),
        ("dict(type=RetinaNet, neck=[dict(dtype=torch.float16)])", "model.neck.0.dtype"),
        ("dict(type=RetinaNet, neck={1, 2})", "model.neck"),
    ],
)
def test_what_is_no_plain_value_is_named(value: str, place: str, tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text(f"import torch\nfrom mmdet.models import RetinaNet\nmodel = {value}\n")
    with pytest.raises(ConfigError, match=rf"{place} of the config is .*cannot be recorded as text"):
        find_config(file)


def test_numbers_of_numpy_become_plain_ones() -> None:
    values = {"lr": np.float32(0.5), "mean": np.array([1.0, 2.0]), "ids": range(2), "root": Path("a")}
    plain = {"lr": 0.5, "mean": [1.0, 2.0], "ids": [0, 1], "root": "a"}
    assert plain_config(Config({"model": values})).to_dict() == {"model": plain}


def test_what_is_imported_cannot_be_called(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text("from mmdet.models import RetinaNet\nmodel = RetinaNet()\n")
    with pytest.raises(ConfigError, match="calls what it imports"):
        find_config(tmp_path / "config.py")


def test_a_package_that_is_missing_is_named() -> None:
    convnext = next(zoo().glob("convnext/mask-rcnn*.py"))
    with pytest.raises(ConfigError, match=r"needs the package mmpretrain.*pip install mmpretrain"):
        find_config(convnext)
