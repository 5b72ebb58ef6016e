"""A small detection data set drawn from nothing: shapes on cluttered, textured ground.

The class of an object is its outline. Colour, texture, size, rotation, stretch, hollow or solid come from the
same distributions for every class, and ground and clutter use the same colours and textures too.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from kdpipe.cache.errors import KdpipeError

__all__ = ["CLASS_NAMES", "draw_shapes", "is_drawn"]

CLASS_NAMES = ("disc", "square", "triangle", "star", "cross", "crescent")

_VERSION = 3  # of the pictures: what another version drew is drawn again
_SMALLEST = 12  # longer side of the smallest object, pixels
_LARGEST = 0.55  # longer side of the largest object, of the shorter side of the picture
_MIN_VISIBLE = 0.4  # of its painted pixels; no object is placed so that it, or another one, shows less

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


def draw_shapes(
    out_dir: Path,
    *,
    train: int,
    val: int,
    size: tuple[int, int] = (192, 256),
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Draw the data set, unless it is there already.

    Writes `annotations/train.json` and `annotations/val.json` in COCO's detection format and the pictures under
    `train/` and `val/`. A bbox is (x, y, w, h) in pixels: the whole object, also what another one covers, cut at the
    border of the picture. The same arguments give the same bytes, and picture i does not depend on how many
    there are. The annotations are written last: an interrupted drawing has none, and is begun again.

    Args:
        out_dir: folder to fill; created when it is missing.
        train: number of training pictures.
        val: number of validation pictures.
        size: (height, width) of a picture in pixels, at least 64 each.
        seed: 0 or more; another seed gives other pictures.
        progress: called with the number of pictures finished so far, of `train + val`.

    Raises:
        KdpipeError: if an argument is out of range, or `out_dir` holds annotations that are not from here.
    """
    if train < 1 or val < 1 or min(size) < 64 or seed < 0:
        raise KdpipeError(
            f"cannot draw {train} training and {val} validation pictures of {size[0]} x {size[1]} pixels from seed "
            f"{seed}: ask for at least one picture of each, 64 pixels a side, and a seed of 0 or more"
        )
    counts = {"train": train, "val": val}
    recipe = {"version": _VERSION, **counts, "size": list(size), "seed": seed}
    files = {split: out_dir / "annotations" / f"{split}.json" for split in counts}
    pictures = {split: list((out_dir / split).glob("shapes_*.jpg")) for split in counts}
    recipes = [(_recipe_of(files[split]), len(pictures[split])) for split in counts]
    progress = progress or (lambda finished: None)
    if recipes == [(recipe, count) for count in counts.values()]:
        progress(train + val)
        return
    for path in [*files.values(), *pictures["train"], *pictures["val"]]:  # annotations never outlive their pictures
        path.unlink(missing_ok=True)
    for number, (split, count) in enumerate(counts.items()):
        (out_dir / split).mkdir(parents=True, exist_ok=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            name = f"shapes_{index:06d}.jpg"
            pixels, objects = _draw_picture(np.random.default_rng([seed, number, index]), size)
            encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
            (out_dir / split / name).write_bytes(encoded.tobytes())
            images.append({"id": index + 1, "file_name": name, "height": size[0], "width": size[1]})
            for item in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": index + 1, "iscrowd": 0, **item})
            progress(number * train + index + 1)
        document = {
            "info": {"description": "kdpipe shapes", "recipe": recipe},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": label + 1, "name": name} for label, name in enumerate(CLASS_NAMES)],
        }
        files[split].parent.mkdir(exist_ok=True)
        aside = files[split].with_suffix(".tmp")
        aside.write_text(json.dumps(document), encoding="utf-8")
        aside.replace(files[split])


def is_drawn(folder: Path) -> bool:
    """Whether all of a folder is a data set that `draw_shapes` made, or has begun to.

    Raises:
        KdpipeError: Its annotations are of another origin.
    """
    if any(_recipe_of(folder / "annotations" / f"{split}.json") is not None for split in ("train", "val")):
        return True
    return all(path.match("shapes_*.jpg") for path in folder.rglob("*") if path.is_file())


def _recipe_of(path: Path) -> Any:
    """What an annotation file was drawn from; None where there is no file."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["info"]["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise KdpipeError(
            f"{path} was not drawn by kdpipe, and drawing here would replace it: give another folder, or move the file"
        ) from error


def _draw_picture(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Pixels, list[dict[str, Any]]]:
    """One picture [h, w, 3] and its objects, each with COCO's category_id, bbox and area."""
    canvas = _ground(rng, size)
    top = np.full(size, -1)  # [h, w] number of the shape that is seen there
    painted, visible = np.zeros(0, int), np.zeros(0, int)  # per shape: pixels it has, pixels of it that are seen
    objects: list[dict[str, Any]] = []
    for _ in range(int(rng.integers(6, 14))):
        label = None if rng.random() < 0.08 else int(rng.integers(len(CLASS_NAMES)))  # None: a blob that is no class
        length = _SMALLEST * (_LARGEST * min(size) / _SMALLEST) ** (rng.random() ** 0.8)  # a little over log-uniform
        silhouette, alpha = _cut_out(rng, label, length)
        h, w = alpha.shape
        for _ in range(8):  # places tried
            y, x = int(rng.uniform(-0.4 * h, size[0] - 0.6 * h)), int(rng.uniform(-0.4 * w, size[1] - 0.6 * w))
            y1, x1, y2, x2 = max(y, 0), max(x, 0), min(y + h, size[0]), min(x + w, size[1])
            window, crop = np.s_[y1:y2, x1:x2], np.s_[y1 - y : y2 - y, x1 - x : x2 - x]
            inside, opaque = silhouette[crop], alpha[crop] >= 0.5
            hidden = np.bincount(top[window][opaque] + 1, minlength=len(visible) + 1)[1:]
            whole, visible_now = np.append(painted, (alpha >= 0.5).sum()), np.append(visible - hidden, opaque.sum())
            if (visible_now < _MIN_VISIBLE * whole).any() or inside.sum() < 0.5 * silhouette.sum():
                continue
            top[window][opaque] = len(visible)
            painted, visible = whole, visible_now
            _paint(rng, canvas[window], alpha[crop])
            if label is not None:
                x, y, w, h = cv2.boundingRect(inside.astype(np.uint8))
                objects.append({"category_id": label + 1, "bbox": [x1 + x, y1 + y, w, h], "area": int(inside.sum())})
            break
    return _photograph(rng, canvas), objects


def _cut_out(rng: np.random.Generator, label: int | None, length: float) -> tuple[Mask, Floats]:
    """A shape, turned and bent at random, in a patch [h, w] that just holds it and whose longer side is `length`.

    Returns the pixels within the outline, and how much of each is painted, in [0, 1]: less of them when hollow.
    """
    points = _outline(rng, label)  # [N, 2]
    points = points + rng.uniform(0, 0.04) * np.sin(3 * points[:, ::-1] + rng.uniform(0, 6, 2))
    points = points @ [[1.0, rng.uniform(-0.2, 0.2)], [0.0, rng.uniform(0.65, 1.0)]]  # sheared and flattened
    turn = rng.normal(0, 0.25)
    points = points @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
    points = (points - points.min(axis=0)) * length / np.ptp(points, axis=0).max() + 2
    w, h = np.ceil(points.max(axis=0)).astype(int) + 3
    full = np.zeros((h, w), dtype=np.uint8)
    cv2.fillPoly(full, [np.round(points * 16).astype(np.int32)], (255,), cv2.LINE_AA, 4)
    alpha = full.copy()
    if length >= 32 and rng.random() < 0.15:
        wall = 1 + round(length * rng.uniform(0.07, 0.12))
        alpha -= cv2.erode(full, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * wall + 1, 2 * wall + 1)))
    x, y, w, h = cv2.boundingRect((full >= 128).astype(np.uint8))
    patch = np.s_[y : y + h, x : x + w]
    return full[patch] >= 128, (alpha[patch] / 255).astype(np.float32)


