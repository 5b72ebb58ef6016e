"""`kdpipe compare`: train every cell of a comparison, and say what they reached."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.compare.cells import Row, check_cell, is_finished
from kdpipe.pipelines.compare.complexity import Complexity, complexity
from kdpipe.pipelines.compare.process import Outcome
from kdpipe.pipelines.compare.run import Engine, run_cells
from kdpipe.pipelines.compare.summary import csv_text, notes, student_checkpoint, summarize, summary_tables
from kdpipe.pipelines.compare.teacher_ap import TeacherAP, known_ap
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.detectors.configs import config_from_checkpoint
from kdpipe.pipelines.detectors.mmdet2 import kept_ratio_scale
from kdpipe.pipelines.runtime.console import first_line

__all__ = ["check_place", "compare", "write_summary"]

_JSON, _CSV = "compare.json", "compare.csv"
_WIDTH = 120  # of a table that is not for a terminal


def check_place(work_dir: Path, rows: Sequence[Row]) -> None:
    """Refuse a folder in which cells were trained with other options, or files have the names of ours.

    Raises:
        KdpipeError: Naming what is there.
    """
    path = work_dir / _JSON
    if path.exists():
        _read_summary(path)
    elif (work_dir / _CSV).exists():
        raise KdpipeError(f"{work_dir / _CSV} is there, and no comparison wrote it. Choose another --work-dir.")
    for row in rows:
        for cell in row.cells:
            check_cell(cell)


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or not content.keys() >= {"kdpipe", "rows"}:
        raise KdpipeError(f"{path} is there, and no comparison wrote it. Choose another --work-dir, or move it away.")
    return content


def compare(
    rows: Sequence[Row], work_dir: Path, engine: Engine, teacher: TeacherAP | Path | None, console: Console
) -> bool:
    """Train what is not finished, and print and write what all reached.

    Args:
        rows: The rows, whose cells are in folders below `work_dir`.
        work_dir: Gets `compare.json` and `compare.csv`; `check_place` has let it pass.
        engine: Where cells run.
        teacher: Its AP; or its checkpoint, whose AP may be known; or None.
        console: Where all is shown.

    Returns:
        Whether all cells are finished.

    Raises:
        KeyboardInterrupt: Somebody asked to stop; the same call goes on.
    """
    # seed by seed, so that there is something to compare soon
    cells = [cell for seed in zip(*(row.cells for row in rows), strict=True) for cell in seed]
    todo = [cell for cell in cells if not is_finished(cell)]
    console.print(
        f"{len(cells)} trainings in {work_dir}, {len(cells) - len(todo)} of which are finished.", markup=False
    )
    failed = run_cells(todo, len(cells) - len(todo), engine, console) if todo else {}
    write_summary(rows, work_dir, failed, teacher, console)
    for name, outcome in failed.items():
        log = next(cell.log for cell in cells if cell.name == name)
        console.print(f"Failed: {name}: {outcome.message}\n  {log}", markup=False)
    return not failed


def write_summary(
    rows: Sequence[Row],
    work_dir: Path,
    failed: Mapping[str, Outcome],
    teacher: TeacherAP | Path | None,
    console: Console,
) -> dict[str, Any]:
    """Print the table of what is finished, and write `compare.json` and `compare.csv`; returns the former."""
    finished = [cell for row in rows for cell in row.cells if is_finished(cell)]
    ap = known_ap(teacher, finished) if isinstance(teacher, Path) else teacher
    costs, remarks = _complexities(rows)
    summary = summarize(rows, failed, costs, ap)
    work_dir.mkdir(parents=True, exist_ok=True)
    for name, text in ((_JSON, json.dumps(summary, indent=2) + "\n"), (_CSV, csv_text(summary))):
        aside = work_dir / f".{name}.tmp"
        aside.write_text(text, encoding="utf-8")
        aside.replace(work_dir / name)
    for table in summary_tables(summary):
        console.print(table, width=None if console.is_terminal else _WIDTH)
    for line in [*notes(summary, rows), *remarks, f"{work_dir / _JSON}, {_CSV}"]:
        console.print(line, markup=False)
    return summary


def _complexities(rows: Sequence[Row]) -> tuple[dict[str, Complexity], list[str]]:
    """Parameters and GFLOPs of the students that are trained, by the name of their row; and why some have none."""
    found: dict[str, Complexity] = {}
    lines: list[str] = []
    known: dict[str, Complexity] = {}
    for row in rows:
        path = student_checkpoint(row)
        if path is None:
            continue
        try:
            config = config_from_checkpoint(load_checkpoint(path))
            scale = None if config is None else kept_ratio_scale(config, None)
            if config is None or scale is None:
                lines.append(f"{row.name}: no GFLOPs, since its test pipeline has no Resize that keeps the ratio.")
                continue
            key = json.dumps([config.model.to_dict(), scale], sort_keys=True, default=str)
            if key not in known:
                known[key] = complexity(config, scale)
        except Exception as error:  # a config may name any class; the comparison has its table all the same
            lines.append(f"{row.name}: no parameters and GFLOPs: {first_line(error)}")
            continue
        found[row.name] = known[key]
    return found, lines
