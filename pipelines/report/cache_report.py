"""The report of a cache: what is in it, what the teacher says, and how good that is."""

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullFormatter
from rich.console import Console

from kdpipe.cache.errors import KdpipeError, present
from kdpipe.cache.read.choice import evenly_chosen
from kdpipe.cache.read.reader import TeacherCache, open_cache
from kdpipe.cache.store.location import Location
from kdpipe.pipelines.commands.inspect import describe_cache
from kdpipe.pipelines.commands.options import ReportOptions
from kdpipe.pipelines.data.images import ImageError
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.data.provenance import recorded_config, recorded_data, recorded_entry, recorded_path
from kdpipe.pipelines.data.voc_ap import Detections
from kdpipe.pipelines.report.figures import COLORS, Figure, new_canvas
from kdpipe.pipelines.report.page import Cell, Section, Table
from kdpipe.pipelines.report.pictures import LEAST_SCORE, draw_box, show_image, small_image
from kdpipe.pipelines.runtime.console import bytes_text
from kdpipe.pipelines.teacher.decode import cached_ap, cached_detections
from kdpipe.pipelines.training.progress import AP_NAMES, ap_text

__all__ = ["cache_page"]

_IMAGES = 12  # that are shown
_MEASURED = 2000  # images, evenly chosen
_SIZES = ("AP", "AP50", "AP75", "small", "medium", "large")


def cache_page(
    location: Location, options: ReportOptions, console: Console
) -> tuple[list[tuple[str, str]], list[Section]]:
    """What is said first of a cache, and the sections of its page.

    Args:
        location: Of the cache; parts may be missing.
        options: Where its images moved.
        console: Where progress is shown.

    Raises:
        CacheError: there is no cache, or it is damaged.
    """
    cache, values = open_cache(location, allow_partial=True), describe_cache(location)
    disk = sum(field["disk"] for field in values["fields"].values())
    facts = [
        ("Images", f"{values['images']['cached']:,}"),
        ("On disk", bytes_text(disk)),
        ("Per image", bytes_text(disk / max(1, len(cache)))),
        ("Tier", f"{values['spec']['tier']}, {values['spec']['dtype']}"),
    ]
    answers = _scores(cache)
    try:
        data = recorded_data(cache, DataOptions(img_dir=options.img_dir))
        ids = evenly_chosen(cache, _MEASURED)
        metrics = cached_ap(cache, recorded_config(cache, None), data, console, ids)
        facts.insert(0, ("Teacher AP", f"{metrics['bbox_mAP']:.3f}"))
        answers.tables.append(_accuracy(metrics, len(ids), len(cache)))
    except (KdpipeError, OSError) as error:
        answers.notes.append(f"AP is not measured: {error}")
    sections = [_content(values), answers]
    sections.append(_pictures(cache, options.img_dir, console))
    return facts, [section for section in [*sections, _made_of(cache, values)] if not section.is_empty]


def _content(values: Mapping[str, Any]) -> Section:
    """Bytes per field, and which losses they serve."""
    fields, images = values["fields"], max(1, values["images"]["cached"])
    rows = [
        [
            name,
            Cell(bytes_text(sizes["raw"]), sizes["raw"]),
            Cell(bytes_text(sizes["disk"]), sizes["disk"]),
            Cell(f"{100 * sizes['disk'] / max(1, sizes['raw']):.0f} %", sizes["disk"] / max(1, sizes["raw"])),
            Cell(bytes_text(sizes["disk"] / images), sizes["disk"]),
        ]
        for name, sizes in fields.items()
    ]
    section = Section("content", "What is stored")
    section.tables.append(Table(("field", "raw", "on disk", "ratio", "per image"), rows))
    caption = "What each field takes on disk, compressed."
    disk = {name: sizes["disk"] for name, sizes in fields.items()}
    section.figures.append(Figure("bytes", "Bytes per field", caption, partial(_draw_bytes, disk)))
    served = [name for name, loss in values["losses"].items() if loss["served"]]
    section.intro = f"It serves the methods {', '.join(served)}." if served else "It serves no distillation loss."
    section.notes += [loss["reason"] for loss in values["losses"].values() if not loss["served"]]
    if missing := values["parts"]["missing"]:
        section.notes.append(f"{len(missing)} of {values['parts']['planned']} parts are missing still.")
    return section


