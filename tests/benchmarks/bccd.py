"""Does distillation from a cache help on real images? One command trains everything and prints a table.

    python tests/benchmarks/bccd.py --data path/to/bccd --out /tmp/bccd --study methods

A ResNet-18 teacher and students of a quarter of its width, from scratch, at 256 x 192, on the photographs of bccd: one
teacher, its cache, and from that cache one student per row of the study and seed. Everything goes through the command
line of kdpipe. Started again, it goes on from where it was stopped; the table is printed after every run, and written
to `STUDY.md` in the output folder. Seconds per step mean something only with `--jobs 1` on an idle machine.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

SCALE = "256x192"
ALL = "sgfi,ckd,pred"
# Of a teacher whose head is class-agnostic, as that of mmdet's cascades.
ALL_AGNOSTIC = "sgfi,ckd,cls,reg"
FASTER, CASCADE = "faster-rcnn_r50_fpn_1x_coco", "cascade-rcnn_r50_fpn_1x_coco"
FCOS = "fcos_r50-caffe_fpn_gn-head_1x_coco"
# From scratch, nothing arrives through RetinaNet's narrow head without normalisation: it gets that of FCOS.
RETINANET = """_base_ = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
model = dict(bbox_head=dict(norm_cfg=dict(type="GN", num_groups=32, requires_grad=True)))
"""


def options(values: Mapping[str, Any]) -> list[str]:
    """Overrides of a config, for the command line."""
    return [part for key, value in values.items() for part in ("-o", f"{key}={value}")]


def backbone(base: int, pyramid: int) -> dict[str, Any]:
    """A ResNet-18 of that width, from scratch, and its pyramid."""
    return {
        "model.backbone.depth": 18,
        "model.backbone.base_channels": base,
        "model.backbone.frozen_stages": -1,
        "model.backbone.norm_cfg.requires_grad": True,
        "model.backbone.norm_eval": False,
        "model.backbone.init_cfg": None,
        "model.neck.in_channels": [base, 2 * base, 4 * base, 8 * base],
        "model.neck.out_channels": pyramid,
    }


def two_stage(base: int, pyramid: int, hidden: int, stages: int = 0) -> list[str]:
    """Options that make mmdet's Faster R-CNN, or Cascade R-CNN of so many stages, a small one."""
    heads = [f"bbox_head.{stage}" for stage in range(stages)] or ["bbox_head"]
    samplers = [f"rcnn.{stage}.sampler" for stage in range(stages)] or ["rcnn.sampler"]
    values = {
        **backbone(base, pyramid),
        "model.rpn_head.in_channels": pyramid,
        "model.rpn_head.feat_channels": pyramid,
        "model.rpn_head.anchor_generator.scales": [4],
        "model.roi_head.bbox_roi_extractor.out_channels": pyramid,
        "model.roi_head.bbox_roi_extractor.finest_scale": 28,
        **{f"model.roi_head.{head}.in_channels": pyramid for head in heads},
        **{f"model.roi_head.{head}.fc_out_channels": hidden for head in heads},
        "model.train_cfg.rpn_proposal.nms_pre": 500,
        "model.train_cfg.rpn_proposal.max_per_img": 200,
        **{f"model.train_cfg.{sampler}.num": 128 for sampler in samplers},
        "model.test_cfg.rpn.nms_pre": 500,
        "model.test_cfg.rpn.max_per_img": 200,
    }
    return options(values)


def one_stage(name: str, base: int, pyramid: int) -> list[str]:
    """Options that make mmdet's RetinaNet or FCOS a small one."""
    values = {
        **backbone(base, pyramid),
        "model.bbox_head.in_channels": pyramid,
        "model.bbox_head.feat_channels": pyramid,
    }
    if name == "retinanet":
        values["model.bbox_head.anchor_generator.octave_base_scale"] = 2
    return options(values)


@dataclass(frozen=True)
class Student:
    """One row of a table: what the command line says of a student besides data, schedule and seed."""

    name: str
    arguments: Sequence[str]
    teacher: str = "teacher"
    targets: Sequence[str] = ("--cache", "bccd.zarr")
    epochs: int = 12


