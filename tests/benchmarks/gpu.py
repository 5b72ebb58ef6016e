"""What distillation costs on a GPU: caching a teacher, training steps from a cache and beside the teacher, loaders.

    python tests/benchmarks/gpu.py --out /tmp/gpu

Seven minutes at most on one GPU with 16 cores, the rows most worth knowing first. Each row is printed and kept in
`gpu.md` and `gpu.jsonl` of the folder as soon as it is there, one that fails does not stop the others, and what no
longer fits is "not reached". Pictures of COCO's sizes are drawn, weights are random, nothing is downloaded; all of it
lies in a folder for temporary files, which is removed at the end. `--device cpu --small` runs the same in a minute.
"""

import time

START = time.monotonic()  # before the imports, which are part of the budget

import os  # noqa: E402
import platform  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import warnings  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import click  # noqa: E402
from gpu_board import Board, Row  # type: ignore[import-not-found]  # noqa: E402

# Loader workers import this file, too: what is heavy is imported in `main`.

TITLES = {
    "teacher": "Caching a teacher",
    "stages": "Where the time of cache-teacher goes, ms per view, the device waited for around each stage",
    "train": "Training steps",
    "profile": "What a training step is made of",
    "loader": "What the loaders reach",
}
TIERS = ("pyramid", "objects", "embeddings")


def training_rows(s: Any, family: str, amp: bool, teachers: tuple[tuple[str, str], ...]) -> list[Row]:
    """Rows of a family of students: each teacher (`plain`, `live`, a tier) with whose RoIs."""
    rows = []
    for teacher, rois in teachers:
        kind = "amp" if amp else "float32"
        name = f"train/{family}/{kind}/{teacher}" + ("" if teacher == "plain" else f", {rois}'s RoIs")
        run = partial(s.train, name, family, teacher, rois, amp=amp)
        rows.append(Row(name, run, least=8, most=70))
    return rows


def loader_rows(s: Any, tier: str, rois: str, counts: tuple[int, ...]) -> list[Row]:
    """Rows of the loaders for a tier, beside the pace of the steps that they feed."""
    label = "plain" if tier == "plain" else f"{tier}, {rois}'s RoIs"
    steps = [f"train/faster-rcnn/{kind}/{label}" for kind in ("float32", "amp")]
    return [
        Row(f"loader/{label}, {count} workers", partial(s.loading, tier, rois, count, steps), least=6, most=40)
        for count in counts
    ]


def teacher_rows(t: Any, name: str, *tiers: str) -> list[Row]:
    """Rows of cache-teacher with a teacher."""
    return [Row(f"teacher/{name}/{tier}", partial(t.caching, name, tier), least=10, most=60) for tier in tiers]


def plan(t: Any, s: Any) -> list[Row]:
    """All rows, the most worth knowing first."""
    few = (("plain", ""), ("pyramid", "student"), ("pyramid", "teacher"))
    rates = s.size.rates
    faster = partial(training_rows, s, "faster-rcnn")
    return [
        *faster(False, (("plain", ""),)),
        Row("teacher/x101/forward pass", partial(t.forward, "x101"), least=8),
        *teacher_rows(t, "x101", "pyramid"),
        *faster(False, few[1:]),
        *faster(True, few[:2]),
        *faster(False, (("live", "student"),)),
        *teacher_rows(t, "x101", "objects"),
        *faster(False, (("objects", "teacher"),)),
        *faster(True, (few[2], ("objects", "teacher"))),
        Row("profile/faster-rcnn/pyramid, student's RoIs", partial(s.profile, "faster-rcnn", *few[1]), least=8),
        *loader_rows(s, "pyramid", "student", rates[-1:]),
        Row("stages/x101/pyramid", partial(t.stages, "x101", "pyramid"), least=8),
        *training_rows(s, "retinanet", False, few),
        *training_rows(s, "fcos", False, few),
        *loader_rows(s, "pyramid", "student", rates[:-1]),
        *teacher_rows(t, "x101", "embeddings"),
        *faster(False, (("embeddings", "teacher"),)),
        Row("teacher/r101/forward pass", partial(t.forward, "r101"), least=6),
        *teacher_rows(t, "r101", *TIERS),
        *loader_rows(s, "objects", "teacher", rates),
        *faster(True, (("live", "student"), ("embeddings", "teacher"))),
        *faster(False, (("live", "teacher"),)),
        *loader_rows(s, "embeddings", "teacher", rates),
        *loader_rows(s, "plain", "", rates),
        Row("profile/faster-rcnn/objects, teacher's RoIs", partial(s.profile, "faster-rcnn", "objects", "teacher"), 8),
        Row("stages/x101/objects", partial(t.stages, "x101", "objects"), least=8),
        *(row for family in ("retinanet", "fcos") for row in training_rows(s, family, True, few)),
    ]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the results.")
@click.option("--seconds", default=420.0, show_default=True, help="Budget of time, from the start of the program.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--small", is_flag=True, help="Tiny pictures and detectors, a few steps.")
@click.option("--only", multiple=True, help="Only rows with this in their name; may be given several times.")
@click.option("--list", "is_list", is_flag=True, help="Show the names of the rows, in their order.")
def main(out: Path, seconds: float, device: str, small: bool, only: tuple[str, ...], is_list: bool) -> None:
    """Measure, and keep what was measured."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of loader workers
    board = Board(out, TITLES, START, seconds)
    import torch
    from gpu_device import Device  # type: ignore[import-not-found]
    from gpu_inputs import SMALL, Size  # type: ignore[import-not-found]
    from gpu_students import Students  # type: ignore[import-not-found]
    from gpu_teachers import Teachers  # type: ignore[import-not-found]

    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("There is no CUDA device here. Say --device cpu --small for a trial.")
    with tempfile.TemporaryDirectory(prefix="kdpipe-gpu-", ignore_cleanup_errors=True) as folder:
        size = SMALL if small else Size()
        teachers = Teachers(Path(folder), Device(device), size)
        rows = [
            row for row in plan(teachers, Students(teachers, out)) if not only or any(text in row.name for text in only)
        ]
        if is_list:
            click.echo("\n".join(row.name for row in rows))
            return
        cores = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
        board.describe({**teachers.device.describe(), **cores, "size": size})
        board.measure(rows, teachers.device.free)
    board.say(f"{len(rows)} rows, {len(board.failed)} of them failed: {', '.join(board.failed) or 'none'}")
    sys.exit(1 if board.failed else 0)


if __name__ == "__main__":
    main()
