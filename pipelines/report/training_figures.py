"""Figures of how trainings went: AP, losses, what each loss does to the gradient, and time."""

import statistics
from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from kdpipe.distill.methods import LOSSES
from kdpipe.pipelines.report.figures import COLORS, GREYS, Figure, ink, new_canvas, paper
from kdpipe.pipelines.report.trainings import Training, TrainingGroup

__all__ = ["ap_figures", "group_colors", "loss_figures", "share_figures", "time_figure"]

_LABEL = 26  # characters of a label that an axis has room for
_OF_DISTILLATION = {loss.log_name for loss in LOSSES.values()}


def group_colors(groups: Sequence[TrainingGroup]) -> dict[str, str]:
    """Colour of each student by its label, the same in all figures; those without distillation are grey.

    Teachers have none: they are drawn in the colour of the text.
    """
    plain = [group.label for group in groups if group.is_plain]
    others = [group.label for group in groups if group.is_distilled]
    return {
        label: palette[number % len(palette)]
        for labels, palette in ((plain, GREYS), (others, COLORS))
        for number, label in enumerate(labels)
    }


def short(text: str) -> str:
    """A name as an axis has room for it; its end tells more than its middle."""
    return text if len(text) <= _LABEL else f"{text[: _LABEL // 2 - 1]}…{text[-(_LABEL // 2) :]}"


def ap_figures(groups: Sequence[TrainingGroup], teacher_ap: float | None) -> list[Figure]:
    """AP of each group with its seeds as dots; and AP over the epochs, where it was measured more than once.

    Args:
        groups: The trainings.
        teacher_ap: AP of the teacher on the same images, where it is known.
    """
    figures = []
    measured = [group for group in groups if group.aps]
    if measured:
        seeds = "A bar is the mean over seeds, a dot is a seed."
        line = " The dashed line is the teacher." if teacher_ap is not None else ""
        draw = partial(_draw_bars, measured, teacher_ap)
        figures.append(Figure("ap", "AP of each student", seeds + line, draw))
    if any(len(training.curve("ap")) > 1 for group in groups for training in group.trainings):
        caption = "COCO AP on the validation images; a line per seed."
        figures.append(Figure("ap-over-epochs", "AP over the training", caption, partial(_draw_curves, groups, "ap")))
    return figures


