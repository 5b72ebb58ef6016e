import json
from typing import TYPE_CHECKING, Any

import pytest

from kdpipe.cache import CacheError, CacheSpec
from kdpipe.cache.spec import DTYPES, FORMAT_VERSION, TIERS

if TYPE_CHECKING:
    from tests.cache.conftest import Kit


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_json_round_trip(kit: "type[Kit]", tier: str, dtype: str) -> None:
    spec = kit.spec(tier=tier, dtype=dtype)
    assert CacheSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_only_a_cascade_has_the_entry_of_its_stages(kit: "type[Kit]") -> None:
    plain, stds = kit.spec(), ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1))
    assert "cascade_stds" not in plain.to_json()
    spec = kit.spec(box_stds=stds[0], cascade_stds=stds)
    assert spec.to_json()["cascade_stds"] == [list(stage) for stage in stds]
    assert CacheSpec.from_json(json.loads(json.dumps(spec.to_json()))) == CacheSpec.from_json(spec.to_json()) == spec
    with pytest.raises(CacheError, match="first stage"):
        kit.spec(box_stds=stds[1], cascade_stds=stds)


def test_only_heads_with_more_than_layers_have_entries_for_it(kit: "type[Kit]") -> None:
    assert not {"shared_style", "semantic"} & kit.spec().to_json().keys()
    spec = kit.spec(shared_style="caffe", semantic=(1, 14))
    assert (spec.to_json()["shared_style"], spec.to_json()["semantic"]) == ("caffe", [1, 14])
    assert CacheSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert (kit.spec().head_levels, spec.head_levels) == (kit.spec().roi_levels, len(kit.spec().strides))


def test_fields_and_types(kit: "type[Kit]") -> None:
    assert kit.spec(tier="predictions").fields == ("boxes", "logits", "deltas")
    assert kit.spec(tier="roi").fields == ("boxes", "logits", "deltas", "embeddings", "roi_features")
    assert kit.spec(tier="pyramid").fields == ("features", "boxes", "logits", "deltas", "embeddings")
    int8, half, single = kit.spec(dtype="int8"), kit.spec(dtype="float16"), kit.spec(dtype="float32")
    assert [s.field_dtype("features") for s in (int8, half, single)] == ["int8", "float16", "float32"]
    assert [s.field_dtype("logits") for s in (int8, half, single)] == ["float16", "float16", "float32"]
    assert [s.field_dtype("boxes") for s in (int8, half, single)] == ["float32"] * 3
    assert kit.spec(class_agnostic=True).box_arrays()["deltas"][0] == (1, 4)
    assert kit.spec(tier="roi").box_arrays()["roi_scale"] == ((6,), "float32")
    assert "roi_scale" not in kit.spec(tier="roi", dtype="float16").box_arrays()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tier": "everything"}, "Unknown tier 'everything'"),
        ({"dtype": "int4"}, "Unknown dtype"),
        ({"codec": "gzip"}, "Unknown codec"),
        ({"views": ()}, "views"),
        ({"views": ("hflip", "identity")}, "views"),
        ({"class_names": ("a",)}, "1 names and 3 ids"),
        ({"channels": 0}, "channels = 0"),
        ({"box_stds": (0.1, 0.0, 0.1, 0.1)}, "box_stds"),
        ({"roi_levels": 5}, "found 5"),
        ({"cascade_stds": ((0.1, 0.1, 0.2, 0.2), (0.1, 0.0, 0.2, 0.2))}, "cascade_stds"),
        ({"shared_style": "torch"}, "Unknown shared_style 'torch'"),
        ({"semantic": (9, 14)}, "semantic is one of the"),
        ({"semantic": (1,)}, "semantic is one of the"),
    ],
)
def test_impossible_values_are_refused(kit: "type[Kit]", changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        kit.spec(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": FORMAT_VERSION + 1}, "install a newer kdpipe"),
        ({"version": FORMAT_VERSION - 1}, "cache the teacher again"),
        ({"version": "1"}, "found '1'"),
        ({"channels": "6"}, r"'channels' .* should be int"),
        ({"channels": True}, r"'channels' .* should be int"),
        ({"strides": 4}, r"'strides' .* should be a list"),
        ({"scale": [1, 2, 3]}, r"'scale' .* should be a list"),
        ({"cascade_stds": [0.1, 0.1]}, r"'cascade_stds' .* should be a list"),
        ({"extra": 1}, r"unknown entries \['extra'\]"),
        ({"tier": "all"}, "Unknown tier"),
    ],
)
def test_damaged_json_is_refused(kit: "type[Kit]", changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        CacheSpec.from_json({**kit.spec().to_json(), **changes})
    with pytest.raises(CacheError, match=r"missing entries \['channels'\]"):
        CacheSpec.from_json({name: value for name, value in kit.spec().to_json().items() if name != "channels"})