def _outline(rng: np.random.Generator, label: int | None) -> npt.NDArray[np.float64]:
    """Closed outline [N, 2] about the origin, radius about 1, with points so dense that its edges can bend."""
    circle = np.exp(2j * np.pi * np.arange(96) / 96)  # the plane as complex numbers
    name, edge = "blob" if label is None else CLASS_NAMES[label], circle
    if name == "blob":
        waves = [rng.uniform(0.15, 0.3) * (circle**k * np.exp(1j * rng.uniform(0, 2 * np.pi))).real for k in (2, 3, 4)]
        edge = circle * (1 + np.sum(waves, axis=0))
    elif name == "crescent":
        half, depth = rng.uniform(1.8, 2.3), rng.uniform(0.4, 0.65)
        outer = np.exp(1j * np.linspace(-half, half, 64))
        inner = depth * outer.real + (1 - depth) * np.cos(half) + 1j * outer.imag
        edge = np.concatenate([outer, inner[-2:0:-1]])
    elif name != "disc":
        arm, waist = rng.uniform(0.22, 0.38), rng.uniform(0.38, 0.52)
        corners = {
            "triangle": circle[::32],
            "square": circle[::24],
            "cross": np.outer(circle[::24], [1 - 1j * arm, 1 + 1j * arm, arm + 1j * arm]).ravel(),
            "star": np.outer(np.exp(0.4j * np.pi * np.arange(5)), [1, waist * np.exp(0.2j * np.pi)]).ravel(),
        }[name]
        edge = (corners[:, None] + (np.roll(corners, -1) - corners)[:, None] * np.linspace(0, 1, 12)[:-1]).ravel()
    return np.stack([edge.real, edge.imag], axis=-1)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _paint(rng: np.random.Generator, canvas: Floats, alpha: Floats) -> None:
    """Paint `alpha` [h, w] onto `canvas` [h, w, 3], in place, in a surface that stands out from what is there."""
    under = cv2.mean(canvas, (alpha >= 0.5).astype(np.uint8))[:3]
    canvas += (_surface(rng, alpha.shape, under) - canvas) * _three(alpha)