def faster(name: str, methods: str, *arguments: str, targets: Sequence[str] = ("--cache", "bccd.zarr")) -> Student:
    return Student(name, ["--methods", methods, *two_stage(16, 64, 256), *arguments], targets=targets)


def studies(out: Path) -> dict[str, list[Student]]:
    plain = faster("none", "none")
    cached, online = ["--rois", "teacher", "-o", "distill.rois.num=96"], ["--teacher-ckpt", "teacher/teacher.pth"]
    paired = ["--rois", "teacher", "-o", "distill.rois.num=128"]
    both_views = ["--cache", "both-views.zarr"]
    mine = ["--rois", "student"]
    wide = two_stage(16, 128, 512)
    three = ["--student", CASCADE, *two_stage(16, 64, 256, 3)]
    cascade = ["--cache", "cascade.zarr"]
    return {
        "methods": [plain, *(faster(methods, methods, *cached) for methods in ("sgfi", "ckd", "pred", ALL))],
        "rois": [
            plain,
            *(faster(f"{methods} student-rois", methods, *mine) for methods in ("sgfi", "ckd", "pred", ALL)),
            faster(f"{ALL} online", ALL, *mine, targets=online),
        ],
        "views": [
            plain,
            faster(f"{ALL} student-rois", ALL, *mine),
            faster(f"{ALL} exact", ALL, *mine, targets=both_views),
            faster(f"{ALL} skipped", ALL, *mine, "--missing-view", "skip"),
        ],
        "ht": [
            Student("none wide", ["--methods", "none", *wide]),
            Student("ht wide", ["--methods", "ht", *wide]),
            Student(f"{ALL} wide", ["--methods", ALL, *mine, *wide]),
            Student(f"{ALL},ht wide", ["--methods", f"{ALL},ht", *mine, *wide]),
        ],
        "cascade": [
            Student("none cascade", ["--methods", "none", *three], "cascade-teacher", cascade),
            Student(f"{ALL_AGNOSTIC} cascade", ["--methods", ALL_AGNOSTIC, *mine, *three], "cascade-teacher", cascade),
            Student(
                f"{ALL_AGNOSTIC} cascade online",
                ["--methods", ALL_AGNOSTIC, *mine, *three],
                "cascade-teacher",
                ["--teacher-ckpt", "cascade-teacher/teacher.pth"],
            ),
        ],
        "dense": [
            Student(
                f"{methods} {name}",
                ["--student", config, "--methods", methods, *one_stage(name, 16, 64), *extra],
                epochs=36,
            )
            for name, config in (("retinanet", str(out / "retinanet.py")), ("fcos", FCOS))
            for methods, extra in (("none", []), *((kd, paired) for kd in ("sgfi", "ckd", "pred", "sgfi,ckd")))
        ],
    }


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
    schedule = ["--recipe", "paper", "--epochs", str(epochs), "--batch-size", "8", "--lr", "0.02"]
    places = ["-o", f"train_cfg.val_interval={epochs}", "--work-dir", str(work_dir)]
    run([*arguments, *schedule, *places, *resume], work_dir.with_suffix(".log"))


def train_teacher(data: Path, out: Path, name: str) -> None:
    images = str(data / "JPEGImages")
    places = ["--ann-file", str(data / "train.json"), "--img-dir", images, "--val-ann-file", str(data / "test.json")]
    model = ["--config", CASCADE, *two_stage(64, 128, 512, 3)] if name == "cascade-teacher" else None
    model = model or ["--config", FASTER, *two_stage(64, 128, 512)]
    train(["train-teacher", *model, *places, "--scale", SCALE], out / name, 24)


