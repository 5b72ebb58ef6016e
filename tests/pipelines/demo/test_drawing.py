import hashlib
import json
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.demo import drawing as shapes
from kdpipe.pipelines.demo.drawing import CLASS_NAMES, draw_shapes

TRAIN, VAL = 24, 12
CutOut: TypeAlias = tuple[shapes.Mask, shapes.Floats]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    draw_shapes(folder, train=TRAIN, val=VAL)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def annotations(folder: Path, split: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "annotations" / f"{split}.json").read_text())
    return document


@pytest.mark.parametrize(("split", "count"), [("train", TRAIN), ("val", VAL)])
def test_is_a_coco_data_set(drawn: Path, split: str, count: int) -> None:
    coco = COCO(str(drawn / "annotations" / f"{split}.json"))
    assert len(coco.getImgIds()) == count
    assert [item["name"] for item in coco.loadCats(coco.getCatIds())] == list(CLASS_NAMES)
    assert {item["category_id"] for item in coco.dataset["annotations"]} == set(coco.getCatIds())
    for image in coco.dataset["images"]:
        pixels = cv2.imread(str(drawn / split / image["file_name"]))
        assert pixels is not None
        assert pixels.shape == (image["height"], image["width"], 3) == (192, 256, 3)
        for item in coco.loadAnns(coco.getAnnIds(image["id"])):
            x, y, w, h = item["bbox"]
            assert min(x, y) >= 0
            assert min(w, h) >= 2
            assert x + w <= image["width"]
            assert y + h <= image["height"]
            assert 0 < item["area"] <= w * h
            assert item["iscrowd"] == 0


def test_sizes_cover_a_wide_range(drawn: Path) -> None:
    longer = [max(item["bbox"][2:]) for item in annotations(drawn, "train")["annotations"]]
    assert min(longer) < 20
    assert max(longer) > 100


def test_same_arguments_give_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    draw_shapes(tmp_path, train=TRAIN, val=VAL)
    assert digests(tmp_path) == digests(drawn)


def test_a_picture_does_not_depend_on_how_many_there_are(drawn: Path, tmp_path: Path) -> None:
    draw_shapes(tmp_path, train=2, val=1)
    few, many = digests(tmp_path), digests(drawn)
    assert {name: many[name] for name in few if name.endswith(".jpg")} == {
        name: digest for name, digest in few.items() if name.endswith(".jpg")
    }


def test_seeds_and_splits_differ(tmp_path: Path) -> None:
    for seed in (0, 1):
        draw_shapes(tmp_path / str(seed), train=2, val=2, seed=seed, size=(64, 80))
    pictures = [path.read_bytes() for path in tmp_path.rglob("*.jpg")]
    assert len(pictures) == len(set(pictures)) == 8


def test_boxes_match_the_drawn_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes in the picture when an object is painted is what its box holds, whatever covers it later."""
    labels: list[int | None] = []
    extents: list[list[int]] = []  # (x, y, w, h) of the pixels that each object changed
    cut_out, paint = shapes._cut_out, shapes._paint

    def watched_cut_out(
        rng: np.random.Generator, label: int | None, length: float
    ) -> tuple[shapes.Mask, shapes.Floats]:
        labels.append(label)
        return cut_out(rng, label, length)

    def watched_paint(rng: np.random.Generator, canvas: shapes.Floats, alpha: shapes.Floats) -> None:
        picture = canvas.base
        assert picture is not None
        before = picture.copy()
        paint(rng, canvas, alpha)
        if labels[-1] is not None:
            ys, xs = np.nonzero(np.abs(picture - before).max(axis=-1) > 2)
            extents.append([int(v) for v in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)])

    monkeypatch.setattr(shapes, "_cut_out", watched_cut_out)
    monkeypatch.setattr(shapes, "_paint", watched_paint)
    objects = [item for seed in range(15) for item in shapes._draw_picture(np.random.default_rng(seed), (192, 256))[1]]
    assert len(objects) > 45
    np.testing.assert_allclose(extents, [item["bbox"] for item in objects], atol=2)


@pytest.mark.parametrize("label", [*range(len(CLASS_NAMES)), None])
def test_cut_out_has_the_asked_length_and_just_fits(label: int | None) -> None:
    rng = np.random.default_rng(3)
    for length in (12.0, 30.5, 71.3, 130.0):
        silhouette, alpha = shapes._cut_out(rng, label, length)
        assert max(silhouette.shape) == pytest.approx(length, abs=2)
        for side in (silhouette[0], silhouette[-1], silhouette[:, 0], silhouette[:, -1]):
            assert side.any()
        assert not (alpha >= 0.51)[~silhouette].any()


def test_no_object_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each object keeps 30 % of its pixels in sight."""
    whole: list[int] = []  # pixels of the object on an endless canvas
    placed: list[int] = []  # the same, of those that found a place in the picture
    pictures: list[Any] = []
    cut_out = shapes._cut_out

    def watched_paint(rng: np.random.Generator, canvas: shapes.Floats, alpha: shapes.Floats) -> None:
        assert canvas.base is not None
        canvas[alpha >= 0.5] = -1 - len(placed)
        placed.append(whole[-1])
        pictures.append(canvas.base)

    def watched_cut_out(
        rng: np.random.Generator, label: int | None, length: float
    ) -> tuple[shapes.Mask, shapes.Floats]:
        silhouette, alpha = cut_out(rng, label, length)
        whole.append(int(np.count_nonzero(alpha >= 0.5)))
        return silhouette, alpha

    monkeypatch.setattr(shapes, "_cut_out", watched_cut_out)
    monkeypatch.setattr(shapes, "_paint", watched_paint)
    for seed in range(15):
        placed.clear()
        shapes._draw_picture(np.random.default_rng(seed), (192, 256))
        for number, pixels in enumerate(placed):
            assert np.count_nonzero(pictures[-1][..., 0] == -1 - number) >= 0.3 * pixels