def _draw_bars(groups: Sequence[TrainingGroup], teacher_ap: float | None) -> Canvas:
    colors = group_colors(groups)
    canvas, (axes,) = new_canvas(1.1 + 0.42 * len(groups))
    for row, group in enumerate(groups):
        mean, color = statistics.mean(group.aps), colors.get(group.label, ink())
        axes.barh(row, mean, height=0.62, color=color, alpha=0.35)
        axes.plot(group.aps, [row] * len(group.aps), "o", color=color, markersize=6)
        behind = {"facecolor": paper(), "edgecolor": "none", "pad": 1.5}
        place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{mean:.3f}", (max(group.aps), row), bbox=behind, **place)  # type: ignore[arg-type]
    if teacher_ap is not None:
        axes.axvline(teacher_ap, color=ink(), linestyle="--", linewidth=1.2)
    axes.set_yticks(range(len(groups)), [short(group.label) for group in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max([teacher_ap or 0, *(ap for group in groups for ap in group.aps), 1e-3]))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("AP")
    return canvas


def _draw_curves(groups: Sequence[TrainingGroup], name: str) -> Canvas:
    canvas, (axes,) = new_canvas(3.1)
    _curves(axes, groups, name)
    axes.set_xlabel("epoch")
    axes.set_ylabel(name.removeprefix("loss_") if name != "ap" else "AP")
    if len(groups) > 1:
        axes.legend()
    return canvas


def _curves(axes: Axes, groups: Sequence[TrainingGroup], name: str) -> None:
    """A line per training, of the groups that have it; one of a single point is a dot."""
    colors = group_colors(groups)
    for group in groups:
        label: str | None = short(group.label)
        for training in group.trainings:
            if curve := training.curve(name):
                x, y = zip(*curve, strict=True)
                marker = "o" if len(x) < 3 else ""
                axes.plot(x, y, marker=marker, color=colors.get(group.label, ink()), label=label, alpha=0.85)
                label = None


def _legend(canvas: Canvas, axes: Sequence[Axes]) -> None:
    """One legend above all axes."""
    entries = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    canvas.legend(list(entries.values()), list(entries), loc="outside upper center", ncols=2)


def loss_figures(groups: Sequence[TrainingGroup]) -> list[Figure]:
    """Every loss over the training: the detector's own together, and those of the distillation."""
    names = list(dict.fromkeys(name for group in groups for name in group.first.logged("loss")))
    own = [name for name in names if name not in _OF_DISTILLATION]
    of_distillation = [name for name in names if name in _OF_DISTILLATION]
    kinds = {
        "losses": ("The detector's own losses", own),
        "distillation-losses": ("Distillation losses", of_distillation),
    }
    return [
        Figure(
            name,
            title,
            "Means over the interval of the log, weighted as they are added up; a line per seed.",
            partial(_draw_losses, groups, chosen),
        )
        for name, (title, chosen) in kinds.items()
        if chosen
    ]


def _draw_losses(groups: Sequence[TrainingGroup], names: Sequence[str]) -> Canvas:
    rows = -(-len(names) // 2)
    canvas, axes = new_canvas(0.7 + 1.55 * rows, rows, 2, sharex=True)
    for axis, name in zip(axes, names, strict=False):
        _curves(axis, groups, name)
        axis.set_title(name.removeprefix("loss_") if name != "loss" else "sum of all")
        axis.tick_params(labelsize=8)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    canvas.supxlabel("epoch", fontsize=9)
    if len(groups) > 1:
        _legend(canvas, axes)
    return canvas


def share_figures(groups: Sequence[TrainingGroup]) -> list[Figure]:
    """Share of each loss in the gradient at the student's pyramid, over the training; a figure per distilled group."""
    figures = []
    for number, group in enumerate(group for group in groups if group.first.logged("share_")):
        title = "Share of each loss in the gradient" + (f": {group.label}" if len(groups) > 1 else "")
        caption = (
            "Norm of each loss's gradient at the student's pyramid, as a share of the sum over all losses. A loss with "
            f"hardly any share teaches nothing; weights are chosen by this. Seed {group.first.seed}."
        )
        figures.append(Figure(f"shares-{number}", title, caption, partial(_draw_shares, group.first)))
    return figures


def _draw_shares(training: Training) -> Canvas:
    canvas, (axes,) = new_canvas(3.3)
    curves = {name: dict(training.curve(name)) for name in training.logged("share_")}
    epochs = sorted({epoch for curve in curves.values() for epoch in curve})
    values = [[curve.get(epoch, 0.0) for epoch in epochs] for curve in curves.values()]
    labels = [name.removeprefix("share_") for name in curves]
    colors = [COLORS[number % len(COLORS)] for number in range(len(labels))]
    areas = axes.stackplot(epochs, values, labels=labels, colors=colors)
    for area, label in zip(areas, labels, strict=True):  # distillation in full colour
        area.set_alpha(0.95 if f"loss_{label}" in _OF_DISTILLATION else 0.45)
    axes.set_ylim(0, 1)
    axes.set_xlim(min(epochs), max(max(epochs), min(epochs) + 1e-6))
    axes.set_xlabel("epoch")
    canvas.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return canvas


def time_figure(groups: Sequence[TrainingGroup]) -> Figure | None:
    """Seconds of a step over the training, and how much of them is waiting for data."""
    if not any(training.curve("time") for group in groups for training in group.trainings):
        return None
    caption = "Above: seconds from step to step. Below: how much of them the step waits for its images and targets."
    return Figure("step-time", "Time of a step", caption, partial(_draw_times, groups))


def _draw_times(groups: Sequence[TrainingGroup]) -> Canvas:
    canvas, axes = new_canvas(3.6, 2, 1, sharex=True)
    for axis, name, label in zip(axes, ("time", "data_time"), ("s per step", "s waiting"), strict=True):
        _curves(axis, groups, name)
        axis.set_ylim(bottom=0)
        axis.set_ylabel(label)
    axes[1].set_xlabel("epoch")
    if len(groups) > 1:
        _legend(canvas, axes)
    return canvas
