"""What the cells of a comparison say together: a table, `compare.json` and `compare.csv`."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from kdpipe.pipelines.compare.cells import Cell, Row, is_finished
from kdpipe.pipelines.compare.complexity import Complexity
from kdpipe.pipelines.compare.process import Outcome
from kdpipe.pipelines.compare.statistics import LEAST_PAIRS, gap_closed, median_of, paired_gain, spread
from kdpipe.pipelines.compare.teacher_ap import TeacherAP
from kdpipe.pipelines.runtime.console import bytes_text, plain
from kdpipe.pipelines.training.work_dir import WorkDir

__all__ = ["csv_text", "notes", "student_checkpoint", "summarize", "summary_tables"]


def summarize(
    rows: Sequence[Row],
    failed: Mapping[str, Outcome],
    complexities: Mapping[str, Complexity],
    teacher: TeacherAP | None,
) -> dict[str, Any]:
    """The content of `compare.json`.

    Args:
        rows: The rows of the comparison.
        failed: Cells that failed, by name.
        complexities: Of students, by the name of their row.
        teacher: Its AP, or None.
    """
    cells = {row.name: [_cell_values(cell, failed) for cell in row.cells] for row in rows}
    aps = {name: _aps(values) for name, values in cells.items()}
    return {
        "kdpipe": version("kdpipe"),
        "teacher": None if teacher is None else asdict(teacher),
        "rows": [_row_values(row, rows, cells[row.name], aps, complexities.get(row.name), teacher) for row in rows],
    }


def _cell_values(cell: Cell, failed: Mapping[str, Outcome]) -> dict[str, Any]:
    result = WorkDir(cell.folder).read("result.json") if is_finished(cell) else None
    state = "done" if result is not None else "failed" if cell.name in failed else "unfinished"
    values = {"seed": cell.seed, "folder": str(cell.folder), "state": state}
    if result is None:
        return values | ({"message": failed[cell.name].message} if cell.name in failed else {})
    names = ("ap", "epoch", "seconds_per_step", "peak_memory", "metrics")
    return values | {name: result.get(name) for name in names}


def _aps(cells: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    return {cell["seed"]: cell["ap"] for cell in cells if cell.get("ap") is not None}


def _row_values(
    row: Row,
    rows: Sequence[Row],
    cells: list[dict[str, Any]],
    aps: Mapping[str, Mapping[int, float]],
    cost: Complexity | None,
    teacher: TeacherAP | None,
) -> dict[str, Any]:
    ap, baseline = spread(list(aps[row.name].values())), row.find_baseline(rows)
    gain = None if baseline is None else paired_gain(aps[row.name], aps[baseline.name])
    teacher_ap = None if teacher is None else teacher.ap
    return {
        "student": row.student,
        "methods": row.methods,
        "config": row.config,
        "ap": None if ap is None else asdict(ap),
        "baseline": None if baseline is None else baseline.name,
        "gain": None if gain is None else {**asdict(gain), "within_noise": gain.within_noise},
        "gap_closed": None if baseline is None else gap_closed(aps[row.name], aps[baseline.name], teacher_ap),
        "seconds_per_step": median_of(cells, "seconds_per_step"),
        "peak_memory": median_of(cells, "peak_memory"),
        "parameters": None if cost is None else cost.parameters,
        "gflops": None if cost is None else cost.gflops,
        "input_size": None if cost is None else list(cost.size),
        "cells": cells,
    }


def summary_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The summary as people read it: what was gained, and what it costs."""
    gains, costs = Table("student", "methods"), Table("student", "methods")
    for table, titles in (
        (gains, ("AP", "seeds", "gain over none", "gap closed")),
        (costs, ("s per step", "peak memory", "parameters", "GFLOPs")),
    ):
        for title in titles:
            table.add_column(title, justify="right")
    for row in summary["rows"]:
        name = Text(plain(row["student"])), Text(plain(row["methods"]))
        gains.add_row(
            *name,
            _ap_text(row["ap"]),
            f"{0 if row['ap'] is None else row['ap']['count']} of {len(row['cells'])}",
            _gain_text(row["gain"]),
            "" if row["gap_closed"] is None else f"{round(100 * row['gap_closed'])} %",
        )
        costs.add_row(
            *name,
            "" if row["seconds_per_step"] is None else f"{row['seconds_per_step']:.2f}",
            "" if row["peak_memory"] is None else bytes_text(row["peak_memory"]),
            "" if row["parameters"] is None else f"{row['parameters'] / 1e6:.2f} M",
            "" if row["gflops"] is None else f"{row['gflops']:.2f}",
        )
    return [gains, costs]


