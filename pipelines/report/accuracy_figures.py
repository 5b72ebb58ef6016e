"""Figures of what detectors find: AP by class, object size and IoU, precision and recall, where distillation helps."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from kdpipe.pipelines.report.accuracy import IOUS, SIZES, Accuracy
from kdpipe.pipelines.report.figures import Figure, ink, new_canvas
from kdpipe.pipelines.report.page import NOTHING, Cell, Table
from kdpipe.pipelines.report.training_figures import short

__all__ = ["accuracy_figures", "class_table", "gain_figure"]

_CLASSES = 20  # that a figure of all classes has room for


def accuracy_figures(
    accuracies: Mapping[str, Accuracy], colors: Mapping[str, str], class_names: Sequence[str], images: int
) -> list[Figure]:
    """AP by class, size and IoU, and precision over recall.

    Args:
        accuracies: Of each detector by its name, means over its seeds.
        colors: Of each detector; one without is drawn in the colour of the text.
        class_names: In the order of the accuracies.
        images: How many were looked at.
    """
    of_images = f"On {images} validation images, mean over seeds."
    classes = _most_different(accuracies, class_names)
    which = "" if len(classes) == len(class_names) else f" The {len(classes)} of {len(class_names)} that differ most."
    return [
        Figure(
            "ap-by-class",
            "AP of each class",
            f"{of_images}{which}",
            partial(_draw_classes, accuracies, colors, [(number, class_names[number]) for number in classes]),
        ),
        Figure(
            "ap-by-size",
            "AP by object size",
            f"{of_images} Small is an area below 32² pixels, large above 96².",
            partial(_draw_sizes, accuracies, colors),
        ),
        Figure(
            "ap-by-iou",
            "AP by IoU",
            f"{of_images} How well boxes have to fit: AP is the mean over these.",
            partial(_draw_ious, accuracies, colors),
        ),
        Figure(
            "precision-recall",
            "Precision and recall",
            f"{of_images} At IoU 0.5 (full) and 0.75 (dotted), mean over classes.",
            partial(_draw_precision, accuracies, colors),
        ),
    ]


def class_table(accuracies: Mapping[str, Accuracy], class_names: Sequence[str]) -> Table:
    """AP of each class, in numbers.

    Args:
        accuracies: Of each detector by its name.
        class_names: In the order of the accuracies.
    """
    columns = [accuracy.by_class() for accuracy in accuracies.values()]
    rows: list[list[Cell | str]] = [
        [name, *(Cell(NOTHING, -math.inf) if np.isnan(of[row]) else Cell(f"{of[row]:.3f}", of[row]) for of in columns)]
        for row, name in enumerate(class_names)
    ]
    return Table(("class", *accuracies), rows, "AP of each class.")


def _most_different(accuracies: Mapping[str, Accuracy], class_names: Sequence[str]) -> list[int]:
    """Classes with objects; of many, those in which the detectors differ most."""
    values = np.array([accuracy.by_class() for accuracy in accuracies.values()])  # [detectors, K]
    there = [number for number in range(len(class_names)) if not np.isnan(values[:, number]).all()]
    if len(there) <= _CLASSES:
        return there
    spread = np.nanmax(values[:, there], axis=0) - np.nanmin(values[:, there], axis=0)
    return sorted(there[place] for place in np.argsort(-spread)[:_CLASSES])


def _draw_classes(
    accuracies: Mapping[str, Accuracy], colors: Mapping[str, str], classes: Sequence[tuple[int, str]]
) -> Canvas:
    values = {name: accuracy.by_class()[[number for number, _ in classes]] for name, accuracy in accuracies.items()}
    height = 1.2 + max(0.28, 0.13 * len(values) + 0.1) * len(classes)
    canvas, (axes,) = new_canvas(height)
    _bars(axes, values, colors)
    axes.set_yticks(range(len(classes)), [short(name) for _, name in classes])
    axes.set_xlabel("AP")
    canvas.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return canvas


def _draw_sizes(accuracies: Mapping[str, Accuracy], colors: Mapping[str, str]) -> Canvas:
    values = {name: np.array(accuracy.by_size()) for name, accuracy in accuracies.items()}
    canvas, (axes,) = new_canvas(1.5 + (0.13 * len(values) + 0.1) * 3)
    _bars(axes, values, colors)
    axes.set_yticks(range(3), SIZES[1:])
    axes.set_xlabel("AP")
    canvas.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return canvas


def _bars(axes: Axes, values: Mapping[str, npt.NDArray[np.float64]], colors: Mapping[str, str]) -> None:
    """Horizontal bars, a group per entry of the values."""
    height = 0.8 / len(values)
    for place, (name, each) in enumerate(values.items()):
        rows = np.arange(len(each)) + (place - (len(values) - 1) / 2) * height
        axes.barh(rows, np.nan_to_num(each), height=0.9 * height, color=colors.get(name, ink()), label=short(name))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _draw_ious(accuracies: Mapping[str, Accuracy], colors: Mapping[str, str]) -> Canvas:
    canvas, (axes,) = new_canvas(3.1)
    for name, accuracy in accuracies.items():
        axes.plot(IOUS, accuracy.by_iou(), marker="o", markersize=4, color=colors.get(name, ink()), label=short(name))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("IoU")
    axes.set_ylabel("AP")
    axes.legend()
    return canvas


def _draw_precision(accuracies: Mapping[str, Accuracy], colors: Mapping[str, str]) -> Canvas:
    canvas, (axes,) = new_canvas(3.1)
    recalls = np.linspace(0, 1, 101)
    for name, accuracy in accuracies.items():
        color = colors.get(name, ink())
        axes.plot(recalls, accuracy.precision_recall(0), color=color, label=short(name))
        axes.plot(recalls, accuracy.precision_recall(5), color=color, linestyle=":")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    axes.legend(loc="lower left")
    return canvas


def gain_figure(plain: tuple[str, Accuracy], distilled: tuple[str, Accuracy], class_names: Sequence[str]) -> Figure:
    """Where a distilled student wins and loses by class, against the same student without distillation.

    Args:
        plain: Name and accuracy of the latter.
        distilled: The same of the former.
        class_names: In the order of the accuracies.
    """
    gains = 100 * (distilled[1].by_class() - plain[1].by_class())
    order = [number for number in np.argsort(-np.nan_to_num(gains)) if not np.isnan(gains[number])]
    chosen = order if len(order) <= _CLASSES else [*order[: _CLASSES // 2], *order[-_CLASSES // 2 :]]
    wins = sum(gains[number] > 0 for number in order)
    more = "" if len(chosen) == len(order) else f" The {_CLASSES // 2} largest gains and losses."
    caption = f"AP of “{distilled[0]}” minus “{plain[0]}”, in points: better in {wins} of {len(order)} classes.{more}"
    rows = [(class_names[number], float(gains[number])) for number in chosen]
    return Figure("gain-by-class", "Where distillation wins and loses", caption, partial(_draw_gains, rows))


def _draw_gains(rows: Sequence[tuple[str, float]]) -> Canvas:
    canvas, (axes,) = new_canvas(0.9 + 0.32 * len(rows))
    values = [gain for _, gain in rows]
    axes.barh(range(len(rows)), values, height=0.65, color=["#009e73" if gain > 0 else "#d55e00" for gain in values])
    for row, gain in enumerate(values):
        axes.annotate(
            f"{gain:+.1f}", (gain, row), xytext=(4 if gain >= 0 else -4, 0), textcoords="offset points", va="center",
            ha="left" if gain >= 0 else "right",
        )  # fmt: skip
    axes.axvline(0, color=ink(), linewidth=1)
    axes.set_yticks(range(len(rows)), [short(name) for name, _ in rows])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("points of AP")
    return canvas
