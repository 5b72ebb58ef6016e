"""What mmdet and pycocotools are handed counts as the user's own file does in stock pycocotools."""

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.evaluation.metrics import CocoMetric
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.data.annotations import UNTRAINED
from kdpipe.pipelines.data.datasets import load_coco

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

Content = dict[str, list[dict[str, Any]]]
SIZE = 100  # of all images
CATEGORIES = {7: "cat", 2: "dog", 5: "bird"}

numbers = st.one_of(st.integers(-20, 120), st.floats(-20, 120, width=32).map(float))
sides = st.one_of(numbers, st.sampled_from([0, 0.5, 1, 8, 30, 60, 100]))
flags = st.sampled_from([0, 0, 0, 1, False, True, None, 1.0])
entries = st.fixed_dictionaries(
    {
        "image_id": st.sampled_from([3, 1, 8, 8.0, 99]),
        "category_id": st.sampled_from([7, 2, 5, 44]),
        "bbox": st.tuples(numbers, numbers, sides, sides).map(list),
    },
    optional={
        "id": st.one_of(st.integers(-1, 3), st.just(2**70), st.sampled_from(["a", "7", "", None])),
        "area": st.one_of(st.integers(-5, 9000), st.floats(0, 9000, width=32).map(float), st.none()),
        "iscrowd": flags,
        "ignore": flags,
        "segmentation": st.sampled_from([[], [[1, 2, 30.5, 4, 5, 60]], {"counts": [5, 3], "size": [100, 100]}]),
        "attributes": st.just({"occluded": float("nan")}),
    },
)
usable = {"id": 0, "image_id": 1, "category_id": 2, "bbox": [10, 10, 40, 30], "area": 900.5, "iscrowd": 0}