def test_colour_does_not_tell_the_class() -> None:
    """Mean colour and spread of painted objects, 150 of each class, agree within sampling error."""
    means, spreads = [], []
    for label in range(len(CLASS_NAMES)):
        rng = np.random.default_rng([5, label])
        colours = []
        for _ in range(150):
            _, alpha = shapes._cut_out(rng, label, shapes._log_uniform(rng, 12, 60))
            canvas = np.full((*alpha.shape, 3), 128, dtype=np.float32)
            shapes._paint(rng, canvas, alpha)
            colours.append(canvas[alpha >= 0.5].mean(axis=0))
        means.append(np.mean(colours, axis=0))
        spreads.append(np.std(colours, axis=0))
    error = np.mean(spreads) / 150**0.5
    assert np.mean(spreads) > 40
    assert np.ptp(means, axis=0).max() < 5.5 * error
    assert np.ptp(spreads, axis=0).max() < 5.5 * error


def test_progress_counts_all_pictures_and_a_second_call_draws_nothing(tmp_path: Path) -> None:
    counts: list[int] = []
    draw_shapes(tmp_path, train=3, val=2, size=(64, 64), progress=counts.append)
    assert counts == [1, 2, 3, 4, 5]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    draw_shapes(tmp_path, train=3, val=2, size=(64, 64), progress=counts.append)
    assert counts[5:] == [5]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps


@pytest.mark.parametrize("stop_at", [1, 4, 5])
def test_interrupted_drawing_is_completed(stop_at: int, tmp_path: Path) -> None:
    def interrupt(finished: int) -> None:
        if finished == stop_at:
            raise KeyboardInterrupt

    draw_shapes(tmp_path / "whole", train=3, val=2, size=(64, 64))
    with pytest.raises(KeyboardInterrupt):
        draw_shapes(tmp_path / "broken", train=3, val=2, size=(64, 64), progress=interrupt)
    draw_shapes(tmp_path / "broken", train=3, val=2, size=(64, 64))
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


def test_a_missing_picture_or_other_arguments_draw_again(tmp_path: Path) -> None:
    draw_shapes(tmp_path / "small", train=2, val=1, size=(64, 64), seed=4)
    draw_shapes(tmp_path / "other", train=4, val=2, size=(64, 80))
    draw_shapes(tmp_path / "other", train=2, val=1, size=(64, 64), seed=4)
    assert digests(tmp_path / "other") == digests(tmp_path / "small")
    (tmp_path / "other" / "val" / "shapes_000000.jpg").unlink()
    draw_shapes(tmp_path / "other", train=2, val=1, size=(64, 64), seed=4)
    assert digests(tmp_path / "other") == digests(tmp_path / "small")


@pytest.mark.parametrize("content", ["{}", "[1]", '{"info": {"year": 2017}, "images": []}', "not json"])
def test_annotations_of_others_are_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "annotations" / "val.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(KdpipeError, match=r"val\.json was not drawn by kdpipe.*another folder"):
        draw_shapes(tmp_path, train=2, val=1)
    assert [item for item in tmp_path.rglob("*") if item.is_file()] == [path]
    assert path.read_text() == content


@pytest.mark.parametrize("bad", [{"train": 0}, {"val": 0}, {"size": (63, 256)}, {"seed": -1}])
def test_arguments_out_of_range_are_refused(bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KdpipeError, match="at least one picture of each"):
        draw_shapes(tmp_path / "new", **{"train": 2, "val": 2, **bad})
    assert not (tmp_path / "new").exists()
