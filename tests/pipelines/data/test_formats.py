"""Variants of COCO JSON and VOC folders that tools write, and what is told to whoever gives another format."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.data.datasets import DetectionData, load_coco, load_voc
from kdpipe.pipelines.data.report import report_data

BOX = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
OBJECT = "<object><name>{}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
SIZE = "<size><width>60</width><height>40</height></size>"


def coco(folder: Path, **image: Any) -> DetectionData:
    """A file with one image and one box."""
    entry = {"id": 1, "width": 60, "height": 40, **image}
    content = {"images": [entry], "annotations": [BOX], "categories": [{"id": 1, "name": "cat"}]}
    (folder / "a.json").write_text(json.dumps(content))
    return load_coco(folder / "a.json", folder)


FOREIGN: dict[str, tuple[str, bytes, str]] = {
    "yolo yaml": ("data.yaml", b"train: images\nnc: 2\nnames: [a, b]\n", "YOLO"),
    "yolo txt": ("a.txt", b"0 0.5 0.5 0.1 0.1\n", "YOLO"),
    "csv": ("a.csv", b"image,xmin,ymin\na.jpg,1,2\n", "CSV"),
    "odgt": ("a.odgt", b'{"ID": "x", "gtboxes": []}\n{"ID": "y", "gtboxes": []}\n', "object per line"),
    "lines named json": ("a.json", b'{"ID": "x"}\n{"ID": "y"}\n', "object per line"),
    "a line": ("a.json", b'{"ID": "x", "gtboxes": []}', "object per line"),
    "bdd": ("a.json", json.dumps([{"name": "a.jpg", "labels": []}]).encode(), "BDD100K"),
    "label studio": ("a.json", json.dumps([{"id": 1, "data": {}, "annotations": []}]).encode(), "Label Studio"),
    "labelme": ("a.json", json.dumps({"version": "5", "shapes": [], "imagePath": "a"}).encode(), "labelme2coco"),
    "via": ("a.json", json.dumps({"a.jpg1": {"filename": "a.jpg", "regions": []}}).encode(), "VIA"),
    "middle format": ("a.json", json.dumps([{"filename": "a.jpg", "ann": {}}]).encode(), "middle format"),
    "detections": ("a.json", json.dumps([{**BOX, "score": 0.5}]).encode(), "results of COCO"),
    "captions": ("a.json", json.dumps({"images": [], "annotations": []}).encode(), "instances"),
    "test split": ("a.json", json.dumps({"images": [], "categories": []}).encode(), "labelled split"),
    "other json": ("a.json", b'{"hello": 1}', "found hello. Export the data set as COCO"),
    "xml": ("a.xml", b"<annotation/>", "--voc"),
    "xml named json": ("a.json", b"\xef\xbb\xbf<?xml version='1.0'?><annotations/>", "--voc"),
    "html": ("a.json", b"<!DOCTYPE html><html></html>", "Download it again"),
    "pickle": ("a.pkl", pickle.dumps([{"filename": "a"}]), "pickled"),
    "zip": ("a.json", b"PK\x03\x04rest", "Unpack it"),
    "gzip": ("a.json.gz", gzip.compress(b"{}"), "Unpack it"),
    "lfs": ("a.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "picture": ("a.jpg", b"\xff\xd8\xff\xe0", "describes the pictures"),
    "empty": ("a.json", b" \n", "is empty"),
    "broken": ("a.json", b'{"images": [', "not valid JSON"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_formats_are_named(tmp_path: Path, kind: str) -> None:
    name, data, expected = FOREIGN[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(KdpipeError) as error:
        load_coco(tmp_path / name, tmp_path)
    assert expected in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    assert "does not exist" not in str(error.value)


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        (("Annotations/", "ImageSets/", "JPEGImages/"), "Give it as --voc"),
        (("images/", "labels/"), "YOLO"),
        (("train.json", "val.json"), "Give one of its files: train.json, val.json"),
        (("a.JPG", "b.png"), "give it as --img-dir"),
        ((), "is a folder. Give the COCO JSON"),
    ],
)
def test_folders_are_no_files(tmp_path: Path, inside: tuple[str, ...], expected: str) -> None:
    for name in inside:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    with pytest.raises(KdpipeError, match=expected):
        load_coco(tmp_path, tmp_path)


def test_image_folder_that_is_a_file(tmp_path: Path) -> None:
    coco(tmp_path, file_name="a.jpg")
    with pytest.raises(KdpipeError, match=r"a\.json is no folder.*--img-dir"):
        load_coco(tmp_path / "a.json", tmp_path / "a.json")


@pytest.mark.parametrize(
    ("written", "files", "expected", "note"),
    [
        ("sub\\a.jpg", "sub/a.jpg", "sub/a.jpg", "backslashes"),
        ("sub\\a.JPG", "sub/a.jpg", "sub/a.jpg", "other case"),
        ("a.jpg", "a.JPG", "a.JPG", "other case"),
        ("sub/a.Png", "sub/a.PNG", "sub/a.PNG", "other case"),
        ("a.jpg", "a.jpg", "a.jpg", None),
        ("a\\b.jpg", "a\\b.jpg", "a\\b.jpg", None),
        ("A.jpg", "a.jpg", "A.jpg", None),  # another image
        ("gone/a.jpg", "b.jpg", "gone/a.jpg", None),
    ],
)
def test_file_names_are_those_on_disk(
    tmp_path: Path, written: str, files: str, expected: str, note: str | None
) -> None:
    (tmp_path / files).parent.mkdir(exist_ok=True)
    (tmp_path / files).touch()
    data = coco(tmp_path, file_name=written)
    assert data.images[0].file_name == expected
    assert note in data.notes[-1] if note else data.notes == ()


def test_both_cases_are_there(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.JPG"):
        (tmp_path / name).touch()
        data = coco(tmp_path, file_name=name)
        assert (data.images[0].file_name, data.notes) == (name, ())


def test_lvis(tmp_path: Path) -> None:
    url = "http://images.cocodataset.org/val2017/000000397133.jpg"
    data = coco(tmp_path, coco_url=url, neg_category_ids=[3], not_exhaustive_category_ids=[])
    assert data.images[0].file_name == "val2017/000000397133.jpg"
    console = Console(width=1000)
    with console.capture() as capture:
        report_data(data, console, trained=False, strict=True)
    assert "COCO AP" in capture.get()
    assert "file names are those of coco_url" in capture.get()
    with console.capture() as capture:
        report_data(data, console, trained=True, strict=True)
    assert "COCO AP" not in capture.get()


def voc(root: Path, split: bytes, **annotations: bytes) -> Path:
    """A VOC folder; each annotation has a picture."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/train.txt").write_bytes(split)
    for stem, data in annotations.items():
        (root / "Annotations" / f"{stem}.xml").write_bytes(data)
        Image.new("RGB", (60, 40)).save(root / "JPEGImages" / f"{stem}.png")
    return root


