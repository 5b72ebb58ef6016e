"""A `type` of a config is resolved to a class, however it is written, and nothing is imported for it."""

import sys
from typing import Any

import mmcv.transforms
import mmdet.datasets.transforms as mmdet_transforms
import pytest
from mmdet.registry import MODELS, TRANSFORMS

from kdpipe.pipelines.detectors.config_types import resolve_type, type_name


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Expand", mmdet_transforms.Expand),
        ("mmdet.Expand", mmdet_transforms.Expand),
        (mmdet_transforms.Expand, mmdet_transforms.Expand),
        ("mmdet.datasets.transforms.Expand", mmdet_transforms.Expand),
        ("mmdet.datasets.transforms.transforms.Expand", mmdet_transforms.Expand),
        ("Resize", mmdet_transforms.Resize),  # mmdet's own, not its parent's
        ("mmengine.Resize", mmcv.transforms.Resize),
        ("mmcv.transforms.processing.Resize", mmcv.transforms.Resize),
        ("mmdet.RandomApply", mmcv.transforms.RandomApply),  # of the parent registry
        ("Nowhere", None),
        ("mmdet.Nowhere", None),
        ("mmpretrain.Expand", None),
        ("mmcv.imresize", None),  # there, but no transform
        ("os.system", None),
        ("", None),
        (".", None),
    ],
)
def test_a_transform_is_found_by_any_of_its_names(kind: Any, expected: Any) -> None:
    assert resolve_type(kind, TRANSFORMS) is expected


def test_nothing_is_imported() -> None:
    assert "antigravity" not in sys.modules
    assert resolve_type("antigravity.fly", MODELS) is None
    assert "antigravity" not in sys.modules


def test_names_in_messages() -> None:
    assert type_name("mmdet.Expand") == "mmdet.Expand"
    assert type_name(mmdet_transforms.Expand) == "Expand"