def cache(data: Path, out: Path, teacher: str, name: str) -> None:
    record = out / f"{name}.json"
    if record.exists():
        return
    places = ["--ann-file", str(data / "train.json"), "--img-dir", str(data / "JPEGImages")]
    views = ["--views", "identity,hflip"] if name == "both-views.zarr" else []
    arguments = ["cache-teacher", "--ckpt", str(out / teacher / "teacher.pth"), *places, "--scale", SCALE, *views]
    seconds = run([*arguments, "--proposals", "200", "--out", str(out / name)], out / f"{name}.log")
    size = sum(file.stat().st_size for file in (out / name).rglob("*") if file.is_file())
    record.write_text(json.dumps({"bytes": size, "seconds": seconds}))


def student_dir(out: Path, student: Student, seed: int) -> Path:
    return out / f"{student.name.replace(',', '-').replace(' ', '_')}_seed{seed}"


def train_student(data: Path, out: Path, student: Student, seed: int) -> None:
    kind, path = student.targets
    places = ["--ann-file", str(data / "train.json"), "--img-dir", str(data / "JPEGImages")]
    if kind == "--teacher-ckpt":
        places += ["--scale", SCALE]
    places += ["--val-ann-file", str(data / "test.json"), "--val-img-dir", str(data / "JPEGImages")]
    arguments = [*student.arguments, kind, str(out / path), "--seed", str(seed), "-o", "distill.ckd.queue_size=8192"]
    train(["train-student", *arguments, *places], student_dir(out, student, seed), student.epochs)


def table(out: Path, students: Iterable[Student], seeds: int) -> str:
    """What is known so far, as Markdown. The gain is over the last row whose student was not distilled."""
    lines = []
    for record in sorted(out.glob("*.zarr.json")):
        cached = json.loads(record.read_text())
        lines += [f"{record.stem}: {cached['bytes'] / 2**20:.1f} MiB in {cached['seconds']:.0f} s, start included."]
    for result in sorted(out.glob("*teacher/result.json")):
        lines += [f"{result.parent.name}: AP {json.loads(result.read_text())['ap']:.3f}."]
    lines += [
        "",
        "| student | AP, mean | lowest to highest | seeds | gain | s per step | x plain | peak memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain: tuple[float, float] | None = None
    for student in students:
        files = [student_dir(out, student, seed) / "result.json" for seed in range(seeds)]
        results = [json.loads(file.read_text()) for file in files if file.exists()]
        if not results:
            continue
        aps = [result["ap"] for result in results]
        mean, step = statistics.mean(aps), statistics.median(result["seconds_per_step"] for result in results)
        memory = statistics.median(result["peak_memory"] for result in results) / 2**20
        if plain is None or student.name.startswith("none"):
            plain = mean, step
        lines.append(
            f"| {student.name} | {mean:.3f} | {min(aps):.3f} to {max(aps):.3f} | {len(aps)} | {mean - plain[0]:+.3f} "
            f"| {step:.2f} | {step / plain[1]:.2f} | {memory:.0f} |"
        )
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), default=Path("../shared/data/bccd"))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--study", type=click.Choice(list(studies(Path()))), default="methods", show_default=True)
@click.option("--only", help="Only students whose name holds this.", default="")
@click.option("--seeds", type=int, default=3, show_default=True)
@click.option(
    "--jobs", type=int, default=1, show_default=True, help="Students at once; the cores are shared among them."
)
def main(data: Path, out: Path, study: str, only: str, seeds: int, jobs: int) -> None:
    """Train the teacher, cache it, train all students of a study, print its table."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    out.mkdir(parents=True, exist_ok=True)
    (out / "retinanet.py").write_text(RETINANET)
    students = [student for student in studies(out)[study] if only in student.name]
    for teacher in dict.fromkeys(student.teacher for student in students):
        train_teacher(data, out, teacher)
    for student in students:
        if student.targets[0] == "--cache":
            cache(data, out, student.teacher, student.targets[1])

    def one(job: tuple[int, Student]) -> None:
        train_student(data, out, job[1], job[0])
        (out / f"{study}.md").write_text(table(out, students, seeds))
        click.echo(table(out, students, seeds))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, [(seed, student) for seed in range(seeds) for student in students]))


if __name__ == "__main__":
    main()
