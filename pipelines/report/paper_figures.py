"""The figures 2, 5 and 6 of G-DetKD, from the user's own trainings and cache."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure as Canvas
from rich.console import Console
from torch import Tensor

from kdpipe.cache.errors import KdpipeError, present
from kdpipe.cache.read.choice import evenly_chosen
from kdpipe.cache.read.reader import TeacherCache
from kdpipe.pipelines.data.provenance import recorded_path
from kdpipe.pipelines.report.figures import Figure, ink, new_canvas
from kdpipe.pipelines.report.page import Section
from kdpipe.pipelines.report.pictures import show_image, small_image
from kdpipe.pipelines.report.student_view import (
    StudentView,
    TrainedStudent,
    level_differences,
    load_sgfi,
    positive_rows,
    without_padding,
)
from kdpipe.pipelines.report.training_figures import short
from kdpipe.pipelines.report.trainings import TrainingGroup, names_beside
from kdpipe.pipelines.runtime.console import ProgressBar

__all__ = ["correlation", "paper_section"]

_IMAGES = 24  # that distributions are of
_PANELS = 4  # of correlation matrices
_NAMED = 12  # classes that a matrix has room for


def paper_section(
    groups: Sequence[TrainingGroup],
    cache: TeacherCache | None,
    colors: Mapping[str, str],
    img_dir: Path | None,
    console: Console,
) -> Section:
    """The figures, as far as cache and trainings can give them; what cannot be had is noted.

    Args:
        groups: The trainings.
        cache: That they learned from; None where it is not known.
        colors: Of the groups.
        img_dir: Images of the cache, where they moved.
        console: Where progress is shown.
    """
    section = Section("paper", "The paper's figures, from this run")
    students = [group for group in groups if not group.first.is_teacher]
    if not students:
        return section
    try:
        if cache is None:
            raise KdpipeError("the trainings do not record where the cache is: name it (--cache)")
        if "identity" not in cache.spec.views or not len(cache):
            raise KdpipeError(f"{cache.location} holds no image in the view identity")
        images = _Images(cache, img_dir)
    except (KdpipeError, OSError) as error:
        section.notes.append(f"They are missing: {error}")
        return section
    section.intro = (
        f"As in G-DetKD (Yao et al., 2021), on {len(images.ids)} images of the cache, evenly chosen. Of students with "
        "several seeds, the first one is looked at."
    )
    maps: dict[str, dict[int, Tensor]] = {}
    differences: dict[str, list[int]] = {}
    correlations: dict[str, npt.NDArray[np.float64]] = {}
    chosen = _chosen(students)
    names = names_beside(chosen)
    for group in chosen:
        name = names[group.label]
        try:
            views = images.seen_by(group, console)
            if group in (chosen[0], chosen[-1]):
                maps[name] = views[0].levels
            correlations[name] = _correlation_difference(images, views)
            if "sgfi" in group.first.methods:
                differences[name] = _level_differences(images, views, group)
        except (KdpipeError, OSError, RuntimeError) as error:
            section.notes.append(f"“{name}” is missing: {str(error).strip()}")
    section.figures += _activation_figure(images, maps, section)
    colors = {names[group.label]: colors[group.label] for group in chosen}
    section.figures += _level_figure(differences, colors, section)
    section.figures += _correlation_figure(images, correlations)
    return section


def _chosen(students: Sequence[TrainingGroup]) -> list[TrainingGroup]:
    """Without distillation, with each single method, and the one of most AP; of one detector."""
    best = max(students, key=lambda group: (group.is_distilled, group.ap or 0))
    alike = [group for group in students if group.first.student == best.first.student]
    plain = [group for group in alike if group.is_plain][:1]
    single = [group for group in alike if len(group.first.methods) == 1 and group is not best]
    order = ("pred", "ckd")
    single.sort(key=lambda group: order.index(name) if (name := group.first.methods[0]) in order else len(order))
    return [*plain, *single[: _PANELS - 2], *([best] if best not in plain else [])]


class _Images:
    """Images of a cache that the figures are of, and where their files are."""

    def __init__(self, cache: TeacherCache, img_dir: Path | None) -> None:
        folder = recorded_path(cache.metadata, "data", "img_dir")
        if folder is None or not folder.is_dir():  # --img-dir may name the validation images, which lie elsewhere
            folder = img_dir
        if folder is None or not folder.is_dir():
            raise KdpipeError(f"the images of the cache are not there ({folder}): say where they are (--img-dir)")
        self.cache, self.folder = cache, folder
        self.ids = evenly_chosen(cache, _IMAGES)

    def path(self, image_id: int) -> Path:
        return self.folder / self.cache.index(image_id, "identity").file_name

    def seen_by(self, group: TrainingGroup, console: Console) -> list[StudentView]:
        student, views = TrainedStudent(group.first), []
        with ProgressBar(console, f"figures: {short(group.label)}", len(self.ids)) as progress:
            for done, image_id in enumerate(self.ids, 1):
                views.append(student.look(self.path(image_id)))
                progress.update(done, "")
        return views


def _activation_figure(images: _Images, maps: Mapping[str, dict[int, Tensor]], section: Section) -> list[Figure]:
    """Figure 2: how strongly each level of the pyramids responds, in one image."""
    cache, image_id = images.cache, images.ids[0]
    rows = dict(maps)
    if "features" in cache.spec.fields:
        targets = cache.targets(image_id, "identity", fields=("features",))
        levels = zip(cache.spec.strides, targets.pyramid(), strict=True)
        rows = {
            "teacher": {
                stride: without_padding(level, stride, targets.input_size)
                for stride, level in levels
                if level is not None
            },
            **rows,
        }
    elif maps:
        section.notes.append(
            "Figure 2 is without the teacher: its pyramid is in caches of the tier pyramid, and this one is of "
            f"{cache.spec.tier}."
        )
    if not rows:
        return []
    activations = {
        name: {stride: level.float().abs().mean(dim=0).numpy() for stride, level in levels.items()}
        for name, levels in rows.items()
    }
    path = images.path(image_id)
    image, _ = small_image(path)
    caption = (
        f"Figure 2: mean magnitude of the channels of each level, each map from its least (dark) to its largest value, "
        f"in {path.name}. The same level of different detectors looks different; neighbouring levels look alike."
    )
    draw = partial(_draw_activations, image, activations)
    return [Figure("paper-2", "Activation of the pyramids", caption, draw, is_photograph=True)]


def _draw_activations(
    image: npt.NDArray[np.uint8], activations: Mapping[str, Mapping[int, npt.NDArray[np.float32]]]
) -> Canvas:
    strides = sorted({stride for levels in activations.values() for stride in levels})
    columns = max(3, len(activations))
    height = (1 + len(strides)) * (5.2 / columns * image.shape[0] / image.shape[1] + 0.25)
    canvas, axes = new_canvas(height, 1 + len(strides), columns)
    for panel in axes:
        panel.set_axis_off()
    for column, (name, levels) in enumerate(activations.items()):
        show_image(axes[column], image, short(name), fontsize=8)
        for row, stride in enumerate(strides, 1):
            panel = axes[row * columns + column]
            if stride in levels:
                panel.imshow(levels[stride], cmap="inferno", extent=(0, image.shape[1], image.shape[0], 0))
                panel.set_title(f"P{stride.bit_length() - 1}", fontsize=8, pad=2)
    return canvas


def _level_differences(images: _Images, views: Sequence[StudentView], group: TrainingGroup) -> list[int]:
    cache, sgfi = images.cache, load_sgfi(group.first)
    field = "roi_features" if "roi_features" in cache.spec.fields else "features"
    found: list[int] = []
    for image_id, view in zip(images.ids, views, strict=True):
        targets = cache.targets(image_id, "identity", fields=("boxes", field))
        found += level_differences(targets, cache.spec, view, sgfi)
    return found


def _level_figure(differences: Mapping[str, list[int]], colors: Mapping[str, str], section: Section) -> list[Figure]:
    """Figure 5: which level of the student matches the teacher's best."""
    shown = {name: values for name, values in differences.items() if values}
    if not shown:
        section.notes.append("Figure 5, of matching levels, is of students that learned with sgfi.")
        return []
    counts = ", ".join(f"{len(values):,}" for values in shown.values())
    caption = (
        f"Figure 5: level of the student that SGFI looks at most, minus the level that the teacher assigns, by stride "
        f"(0: the same one; -1: a finer one), over {counts} positive RoIs."
    )
    return [Figure("paper-5", "Which levels match", caption, partial(_draw_levels, shown, colors))]


