"""The report of trainings: what a work directory of `train-student`, or a folder with several, tells."""

import math
import statistics
from collections.abc import Sequence

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.compare.statistics import Gain, median_of
from kdpipe.pipelines.data.images import ImageError
from kdpipe.pipelines.report.accuracy import class_names
from kdpipe.pipelines.report.accuracy_figures import accuracy_figures, class_table, gain_figure
from kdpipe.pipelines.report.found import TEACHER, Found
from kdpipe.pipelines.report.page import NOTHING, Cell, Section, Table
from kdpipe.pipelines.report.pictures import LEAST_SCORE, picture_figures
from kdpipe.pipelines.report.provenance import provenance_section
from kdpipe.pipelines.report.training_figures import (
    ap_figures,
    group_colors,
    loss_figures,
    share_figures,
    time_figure,
)
from kdpipe.pipelines.report.trainings import TrainingGroup, names_beside
from kdpipe.pipelines.runtime.console import bytes_text

__all__ = ["training_facts", "training_sections"]

_PICTURES = 12
_MORE_COLUMNS = ("AP50", "AP75", "s per step", "peak memory", "seeds", "student", "state")


def training_facts(groups: Sequence[TrainingGroup], found: Found) -> list[tuple[str, str]]:
    """What is said first: AP of the teacher and of the best students, and the gain."""
    facts = [("Teacher AP", f"{found.teacher_ap:.3f}")] if found.teacher_ap is not None else []
    plain, best = _plain(groups), _best(groups)
    if plain is not None and plain.ap is not None and plain is not best:
        facts.append(("Without distillation", f"{plain.ap:.3f}"))
    if best is not None and best.ap is not None and not best.first.is_teacher:
        count = sum(group.is_distilled for group in groups)
        distilled = f"Distilled, best of {count}" if count > 1 else "Distilled"
        facts.append((distilled if best.is_distilled else "AP", f"{best.ap:.3f}"))
        gain = best.gain_over(plain) if plain is not None and best is not plain else None
        if gain is not None:
            noise = " (within noise)" if gain.within_noise else ""
            facts.append(("Gain", f"{100 * gain.mean:+.1f} points{noise}"))
    trainings = sum(len(group.trainings) for group in groups)
    return [*facts, ("Trainings", str(trainings))] if trainings > 1 else facts


def _best(groups: Sequence[TrainingGroup]) -> TrainingGroup | None:
    """The distilled students of most AP; without any, the others."""
    distilled = [group for group in groups if group.is_distilled and group.ap is not None]
    students = [group for group in groups if not group.first.is_teacher]
    candidates = distilled or [group for group in students or groups if group.ap is not None]
    return max(candidates, key=lambda group: group.ap or 0, default=None)


def _plain(groups: Sequence[TrainingGroup]) -> TrainingGroup | None:
    """The students without distillation that belong beside the best distilled ones."""
    best = _best(groups)
    return None if best is None else _same_without_distillation(best, groups)


def _same_without_distillation(group: TrainingGroup, groups: Sequence[TrainingGroup]) -> TrainingGroup | None:
    """The same student, trained in the same way without distillation, which may be this one."""
    same = (each for each in groups if each.is_plain and each.first.own_training == group.first.own_training)
    return next(same, None)


def training_sections(groups: Sequence[TrainingGroup], found: Found) -> list[Section]:
    """The sections of a report of trainings.

    Args:
        groups: The trainings.
        found: As `find_objects` gives it.
    """
    colors = group_colors(groups)
    results = Section("results", "Results", "AP is COCO's, on the validation images after the last epoch.")
    results.tables.append(_results_table(groups, found))
    results.figures += ap_figures(groups, found.teacher_ap)
    if _plain(groups) is None and any(group.is_distilled for group in groups):
        results.notes.append(
            "There is no student without distillation here to compare with, trained in the same way (config, epochs, "
            "batch size, rate, data) but for that: train one with --methods none and the same other options, in a "
            "folder beside this one, and report the folder that holds both."
        )
    course = Section("training", "How training went", figures=[*loss_figures(groups), *share_figures(groups)])
    if times := time_figure(groups):
        course.figures.append(times)
    return [results, course, _accuracy(groups, found, colors), _pictures(groups, found), provenance_section(groups)]


