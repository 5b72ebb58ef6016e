"""Does distillation from a cache help on real images? One command trains everything and prints the table.

    python tests/benchmarks/bccd.py --data path/to/bccd --out /tmp/bccd

Faster R-CNN, ResNet-18 teacher and a student of a quarter of its width, from scratch, at 256 x 192, on the photographs
of bccd: one teacher, one cache of it, and from that cache one student per choice of methods and per seed. Everything
goes through the command line of kdpipe. Started again, it goes on from where it was stopped; the table is printed after
every run, and written to `table.md` in the output folder.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

METHODS = ("none", "sgfi", "ckd", "pred", "sgfi,ckd,pred")
SCALE = "256x192"


def narrow(base: int, pyramid: int, hidden: int) -> list[str]:
    """Options that make mmdet's Faster R-CNN R50-FPN a small ResNet-18 one, trained from scratch."""
    values = {
        "model.backbone.depth": 18,
        "model.backbone.base_channels": base,
        "model.backbone.frozen_stages": -1,
        "model.backbone.norm_eval": False,
        "model.backbone.init_cfg": None,
        "model.neck.in_channels": [base, 2 * base, 4 * base, 8 * base],
        "model.neck.out_channels": pyramid,
        "model.rpn_head.in_channels": pyramid,
        "model.rpn_head.feat_channels": pyramid,
        "model.rpn_head.anchor_generator.scales": [4],
        "model.roi_head.bbox_roi_extractor.out_channels": pyramid,
        "model.roi_head.bbox_roi_extractor.finest_scale": 28,
        "model.roi_head.bbox_head.in_channels": pyramid,
        "model.roi_head.bbox_head.fc_out_channels": hidden,
        "model.train_cfg.rpn_proposal.nms_pre": 500,
        "model.train_cfg.rpn_proposal.max_per_img": 200,
        "model.train_cfg.rcnn.sampler.num": 128,
        "model.test_cfg.rpn.nms_pre": 500,
        "model.test_cfg.rpn.max_per_img": 200,
    }
    return [part for key, value in values.items() for part in ("-o", f"{key}={value}")]


def run(arguments: Sequence[str], log: Path) -> float:
    """Run kdpipe with its output in a file; returns the seconds it took."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("a") as output:
        code = subprocess.run(
            [sys.executable, "-m", "kdpipe.pipelines.cli", *arguments], stdout=output, stderr=subprocess.STDOUT
        ).returncode
    if code:
        raise click.ClickException(f"kdpipe {arguments[0]} failed:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - start


def train(arguments: Sequence[str], work_dir: Path, epochs: int) -> None:
    """Train where that is not done yet; AP is measured after the last epoch only."""
    if (work_dir / "result.json").exists():
        return
    resume = ["--resume"] if (work_dir / "last_checkpoint").exists() else []
    schedule = ["--epochs", str(epochs), "--batch-size", "8", "--lr", "0.02", "-o", f"train_cfg.val_interval={epochs}"]
    run([*arguments, *schedule, "--work-dir", str(work_dir), *resume], work_dir.with_suffix(".log"))


def train_teacher(data: Path, out: Path) -> None:
    images = str(data / "JPEGImages")
    places = ["--ann-file", str(data / "train.json"), "--img-dir", images, "--val-ann-file", str(data / "test.json")]
    arguments = ["train-teacher", "--config", "faster-rcnn_r50_fpn_1x_coco", *places, "--scale", SCALE]
    train([*arguments, *narrow(64, 128, 512)], out / "teacher", 24)


def cache(data: Path, out: Path) -> None:
    if (out / "cache.json").exists():
        return
    path = out / "bccd.zarr"
    places = ["--ann-file", str(data / "train.json"), "--img-dir", str(data / "JPEGImages")]
    arguments = ["cache-teacher", "--ckpt", str(out / "teacher" / "teacher.pth"), *places, "--scale", SCALE]
    seconds = run([*arguments, "--proposals", "200", "--out", str(path)], out / "cache.log")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    (out / "cache.json").write_text(json.dumps({"bytes": size, "seconds": seconds}))


def student_dir(out: Path, methods: str, rois: str, seed: int) -> Path:
    return out / f"{methods.replace(',', '-')}{'_student-rois' * (rois == 'student' and methods != 'none')}_seed{seed}"


def train_student(data: Path, out: Path, methods: str, rois: str, seed: int) -> None:
    arguments = ["train-student", "--cache", str(out / "bccd.zarr"), "--methods", methods, "--seed", str(seed)]
    if methods != "none":
        arguments += ["--rois", rois]
    places = ["--val-ann-file", str(data / "test.json"), "--val-img-dir", str(data / "JPEGImages")]
    distill = ["-o", "distill.rois.num=96", "-o", "distill.ckd.queue_size=8192"]
    train([*arguments, *places, *narrow(16, 64, 256), *distill], student_dir(out, methods, rois, seed), 12)


def table(out: Path, rois: str, seeds: int) -> str:
    """What is known so far, as Markdown."""
    teacher = json.loads((out / "teacher" / "result.json").read_text())
    cached = json.loads((out / "cache.json").read_text())
    lines = [
        f"Teacher: AP {teacher['ap']:.3f}, {teacher['seconds_per_step']:.2f} s per step. "
        f"Cache: {cached['bytes'] / 2**20:.1f} MiB in {cached['seconds']:.0f} s (start of the program included).",
        "",
        "| methods | AP, mean | lowest to highest | seeds | gain | s per step | x plain |",
        "|---|---|---|---|---|---|---|",
    ]
    plain: tuple[float, float] | None = None
    for methods in METHODS:
        files = [student_dir(out, methods, rois, seed) / "result.json" for seed in range(seeds)]
        results = [json.loads(file.read_text()) for file in files if file.exists()]
        if not results:
            continue
        aps = [result["ap"] for result in results]
        mean, step = statistics.mean(aps), statistics.median(result["seconds_per_step"] for result in results)
        plain = plain or (mean, step)
        lines.append(
            f"| {methods} | {mean:.3f} | {min(aps):.3f} to {max(aps):.3f} | {len(aps)} | {mean - plain[0]:+.3f} "
            f"| {step:.2f} | {step / plain[1]:.2f} |"
        )
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), default=Path("../shared/data/bccd"))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", type=int, default=3, show_default=True)
@click.option(
    "--jobs", type=int, default=1, show_default=True, help="Students at once; the cores are shared among them."
)
@click.option(
    "--rois",
    type=click.Choice(["teacher", "student"]),
    default="teacher",
    show_default=True,
    help="As train-student's.",
)
def main(data: Path, out: Path, seeds: int, jobs: int, rois: str) -> None:
    """Train the teacher, cache it, train all students, print the table."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    train_teacher(data, out)
    cache(data, out)

    def student(choice: tuple[int, str]) -> None:
        train_student(data, out, choice[1], rois, choice[0])
        (out / "table.md").write_text(table(out, rois, seeds))
        click.echo(table(out, rois, seeds))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(student, [(seed, methods) for seed in range(seeds) for methods in METHODS]))


if __name__ == "__main__":
    main()