def _colour(rng: np.random.Generator) -> Floats:
    colour = rng.uniform(0, 255, 3)
    return np.asarray(colour.mean() + (colour - colour.mean()) * rng.uniform(0.2, 1.0), dtype=np.float32)


def _surface(rng: np.random.Generator, size: tuple[int, ...], under: tuple[float, ...] | None = None) -> Floats:
    """Two colours mixed by a texture [h, w, 3], in [0, 255]; the first is well away from `under`."""
    first = _colour(rng)
    while under is not None and np.abs(first - under).max() < 100:
        first = _colour(rng)
    step = np.clip(first + rng.normal(0, 20, 3), 0, 255).astype(np.float32) - first
    mix = _texture(rng, size[0], size[1])
    return np.asarray(cv2.merge([start + mix * change for start, change in zip(first, step, strict=True)]))


def _texture(rng: np.random.Generator, h: int, w: int) -> Floats:
    """A pattern [h, w] in [0, 1]: plain, stripes (wide ones are gradients), checks, or noise in several octaves."""
    kind = ("plain", "stripes", "checks", "noise")[int(rng.integers(4))]
    if kind == "noise":
        pattern = np.sum([_noise(rng, h, w, cell) * np.float32(cell**0.7) for cell in (48, 20, 8, 3)], axis=0)
        return np.asarray((pattern - pattern.min()) / max(np.ptp(pattern), 1e-6), dtype=np.float32)
    turn, wavelength = rng.uniform(0, 2 * np.pi), _log_uniform(rng, 4, 24 if kind == "checks" else 400)
    c, s = (2 * np.pi / wavelength * np.array([np.cos(turn), np.sin(turn)])).astype(np.float32)
    y, x = np.arange(h, dtype=np.float32)[:, None], np.arange(w, dtype=np.float32)
    wave = np.sin(x * c + y * s) * {"plain": 0, "stripes": 1, "checks": np.sin(y * c - x * s)}[kind]
    return np.asarray(np.clip(0.5 + 2 * wave, 0, 1))


def _three(grey: Floats) -> Floats:
    """[h, w] to [h, w, 3]; a real copy, because numpy is slow at broadcasting along so short an axis."""
    return np.asarray(cv2.merge([grey, grey, grey]), dtype=np.float32)


def _noise(rng: np.random.Generator, h: int, w: int, cell: int) -> Floats:
    """Smooth noise [h, w], about in [0, 1], with bumps of about `cell` pixels."""
    grid = rng.random((h // cell + 2, w // cell + 2), dtype=np.float32)
    return np.asarray(cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC), dtype=np.float32)


def _ground(rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    """One or two surfaces [h, w, 3] and clutter that is no class: strokes, arcs, letters."""
    h, w = size
    ground = _surface(rng, size)
    if rng.random() < 0.6:
        height = _noise(rng, h, w, max(size) // 2) + 0.5 * _noise(rng, h, w, max(size) // 6)
        ground += (_surface(rng, size) - ground) * _three(np.clip(20 * (height - 0.75), 0, 1))
    canvas = np.clip(ground, 0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(0, 3))):
        colour, thick = _colour(rng).tolist(), int(rng.integers(1, 5))
        x, y, u, v = (int(rng.integers(n)) for n in (w, h, w, h))
        kind = ("stroke", "arc", "letter")[int(rng.integers(3))]
        if kind == "stroke":
            cv2.line(canvas, (x, y), (u, v), colour, thick, cv2.LINE_AA)
        elif kind == "arc":
            start, axes = rng.uniform(0, 360), (8 + u // 3, 8 + v // 3)
            cv2.ellipse(canvas, (x, y), axes, 0, start, start + rng.uniform(30, 150), colour, thick, cv2.LINE_AA)
        else:
            letter, large = "AEFHKMNRSZ2345679"[int(rng.integers(17))], rng.uniform(0.5, 2.0)
            cv2.putText(canvas, letter, (x, y), cv2.FONT_HERSHEY_SIMPLEX, large, colour, thick, cv2.LINE_AA)
    return canvas.astype(np.float32)


def _photograph(rng: np.random.Generator, canvas: Floats) -> Pixels:
    """Uneven light, contrast, brightness, blur and sensor noise; [h, w, 3]."""
    h, w = canvas.shape[:2]
    light = (1 + rng.uniform(0, 0.6) * (_noise(rng, h, w, max(h, w)) - 0.5)).astype(np.float32)
    picture = 128 + (canvas * _three(light) - 128) * rng.uniform(0.7, 1.1) + rng.uniform(-25, 25)
    if rng.random() < 0.5:
        picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.4, 0.8)), dtype=np.float32)
    picture += _three(rng.standard_normal((h, w), dtype=np.float32) * np.float32(rng.uniform(1, 5)))
    return np.asarray(np.clip(picture + 0.5, 0, 255), dtype=np.uint8)