def _results_table(groups: Sequence[TrainingGroup], found: Found) -> Table:
    columns = ["methods", "AP", "±", "gain", "gap closed", *_MORE_COLUMNS]
    rows = [
        _row(group, _same_without_distillation(group, groups) if group.is_distilled else None, found.teacher_ap)
        for group in groups
    ]
    caption = (
        "AP: mean over seeds; ±: standard deviation. Gain: points of AP over the same training without distillation, "
        "of seeds that both have; from three on with Student's t interval of 95 %, within noise where that holds 0. "
        "Gap closed: of the distance from that student to the teacher. Click on a column to sort."
    )
    if TEACHER in found.accuracies and not any(group.first.is_teacher for group in groups):
        ious = found.accuracies[TEACHER].by_iou()
        values = [found.accuracies[TEACHER].ap, None, None, None, ious[0], ious[5], None, None]
        rows.append([TEACHER, *map(_number, values), NOTHING, NOTHING, "from its checkpoint"])
    if len({group.first.student for group in groups}) == 1:
        place = columns.index("student")
        del columns[place]
        for row in rows:
            del row[place]
    return Table(columns, rows, caption)


def _row(group: TrainingGroup, plain: TrainingGroup | None, teacher_ap: float | None) -> list[Cell | str]:
    gain = None if plain is None else group.gain_over(plain)
    results = [training.result for training in group.trainings]
    memory = median_of(results, "peak_memory")
    states = {training.state for training in group.trainings}
    return [
        group.first.methods_text if group.is_named_by_methods else group.label,
        _number(group.ap, strong=True),
        _number(statistics.stdev(group.aps) if len(group.aps) > 1 else None),
        _gain(gain),
        _share(None if plain is None else group.gap_closed(plain, teacher_ap)),
        *(_number(_metric(group, name)) for name in ("bbox_mAP_50", "bbox_mAP_75")),
        _number(median_of(results, "seconds_per_step"), digits=2),
        Cell(NOTHING, -math.inf) if memory is None else Cell(bytes_text(memory), memory),
        ", ".join(str(training.seed) for training in group.trainings),
        group.first.student,
        states.pop() if len(states) == 1 else "; ".join(f"seed {each.seed}: {each.state}" for each in group.trainings),
    ]


def _gain(gain: Gain | None) -> Cell:
    if gain is None:
        return Cell(NOTHING, -math.inf)
    text = f"{100 * gain.mean:+.1f}"
    if gain.interval is not None:
        low, high = (100 * end for end in gain.interval)
        text += f" ({low:+.1f} to {high:+.1f}{', within noise' if gain.within_noise else ''})"
    return Cell(text, gain.mean)


def _share(share: float | None) -> Cell:
    return Cell(NOTHING, -math.inf) if share is None else Cell(f"{round(100 * share)} %", share)


def _metric(group: TrainingGroup, name: str) -> float | None:
    values = [(training.result.get("metrics") or {}).get(name) for training in group.trainings]
    numbers = [float(value) for value in values if value is not None]
    return statistics.mean(numbers) if numbers else None


def _number(value: float | None, *, digits: int = 3, strong: bool = False) -> Cell:
    return Cell(NOTHING, -math.inf) if value is None else Cell(f"{value:.{digits}f}", value, strong)


def _accuracy(groups: Sequence[TrainingGroup], found: Found, colors: dict[str, str]) -> Section:
    section = Section("accuracy", "What is found", notes=list(found.notes))
    if found.truth is None or not found.accuracies:
        return section
    names = class_names(found.truth)
    section.figures += accuracy_figures(found.accuracies, colors, names, len(found.truth.getImgIds()))
    section.tables.append(class_table(found.accuracies, names))
    plain, best = _plain(groups), _best(groups)
    if plain and best and plain is not best and {plain.label, best.label} <= found.accuracies.keys():
        short_names = names_beside([plain, best])
        first, second = ((short_names[group.label], found.accuracies[group.label]) for group in (plain, best))
        section.figures.append(gain_figure(first, second, names))
    return section


def _pictures(groups: Sequence[TrainingGroup], found: Found) -> Section:
    section = Section("images", "Validation images")
    if found.images is None or found.truth is None or not found.results:
        return section
    both = list({group.label: group for group in (_plain(groups), _best(groups)) if group}.values())
    short_names = names_beside(both)
    results = {TEACHER: found.results[TEACHER]} if TEACHER in found.results else {}
    results |= {name: found.results[label] for label, name in short_names.items() if label in found.results}
    names = list(results)
    chosen = [name for name in short_names.values() if name in results]
    compared = (chosen if len(chosen) == 2 else names)[:2]
    by = f"“{compared[0]}” and “{compared[1]}” differ most" if len(compared) == 2 else f"“{compared[0]}” errs most"
    section.intro = (
        f"Those on which {by} come first. Detections of at least {LEAST_SCORE} are shown: blue is right (IoU 0.5, of "
        "its class), orange is wrong; a dashed yellow box was missed."
    )
    try:
        img_dir = found.images.folder
        section.figures += picture_figures(found.truth, img_dir, results, compared, _PICTURES)
    except (ImageError, KdpipeError) as error:
        section.notes.append(f"No image is shown: {error}")
    return section
