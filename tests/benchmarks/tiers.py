"""Which tier, storage type and views teach best? Paired seeds on two data sets, many small objects and few large ones.

    python tests/benchmarks/tiers.py --data ../shared/data --out /tmp/tiers --seeds 4

Per data set (bccd, cards) one teacher from scratch at 256 x 192, its caches, and students at 192 x 144 with all losses,
which of a seed begin with the same weights. Everything goes through the command line of kdpipe. Started again, it goes
on from where it was stopped; the table is printed after every run, and written to `tiers.md` in the output folder.
"""

import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import bccd  # type: ignore[import-not-found]
import click


@dataclass(frozen=True)
class Photographs:
    """A data set, and what its teacher and students are."""

    images: str
    anchor_scale: int
    teacher: tuple[int, int, int]
    epochs: int

    def model(self, *widths: int) -> list[str]:
        scales = f"scales=[{self.anchor_scale}]"
        return [part.replace("scales=[4]", scales) for part in bccd.two_stage(*widths)]


DATA = {
    "bccd": Photographs("JPEGImages", 4, (64, 128, 512), 10),
    "cards": Photographs("images", 8, (32, 128, 256), 8),
}
ROIS = "64"
CACHES = {
    "pyramid": ["--dtype", "int8"],
    "pyramid-int4": ["--dtype", "int4"],
    "objects": ["--targets", "objects", "--dtype", "int8", "--views", "identity"],
    "objects-both-views": ["--targets", "objects", "--dtype", "int8", "--views", "identity,hflip"],
}


@dataclass(frozen=True)
class Student:
    """What a student is trained with, and the row that it is compared with."""

    cache: str
    rois: str
    beside: str = ""
    methods: str = bccd.ALL


STUDENTS = {
    "pyramid, student's RoIs": Student("pyramid", "student"),
    "pyramid int4, student's RoIs": Student("pyramid-int4", "student", "pyramid, student's RoIs"),
    "pyramid, teacher's RoIs": Student("pyramid", "teacher", "pyramid, student's RoIs"),
    "objects": Student("objects", "teacher", "pyramid, student's RoIs"),
    "objects, both views": Student("objects-both-views", "teacher", "objects"),
    "objects, ckd alone": Student("objects", "teacher", methods="ckd"),
    "objects, both views, ckd alone": Student("objects-both-views", "teacher", "objects, ckd alone", "ckd"),
}


def places(data: Path, name: str) -> list[str]:
    return ["--ann-file", str(data / name / "train.json"), "--img-dir", str(data / name / DATA[name].images)]


def prepare(data: Path, out: Path, name: str, caches: set[str]) -> None:
    """Train the teacher of a data set, and cache it."""
    dataset = DATA[name]
    teacher = ["train-teacher", "--config", bccd.FASTER, *dataset.model(*dataset.teacher)]
    where = [*places(data, name), "--val-ann-file", str(data / name / "test.json")]
    bccd.train([*teacher, *where, "--scale", "256x192"], out / name / "teacher", 24)
    for cache in sorted(caches):
        record = out / name / f"{cache}.json"
        if not record.exists():
            arguments = ["cache-teacher", "--ckpt", str(out / name / "teacher" / "teacher.pth"), "--scale", "256x192"]
            place = out / name / f"{cache}.zarr"
            proposals = [] if cache.startswith("objects") else ["--proposals", "256"]
            arguments += [*places(data, name), *CACHES[cache], *proposals, "--out", str(place)]
            bccd.run(arguments, record.with_suffix(".log"))
            size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
            record.write_text(json.dumps({"bytes": size}))


def work_dir(out: Path, name: str, student: str, seed: int) -> Path:
    name_part = "".join(character for character in student if character.isalnum() or character == " ")
    return out / name / f"{name_part.replace(' ', '-')}_seed{seed}"


def train_student(data: Path, out: Path, name: str, student: str, seed: int) -> None:
    row = STUDENTS[student]
    model = [x.replace("sampler.num=128", f"sampler.num={ROIS}") for x in DATA[name].model(16, 64, 256)]
    arguments = ["train-student", "--methods", row.methods, "--rois", row.rois, *model, *places(data, name)]
    arguments += ["--val-ann-file", str(data / name / "test.json")]
    arguments += ["--cache", str(out / name / f"{row.cache}.zarr"), "--scale", "192x144", "--seed", str(seed)]
    arguments += ["-o", "distill.ckd.queue_size=8192", "--workers", "0"]
    arguments += ["-o", f"distill.rois.num={ROIS}"] if row.rois == "teacher" else []
    bccd.train(arguments, work_dir(out, name, student, seed), DATA[name].epochs)


def results(out: Path, name: str, student: str, seeds: int) -> dict[int, float]:
    """AP of each seed that is done."""
    files = {seed: work_dir(out, name, student, seed) / "result.json" for seed in range(seeds)}
    return {seed: json.loads(file.read_text())["ap"] for seed, file in files.items() if file.exists()}


def table(out: Path, seeds: int) -> str:
    """What is known so far, as Markdown; differences are of the same seeds, in points, with their standard error."""
    lines = ["| data | student | AP of each seed | mean | minus | points |", "|---|---|---|---|---|---|"]
    for name in DATA:
        for student, row in STUDENTS.items():
            other = row.beside
            row_results, beside = results(out, name, student, seeds), results(out, name, other, seeds) if other else {}
            if not row_results:
                continue
            points = [100 * (row_results[seed] - beside[seed]) for seed in row_results if seed in beside]
            change = f"{statistics.mean(points):+.2f}" if points else ""
            if len(points) > 1:
                change += f" ± {statistics.stdev(points) / len(points) ** 0.5:.2f}"
            every = ", ".join(f"{ap:.3f}" for ap in row_results.values())
            lines.append(
                f"| {name} | {student} | {every} | {statistics.mean(row_results.values()):.3f} | {other} | {change} |"
            )
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), default=Path("../shared/data"))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option(
    "--data-set", "names", type=click.Choice(list(DATA)), multiple=True, default=list(DATA), show_default=True
)
@click.option("--only", help="Only students whose name holds this.", default="")
@click.option("--seeds", type=int, default=4, show_default=True)
def main(data: Path, out: Path, names: tuple[str, ...], only: str, seeds: int) -> None:
    """Train the teachers, cache them, train all students, print the table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    students = [student for student in STUDENTS if only in student]
    for name in names:
        (out / name).mkdir(parents=True, exist_ok=True)
        prepare(data, out, name, {STUDENTS[student].cache for student in students})
    for seed in range(seeds):
        for name in names:
            for student in students:
                train_student(data, out, name, student, seed)
                (out / "tiers.md").write_text(table(out, seeds))
                click.echo(table(out, seeds))


if __name__ == "__main__":
    main()
