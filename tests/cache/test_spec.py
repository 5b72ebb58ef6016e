import json
from typing import TYPE_CHECKING, Any

import pytest

from kdpipe.cache import CacheError, CacheSpec
from kdpipe.cache.spec import DTYPES, TIERS

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


def test_only_a_part_of_the_levels_is_named(kit: "type[Kit]") -> None:
    assert kit.spec().levels == (0, 1, 2, 3)
    assert kit.spec(levels=(0, 1, 2, 3)) == kit.spec()
    assert "levels" not in kit.spec().to_json()
    spec = kit.spec(levels=(1, 3))
    assert spec.to_json()["levels"] == [1, 3]
    assert CacheSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert [spec.stored_elements(level, 10) for level in range(4)] == [0, 60, 0, 60]
    assert [spec.level_name(level) for level in range(4)] == ["P3", "P4", "P5", "P6"]


def test_fields_and_types(kit: "type[Kit]") -> None:
    assert kit.spec(tier="predictions").fields == ("boxes", "logits", "deltas")
    assert kit.spec(tier="objects").fields == ("boxes", "logits", "deltas", "embeddings", "roi_features")
    assert kit.spec(tier="pyramid").fields == ("features", "boxes", "logits", "deltas", "embeddings")
    specs = [kit.spec(dtype=dtype) for dtype in DTYPES]
    assert [s.field_dtype("features") for s in specs] == ["int4", "int8", "float16", "float32"]
    assert [s.element_dtype for s in specs] == ["uint8", "int8", "float16", "float32"]
    assert [s.field_dtype("roi_features") for s in specs] == ["int4", "int8", "float16", "float32"]
    assert [s.field_dtype("embeddings") for s in specs] == ["int8", "int8", "float16", "float32"]
    assert [s.field_dtype("logits") for s in specs] == ["float16", "float16", "float16", "float32"]
    assert [s.field_dtype("boxes") for s in specs] == ["float32"] * 4
    assert [s.is_quantized for s in specs] == [True, True, False, False]
    assert kit.spec(class_agnostic=True).box_arrays()["deltas"][0] == (1, 4)
    assert [s.box_arrays().get("embedding_scale") for s in specs] == [((), "float32")] * 2 + [None] * 2
    assert "embedding_scale" not in kit.spec(tier="predictions").box_arrays()
    objects = kit.spec(tier="objects").object_arrays()
    assert objects == {
        "roi_rows": ((), "int32"),
        "roi_features": ((6, 7, 7), "int8"),
        "roi_scale": ((6,), "float16"),
    }
    assert kit.spec(tier="objects", dtype="float16").object_arrays().keys() == {"roi_rows", "roi_features"}
    assert kit.spec(tier="pyramid").object_arrays() == kit.spec(tier="embeddings").object_arrays() == {}


def test_int4_holds_two_channels_in_a_byte(kit: "type[Kit]") -> None:
    assert [kit.spec(dtype=dtype).stored_channels for dtype in DTYPES] == [3, 6, 6, 6]
    assert kit.spec(dtype="int4", channels=7).stored_channels == 4
    assert kit.spec(dtype="int4", channels=7).stored_elements(2, 15) == 60
    assert kit.spec(tier="objects", dtype="int4", channels=7).object_arrays()["roi_features"] == ((4, 7, 7), "uint8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tier": "everything"}, "Unknown tier 'everything'"),
        ({"dtype": "int2"}, "Unknown dtype"),
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
        ({"delta_floor": 1.0}, "delta_floor is a probability"),
        ({"delta_floor": -0.1}, "delta_floor is a probability"),
        ({"jittered": -1}, "jittered is a number of boxes"),
        ({"levels": (0, 4)}, "stored levels are some of"),
        ({"levels": (1, 0)}, "stored levels are some of"),
        ({"levels": (1, 2), "tier": "objects"}, "the tier 'objects' holds none"),
    ],
)
def test_impossible_values_are_refused(kit: "type[Kit]", changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CacheError, match=message):
        kit.spec(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "install a newer kdpipe"),
        ({"version": 2}, "development version .* cache the teacher again"),
        ({"version": 0}, "found 0"),
        ({"version": True}, "found True"),
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
