"""Pascal VOC folders, read as COCO JSON is."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree.ElementTree import Element

from kdpipe.pipelines.data.annotations import LeftOut
from kdpipe.pipelines.data.coco import CocoFile, check_entries
from kdpipe.pipelines.data.coco_entries import AnnotationEntry, CategoryEntry, CocoEntries, ImageEntry
from kdpipe.pipelines.data.file_names import IMAGE_SUFFIXES
from kdpipe.pipelines.data.voc_xml import VocError, number_in, parse_xml, text_in

__all__ = ["VOC_CLASSES", "read_voc", "split_path"]

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_LABELS = ("1", "0", "-1")  # behind the names in a split file of one class


@dataclass(frozen=True)
class _Object:
    name: str
    box: tuple[int, int, int, int]  # x, y, width, height in 0-based pixels
    difficult: bool


def split_path(folder: Path, split: str) -> Path:
    """The file that lists the images of a split."""
    return folder / "ImageSets" / "Main" / f"{split}.txt"


def read_voc(folder: Path, split: str) -> CocoFile:
    """Reads a split of a Pascal VOC folder, whose images lie in its ``JPEGImages``.

    Boxes are those of mmdet's XMLDataset: whole pixels, one subtracted since VOC counts from 1. Boxes without area
    are left out; difficult ones become crowds, which neither training nor AP count. Images get the ids 1, 2, ... in the
    order of the split. The classes are VOC's 20 where all names are among them, else the sorted names of the whole
    folder, so that all splits agree.

    Args:
        folder: holds ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``.
        split: ``train`` for ``ImageSets/Main/train.txt``.

    Raises:
        VocError: something is missing or malformed; the file is named.
        DataError: there is nothing to learn from.
    """
    lines = _split_lines(folder, split)
    annotations = {path.stem: path for path in _annotation_files(folder)}
    names = [_image_name(line, annotations) for line in lines]
    _check_names(names, annotations, folder, split)
    roots, folder_classes, notes = _parse_all(annotations, set(names))
    if names != lines:
        notes += (f"{split_path(folder, split)} has labels, suffixes or folders beside the names, which are not read",)
    classes = VOC_CLASSES if folder_classes <= set(VOC_CLASSES) else tuple(sorted(folder_classes))
    files = _image_files(folder / "JPEGImages")
    images: list[ImageEntry] = []
    boxes: list[AnnotationEntry] = []
    flat: list[str] = []
    for image_id, name in enumerate(names, 1):
        path, file_name = annotations[name], files.get(name, f"{name}.jpg")
        height, width = _size(roots[name], path)
        images.append(ImageEntry(image_id, file_name, width=width, height=height))
        for item in _objects(roots[name], path):
            if item.box[2] > 0 and item.box[3] > 0:
                boxes.append(_annotation(len(boxes) + 1, image_id, item, classes))
            else:
                flat.append(f"a {item.name} in {path}")
    entries = CocoEntries(images, boxes, [CategoryEntry(index, name) for index, name in enumerate(classes, 1)])
    content = check_entries(entries, split_path(folder, split), folder / "JPEGImages")
    absent = (LeftOut(len(flat), "boxes with xmin >= xmax or ymin >= ymax", flat[0]),) if flat else ()
    return replace(content, absent=absent, notes=(*notes, *content.notes))


def _split_lines(folder: Path, split: str) -> list[str]:
    sets = folder / "ImageSets" / "Main"
    if not folder.is_dir():
        state = "is no folder" if folder.exists() else "does not exist"
        raise VocError(f"Pascal VOC folder {folder} {state}. Expected one with Annotations, ImageSets and JPEGImages.")
    if not sets.is_dir() or not (folder / "Annotations").is_dir():
        raise VocError(f"{folder} is no Pascal VOC folder: expected Annotations, ImageSets/Main and JPEGImages in it.")
    path = split_path(folder, split)
    if not path.is_file():
        others = ", ".join(sorted(file.stem for file in sets.glob("*.txt"))[:20]) or "none"
        raise VocError(f"{folder} has no split {split!r}: {path} does not exist. There are: {others}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise VocError(f"split file {path} is not UTF-8: {error}. Save it in that encoding.") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise VocError(f"split file {path} is empty: expected the name of an image in each line.")
    return lines


def _annotation_files(folder: Path) -> list[Path]:
    """Its XML files, without the hidden ones that file managers leave behind (``._a.xml``)."""
    files = (folder / "Annotations").iterdir()
    return sorted(path for path in files if path.suffix.lower() == ".xml" and not path.name.startswith("."))


def _image_name(line: str, annotations: Mapping[str, Path]) -> str:
    """The image that a line of a split file names, also with a suffix, a folder or a label."""
    words = line.split()
    unlabelled = line[: -len(words[-1])].strip() if len(words) > 1 and words[-1] in _LABELS else line
    for text in (line, unlabelled):
        name = text.replace("\\", "/").rsplit("/", 1)[-1]
        stem, _, suffix = name.rpartition(".")
        for candidate in (name, stem if f".{suffix.lower()}" in (*IMAGE_SUFFIXES, ".xml") else name):
            if candidate in annotations:
                return candidate
    return unlabelled


def _check_names(names: Sequence[str], annotations: Mapping[str, Path], folder: Path, split: str) -> None:
    twice = _first_double(names)
    if twice is not None:
        raise VocError(f"split file {split_path(folder, split)} names image {twice} twice. Name each image once.")
    absent = [name for name in names if name not in annotations]
    if absent:
        raise VocError(
            f"{len(absent)} of the {len(names)} images of split {split} have no annotation in "
            f"{folder / 'Annotations'}, the first is {absent[0]}.xml. Add them, or take the images out of the split."
        )


def _first_double(names: Iterable[str]) -> str | None:
    earlier: set[str] = set()
    for name in names:
        if name in earlier:
            return name
        earlier.add(name)
    return None


def _parse_all(
    annotations: Mapping[str, Path], image_names: set[str]
) -> tuple[dict[str, Element], set[str], tuple[str, ...]]:
    """The annotations that are chosen, the names of all classes of the folder, and what is said of faulty files."""
    roots: dict[str, Element] = {}
    classes: set[str] = set()
    faulty: list[VocError] = []
    for stem, path in annotations.items():
        try:
            root = parse_xml(path)
            names = {text_in(item, "name", path) for item in root.iterfind("object")}
        except VocError as error:
            if stem in image_names:
                raise
            faulty.append(error)
            continue
        classes |= names
        if stem in image_names:
            roots[stem] = root
    if not faulty:
        return roots, classes, ()
    note = f"faulty annotations outside of the split are skipped: {len(faulty)} (the first: {faulty[0]})"
    return roots, classes, (note,)


def _objects(root: Element, path: Path) -> list[_Object]:
    objects = []
    for item in root.iterfind("object"):
        corners = item.find("bndbox")
        if corners is None:
            raise VocError(f"annotation {path}: an <object> has no <bndbox>. Correct the file.")
        x1, y1, x2, y2 = (number_in(corners, name, path) - 1 for name in ("xmin", "ymin", "xmax", "ymax"))
        difficult = item.find("difficult") is not None and number_in(item, "difficult", path) != 0
        objects.append(_Object(text_in(item, "name", path), (x1, y1, x2 - x1, y2 - y1), difficult))
    return objects


def _annotation(index: int, image_id: int, item: _Object, classes: Sequence[str]) -> AnnotationEntry:
    area = item.box[2] * item.box[3]
    category = classes.index(item.name) + 1
    return AnnotationEntry(index, image_id, category, list(item.box), area, int(item.difficult))


def _image_files(folder: Path) -> dict[str, str]:
    """Image files by name without suffix; of several, the one whose suffix comes first in `IMAGE_SUFFIXES`."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES] if folder.is_dir() else []
    files.sort(key=lambda path: (IMAGE_SUFFIXES.index(path.suffix.lower()), path.suffix.isupper(), path.name))
    return {path.stem: path.name for path in reversed(files)}


def _size(root: Element, path: Path) -> tuple[int, int]:
    """``(height, width)`` that the annotation says; 0 where it does not."""
    size = root.find("size")
    if size is None:
        return 0, 0
    height, width = (number_in(size, name, path) if size.findtext(name) else 0 for name in ("height", "width"))
    return height, width
