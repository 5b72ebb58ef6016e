"""`kdpipe inspect`, also of caches that are incomplete, and whose names would paint the terminal."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kdpipe.cache import CacheWriter, ImageInfo, TeacherRecord, open_cache
from kdpipe.cache.spec import VIEWS
from kdpipe.pipelines.commands.inspect import _uncrossable
from kdpipe.pipelines.runtime.console import plain

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

IMAGES = [
    ImageInfo(1, "[red]a\x1b[31m.jpg", 96, 128, 1),
    ImageInfo(2, "b.jpg", 96, 128, 0),
    ImageInfo(3, "c", 96, 128, 0),
]


@pytest.fixture
def partial(kit: "Kit", work: Path) -> Path:
    """Three parts, of which one is missing and one has a skipped image only; class names that are no good."""
    spec = replace(open_cache(kit.cache).spec, tier="predictions", proposals=3)
    spec = replace(spec, class_names=tuple(f"[bold]{name}\x1b[2J\u202e" for name in spec.class_names))
    writer = CacheWriter(work / "x.zarr", spec, IMAGES, 1, {}, {})
    with writer.part(0) as part:
        logits = torch.zeros(4, spec.num_classes + 1)
        logits[:, 1] = torch.tensor([1.0, 9.0, 3.0, 2.0])
        boxes = torch.tensor([[10.0, 20.0, 30.0, 40.0]]).repeat(4, 1)
        deltas = torch.zeros(4, spec.num_classes, 4)
        labels = torch.zeros(1, dtype=torch.int64)
        record = TeacherRecord(1, "identity", IMAGES[0].file_name, (96, 128), (96, 128), 3, boxes, logits, deltas)
        part.add(replace(record, gt_labels=labels))
    with writer.part(1) as part:
        part.skip(2, "b.jpg", "not an image \x1b[31m[red]")
    return work / "x.zarr"


def test_a_whole_cache(kit: "Kit", work: Path) -> None:
    ended = kit.run("inspect", kit.cache)
    for text in ("tier pyramid, int4, zstd", "8 of 8", "1 of 1", str(kit.teacher), str(kit.ann), "features", "total"):
        assert text in ended.out
    assert "serves   sgfi, ckd, pred, cls, reg, careg" in ended.out
    assert "missing" not in ended.out
    values = json.loads(kit.run("inspect", kit.cache, "--json").out)
    sizes = values["fields"]
    files = [file for file in kit.cache.glob("parts/00000/*/*/*") if file.is_file()]
    assert sum(size["disk"] for size in sizes.values()) == sum(file.stat().st_size for file in files)
    cache = open_cache(kit.cache)
    rows = sum(cache.index(image_id).num_rois for image_id in cache.image_ids.tolist())
    assert sizes["embeddings"]["raw"] == rows * (
        cache.spec.row_bytes()["embeddings"] + cache.spec.row_bytes()["embedding_scale"]
    )
    assert values["spec"] == cache.spec.to_json()


def test_how_often_no_more_rois_are_stored(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = work / "x.zarr"
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--targets", "objects", "--limit", 3, "--out", out)
    cache = open_cache(out)
    assert cache.spec.views == VIEWS, "in this tier both are kept"
    counts = [cache.index(image_id, view).num_objects for image_id in cache.image_ids.tolist() for view in VIEWS]
    limit = sorted(counts)[2]
    monkeypatch.setattr("kdpipe.pipelines.commands.inspect.MAX_OBJECTS", limit)
    reached = sum(count >= limit for count in counts)
    values = json.loads(kit.run("inspect", out, "--json").out)["objects"]
    assert values == {"limit": limit, "views": 6, "mean": pytest.approx(sum(counts) / 6), "at_limit": reached}
    ended = kit.run("inspect", out)
    assert f"in {reached} of 6 views looked at" in ended.out
    assert "128 boxes near objects" in ended.out
    assert json.loads(kit.run("inspect", kit.cache, "--json").out)["objects"] is None
    image = kit.run("inspect", out, "--image", int(cache.image_ids[0]))
    assert f"{cache.index(int(cache.image_ids[0])).num_jittered} near objects" in image.out


def test_some_levels(kit: "Kit", work: Path) -> None:
    out = work / "x.zarr"
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--levels", "P5,P3", "--limit", 2, "--out", out)
    assert "strides 8, 32" in kit.run("inspect", out).out
    values = json.loads(kit.run("inspect", out, "--image", int(open_cache(out).image_ids[0]), "--json").out)
    assert [level["stride"] for level in values["image"]["levels"]] == [8, 32]
    losses = json.loads(kit.run("inspect", out, "--json").out)["losses"]
    assert "lacks P2, P4" in losses["sgfi"]["reason"]
    assert losses["ckd"]["served"]


def test_an_image(kit: "Kit", work: Path) -> None:
    cache = open_cache(kit.cache)
    image_id = int(cache.image_ids[0])
    values = json.loads(kit.run("inspect", kit.cache, "--image", image_id, "--json").out)["image"]
    index = cache.index(image_id)
    assert [tuple(level["shape"][1:]) for level in values["levels"]] == list(index.level_shapes)
    assert (values["proposals"], values["ground_truth"]) == (index.num_proposals, index.num_rois - index.num_proposals)
    proposals = [box["probability"] for box in values["boxes"] if not box["ground_truth"]]
    assert proposals == sorted(proposals, reverse=True)
    assert len(values["boxes"]) == 10 + values["ground_truth"]
    ended = kit.run("inspect", kit.cache, "--image", image_id)
    assert index.file_name in ended.out
    assert ended.out.count("annotated") == values["ground_truth"] + 1
    assert "is not in the cache" in kit.refused("inspect", kit.cache, "--image", 999_999)
    assert "has the views" in kit.refused("inspect", kit.cache, "--image", image_id, "--view", "hflip")


def test_levels_that_are_not_stored_are_not_shown(kit: "Kit", work: Path) -> None:
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--levels", "P3,P5", "--out", work / "x.zarr")
    image_id = int(open_cache(work / "x.zarr").image_ids[0])
    values = json.loads(kit.run("inspect", work / "x.zarr", "--image", image_id, "--json").out)["image"]
    assert [level["stride"] for level in values["levels"]] == [8, 32]


def test_an_incomplete_cache(kit: "Kit", partial: Path) -> None:
    ended = kit.run("inspect", partial)
    for text in ("images   1 of 3, 1 skipped", "parts    2 of 3", "head     missing", "missing  part 2 of 1 images"):
        assert text in ended.out
    assert "serves   pred, cls, reg, careg" in ended.out
    assert "--targets embeddings" in ended.out
    assert ended.out.endswith("missing  1 parts; the program that made the cache makes them\n")
    values = json.loads(kit.run("inspect", partial, "--json").out)
    assert values["parts"]["missing"] == [{"part": 2, "images": 1}]
    assert not values["losses"]["sgfi"]["served"]


def test_text_of_a_cache_is_only_shown(kit: "Kit", partial: Path) -> None:
    printed = [kit.run("inspect", partial, *options).out for options in ((), ("--image", 1), ("--json",))]
    for out in printed:
        assert "\x1b" not in out
        assert "\u202e" not in out
        assert "[bold]" in out
    assert r"image 1 ([red]a\x1b[31m.jpg), view identity" in printed[1]
    assert r"not an image \x1b[31m[red]" in printed[0]


def test_plain() -> None:
    assert plain("größe 漢字 [b]") == "größe 漢字 [b]"
    assert plain("a\x1b[0m\n\x7f\x9b\u202e\ud800") == r"a\x1b[0m\n\x7f\x9b\u202e\ud800"


def cross(kit: "Kit", path: Path) -> tuple[bool, str]:
    """Whether a cache serves `cross`, and why not."""
    loss = json.loads(kit.run("inspect", path, "--json").out)["losses"]["cross"]
    assert loss["needs"] == ["deltas", "logits", "head"]
    return loss["served"], str(loss["reason"])


def test_what_serves_cross(kit: "Kit", work: Path) -> None:
    """The box head does, where it is there, and can be rebuilt for features of a student."""
    assert cross(kit, kit.cache) == (True, "None")
    shutil.copytree(kit.cache, work / "a.zarr")
    shutil.rmtree(work / "a.zarr" / "head")
    assert cross(kit, work / "a.zarr") == (False, "The loss cross needs the teacher's box head, which is missing.")
    spec = open_cache(kit.cache).spec
    record = {"parameters": {"roi_head.bbox_head.fc_cls.weight": {"shape": [4, 3], "dtype": "float32"}}}
    assert "cannot be rebuilt" in str(_uncrossable(spec, "stored", record))


def test_a_record_of_any_kind(kit: "Kit", work: Path) -> None:
    """What a cache records beside its data may be any JSON."""
    spec = replace(open_cache(kit.cache).spec, tier="predictions")
    records: list[dict[str, Any]] = [{"teacher": "x101", "data": "coco"}, {"data": {"voc": "/v"}}, {"teacher": [1]}]
    for number, metadata in enumerate(records):
        place = work / f"{number}.zarr"
        CacheWriter(place, spec, IMAGES, 1, {}, metadata)
        assert "teacher  not recorded" in kit.run("inspect", place).out
        assert json.loads(kit.run("inspect", place, "--json").out)["teacher"] == {}
        kit.run("report", place, "--out", f"{number}.html")