def _draw_levels(differences: Mapping[str, list[int]], colors: Mapping[str, str]) -> Canvas:
    canvas, (axes,) = new_canvas(2.9)
    every = {-2, 2}.union(*differences.values())
    steps = range(min(every), max(every) + 1)
    width = 0.8 / len(differences)
    for place, (name, values) in enumerate(differences.items()):
        counts = Counter(values)
        shares = [100 * counts[step] / len(values) for step in steps]
        x = np.array(steps) + (place - (len(differences) - 1) / 2) * width
        axes.bar(x, shares, width=0.92 * width, color=colors.get(name, ink()), label=short(name))
    axes.set_xticks(list(steps), [f"{step:+d}" if step else "0" for step in steps])
    axes.set_xlabel("difference of levels")
    axes.set_ylabel("% of RoIs")
    axes.grid(axis="x", visible=False)
    axes.legend()
    return canvas


def _correlation_difference(images: _Images, views: Sequence[StudentView]) -> npt.NDArray[np.float64]:
    """Magnitude of the difference between the correlation matrices of the class logits of student and teacher."""
    of_student, of_teacher = [], []
    for image_id, view in zip(images.ids, views, strict=True):
        targets = images.cache.targets(image_id, "identity", fields=("boxes", "logits"))
        rows = positive_rows(targets)
        if not len(rows):
            continue
        with torch.inference_mode():
            answered, logits = view.logits(targets.boxes[rows])
        of_student.append(logits.float())
        of_teacher.append(present(targets.logits, "the teacher's logits")[rows][answered].float())
    if not of_student or sum(map(len, of_student)) < 2:
        raise KdpipeError("too few positive RoIs for a correlation")
    classes = images.cache.spec.num_classes
    student, teacher = (correlation(torch.cat(each)[:, :classes]) for each in (of_student, of_teacher))
    return np.abs(student - teacher)


