"""Data sets say what mmdet says, and bad ones are refused with the file, the entry and the remedy."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from PIL import Image

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.data.datasets import load_coco, load_voc

GOOD: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 60, "height": 40},
        {"id": 3, "file_name": "sub/b.png", "width": 50, "height": 30},
        {"id": 5, "file_name": "c.png", "width": 50, "height": 30},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 9, "bbox": [-5, 1, 20, 10], "area": 200, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [1.5, 2, 10, 10], "area": 90, "iscrowd": 0},
        {"id": 3, "image_id": 3, "category_id": 4, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 1},
        {"id": 4, "image_id": 3, "category_id": 4, "bbox": [5, 5, 50, 50], "area": 25, "iscrowd": 0},
        {"id": 5, "image_id": 3, "category_id": 4, "bbox": [5, 5, 0, 3], "area": 0, "iscrowd": 0},
        {"id": 6, "image_id": 3, "category_id": 4, "bbox": [5, 5, -4, 3], "area": 12, "iscrowd": 0},
        {"id": 7, "image_id": 3, "category_id": 4, "bbox": [90, 5, 4, 3], "area": 12, "iscrowd": 0},
        {"id": 8, "image_id": 3, "category_id": 4, "bbox": [9, 5, 4, 3], "area": 12, "iscrowd": 0, "ignore": 1},
    ],
    "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
}


def write(folder: Path, content: Any, name: str = "a.json") -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder / name


def mmdet_instances(ann_file: Path, classes: tuple[str, ...], flag: int) -> dict[int, list[Any]]:
    dataset = CocoDataset(
        ann_file=str(ann_file),
        data_prefix={"img": ""},
        metainfo={"classes": classes},
        filter_cfg=None,
        pipeline=[],
        serialize_data=False,
    )
    instances: dict[int, list[Any]] = {}
    for item in dataset.data_list:
        selected = [each for each in item["instances"] if each["ignore_flag"] == flag]
        instances[item["img_id"]] = [(*each["bbox"], each["bbox_label"]) for each in selected]
    return instances


def test_coco_is_read_as_mmdet_does(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    data = load_coco(path, tmp_path)
    assert data.class_names == ("dog", "cat")
    assert data.category_ids == (9, 4)
    assert [(i.image_id, i.file_name, i.height, i.width, i.num_gt) for i in data.images] == [
        (7, "a.png", 40, 60, 1),
        (3, "sub/b.png", 30, 50, 2),
        (5, "c.png", 30, 50, 0),
    ]
    for image_id, instances in mmdet_instances(path, data.class_names, 0).items():
        expected = np.array(instances).reshape(-1, 5)
        expected[:, :4] = np.clip(expected[:, :4], 0, [60, 40, 60, 40] if image_id == 7 else [50, 30, 50, 30])
        np.testing.assert_array_equal(data.gt_boxes(image_id), expected[:, :4].astype(np.float32))
        np.testing.assert_array_equal(data.gt_labels(image_id), expected[:, 4])
    assert data.gt_boxes(3).dtype == np.float32
    assert data.gt_labels(3).dtype == np.int64
    assert data.gt_boxes(5).shape == (0, 4)


@pytest.mark.parametrize("split", ["train", "test"])
def test_bccd_is_read_as_mmdet_does(bccd: Path, split: str) -> None:
    data = load_coco(bccd / f"{split}.json", bccd / "JPEGImages")
    for image_id, instances in mmdet_instances(bccd / f"{split}.json", data.class_names, 0).items():
        expected = np.array(instances)
        np.testing.assert_array_equal(data.gt_labels(image_id), expected[:, 4])
        np.testing.assert_array_equal(data.gt_boxes(image_id), np.clip(expected[:, :4], 0, [640, 480, 640, 480]))


def test_limit_keeps_the_first_images(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    data = load_coco(path, tmp_path, limit=2)
    assert [image.image_id for image in data.images] == [7, 3]
    np.testing.assert_array_equal(data.gt_boxes(3), load_coco(path, tmp_path).gt_boxes(3))
    assert data.digest() != load_coco(path, tmp_path).digest()
    with pytest.raises(KdpipeError, match="at least 1"):
        load_coco(path, tmp_path, limit=0)


def test_digest_follows_what_matters(tmp_path: Path) -> None:
    digest = load_coco(write(tmp_path, GOOD), tmp_path).digest()
    (tmp_path / "moved").mkdir()
    assert load_coco(write(tmp_path, GOOD | {"info": "x"}, "b.json"), tmp_path / "moved").digest() == digest
    for where, key, value in [
        ("images", "file_name", "x.png"),
        ("images", "width", 61),
        ("annotations", "bbox", [0, 1, 20, 10]),
        ("annotations", "category_id", 4),
        ("categories", "name", "bird"),
    ]:
        content = copy.deepcopy(GOOD)
        content[where][0][key] = value
        assert load_coco(write(tmp_path, content), tmp_path).digest() != digest


def test_sparse_files_are_completed(tmp_path: Path) -> None:
    sparse = copy.deepcopy(GOOD)
    for image in sparse["images"]:
        (tmp_path / image["file_name"]).parent.mkdir(exist_ok=True)
        Image.new("RGB", (image.pop("width"), image.pop("height"))).save(tmp_path / image["file_name"])
    sparse["annotations"][0].pop("area")
    sparse["annotations"][1].pop("iscrowd")
    sparse["annotations"][3].pop("id")
    data = load_coco(write(tmp_path, sparse), tmp_path)
    assert [(image.width, image.height) for image in data.images] == [(60, 40), (50, 30), (50, 30)]
    full = load_coco(data.copied_to(tmp_path / "new/full.json").write_copy(), tmp_path)
    assert full.digest() == data.digest() == load_coco(write(tmp_path, GOOD), tmp_path).digest()
    for flag in (0, 1):
        assert mmdet_instances(full.ann_file, full.class_names, flag) == mmdet_instances(
            write(tmp_path, GOOD), full.class_names, flag
        )


def edit(where: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content[where][0][key] = value

    return change


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("images", []), "has no images"),
        (put("categories", []), "has no categories"),
        (put("annotations", []), "no usable annotation among 0"),
        (put("annotations", GOOD["annotations"][4:]), "no usable annotation among 4"),
        (put("annotations", None), "annotations is null, expected a list of objects"),
        (put("images", ["a.png"]), "an entry of images is 'a.png'"),
        (edit("images", "id", 3), "image id 3 occurs more than once"),
        (edit("images", "id", "7"), "an image has id '7', expected an integer"),
        (edit("images", "file_name", None), "image 7 has file_name None"),
        (edit("images", "file_name", "\ud83d.jpg"), r"image 7 has file_name '\\ud83d.jpg'"),
        (edit("categories", "name", "\ud83d"), "a category has no name"),
        (edit("categories", "id", 4), "category id 4 occurs more than once"),
        (edit("categories", "name", "cat"), "category name 'cat' occurs more than once"),
        (edit("categories", "name", ""), "a category has no name"),
        (edit("annotations", "image_id", "7"), "annotation 1 has image_id '7', expected an integer"),
        (edit("annotations", "category_id", 2**63), "annotation 1 has category_id 9223372036854775808, expected"),
        (edit("annotations", "bbox", [1, 2, 3]), r"annotation 1 has bbox \[1, 2, 3\]"),
        (edit("annotations", "bbox", [1, 2, 3, float("nan")]), "annotation 1 has bbox .*nan"),
        (edit("annotations", "bbox", [1, 2, 3, "4"]), "expected four finite numbers"),
        (edit("annotations", "bbox", None), "annotation 1 has bbox None"),
        (edit("annotations", "area", float("inf")), "annotation 1 has area inf"),
    ],
)
def test_bad_annotation_files(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    content = copy.deepcopy(GOOD)
    change(content)
    path = write(tmp_path, content)
    with pytest.raises(KdpipeError, match=message) as error:
        load_coco(path, tmp_path)
    assert str(path.parent) in str(error.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(KdpipeError, match=r"none\.json does not exist.*--ann-file"):
        load_coco(tmp_path / "none.json", tmp_path)
    with pytest.raises(KdpipeError, match=r"none does not exist.*--img-dir"):
        load_coco(write(tmp_path, GOOD), tmp_path / "none")
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(KdpipeError, match=r"half\.json is not valid JSON"):
        load_coco(tmp_path / "half.json", tmp_path)
    with pytest.raises(KdpipeError, match=r"not a COCO detection file: .* found list"):
        load_coco(write(tmp_path, []), tmp_path)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_converted_voc_is_the_coco_file(bccd: Path, tmp_path: Path, split: str) -> None:
    coco = load_coco(bccd / f"{split}.json", bccd / "JPEGImages")
    voc = load_voc(bccd, split)
    assert voc.class_names == ("Platelets", "RBC", "WBC")
    by_name = {image.file_name: image for image in coco.images}
    assert [image.file_name for image in voc.images] == [image.file_name for image in coco.images]
    for image in voc.images:
        other = by_name[image.file_name]
        assert (image.height, image.width, image.num_gt) == (other.height, other.width, other.num_gt)
        # this COCO file counts pixels from 1 as its VOC source does, mmdet's VOC counts from 0
        expected = _boxes(coco, other.image_id, shift=1)
        actual = _boxes(voc, image.image_id, shift=0)
        assert actual == expected


def _boxes(data: Any, image_id: int, shift: int) -> list[tuple[str, list[float]]]:
    rows = data._rows[image_id]
    start, stop = data.annotations.starts[rows : rows + 2]
    corner = np.array([shift, shift, 0, 0])
    return [
        (data.class_names[label], (box - corner).tolist())
        for label, box in zip(data.annotations.labels[start:stop], data.annotations.boxes[start:stop], strict=True)
    ]


def voc_object(name: str, box: tuple[object, ...], difficult: int = 0) -> str:
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


def voc_folder(root: Path, annotations: dict[str, str], split: str = "a\nb\n") -> Path:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_text(split)
    for stem, body in annotations.items():
        (root / "Annotations" / f"{stem}.xml").write_text(
            body if body.startswith("<?") else f"<annotation>{body}</annotation>"
        )
    return root


SIZE = "<size><width>60</width><height>40</height><depth>3</depth></size>"


def test_voc_conversion(tmp_path: Path) -> None:
    root = voc_folder(
        tmp_path / "voc",
        {
            "a": SIZE + voc_object("person", (1, 1, 11, 21)) + voc_object("cat", (5.9, 5, 15, 15), difficult=1),
            "b": voc_object("cat", (3, 3, 3, 9)) + "<size><width>0</width><height></height></size>",
        },
    )
    Image.new("RGB", (30, 20)).save(root / "JPEGImages/b.png")
    content = json.loads(load_voc(root, "train").copied_to(tmp_path / "out.json").write_copy().read_text())
    assert content["images"] == [
        {"id": 1, "file_name": "a.jpg", "width": 60, "height": 40},
        {"id": 2, "file_name": "b.png", "width": 30, "height": 20},
    ]
    assert [category["name"] for category in content["categories"]][7:9] == ["cat", "chair"]
    assert len(content["categories"]) == 20
    assert content["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 15, "bbox": [0, 0, 10, 20], "area": 200, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 8, "bbox": [4, 4, 10, 10], "area": 100, "iscrowd": 1},
    ]


def test_voc_classes_are_those_of_the_whole_folder(tmp_path: Path) -> None:
    root = voc_folder(
        tmp_path / "voc", {"a": SIZE + voc_object("zebu", (1, 1, 9, 9)), "other": voc_object("ant", (1, 1, 9, 9))}, "a"
    )
    content = json.loads(load_voc(root, "train").copied_to(tmp_path / "out.json").write_copy().read_text())
    assert content["categories"] == [{"id": 1, "name": "ant"}, {"id": 2, "name": "zebu"}]


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "yyyyyyyy"><!ENTITY z "&x;&x;">]><annotation>&z;</annotation>'


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (BOMB, "declares XML entities"),
        ("<object>", "no valid XML"),
        (SIZE + "<object><name>cat</name></object>", "no <bndbox>"),
        (SIZE + "<object><bndbox/></object>", "a <object> has no <name>"),
        (SIZE + voc_object("cat", ("x", 1, 2, 3)), "<xmin> is 'x', expected a number"),
        (SIZE + voc_object("cat", ("nan", 1, 2, 3)), "<xmin> is 'nan', expected a number"),
    ],
)
def test_bad_voc_annotations(tmp_path: Path, body: str, message: str) -> None:
    root = voc_folder(tmp_path / "voc", {"a": body}, "a")
    with pytest.raises(KdpipeError, match=message):
        load_voc(root, "train")


@pytest.mark.parametrize(
    ("split", "text", "message"),
    [
        ("val", "a", "no split 'val': .*There are: train"),
        ("train", "\n", "is empty"),
        ("train", "a\na", "names image a twice"),
        ("train", "a\nmissing", r"1 of the 2 images .* the first is missing\.xml"),
    ],
)
def test_bad_voc_splits(tmp_path: Path, split: str, text: str, message: str) -> None:
    root = voc_folder(tmp_path / "voc", {"a": SIZE}, text)
    with pytest.raises(KdpipeError, match=message):
        load_voc(root, split)
    with pytest.raises(KdpipeError, match="no Pascal VOC folder"):
        load_voc(tmp_path, split)
