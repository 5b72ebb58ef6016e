"""Pascal VOC folders, converted to COCO JSON."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.coco import write_json
from kdpipe.pipelines.images import image_size

__all__ = ["VOC_CLASSES", "VocError", "convert_voc"]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp")


class VocError(KdpipeError):
    """A Pascal VOC folder is incomplete, or one of its annotations is malformed."""


@dataclass(frozen=True)
class _Object:
    name: str
    box: tuple[int, int, int, int]  # x, y, width, height in 0-based pixels
    difficult: bool


def convert_voc(voc_dir: str | Path, split: str, out_json: str | Path) -> Path:
    """Writes a split of a Pascal VOC folder as COCO JSON, whose images lie in the folder's ``JPEGImages``.

    Boxes are those of mmdet's XMLDataset: whole pixels, one subtracted since VOC counts from 1. Boxes without area
    are left out; difficult ones become crowds, which neither training nor AP count. Images get the ids 1, 2, ... in the
    order of the split. The classes are VOC's 20 where all names are among them, else the sorted names of the whole
    folder, so that all splits agree.

    Args:
        voc_dir: holds ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``.
        split: ``train`` for ``ImageSets/Main/train.txt``.
        out_json: is replaced at once, when complete.

    Returns:
        `out_json`.

    Raises:
        VocError: something is missing or malformed; the file is named.
    """
    voc_dir, out_json = Path(voc_dir), Path(out_json)
    names = _split(voc_dir, split)
    annotations = {path.stem: path for path in sorted((voc_dir / "Annotations").glob("*.xml"))}
    absent = [name for name in names if name not in annotations]
    if absent:
        raise VocError(
            f"{len(absent)} of the {len(names)} images of split {split} have no annotation in "
            f"{voc_dir / 'Annotations'}, the first is {absent[0]}.xml. Add them, or take the images out of the split."
        )
    chosen = set(names)
    roots: dict[str, Element] = {}
    found: set[str] = set()
    for stem, path in annotations.items():
        root = _parse(path)
        found.update(_text(item, "name", path) for item in root.iterfind("object"))
        if stem in chosen:
            roots[stem] = root
    classes = VOC_CLASSES if found <= set(VOC_CLASSES) else tuple(sorted(found))
    images, boxes = [], []
    for image_id, name in enumerate(names, 1):
        path = annotations[name]
        file_name = _image_file(voc_dir, name)
        height, width = _size(roots[name], path, voc_dir / "JPEGImages" / file_name)
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        boxes += [_annotation(each, image_id, classes) for each in _objects(roots[name], path)]
    content = {
        "images": images,
        "annotations": [{"id": index, **box} for index, box in enumerate(boxes, 1)],
        "categories": [{"id": index, "name": name} for index, name in enumerate(classes, 1)],
    }
    return write_json(out_json, content)


def _split(voc_dir: Path, split: str) -> list[str]:
    folder = voc_dir / "ImageSets" / "Main"
    if not folder.is_dir() or not (voc_dir / "Annotations").is_dir():
        raise VocError(f"{voc_dir} is no Pascal VOC folder: expected Annotations, ImageSets/Main and JPEGImages in it.")
    path = folder / f"{split}.txt"
    if not path.is_file():
        others = ", ".join(sorted(file.stem for file in folder.glob("*.txt"))[:20]) or "none"
        raise VocError(f"{voc_dir} has no split {split!r}: {path} does not exist. There are: {others}.")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise VocError(f"split file {path} is empty: expected the name of an image in each line.")
    twice = _first_double(names)
    if twice is not None:
        raise VocError(f"split file {path} names image {twice} twice. Name each image once.")
    return names


def _first_double(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _parse(path: Path) -> Element:
    """Parses XML; entities are refused, so that none can be expanded without end."""

    def refuse(*_: Any) -> None:
        raise VocError(f"annotation {path} declares XML entities, which are not read. Save it without.")

    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise VocError(f"annotation {path} is no valid XML: {error}. Correct or remove it.") from error
    return builder.close()


def _text(element: Element, name: str, path: Path) -> str:
    text = element.findtext(name)
    if text is None or not text.strip():
        raise VocError(f"annotation {path}: a <{element.tag}> has no <{name}>. Correct the file.")
    return text.strip()


def _number(element: Element, name: str, path: Path) -> int:
    text = _text(element, name, path)
    try:
        return int(float(text))
    except (ValueError, OverflowError) as error:
        raise VocError(f"annotation {path}: <{name}> is {text!r}, expected a number. Correct the file.") from error


def _objects(root: Element, path: Path) -> list[_Object]:
    objects = []
    for item in root.iterfind("object"):
        corners = item.find("bndbox")
        if corners is None:
            raise VocError(f"annotation {path}: an <object> has no <bndbox>. Correct the file.")
        x1, y1, x2, y2 = (_number(corners, name, path) - 1 for name in ("xmin", "ymin", "xmax", "ymax"))
        difficult = item.find("difficult") is not None and _number(item, "difficult", path) != 0
        if x2 > x1 and y2 > y1:
            objects.append(_Object(_text(item, "name", path), (x1, y1, x2 - x1, y2 - y1), difficult))
    return objects


def _annotation(item: _Object, image_id: int, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "category_id": classes.index(item.name) + 1,
        "bbox": list(item.box),
        "area": item.box[2] * item.box[3],
        "iscrowd": int(item.difficult),
    }


def _image_file(voc_dir: Path, name: str) -> str:
    files = (f"{name}{suffix}" for suffix in _SUFFIXES)
    return next((file for file in files if (voc_dir / "JPEGImages" / file).is_file()), f"{name}.jpg")


def _size(root: Element, path: Path, image: Path) -> tuple[int, int]:
    """``(height, width)`` that the annotation says, or else the image's header."""
    size = root.find("size")
    if size is not None:
        height, width = (_number(size, name, path) if size.findtext(name) else 0 for name in ("height", "width"))
        if height > 0 and width > 0:
            return height, width
    return image_size(image)