def correlation(logits: Tensor) -> npt.NDArray[np.float64]:
    """Correlation matrix of the columns, Tensor[N, K] -> ``[K, K]``; NaN for a column that is constant."""
    values = logits.double().numpy()
    centred = values - values.mean(axis=0)
    deviation = np.sqrt((centred**2).sum(axis=0))
    scale = np.where(deviation > 0, deviation, np.nan)
    matrix: npt.NDArray[np.float64] = (centred / scale).T @ (centred / scale)
    return matrix


def _correlation_figure(images: _Images, correlations: Mapping[str, npt.NDArray[np.float64]]) -> list[Figure]:
    """Figure 6: how far the student's classes go together otherwise than the teacher's."""
    if not correlations or images.cache.spec.num_classes < 2:
        return []
    caption = (
        "Figure 6: difference between the correlation matrices of the class logits of student and teacher, at the "
        "teacher's positive boxes. Dark is equal; the mean of what is off the diagonal stands above it."
    )
    names = images.cache.spec.class_names
    draw = partial(_draw_correlations, correlations, names)
    return [Figure("paper-6", "Correlation of the classes", caption, draw)]


def _draw_correlations(correlations: Mapping[str, npt.NDArray[np.float64]], class_names: Sequence[str]) -> Canvas:
    columns, classes = min(2, len(correlations)), len(class_names)
    rows = -(-len(correlations) // 2)
    canvas, axes = new_canvas(rows * (4.4 / columns + 0.35) + 0.4, rows, columns)
    largest = max(float(np.nanmax(matrix)) for matrix in correlations.values()) or 1.0
    off = ~np.eye(classes, dtype=bool)
    ticks = range(classes) if classes <= _NAMED else range(0)
    labels = [short(class_names[tick]) for tick in ticks]
    for axis in axes[len(correlations) :]:
        axis.set_axis_off()
    for place, (axis, (name, matrix)) in enumerate(zip(axes, correlations.items(), strict=False)):
        image = axis.imshow(matrix, cmap="inferno", vmin=0, vmax=largest)
        axis.set_title(f"{short(name)}: {np.nanmean(matrix[off]):.3f}", fontsize=9)
        axis.grid(visible=False)
        is_last_row, is_first_column = place + columns >= len(correlations), place % columns == 0
        axis.set_xticks(ticks, labels if is_last_row else [""] * len(ticks), rotation=90, fontsize=7)
        axis.set_yticks(ticks, labels if is_first_column else [""] * len(ticks), fontsize=7)
    canvas.colorbar(image, ax=axes, shrink=0.6, fraction=0.05)
    return canvas
