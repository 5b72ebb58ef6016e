"""What distillation from a cache gains on real photographs: one command per question trains everything, in pairs.

    python tests/benchmarks/bccd.py --out /tmp/bccd --study dense --seeds 6
    python tests/benchmarks/bccd.py --out /tmp/bccd --study dense --seeds 6 --test
    python tests/benchmarks/bccd.py --out /tmp/bccd --study dense --seeds 4 --data-set cards

Per data set teachers from scratch at 256 x 192 and their caches, made once; from these, by `kdpipe compare`, students
of a quarter of the width at 192 x 144, one per row of the study and seed. Of a seed, all begin with the same weights
and see the same images in the same order and views, so that what a row gains is a mean over pairs.

Arms are chosen by AP on the photographs for validation (bccd has some); `--test` measures on the others what is
trained already, and trains nothing. Started again, a command goes on from where it was stopped. Its table is written
to `DATASET/STUDY.md` in the output folder. Seconds per step mean something only with `--jobs 1` on an idle machine.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from bccd_models import (  # type: ignore[import-not-found]
    CASCADE,
    FASTER,
    FCOS,
    RETINANET,
    fcos,
    options,
    retinanet,
    two_stage,
)

from kdpipe.pipelines.compare.cells import methods_folder
from kdpipe.pipelines.compare.statistics import paired_gain

KDPIPE = (sys.executable, "-m", "kdpipe.pipelines.cli")
ROIS = 64
ALL = "sgfi,ckd,pred"
# Of a teacher whose head is class-agnostic, as that of mmdet's cascades.
ALL_AGNOSTIC = "sgfi,ckd,cls,reg"


@dataclass(frozen=True)
class DataSet:
    """Photographs, and what suits the objects in them.

    Attributes:
        images: Their folder.
        validation: Annotations of the photographs that arms are chosen by.
        rpn_scale, dense_scale: Side of the anchors of an RPN, and of RetinaNet, in strides.
        teacher: Channels of backbone and pyramid, width of the box head.
    """

    images: str
    validation: str
    rpn_scale: int
    dense_scale: int
    teacher: tuple[int, int, int]

    def two_stage(self, *sizes: int) -> list[str]:
        found: list[str] = two_stage(*sizes, anchor_scale=self.rpn_scale, rois=ROIS)
        return found


DATA = {
    "bccd": DataSet("JPEGImages", "val.json", 4, 2, (64, 128, 512)),
    "cards": DataSet("images", "test.json", 8, 4, (32, 128, 256)),
}
# teacher -> its config, stages of a cascade, its widths where they are others
TEACHERS: dict[str, tuple[str, int, tuple[int, int, int] | None]] = {
    "teacher": (FASTER, 0, None),
    "cascade-teacher": (CASCADE, 3, None),
    "equal-teacher": (FASTER, 0, (16, 64, 256)),
}
OBJECTS = ("--targets", "objects", "--dtype", "int8")
# cache -> its teacher, and options of `cache-teacher`
CACHES = {
    "pyramid": ("teacher", ["--dtype", "int8", "--proposals", "256"]),
    "pyramid-int4": ("teacher", ["--dtype", "int4", "--proposals", "256"]),
    "objects": ("teacher", [*OBJECTS, "--views", "identity"]),
    "objects-both-views": ("teacher", [*OBJECTS, "--views", "identity,hflip"]),
    "cascade": ("cascade-teacher", ["--dtype", "int4", "--proposals", "256"]),
    "equal": ("equal-teacher", [*OBJECTS, "--views", "identity,hflip"]),
}
# What was tried with `ckd`.
CKD: dict[str, dict[str, Any]] = {
    "ckd": {},
    "nonlinear": {"ckd.projection": "nonlinear"},
    "queue-of-one-step": {"ckd.queue_size": 512},
}
# Weights at which the distillation losses have equal shares of the gradient at the pyramid (the teacher's RoIs, bccd).
EQUAL_SHARES = {
    "two-stage": {"weights.sgfi": 3.1, "weights.ckd": 0.41, "weights.careg": 1.3, "weights.cls": 2.2},
    "fcos": {"weights.sgfi": 3.2, "weights.ckd": 0.39, "weights.cls": 7.2},
}


@dataclass(frozen=True)
class Row:
    """Students of a study that differ in their losses only.

    Attributes:
        name: Of the row.
        methods: As `--methods` has them, each of which is trained.
        student: Its config, and options of the command line that make it small.
        cache: The teacher's.
        rois: Who chooses the RoIs.
        distill: Options of the distillation.
        lr: Peak rate.
        baseline: Row with the student without distillation, where it is not this one.
    """

    name: str
    methods: Sequence[str]
    student: tuple[str, Sequence[str]]
    cache: str = "objects-both-views"
    rois: str = "teacher"
    distill: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 0.02
    baseline: str | None = None

    def toml(self, folder: Path) -> str:
        """The row, as `kdpipe compare --grid` has it."""
        config, overrides = self.student
        distill = {"rois.num": ROIS, **self.distill} if self.rois == "teacher" else self.distill
        values: dict[str, Any] = {
            "student": config,
            "methods": list(self.methods),
            "cache": str(folder / f"{self.cache}.zarr"),
            "rois": self.rois,
            "lr": self.lr,
            "cfg-options": [*overrides, *options({f"distill.{key}": value for key, value in distill.items()})][1::2],
        }
        if self.baseline is not None:
            values["baseline"] = self.baseline
        return f"[rows.{self.name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


@dataclass(frozen=True)
class Study:
    """A question, as rows.

    Attributes:
        epochs: Of each student.
        rows: What is trained.
        differences: Pairs of rows (`name, methods`) of which the difference answers it, beside the gain over `none`.
    """

    epochs: int
    rows: Sequence[Row]
    differences: Sequence[tuple[str, str]] = ()


def studies(data_set: DataSet, folder: Path) -> dict[str, Study]:
    """All questions.

    Args:
        data_set: Of which photographs.
        folder: Where its caches lie.
    """
    small = FASTER, data_set.two_stage(16, 64, 256)
    wide = FASTER, data_set.two_stage(16, 128, 512)
    cascade = CASCADE, data_set.two_stage(16, 64, 256, 3)
    alone = ("sgfi", "ckd", "pred")
    two_stage_methods = [*alone, ALL, f"{ALL},cross", f"{ALL},box"]
    dense_methods = ["none", *alone, ALL, f"{ALL},cross", "sgfi,cross"]
    anchors = str(folder / "retinanet.py"), retinanet(16, 64, data_set.dense_scale)
    points_only = FCOS, fcos(16, 64)
    dense = [
        Row("retinanet", dense_methods, anchors),
        Row("fcos", dense_methods, points_only, lr=0.01),
        Row("fcos-high-rate", dense_methods, points_only),
    ]
    plain = Row("plain", ["none"], small)
    pyramid: dict[str, Any] = {"cache": "pyramid-int4", "rois": "student", "baseline": "plain"}
    masks = ("whole", "gt-mask", "anchor-mask", "gaussian-mask", "roifi", "sgfi")
    return {
        "two-stage": Study(
            12,
            [
                plain,
                Row("teacher-rois", two_stage_methods, small, baseline="plain"),
                Row("student-rois", two_stage_methods, small, **pyramid),
            ],
            [("teacher-rois, " + ALL, "student-rois, " + ALL)],
        ),
        "dense": Study(36, dense),
        "dense-12-epochs": Study(12, dense),
        "masks": Study(
            12,
            [plain, Row("pyramid", masks, small, cache="pyramid-int4", baseline="plain")],
            [("pyramid, sgfi", f"pyramid, {name}") for name in masks if name != "sgfi"],
        ),
        "rois": Study(
            12,
            [
                plain,
                Row("teacher-rois", [ALL, "hard"], small, cache="pyramid-int4", baseline="plain"),
                Row("four-times", [ALL], small, "pyramid-int4", distill={"rois.num": 4 * ROIS}, baseline="plain"),
                Row("student-rois", [ALL], small, **pyramid),
            ],
            [(f"{name}, {ALL}", f"student-rois, {ALL}") for name in ("teacher-rois", "four-times")],
        ),
        "boxes": Study(
            12,
            [plain, Row("teacher-rois", ["cls", "cls,reg", "cls,careg", "cls,box"], small, baseline="plain")],
            [("teacher-rois, cls,careg", "teacher-rois, cls,reg")],
        ),
        "tiers": Study(
            12,
            [
                plain,
                Row("pyramid-student-rois", [ALL], small, "pyramid", "student", baseline="plain"),
                Row("pyramid-int4-student-rois", [ALL], small, **pyramid),
                Row("pyramid-teacher-rois", [ALL], small, "pyramid", baseline="plain"),
                Row("objects", [ALL, "ckd"], small, "objects", baseline="plain"),
                Row("objects-both-views", [ALL, "ckd"], small, baseline="plain"),
            ],
            [
                (f"pyramid-int4-student-rois, {ALL}", f"pyramid-student-rois, {ALL}"),
                (f"objects, {ALL}", f"pyramid-student-rois, {ALL}"),
                (f"objects, {ALL}", f"pyramid-teacher-rois, {ALL}"),
                *((f"objects-both-views, {each}", f"objects, {each}") for each in (ALL, "ckd")),
            ],
        ),
        "contrast": Study(
            12, [plain, *(Row(name, ["ckd"], small, distill=each, baseline="plain") for name, each in CKD.items())]
        ),
        "contrast-dense": Study(
            12,
            [
                Row("plain", ["none"], anchors),
                *(Row(name, ["ckd", ALL], anchors, distill=each, baseline="plain") for name, each in CKD.items()),
            ],
        ),
        "balance": Study(
            12,
            [
                plain,
                Row("as-it-is", [ALL], small, baseline="plain"),
                Row("equal-shares", [ALL], small, distill=EQUAL_SHARES["two-stage"], baseline="plain"),
            ],
            [(f"equal-shares, {ALL}", f"as-it-is, {ALL}")],
        ),
        "balance-dense": Study(
            36,
            [
                Row("as-it-is", ["none", ALL], points_only, lr=0.01),
                Row("equal-shares", [ALL], points_only, distill=EQUAL_SHARES["fcos"], lr=0.01, baseline="as-it-is"),
            ],
            [(f"equal-shares, {ALL}", f"as-it-is, {ALL}")],
        ),
        "head-transfer": Study(
            12,
            [
                Row(
                    "wide",
                    ["none", "ht", "inherit", ALL, f"{ALL},ht", f"{ALL},inherit"],
                    wide,
                    **{**pyramid, "baseline": None},
                )
            ],
        ),
        "cascade": Study(
            12,
            [
                Row("cascade", ["none", ALL_AGNOSTIC], cascade, "cascade", "student"),
                Row(
                    "stagewise", [ALL_AGNOSTIC], cascade, "cascade", "student", {"stagewise": True}, baseline="cascade"
                ),
            ],
            [(f"stagewise, {ALL_AGNOSTIC}", f"cascade, {ALL_AGNOSTIC}")],
        ),
        "equal-teacher": Study(12, [plain, Row("equal", [ALL], small, "equal", baseline="plain")]),
    }


def run(arguments: Sequence[str], log: Path) -> None:
    """Run kdpipe with its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        code = subprocess.run([*KDPIPE, *arguments], stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        raise click.ClickException(f"kdpipe {arguments[0]} failed:\n{log.read_text()[-2000:]}")


def places(data: Path, data_set: DataSet, annotations: str) -> list[str]:
    return ["--ann-file", str(data / annotations), "--img-dir", str(data / data_set.images)]


def train_teacher(data: Path, data_set: DataSet, name: str, work_dir: Path) -> None:
    """Train a teacher where that is not done yet."""
    if (work_dir / "result.json").exists():
        return
    config, stages, widths = TEACHERS[name]
    model = two_stage(*(widths or data_set.teacher), stages, anchor_scale=data_set.rpn_scale)
    schedule = ["--recipe", "paper", "--epochs", "24", "--batch-size", "8", "--lr", "0.02", "--scale", "256x192"]
    where = [*places(data, data_set, "train.json"), "--val-ann-file", str(data / "test.json")]
    once = ["-o", "train_cfg.val_interval=24", "--work-dir", str(work_dir)]
    again = ["--resume"] if (work_dir / "last_checkpoint").exists() else []
    run(["train-teacher", "--config", config, *model, *schedule, *where, *once, *again], work_dir.with_suffix(".log"))


def prepare(data: Path, data_set: DataSet, folder: Path, caches: Sequence[str]) -> None:
    """Train the teachers of some caches, and make these."""
    for name in caches:
        teacher, arguments = CACHES[name]
        train_teacher(data, data_set, teacher, folder / teacher)
        record = folder / f"{name}.json"
        if not record.exists():
            where = ["--ckpt", str(folder / teacher / "teacher.pth"), *places(data, data_set, "train.json")]
            place = folder / f"{name}.zarr"
            run(
                ["cache-teacher", *where, *arguments, "--scale", "256x192", "--out", str(place)],
                place.with_suffix(".log"),
            )
            size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            record.write_text(json.dumps({"bytes": size}))


def grid(data: Path, data_set: DataSet, folder: Path, study: Study, rows: Sequence[Row]) -> str:
    """The rows of a study, as `kdpipe compare --grid` has them. AP is measured after the last epoch only."""
    images = str(data / data_set.images)
    values = {
        **{"recipe": "paper", "epochs": study.epochs, "batch-size": 8, "scale": "192x144", "workers": 0},
        **{"ann-file": str(data / "train.json"), "img-dir": images},
        **{"val-ann-file": str(data / data_set.validation), "val-img-dir": images},
        "cfg-options": [f"train_cfg.val_interval={study.epochs}"],
    }
    shared = "[options]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    return "\n".join([shared, *(row.toml(folder) for row in rows)])


def test_ap(data: Path, data_set: DataSet, student: Path) -> None:
    """Measure a finished student on the test photographs, once: `test.json` in its folder."""
    record = student / "test.json"
    if record.exists():
        return
    log = student / "test.log"
    log.unlink(missing_ok=True)
    where = places(data, data_set, "test.json")
    run(["evaluate", "--ckpt", str(student / "student.pth"), *where, "--scale", "192x144"], log)
    match = re.search(r"[01]\.\d{3}", log.read_text())
    if match is None:
        raise click.ClickException(f"{log} holds no AP.")
    record.write_text(json.dumps({"ap": float(match.group())}))


def measured(folder: Path, study: Study, record: str) -> dict[str, dict[int, float]]:
    """AP by seed of each row (`name, methods`) of a study, from the files of that name in the folders of students."""
    return {
        f"{row.name}, {methods}": {
            int(file.parent.name.removeprefix("seed-")): json.loads(file.read_text())["ap"]
            for file in sorted((folder / row.name / methods_folder(methods)).glob(f"seed-*/{record}"))
        }
        for row in study.rows
        for methods in row.methods
    }


def points(aps: Mapping[int, float], beside: Mapping[int, float]) -> str:
    """Mean difference of the seeds that both have, in points, with its 95 % interval."""
    gain = paired_gain(aps, beside)
    if gain is None:
        return ""
    if gain.interval is None:
        return f"{100 * gain.mean:+.1f}"
    return f"{100 * gain.mean:+.1f} ({100 * gain.interval[0]:+.1f} to {100 * gain.interval[1]:+.1f})"


def table(study: Study, aps: Mapping[str, Mapping[int, float]]) -> str:
    """AP by seed of each row (`name, methods`), and what they gain, as Markdown."""
    lines = ["| student, losses | AP | of each seed | points over none, 95 % |", "|---|---|---|---|"]
    for row in study.rows:
        for methods in row.methods:
            name = f"{row.name}, {methods}"
            if values := aps[name]:
                gain = "" if methods == "none" else points(values, aps[f"{row.baseline or row.name}, none"])
                every = ", ".join(f"{values[seed]:.3f}" for seed in sorted(values))
                lines.append(f"| {name} | {statistics.fmean(values.values()):.3f} | {every} | {gain} |")
    differences = [
        f"- {one} less {other}: {points(aps[one], aps[other])}"
        for one, other in study.differences
        if aps[one] and aps[other]
    ]
    return "\n".join([*lines, *([""] if differences else []), *differences]) + "\n"


def asked_for(rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    """The rows that are named, whole or as `name, methods`, and what these gain over."""
    if not only:
        return list(rows)
    asked = {row.name: [x for x in row.methods if {row.name, f"{row.name}, {x}"} & set(only)] for row in rows}
    baselines = {row.baseline or row.name for row in rows if asked[row.name]}
    found = [
        replace(
            row, methods=[x for x in row.methods if x in asked[row.name] or (x == "none" and row.name in baselines)]
        )
        for row in rows
    ]
    return [row for row in found if row.methods]


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), default=Path("../shared/data"))
@click.option("--data-set", "name", type=click.Choice(list(DATA)), default="bccd", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--study", "question", type=click.Choice(list(studies(DATA["bccd"], Path()))), required=True)
@click.option("--only", multiple=True, help='Only this row, or "row, methods", and what it gains over.')
@click.option("--seeds", type=int, default=6, show_default=True)
@click.option("--jobs", type=int, default=2, show_default=True, help="Students at once, with one thread each.")
@click.option("--test", is_flag=True, help="Measure on the test photographs what is trained, and train nothing.")
def main(
    data: Path, name: str, out: Path, question: str, only: Sequence[str], seeds: int, jobs: int, test: bool
) -> None:
    """Train teachers, cache them, train all students of a study, print its table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    data_set, folder, data = DATA[name], out.resolve() / name, data.resolve() / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "retinanet.py").write_text(RETINANET)
    study = studies(data_set, folder)[question]
    rows = asked_for(study.rows, only)
    work, code = folder / question, 0
    if test:
        for row in rows:
            for methods in row.methods:
                for result in sorted((work / row.name / methods_folder(methods)).glob("seed-*/result.json")):
                    test_ap(data, data_set, result.parent)
    else:
        prepare(data, data_set, folder, list(dict.fromkeys(row.cache for row in rows)))
        (folder / f"{question}.toml").write_text(grid(data, data_set, folder, study, rows))
        command = ["compare", "--grid", str(folder / f"{question}.toml"), "--work-dir", str(work)]
        code = subprocess.run([*KDPIPE, *command, "--seeds", str(seeds), "--jobs", str(jobs)]).returncode
    text = table(study, measured(work, study, "test.json" if test else "result.json"))
    (folder / f"{question}{'.test' if test else ''}.md").write_text(text)
    click.echo(text)
    sys.exit(code)


if __name__ == "__main__":
    main()
