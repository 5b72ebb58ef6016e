"""Validation images with what is there, and what teacher and students find: those first on which these differ most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from pycocotools.coco import COCO

from kdpipe.pipelines.data.images import ImageError, read_image
from kdpipe.pipelines.report.accuracy import Verdict, judge
from kdpipe.pipelines.report.detections import Results
from kdpipe.pipelines.report.figures import COLORS, Figure, new_canvas

__all__ = ["LEAST_SCORE", "draw_box", "picture_figures", "show_image", "small_image"]

LEAST_SCORE = 0.3
_TITLE = 40  # characters above an image
_SIDE = 420  # pixels of the longer side of an image, as it is shown
_RIGHT, _WRONG, _MISSED = "#56b4e9", "#ff6a1a", "#f5e642"


@dataclass(frozen=True, eq=False)
class _Picture:
    """An image, its objects, and what each detector finds."""

    path: Path
    objects: Sequence[Mapping[str, Any]]
    verdicts: Mapping[str, Verdict]
    difference: int


def picture_figures(
    truth: COCO, img_dir: Path, results: Mapping[str, Results], compared: Sequence[str], count: int
) -> list[Figure]:
    """A figure per image: its objects, and what each detector finds from `LEAST_SCORE` on.

    Args:
        truth: The annotations.
        img_dir: Where the images are.
        results: Of each detector by its name.
        compared: Names of the one or two detectors that images are chosen by.
        count: At most so many images.

    Raises:
        ImageError: None of the images can be read.
    """
    by_image = {name: _by_image(each) for name, each in results.items()}
    pictures = [_picture(truth, img_dir, entry, by_image, compared) for entry in truth.dataset["images"]]
    pictures.sort(key=lambda picture: -picture.difference)
    names = {each["id"]: str(each["name"]) for each in truth.dataset["categories"]}
    figures: list[Figure] = []
    problem: ImageError | None = None
    for picture in pictures:
        if len(figures) == count:
            break
        try:
            image, ratio = small_image(picture.path)
        except ImageError as error:
            problem = error
            continue
        texts = [f"{name}: {verdict.text}" for name, verdict in picture.verdicts.items()]
        caption = f"{len(picture.objects)} objects. {'; '.join(texts)}."
        draw = partial(_draw, image, ratio, picture, names)
        figures.append(Figure(f"image-{len(figures) + 1:02}", picture.path.name, caption, draw, is_photograph=True))
    if not figures and problem is not None:
        raise problem
    return figures


def _by_image(results: Results) -> dict[int, Results]:
    by_image: dict[int, Results] = {}
    for each in results:
        by_image.setdefault(each["image_id"], []).append(each)
    return by_image


def _picture(
    truth: COCO,
    img_dir: Path,
    entry: Mapping[str, Any],
    results: Mapping[str, Mapping[int, Results]],
    compared: Sequence[str],
) -> _Picture:
    image_id = entry["id"]
    objects = [each for each in truth.imgToAnns.get(image_id, []) if not each.get("iscrowd")]
    verdicts = {name: judge(objects, each.get(image_id, []), LEAST_SCORE) for name, each in results.items()}
    chosen = [verdicts[name] for name in compared]
    if len(chosen) == 2:
        first, second = chosen
        wrong = int((~first.right).sum()) - int((~second.right).sum())
        difference = int((first.found != second.found).sum()) + abs(wrong)
    else:
        difference = sum(int((~each.found).sum() + (~each.right).sum()) for each in chosen)
    return _Picture(img_dir / entry["file_name"], objects, verdicts, difference)


def small_image(path: Path) -> tuple[npt.NDArray[np.uint8], float]:
    """An image as it is shown, RGB, and its size relative to that of the file.

    Raises:
        ImageError: It cannot be read.
    """
    pixels = read_image(path)
    ratio = min(1.0, _SIDE / max(pixels.shape[:2]))
    size = max(1, round(pixels.shape[1] * ratio)), max(1, round(pixels.shape[0] * ratio))
    resized = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)[..., ::-1]
    return resized.astype(np.uint8), ratio


def show_image(axes: Axes, image: npt.NDArray[np.uint8], title: str, fontsize: float = 9) -> None:
    """Draw an image without anything around it but its title."""
    axes.imshow(image, interpolation="lanczos")
    axes.set_title(title, fontsize=fontsize)
    axes.set_axis_off()
    axes.autoscale(False)


def draw_box(axes: Axes, box: Sequence[float], color: str, label: str = "", *, dashed: bool = False) -> None:
    """Draw a box on an image, with a dark edge so that it is seen on any.

    Args:
        axes: Of the image.
        box: (x, y, w, h) in pixels of the image as it is shown.
        color: Of the box.
        label: At its upper left corner.
        dashed: Whether the line is.
    """
    shadow = [withStroke(linewidth=2.6, foreground="#000000b0")]
    style = {"linestyle": (0, (3, 2)) if dashed else "-", "path_effects": shadow}
    axes.add_patch(Rectangle((box[0], box[1]), box[2], box[3], fill=False, edgecolor=color, linewidth=1.3, **style))  # type: ignore[arg-type]
    if label:
        behind = {"facecolor": "#000000a0", "edgecolor": "none", "pad": 0.8}
        place = {"va": "top", "clip_on": True, "bbox": behind}
        axes.text(box[0] + 2, box[1] + 2, label[:18], fontsize=5.5, color="white", **place)  # type: ignore[arg-type]


def _draw(image: npt.NDArray[np.uint8], ratio: float, picture: _Picture, names: Mapping[int, str]) -> Canvas:
    panels = 1 + len(picture.verdicts)
    rows = -(-panels // 2)
    columns = min(2, panels)
    height = rows * (5.2 / columns * image.shape[0] / image.shape[1] + 0.3)
    canvas, axes = new_canvas(height, rows, columns)
    show_image(axes[0], image, "ground truth")
    classes = {category: COLORS[number % len(COLORS)] for number, category in enumerate(names)}
    bright = {**classes, **{category: "#4db2ff" for category, color in classes.items() if color == COLORS[0]}}
    truth = np.array([each["bbox"] for each in picture.objects], dtype=np.float64).reshape(-1, 4)
    for each, box in zip(picture.objects, truth * ratio, strict=True):
        draw_box(axes[0], box.tolist(), bright[each["category_id"]], names[each["category_id"]])
    for panel, (name, verdict) in zip(axes[1:], picture.verdicts.items(), strict=False):
        show_image(panel, image, name[:_TITLE])
        for box in truth[~verdict.found] * ratio:
            draw_box(panel, box.tolist(), _MISSED, dashed=True)
        for box, right in zip(verdict.boxes * ratio, verdict.right, strict=True):
            draw_box(panel, box.tolist(), _RIGHT if right else _WRONG)
    for panel in axes[panels:]:
        panel.set_axis_off()
    return canvas
