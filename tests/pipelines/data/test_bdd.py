"""Detection labels of BDD100K, of both layouts."""

import json
from pathlib import Path
from typing import Any

import pytest

from kdpipe.pipelines.data.bdd import BDD_CLASSES
from kdpipe.pipelines.data.coco_entries import DataError
from kdpipe.pipelines.data.datasets import DetectionData, load_bdd


def label(category: str, *corners: float, **attributes: Any) -> dict[str, Any]:
    box = dict(zip(("x1", "y1", "x2", "y2"), corners, strict=True))
    return {"id": 1, "category": category, "attributes": attributes, "manualShape": True, "box2d": box}


def lane() -> dict[str, Any]:
    vertices = [{"vertices": [[1.5, 2], [3, 4]], "types": "LL", "closed": False}]
    return {"id": 2, "category": "lane", "attributes": {"direction": "parallel"}, "poly2d": vertices}


def frame(name: str, *labels: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "attributes": {"weather": "clear"}, "timestamp": 10000, "labels": list(labels), **more}


OF_2018 = [
    frame("a.jpg", label("person", 10, 20, 29.5, 39.5, occluded=False), lane(), label("bike", 0, 0, 9, 9)),
    frame("b.jpg", lane()),
    frame("c.jpg", label("traffic light", 100, 100, 109, 119, trafficLightColor="green")),
]
OF_2020 = [
    frame("a.jpg", label("pedestrian", 10, 20, 29.5, 39.5), label("bicycle", 0, 0, 9, 9)),
    {"name": "b.jpg", "attributes": {"weather": "clear"}},  # nothing is there
    frame("c.jpg", label("traffic light", 100, 100, 109, 119)),
]


def read(folder: Path, content: Any, **options: Any) -> DetectionData:
    path = folder / "det_train.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_bdd(path, folder, **options)


@pytest.mark.parametrize(
    "content", [OF_2018, OF_2020, {"frames": OF_2020, "groups": None, "config": None}], ids=["2018", "2020", "scalabel"]
)
def test_both_layouts_are_the_same_data(tmp_path: Path, content: Any) -> None:
    data = read(tmp_path, content)
    assert data.class_names == BDD_CLASSES
    assert len(BDD_CLASSES) == 10
    assert [(x.image_id, x.file_name, x.width, x.height, x.num_gt) for x in data.images] == [
        (1, "a.jpg", 1280, 720, 2),
        (2, "b.jpg", 1280, 720, 0),
        (3, "c.jpg", 1280, 720, 1),
    ]
    assert data.gt_boxes(1).tolist() == [[10, 20, 30.5, 40.5], [0, 0, 10, 10]]
    assert [BDD_CLASSES[x] for x in data.gt_labels(1)] == ["pedestrian", "bicycle"]
    assert data.annotations.areas.tolist() == [20.5**2, 100, 200]
    assert data.absent == ()
    assert not data.is_voc
    assert data.digest() == read(tmp_path, OF_2020).digest()


def test_what_was_done_is_said(tmp_path: Path) -> None:
    assert read(tmp_path, OF_2018).notes == (
        "labels without a box, as of lanes and drivable areas, are not read: 2",
        "classes are named as since 2020: person as pedestrian, bike as bicycle",
    )
    assert read(tmp_path, OF_2020).notes == ()


def test_what_bdd_does_not_count(tmp_path: Path) -> None:
    """Crowds, what is marked as ignored, and three classes, which become crowds of others; and classes of ours."""
    data = read(
        tmp_path,
        [
            frame(
                "a.jpg",
                label("car", 0, 0, 9, 9, crowd=False),
                label("car", 0, 0, 9, 9, crowd=True),
                label("rider", 0, 0, 9, 9, ignored=True),
                label("trailer", 0, 0, 9, 9),
                label("other person", 0, 0, 9, 9),
                label("zebra", 0, 0, 9, 9),
            )
        ],
    )
    content = json.loads(data.copied_to(tmp_path / "copy.json").write_copy().read_text())
    assert [(BDD_CLASSES[each["category_id"] - 1], each["iscrowd"]) for each in content["annotations"]] == [
        *(("car", 0), ("car", 1), ("rider", 1), ("truck", 1), ("pedestrian", 1))
    ]
    assert data.images[0].num_gt == 1
    (absent,) = data.absent
    assert str(absent) == "1 boxes of other classes than the ten of BDD100K (the first: a 'zebra' in a.jpg)"
    assert data.notes == ("not counted, as in BDD100K's own benchmark: other person (1), trailer (1)",)


def test_sizes(tmp_path: Path) -> None:
    box = label("car", 0, 0, 9, 9)
    frames = [frame("a.jpg", box, size={"width": 64, "height": 48}), frame("b.jpg", box)]
    config = {"imageSize": {"width": 640, "height": 360}, "categories": []}
    data = read(tmp_path, {"frames": frames, "config": config})
    assert [(image.width, image.height) for image in data.images] == [(64, 48), (640, 360)]
    assert len(read(tmp_path, frames, limit=1).images) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no images"),
        ([frame("a.jpg"), frame("a.jpg")], r"names image a\.jpg 2 times"),
        ([frame("a.jpg", lane())], "no usable annotation"),
        ([frame("a.jpg", {"category": "car", "box2d": {"x1": "0", "y1": 0, "x2": 1, "y2": 1}})], r"\[0\]\.box2d\.x1"),
        ([{"labels": []}], "missing required field `name`.*Expected a list of frames"),
        ({"name": "a", "frames": [{"timestamp": 10000, "objects": []}]}, "missing required field `name`"),
        ({"images": [], "annotations": [], "categories": []}, "COCO JSON is given as --ann-file"),
        ("[{", "is no file of BDD100K"),
        ("", "is empty"),
    ],
)
def test_bad_files(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, content)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist\. Give the detection labels of a split of BDD100K as --bdd"):
        load_bdd(tmp_path / "x.json", tmp_path)
    with pytest.raises(DataError, match="is a folder"):
        load_bdd(tmp_path, tmp_path)
    read(tmp_path, OF_2020)
    with pytest.raises(DataError, match=r"image folder .* does not exist"):
        load_bdd(tmp_path / "det_train.json", tmp_path / "x")