def _draw_bytes(disk: Mapping[str, int]) -> Canvas:
    canvas, (axes,) = new_canvas(0.8 + 0.36 * len(disk))
    unit = 2.0 ** (10 * max(0, int(np.log2(max(1, *disk.values())) // 10)))
    sizes = [size / unit for size in disk.values()]
    axes.barh(range(len(sizes)), sizes, height=0.65, color=COLORS[0])
    for row, size in enumerate(disk.values()):
        place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(bytes_text(size), (sizes[row], row), **place)  # type: ignore[arg-type]
    axes.set_yticks(range(len(sizes)), list(disk))
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(bytes_text(unit).partition(" ")[2])
    return canvas


def _scores(cache: TeacherCache) -> Section:
    """How sure the teacher is of its boxes."""
    section = Section("scores", "What the teacher says")
    ids = evenly_chosen(cache, 256)
    if not ids:
        return section
    view = cache.spec.views[0]
    proposals, objects = [], []
    for image_id in ids:
        targets = cache.targets(image_id, view, fields=("logits",))
        logits = present(targets.logits, f"the logits of image {image_id}")
        best = logits.float().softmax(-1)[:, :-1].amax(-1).numpy()
        proposals.append(best[: targets.num_proposals])
        objects.append(best[targets.num_proposals + targets.num_jittered :])
    caption = (
        f"Probability of the most probable class, of {len(ids)} images in the view {view}. A good teacher is sure of "
        "most annotated objects, and finds most proposals to be background."
    )
    draw = partial(_draw_scores, np.concatenate(proposals), np.concatenate(objects))
    section.figures.append(Figure("scores", "Histogram of scores", caption, draw))
    return section


def _draw_scores(proposals: npt.NDArray[np.float32], objects: npt.NDArray[np.float32]) -> Canvas:
    canvas, axes = new_canvas(3.6, 2, 1, sharex=True)
    canvas.align_ylabels()
    for axis, values, label, color in zip(
        axes, (proposals, objects), ("proposals", "annotated objects"), COLORS, strict=False
    ):
        axis.hist(values, bins=40, range=(0, 1), color=color, alpha=0.85)
        axis.set_title(f"{len(values):,} {label}")
        axis.set_ylabel("boxes")
    if len(proposals):
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter("{x:,.0f}")
        axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[1].set_xlabel("probability")
    return canvas


def _accuracy(metrics: Mapping[str, float], measured: int, cached: int) -> Table:
    of = f"all {cached:,}" if measured == cached else f"{measured:,} of {cached:,}, evenly chosen"
    caption = f"AP from what is cached alone, on {of} images. The teacher was trained on these, as a rule."
    return Table(_SIZES, [[Cell(ap_text(metrics[name]), metrics[name]) for name in AP_NAMES]], caption)


def _pictures(cache: TeacherCache, img_dir: Path | None, console: Console) -> Section:
    """Some images with annotated objects, and what the teacher finds."""
    section = Section("images", "Images with the teacher's boxes")
    folder = img_dir or recorded_path(cache.metadata, "data", "img_dir")
    ids = evenly_chosen(cache, _IMAGES)
    if folder is None or not ids:
        section.notes.append("The cache does not record where its images are: say so (--img-dir).")
        return section
    try:
        detections = cached_detections(cache, recorded_config(cache, None), ids, Console(quiet=True))
        for number, image_id in enumerate(ids, 1):
            section.figures.append(_picture(cache, folder, image_id, detections.get(image_id), number))
    except (KdpipeError, ImageError, OSError) as error:
        section.notes.append(f"Not all images are shown: {error}")
    section.intro = (
        f"Evenly chosen. Left: annotated objects. Right: detections of at least {LEAST_SCORE}, decoded from the cache."
    )
    return section


def _picture(cache: TeacherCache, folder: Path, image_id: int, found: Detections | None, number: int) -> Figure:
    targets = cache.targets(image_id, "identity", fields=("boxes",))
    truth = targets.boxes[targets.num_proposals + targets.num_jittered :].numpy()
    image, ratio = small_image(folder / targets.file_name)
    boxes: list[tuple[list[float], str]] = []
    if found is not None:
        names = cache.spec.class_names
        kept = found.scores >= LEAST_SCORE
        for box, label, score in zip(found.boxes[kept], found.labels[kept], found.scores[kept], strict=True):
            boxes.append(((box * ratio).tolist(), f"{names[int(label)]} {score:.2f}"))
    title = Path(targets.file_name).name
    caption = f"{len(truth)} annotated objects, {len(boxes)} detections, {targets.num_proposals} proposals."
    draw = partial(_draw_picture, image, (truth * ratio).tolist(), boxes)
    return Figure(f"image-{number:02}", title, caption, draw, is_photograph=True)


def _draw_picture(
    image: npt.NDArray[np.uint8], truth: Sequence[Sequence[float]], found: Sequence[tuple[Sequence[float], str]]
) -> Canvas:
    canvas, axes = new_canvas(5.2 / 2 * image.shape[0] / image.shape[1] + 0.3, 1, 2)
    show_image(axes[0], image, "annotated")
    show_image(axes[1], image, "teacher")
    for x1, y1, x2, y2 in truth:
        draw_box(axes[0], (x1, y1, x2 - x1, y2 - y1), "#f5e642")
    for (x1, y1, x2, y2), label in found:
        draw_box(axes[1], (x1, y1, x2 - x1, y2 - y1), "#56b4e9", label)
    return canvas


def _made_of(cache: TeacherCache, values: Mapping[str, Any]) -> Section:
    """Teacher, data, and the command that makes it again."""
    spec, names = cache.spec, cache.spec.class_names
    weights = recorded_entry(cache.identity, "teacher", "weights")
    data = values["data"]
    source = next((str(data[key]) for key in ("voc", "bdd", "ann_file") if key in data), "not recorded")
    rows = {
        "teacher": str(values["teacher"].get("checkpoint", "not recorded")),
        "weights (SHA-256)": str(weights),
        "data": source,
        "data (SHA-256)": str(recorded_entry(cache.identity, "data")),
        "classes": f"{len(names)}: {', '.join(names)}",
        "views": ", ".join(spec.views),
        "scale": "x".join(map(str, spec.scale)),
        "proposals": str(spec.proposals),
        "pyramid": f"{spec.channels} channels, strides {', '.join(map(str, spec.strides))}",
        "storage": f"{spec.dtype}, {spec.codec}, format version {values['format_version']}",
        "skipped images": str(len(cache.skipped)),
    }
    section = Section("run", "What it was made of", tables=[Table(("what", "value"), list(rows.items()))])
    if values["command"] is not None:
        section.code.append(("Command that makes it again", shlex.join(values["command"])))
    return section