def content_of(annotations: list[dict[str, Any]]) -> Content:
    images = [{"id": each, "file_name": f"{each}.jpg", "width": SIZE, "height": SIZE} for each in (3, 1, 8)]
    categories = [{"id": each, "name": name} for each, name in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def with_valid_ids(content: Content) -> Content:
    """The file as stock pycocotools can read it, changed in nothing else."""
    content = copy.deepcopy(content)
    for number, entry in enumerate(content["annotations"], 1):
        entry["id"] = number
        entry["iscrowd"] = int(bool(entry.get("iscrowd")))
        if entry.get("area") is None:
            entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    return content


def found_near(content: Content, seed: int) -> list[dict[str, Any]]:
    """Detections of every kind: exact, near, far, of another class, and where there is nothing."""
    rng = np.random.default_rng(seed)
    images, categories = ([entry["id"] for entry in content[key]] for key in ("images", "categories"))
    results = []
    for entry in [*content["annotations"], *content["annotations"][:2]]:
        shift = rng.normal(0, rng.choice([0.0, 1.0, 5.0]), 4)
        box = np.array(entry["bbox"], dtype=float) + shift
        category = int(rng.choice([entry["category_id"], *categories[:2]], p=[0.8, 0.1, 0.1]))
        if entry["image_id"] in images and category in categories:
            score = float(rng.random())
            results.append(
                {"image_id": int(entry["image_id"]), "category_id": category, "bbox": box.tolist(), "score": score}
            )
    return results


def stock_ap(dataset: Any, results: list[dict[str, Any]]) -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(dataset)  # it marks what it ignores
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats: list[float] = evaluation.stats.tolist()
    return stats


@settings(max_examples=60)
@given(
    annotations=st.lists(entries, max_size=12),
    seed=st.integers(0, 99),
    encoding=st.sampled_from(["utf-8", "utf-16"]),
)
def test_ap_is_that_of_stock_pycocotools(
    tmp_path_factory: pytest.TempPathFactory, annotations: list[dict[str, Any]], seed: int, encoding: str
) -> None:
    folder = tmp_path_factory.mktemp("ap")
    content = content_of([*annotations, usable])
    (folder / "a.json").write_text(json.dumps(content), encoding=encoding)
    data = load_coco(folder / "a.json", folder)
    copied = json.loads(data.copied_to(folder / "b.json").write_copy().read_bytes())
    results = found_near(content, seed)
    assert stock_ap(copied, results) == stock_ap(with_valid_ids(content), results)
    assert [entry["id"] for entry in copied["annotations"]] == list(range(1, len(copied["annotations"]) + 1))
    valid = [entry for entry in content["annotations"] if entry["image_id"] != 99 and entry["category_id"] != 44]
    valid.sort(key=lambda entry: [3, 1, 8].index(entry["image_id"]))
    for written, entry in zip(copied["annotations"], valid, strict=True):
        assert written["bbox"] == entry["bbox"]
        assert written.get("segmentation") == entry.get("segmentation")
        assert bool(written.get("ignore")) == bool(entry.get("ignore"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    content = content_of([usable])
    content["images"][1]["file_name"] = "äé日本.jpg"
    (tmp_path / "a.json").write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    data = load_coco(tmp_path / "a.json", tmp_path).copied_to(tmp_path / "new" / "b.json")
    assert data.images[1].file_name == "äé日本.jpg"
    assert json.loads(data.write_copy().read_text(encoding="utf-8"))["images"] == content["images"]
    assert (tmp_path / "a.json").read_text(encoding=encoding) == json.dumps(content, ensure_ascii=False)


STRANGE: dict[str, dict[str, Any]] = {
    UNTRAINED[0]: {"ignore": 1},
    UNTRAINED[1]: {"bbox": [50, 50, -20, 10], "area": 200},
    UNTRAINED[2]: {"area": 0},
    UNTRAINED[3]: {"bbox": [0.2, 0.3, 0.5, 0.4], "area": 0.2},  # of a file with relative coordinates
    UNTRAINED[4]: {"bbox": [200, 10, 20, 20]},
    UNTRAINED[5]: {"iscrowd": 1},
}


@pytest.mark.parametrize("kind", UNTRAINED)
def test_what_is_left_out_is_counted_by_its_reason(tmp_path: Path, kind: str) -> None:
    strange = [{**usable, **STRANGE[kind], "id": number, "image_id": 8} for number in (5, 6)]
    (tmp_path / "a.json").write_text(json.dumps(content_of([usable, *strange])))
    data = load_coco(tmp_path / "a.json", tmp_path)
    first, images = data.left_out()
    assert (first.count, first.kind) == (2, f"annotations {kind}")
    assert "annotation 5, bbox" in first.example
    assert "8.jpg" in first.example
    assert (images.count, images.kind, images.example) == (2, "images without a usable annotation", "3.jpg")
    assert data.only([1]).left_out() == ()
    (tmp_path / "a.json").write_text(json.dumps(content_of(strange)))
    with pytest.raises(
        KdpipeError, match=rf"no usable annotation among 2: 2 annotations {kind} \(the first: annotation 5"
    ):
        load_coco(tmp_path / "a.json", tmp_path)


def odd_file(kit: "Kit", path: Path) -> Content:
    """The validation annotations with everything odd that is accepted."""
    content: Content = json.loads(kit.val_ann.read_text())
    boxes = content["annotations"]
    odd = [{**boxes[0], **each} for each in STRANGE.values()]
    content["annotations"] = [{**box, "id": number // 2} for number, box in enumerate([*odd, *boxes])]
    content["annotations"].append({**boxes[1], "id": "text", "image_id": 4711})
    del content["annotations"][-2]["iscrowd"], content["annotations"][-3]["area"]
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    return content


def test_commands_measure_what_stock_pycocotools_measures(
    kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = odd_file(kit, work / "val.json")
    results = found_near(content, 0)
    ids = [entry["id"] for entry in content["categories"]]

    def process(self: CocoMetric, batch: Any, samples: Any) -> None:
        """In place of what a detector finds."""
        for sample in samples:
            image_results = [entry for entry in results if entry["image_id"] == sample["img_id"]]
            boxes = np.array([entry["bbox"] for entry in image_results]).reshape(-1, 4)
            result = {
                "img_id": sample["img_id"],
                "bboxes": np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
                "scores": np.array([entry["score"] for entry in image_results]),
                "labels": np.array([ids.index(entry["category_id"]) for entry in image_results], dtype=int),
            }
            self.results.append(({"img_id": sample["img_id"]}, result))

    monkeypatch.setattr(CocoMetric, "process", process)
    expected = stock_ap(with_valid_ids(content), results)
    assert 0.1 < expected[0] < 0.9
    before = kit.tree(work)
    ended = kit.run("evaluate", "--ckpt", kit.teacher, "--ann-file", "val.json", "--img-dir", kit.val_img)
    assert f"{expected[0]:.3f}" in ended.out
    assert "left out: 1 annotations of images that are not listed" in ended.out
    assert kit.tree(work) == before
    validation = ("--val-ann-file", "val.json", "--val-img-dir", kit.val_img)
    training = ("--config", kit.student, *kit.data, *validation, "--epochs", 1, "--work-dir", ".", "--workers", 0)
    ended = kit.run("train-teacher", *training)
    assert json.loads(Path("result.json").read_text())["ap"] == pytest.approx(expected[0], abs=6e-4)
    assert kit.tree(work)["val.json"] == before["val.json"]

    source = ("--ckpt", kit.teacher, "--ann-file", "val.json", "--img-dir", kit.val_img)
    kit.run("cache-teacher", *source, *kit.VIEW, "--out", "val.zarr")

    def of_image(cache: Any, image_id: int, *args: Any) -> list[dict[str, Any]]:
        return [entry for entry in results if entry["image_id"] == image_id]

    monkeypatch.setattr("kdpipe.pipelines.teacher.decode._results", of_image)
    assert f"{expected[0]:.3f}" in kit.run("verify", "val.zarr", "--ap").out


def test_a_large_file_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content_of([usable])))
    load_coco(tmp_path / "a.json", tmp_path)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr("kdpipe.pipelines.data.datasets._LARGE", 100)
    load_coco(tmp_path / "a.json", tmp_path)
    assert capsys.readouterr().out.startswith(f"Reading {tmp_path}/a.json (")


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 9])
def test_annotations_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Masks in some chunks only, ids of every kind, and a bad entry is named by its place in the file."""
    for module in ("coco_entries", "coco_copy"):
        monkeypatch.setattr(f"kdpipe.pipelines.data.{module}._CHUNK", 2)
    boxes = [
        {**usable, "id": [7, "x", 2**80][number % 3], "image_id": 3, "area": number + 1} for number in range(count)
    ]
    if count > 4:
        boxes[4]["segmentation"] = [[1, 2, 3, 4, 5, 6]]
    content = content_of([*boxes, usable])
    (tmp_path / "a.json").write_text(json.dumps(content))
    data = load_coco(tmp_path / "a.json", tmp_path)
    assert data.annotations.ids.tolist() == [box["id"] for box in content["annotations"]]
    copied = json.loads(data.copied_to(tmp_path / "b.json").write_copy().read_bytes())
    expected = [{**box, "id": number} for number, box in enumerate(content["annotations"], 1)]
    assert copied["annotations"] == expected
    for bad, message in (
        (5, "an entry of annotations is '5'"),
        ({"bbox": []}, f"annotation at position {count + 1} has"),
    ):
        (tmp_path / "a.json").write_text(json.dumps(content_of([*content["annotations"], bad])))  # type: ignore[list-item]
        with pytest.raises(KdpipeError, match=message):
            load_coco(tmp_path / "a.json", tmp_path)


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=6,
)
places = st.sampled_from(
    [
        *[("images", key) for key in ("id", "file_name", "coco_url", "width", "neg_category_ids")],
        *[("categories", key) for key in ("id", "name", "supercategory")],
        *[("annotations", key) for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")],
        *[("images", None), ("categories", None), ("annotations", None), (None, None)],
    ]
)


@settings(max_examples=150)
@given(place=places, value=anything)
def test_any_value_in_any_place_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[str | None, str | None], value: Any
) -> None:
    folder = tmp_path_factory.mktemp("any")
    content: Any = content_of([dict(usable), {**usable, "image_id": 8}])
    key, field = place
    if key is None:
        content = value
    elif field is None:
        content[key] = value
    else:
        content[key][0][field] = value
    (folder / "a.json").write_text(json.dumps(content))
    try:
        data = load_coco(folder / "a.json", folder)
    except KdpipeError:
        return
    written = data.copied_to(folder / "b.json").write_copy()
    assert load_coco(written, folder).digest() == data.digest()