def _ap_text(ap: Mapping[str, Any] | None) -> str:
    if ap is None:
        return ""
    return f"{ap['mean']:.3f}" + ("" if ap["deviation"] is None else f" ± {ap['deviation']:.3f}")


def _gain_text(gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return ""
    text = f"{gain['mean']:+.3f}"
    if gain["interval"] is None:
        return text
    low, high = gain["interval"]
    return f"{text} ({low:+.3f} to {high:+.3f}{', within noise' if gain['within_noise'] else ''})"


def notes(summary: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """What has to be known to read the table."""
    lines = []
    gains = [row["gain"] for row in summary["rows"] if row["gain"] is not None]
    if any(gain["interval"] is not None for gain in gains):
        lines.append(
            "Gain: mean over seeds of the difference to the same seed without distillation, with Student's t interval "
            "of 95 %; within noise: it contains 0."
        )
    if any(gain["interval"] is None for gain in gains):
        lines.append(f"Fewer than {LEAST_PAIRS} seeds in common: a gain may be noise (--seeds {LEAST_PAIRS}).")
    if any(row["ap"] is not None and row["ap"]["count"] > 1 for row in summary["rows"]):
        lines.append("AP: mean of the seeds ± sample standard deviation.")
    if summary["teacher"] is not None:
        lines.append(f"Teacher: AP {summary['teacher']['ap']:.3f} ({summary['teacher']['source']}).")
    elif gains:
        lines.append(
            "The teacher's AP on these images is not known: measure it (kdpipe evaluate), and say --teacher-ap."
        )
    records = [WorkDir(cell.folder).record() or {} for row in rows for cell in row.cells if is_finished(cell)]
    for name, what in (
        ("validation", "validation images"),
        ("data", "training images"),
        ("kdpipe", "versions of kdpipe"),
    ):
        if len({record.get(name) for record in records}) > 1:
            lines.append(f"Warning: not all of these had the same {what}.")
    return lines


def csv_text(summary: Mapping[str, Any]) -> str:
    """The rows of the summary as CSV, with a column per seed."""
    seeds = sorted({cell["seed"] for row in summary["rows"] for cell in row["cells"]})
    text = io.StringIO()
    lines = []
    for row in summary["rows"]:
        ap, gain = row["ap"] or {}, row["gain"] or {}
        low, high = gain.get("interval") or (None, None)
        lines.append(
            {
                **{name: row[name] for name in ("student", "methods", "config")},
                **{f"ap_{name}": ap.get(name) for name in ("mean", "deviation", "lowest", "highest", "count")},
                "baseline": row["baseline"],
                **{"gain": gain.get("mean"), "gain_low": low, "gain_high": high, "gain_pairs": gain.get("pairs")},
                "within_noise": gain.get("within_noise"),
                **{name: row[name] for name in ("gap_closed", "seconds_per_step", "peak_memory")},
                **{name: row[name] for name in ("parameters", "gflops")},
                **{f"ap_seed_{seed}": _aps(row["cells"]).get(seed) for seed in seeds},
            }
        )
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def student_checkpoint(row: Row) -> Path | None:
    """The bare detector of a finished cell; None where none is finished."""
    paths = [cell.folder / "student.pth" for cell in row.cells if is_finished(cell)]
    return next((path for path in paths if path.is_file()), None)
