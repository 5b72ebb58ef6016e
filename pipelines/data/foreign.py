"""What is given where a COCO JSON is wanted and is none: what it looks like, and how it becomes one."""

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from kdpipe.pipelines.data.file_names import IMAGE_SUFFIXES

__all__ = ["foreign_file", "foreign_folder", "foreign_json"]

_DATUM = "Convert it: pip install datumaro; datum convert --input-format {} --input-path FOLDER --output-format coco"
_EXPORT = "Export it as COCO from the tool that made it"
_YOLO = _DATUM.format("yolo")
_VOC = "Give the folder that holds Annotations, ImageSets and JPEGImages as --voc, with --split; or export it as COCO"
_LINES = (
    "a JSON object per line, as CrowdHuman's odgt",
    "Convert it: mmdetection's tools/dataset_converters/crowdhuman2coco.py",
)
_LABELME = ("labelme's annotation of one image", "Convert the folder: pip install labelme2coco; labelme2coco FOLDER")
_BDD = ("labels of BDD100K", "Give the detection labels of a split as --bdd, with --img-dir")
_LABEL_STUDIO = ("an export of Label Studio", "Export the project as COCO")
_VIA = ("annotations of VIA", "Export them as COCO")
_PICTURE = ("a picture", "Give the COCO JSON that describes the pictures")
_PAGE = ("a web page, perhaps of a download that failed", "Download it again")

_STARTS = {  # of the file, whatever its name
    b"\x80": ("a pickled file", "It is not read, since it could run code: convert it to COCO JSON"),
    b"pk\x03\x04": ("a zip archive", "Unpack it, and give the JSON in it"),
    b"\x1f\x8b": ("a gzip archive", "Unpack it, and give the JSON in it"),
    b"\x93numpy": ("a NumPy file", _EXPORT),
    b"version https://git-lfs": ("a pointer of Git LFS in place of the file", "Fetch the file: git lfs pull"),
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
    b"<": ("an XML annotation, as Pascal VOC's or CVAT's", _VOC),
    b"\xff\xd8": _PICTURE,
    b"\x89png": _PICTURE,
}
_SUFFIXES = {
    ".yaml": ("the description of a YOLO data set", _YOLO),
    ".yml": ("the description of a YOLO data set", _YOLO),
    ".txt": ("a list of images, or the boxes of one image as YOLO has them", _YOLO),
    ".csv": ("a table (CSV), as Open Images'", _DATUM.format("open_images")),
    ".tsv": ("a table (TSV)", _EXPORT),
    ".xml": ("an XML annotation, as Pascal VOC's or CVAT's", _VOC),
    ".odgt": _LINES,
    ".jsonl": _LINES,
    ".ndjson": _LINES,
    ".tfrecord": ("TensorFlow records", _DATUM.format("tf_detection_api")),
    ".pkl": ("a pickled file", "It is not read, since it could run code: convert it to COCO JSON"),
    ".mat": ("a MATLAB file", _EXPORT),
}
_ENTRIES = {  # fields of the first entry of a list
    ("image_id", "category_id", "score"): (
        "detections (results of COCO)",
        "Give the annotations",
    ),
    ("name", "labels"): _BDD,
    ("data", "annotations"): _LABEL_STUDIO,
    ("data", "completions"): _LABEL_STUDIO,
    ("image", "annotations"): ("annotations of CreateML", _EXPORT),
    ("filename", "ann"): ("mmdetection's middle format", "Convert it to COCO JSON"),
    ("ID", "gtboxes"): _LINES,
}
_OBJECTS = {  # fields of an object
    ("shapes", "imagePath"): _LABELME,
    ("shapes", "version"): _LABELME,
    ("_via_img_metadata",): _VIA,
    ("size", "objects"): ("an annotation of Supervisely", _EXPORT),
    ("categories", "items"): ("Datumaro's own format", _DATUM.format("datumaro")),
    ("assets",): ("a project of VoTT", _EXPORT),
    ("data", "annotations"): _LABEL_STUDIO,
    ("name", "frames"): _BDD,
    ("frames",): _BDD,
    ("metainfo", "data_list"): ("mmdetection's own format (BaseDetDataset)", "Convert it to COCO JSON"),
    ("ID", "gtboxes"): _LINES,
    ("videos", "annotations"): ("annotations of videos", _EXPORT),
    ("images", "annotations"): ("captions of COCO, or a file that lost its categories", "Give the file of instances"),
    ("images", "categories"): ("a list of images without labels, as COCO's test splits", "Give a labelled split"),
}


def foreign_file(path: Path, data: bytes) -> str:
    """What a file that is no JSON looks like, by its bytes and its name; empty where that is unknown."""
    start = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, what in _STARTS.items():
        if start.startswith(magic):
            return _sentence(what)
    if path.suffix.lower() in _SUFFIXES:
        return _sentence(_SUFFIXES[path.suffix.lower()])
    lines = data[: 1 << 20].decode("utf-8", "replace").splitlines()[:2]
    return _sentence(_LINES) if len(lines) == 2 and all(map(_is_object, lines)) else ""


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def foreign_json(content: Any) -> str:
    """What JSON looks like that has not the lists of a COCO JSON; empty where that is unknown."""
    if isinstance(content, Sequence) and content and isinstance(content[0], Mapping):
        return _match(content[0], _ENTRIES)
    if not isinstance(content, Mapping):
        return ""
    entries = list(content.values())
    if entries and all(isinstance(entry, Mapping) and {"filename", "regions"} <= entry.keys() for entry in entries):
        return _sentence(_VIA)
    return _match(content, _OBJECTS)


def _match(entry: Mapping[str, Any], kinds: Mapping[tuple[str, ...], tuple[str, str]]) -> str:
    return next((_sentence(what) for names, what in kinds.items() if set(names) <= entry.keys()), "")


def foreign_folder(path: Path) -> str:
    """What a folder holds that was given in place of a file."""
    if (path / "Annotations").is_dir() and (path / "ImageSets").is_dir():
        return "It looks like a Pascal VOC folder. Give it as --voc, with --split."
    if (path / "labels").is_dir():
        return _sentence(("a YOLO data set", _YOLO))
    files = sorted(islice((file for file in path.iterdir() if file.is_file()), 1000))
    if json_files := [file.name for file in files if file.suffix.lower() == ".json"]:
        return f"Give one of its files: {', '.join(json_files[:5])}{', ...' * (len(json_files) > 5)}."
    if any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        return "It holds pictures: give it as --img-dir, and the COCO JSON that describes them as --ann-file."
    return "Give the COCO JSON of the data set."


def _sentence(what: tuple[str, str]) -> str:
    return f"It looks like {what[0]}. {what[1]}."
