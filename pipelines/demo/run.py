"""`kdpipe demo`: pictures drawn from nothing, and the commands that a user would give."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.demo.drawing import draw_shapes, is_drawn
from kdpipe.pipelines.demo.settings import DemoSettings, detector_config
from kdpipe.pipelines.demo.teacher import SHIPPED, DemoTeacher
from kdpipe.pipelines.runtime.console import ProgressBar

__all__ = ["ORIGIN", "RunCommand", "data_words", "draw", "run_demo", "write_config"]

RunCommand = Callable[[Sequence[str]], None]  # runs `kdpipe` with these words, and raises where it fails

ORIGIN = "Written by kdpipe demo"


def run_demo(
    out: Path,
    run: RunCommand,
    *,
    fresh: bool,
    console: Console,
    settings: DemoSettings | None = None,
    teacher: DemoTeacher = SHIPPED,
) -> None:
    """Draw a data set, cache a teacher that knows such pictures, compare two students, and write the report.

    Interrupted, the same call goes on: each of the commands does what is missing.

    Args:
        out: Folder for all of it.
        run: Runs a command.
        fresh: Delete what an earlier demo left in `out`, and nothing else.
        console: Where progress is shown.
        settings: Size of the demo; by default what two cores do in four minutes.
        teacher: Has learned from pictures of the same size.

    Raises:
        KdpipeError: What is in the place of a step's output is something else.
    """
    settings = settings or DemoSettings()
    begin = time.perf_counter()
    if fresh:
        _clear(out)
    console.print(f"{settings.train} pictures to train on, and {settings.val} to measure AP on: {out / 'shapes'}")
    draw(out / "shapes", settings.train, settings, console)
    student = out / "student.py"
    write_config(student, detector_config(ORIGIN, settings.student, settings.epochs, settings.train, settings))
    run(_cache_words(out, teacher, settings))
    run(_compare_words(out, student, teacher, settings))
    run(["report", str(out / "compared")])
    seconds = int(time.perf_counter() - begin)
    console.print(f"The demo took {seconds // 60} min {seconds % 60:02d} s. Open {out / 'compared' / 'report.html'}")


def _cache_words(out: Path, teacher: DemoTeacher, settings: DemoSettings) -> list[str]:
    words = ["cache-teacher", "--ckpt", str(teacher.checkpoint), *data_words(out / "shapes", "train")]
    return [*words, "--proposals", str(settings.proposals), "--out", str(out / "shapes.zarr")]


def _compare_words(out: Path, student: Path, teacher: DemoTeacher, settings: DemoSettings) -> list[str]:
    words = ["compare", "--cache", str(out / "shapes.zarr"), "--student", str(student), "--methods", "none"]
    words += ["--methods", ",".join(settings.methods), "--rois", "teacher", "--seed", str(settings.seed)]
    words += [*data_words(out / "shapes", "val"), "--teacher-ap", f"{teacher.ap:.3f}"]
    words += ["-o", f"distill.rois.num={settings.rois}"]
    return [*words, "--jobs", "2", "--work-dir", str(out / "compared")]


def data_words(shapes: Path, split: str) -> list[str]:
    """The options that name pictures: `--ann-file` and `--img-dir`, or those for validation."""
    prefix = "--val-" if split == "val" else "--"
    return [f"{prefix}ann-file", str(shapes / "annotations" / f"{split}.json"), f"{prefix}img-dir", str(shapes / split)]


def draw(folder: Path, train: int, settings: DemoSettings, console: Console) -> None:
    """Draw the pictures that are not there yet."""
    with ProgressBar(console, "drawing", train + settings.val) as progress:
        start = time.perf_counter()

        def update(done: int) -> None:
            progress.update(done, f"{done / (time.perf_counter() - start):.0f} pictures/s")

        draw_shapes(folder, train=train, val=settings.val, size=settings.size, seed=settings.seed, progress=update)


def write_config(path: Path, text: str) -> None:
    """Write a config of the demo, in the place of an older one.

    Raises:
        KdpipeError: There is another file.
    """
    _check_config(path)
    path.write_text(text, encoding="utf-8")


def _check_config(path: Path) -> None:
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(f"# {ORIGIN}"):
        raise KdpipeError(f"{path} is there, and no demo wrote it: move it away, or choose another --out.")


def _clear(out: Path) -> None:
    """Delete what a demo made, the last step first, so that what an interruption leaves is a demo that can go on.

    Raises:
        KdpipeError: Something of another origin is in the place of a step's; nothing has been deleted.
    """
    made = [folder for name in ("compared", "shapes.zarr", "shapes") if (folder := out / name).exists()]
    for folder in made:
        if folder.suffix == ".zarr":
            open_cache(folder, allow_partial=True)
        elif not (is_drawn(folder) if folder.name == "shapes" else _is_comparison(folder)):
            raise KdpipeError(f"{folder} is there, and no demo made it: move it away, or choose another --out.")
    _check_config(out / "student.py")
    for folder in made:
        shutil.rmtree(folder)
    (out / "student.py").unlink(missing_ok=True)


def _is_comparison(folder: Path) -> bool:
    """Whether a folder is a comparison of the demo's student, or empty."""
    return any(folder.glob("student/*/seed-*.log")) or not any(path.is_file() for path in folder.rglob("*"))