def xml(name: str = "cat", *, encoding: str = "utf-8", declared: str | None = None) -> bytes:
    body = f"<annotation>{SIZE}{OBJECT.format(name)}</annotation>"
    return f'<?xml version="1.0" encoding="{declared or encoding}"?>{body}'.encode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "gb2312", "gbk", "gb18030", "shift_jis", "big5", "utf-16", "utf-8-sig"])
def test_xml_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    declared = "utf-8" if encoding == "utf-8-sig" else encoding
    name = "车" if encoding.startswith("gb") else "車"
    data = load_voc(voc(tmp_path / "v", b"a", a=xml(name, encoding=encoding, declared=declared)), "train")
    assert data.class_names == (name,)


def test_xml_that_declares_another_encoding_than_it_has(tmp_path: Path) -> None:
    data = load_voc(voc(tmp_path / "v", b"a", a=xml("Käfer", declared="utf-16")), "train")
    assert data.class_names == ("Käfer",)
    with pytest.raises(KdpipeError, match="cannot be read as klingon, which it declares"):
        load_voc(voc(tmp_path / "w", b"a", a=xml(declared="klingon")), "train")
    with pytest.raises(KdpipeError, match="cannot be read as shift_jis, which it declares"):
        load_voc(voc(tmp_path / "x", b"a", a=xml(declared="shift_jis").replace(b"cat", b"\x81\xff")), "train")


@pytest.mark.parametrize(
    "split",
    [
        b"a\nb\n",
        b"\xef\xbb\xbfa\r\nb\r\n",
        b"a  1\nb -1\n",
        b"a.jpg\nb.JPEG\n",
        b"JPEGImages/a.png\nJPEGImages\\b.png 1\n",
        b"a.xml\n\n  b\n",
    ],
)
def test_split_files(tmp_path: Path, split: bytes) -> None:
    data = load_voc(voc(tmp_path / "v", split, a=xml(), b=xml()), "train")
    assert [image.file_name for image in data.images] == ["a.png", "b.png"]
    assert bool(data.notes) == (split.replace(b"\xef\xbb\xbf", b"").split() != [b"a", b"b"])


def test_names_that_look_like_labels_or_suffixes(tmp_path: Path) -> None:
    root = voc(tmp_path / "v", b"scan 1\nscan.jpg\n", **{"scan 1": xml(), "scan": xml(), "scan.jpg": xml()})
    data = load_voc(root, "train")
    assert [image.file_name for image in data.images] == ["scan 1.png", "scan.jpg.png"]
    assert data.notes == ()


def test_what_else_lies_in_a_voc_folder(tmp_path: Path) -> None:
    root = voc(tmp_path / "v", b"a", a=xml("ant"), b=b"<annotation>", c=xml("bee"))
    (root / "Annotations" / "._a.xml").write_bytes(b"\0\5\x16\7")
    (root / "Annotations" / ".DS_Store").write_bytes(b"\0")
    (root / "Annotations" / "Thumbs.db").write_bytes(b"\0")
    (root / "Annotations" / "d.XML").write_bytes(xml("cow"))
    (root / "JPEGImages" / "a.png").rename(root / "JPEGImages" / "a.JPEG")
    data = load_voc(root, "train")
    assert data.class_names == ("ant", "bee", "cow")
    assert data.images[0].file_name == "a.JPEG"
    (note,) = data.notes
    assert "faulty annotations outside of the split are skipped: 1 " in note
    assert "b.xml" in note
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")
    with pytest.raises(KdpipeError, match=r"b\.xml is no valid XML"):
        load_voc(root, "train")


def test_turned_boxes_are_counted(tmp_path: Path) -> None:
    turned = OBJECT.format("cat").replace("<xmax>9", "<xmax>0").encode()
    annotation = xml().replace(b"</annotation>", turned + b"</annotation>")
    data = load_voc(voc(tmp_path / "v", b"a\n", a=annotation), "train")
    (kind,) = data.absent
    assert (kind.count, kind.kind) == (1, "boxes with xmin >= xmax or ymin >= ymax")
    assert "a.xml" in kind.example


def test_voc_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KdpipeError, match="none does not exist"):
        load_voc(tmp_path / "none", "train")
