"""Does `ckd` teach, and which of its options help? Paired seeds of three kinds of students on bccd, from one cache.

    python tests/benchmarks/contrast.py --out /tmp/contrast --cache /tmp/tiers/bccd/objects.zarr --seeds 6
    python tests/benchmarks/contrast.py --out /tmp/contrast --cache ... --only "fcos, centre" --test

Arms are chosen by AP on the images for validation (trainval.json without train.json); `--test` measures those of
`--only` on test.json, once, when they are chosen. Of a seed, all arms begin with the same weights, and see the same
images in the same order and views. Differences are in points of AP between an arm and the row that it is compared
with, with their 95 % interval (Student's t). `top1` and `spread` are means of the last epoch's `ckd_top1` and
`ckd_spread`. Everything goes through the command line of kdpipe. Started again, it goes on from where it was stopped;
the table is printed after every run, and written to `contrast.md` in the output folder.

The cache is that of `tests/benchmarks/tiers.py`: a teacher at 256 x 192, of any tier with embeddings.
"""

import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import bccd  # type: ignore[import-not-found]
import click

ROIS, SCALE = "64", "192x144"
# Student's t: 97.5 % quantile for so many pairs of seeds.
QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True)
class Arm:
    """What `ckd` is trained with.

    Attributes:
        beside: The arm that it is compared with.
        methods: Of the training.
        options: Of the distillation.
    """

    beside: str = "none"
    methods: str = "ckd"
    options: Mapping[str, object] = field(default_factory=dict)


ARMS = {
    "none": Arm("", "none"),
    "ckd": Arm(),
    "weight 0.25": Arm(options={"weights.ckd": 0.25}),
    "centre": Arm("ckd", options={"ckd.centre": True}),
    "teacher's side detached": Arm("ckd", options={"ckd.teacher_gradient": "none"}),
    "queue detached": Arm("ckd", options={"ckd.teacher_gradient": "batch"}),
    "after warm-up": Arm("ckd", options={"ckd.start": 52}),  # two epochs
    "same class no negatives": Arm("ckd", options={"ckd.same_class_negatives": False}),
    "centre, same class no negatives": Arm("ckd", options={"ckd.centre": True, "ckd.same_class_negatives": False}),
    "nonlinear": Arm("ckd", options={"ckd.projection": "nonlinear"}),
    "temperature 0.2": Arm("ckd", options={"ckd.temperature": 0.2}),
    "queue of one step": Arm("ckd", options={"ckd.queue_size": 512}),
}
DENSE_ARMS = {
    "combined branches": Arm("ckd", options={"ckd.branch": "combined"}),
    "pairs from an IoU of 0.7": Arm("ckd", options={"ckd.pair_iou": 0.7}),
}
EPOCHS = {"faster-rcnn": 12, "retinanet": 36, "fcos": 36}


def students(out: Path) -> dict[str, list[str]]:
    """Their options on the command line, by kind."""
    two_stage = [part.replace("sampler.num=128", f"sampler.num={ROIS}") for part in bccd.two_stage(16, 64, 256)]
    return {
        "faster-rcnn": two_stage,
        "retinanet": ["--student", str(out / "retinanet.py"), *bccd.one_stage("retinanet", 16, 64)],
        "fcos": ["--student", bccd.FCOS, *bccd.one_stage("fcos", 16, 64)],
    }


def rows(only: Sequence[str]) -> list[tuple[str, str, Arm]]:
    """Kind of student, name and options of each arm whose row holds one of the texts."""
    every = [
        (kind, name, arm)
        for kind in EPOCHS
        for name, arm in {**ARMS, **(DENSE_ARMS if kind != "faster-rcnn" else {})}.items()
    ]
    return [row for row in every if not only or any(text in f"{row[0]}, {row[1]}" for text in only)]


def write_validation(data: Path, path: Path) -> None:
    """The images that are neither for training nor for the test."""
    every, trained = (json.loads((data / f"{name}.json").read_text()) for name in ("trainval", "train"))
    names = {image["file_name"] for image in trained["images"]}
    images = [image for image in every["images"] if image["file_name"] not in names]
    ids = {image["id"] for image in images}
    boxes = [box for box in every["annotations"] if box["image_id"] in ids]
    path.write_text(json.dumps({**every, "images": images, "annotations": boxes}))


def work_dir(out: Path, kind: str, name: str, seed: int) -> Path:
    name_part = "".join(character for character in name if character.isalnum() or character in " .")
    return out / f"{kind}_{name_part.replace(' ', '-')}_seed{seed}"


def train_student(data: Path, out: Path, cache: Path, row: tuple[str, str, Arm], seed: int, epochs: int | None) -> None:
    kind, name, arm = row
    places = ["--ann-file", str(data / "train.json"), "--img-dir", str(data / "JPEGImages")]
    places += ["--val-ann-file", str(out / "val.json"), "--val-img-dir", str(data / "JPEGImages")]
    arguments = ["train-student", *students(out)[kind], "--methods", arm.methods, *places, "--cache", str(cache)]
    arguments += ["--scale", SCALE, "--seed", str(seed), "--workers", "0"]
    if arm.methods != "none":
        arguments += ["--rois", "teacher", "-o", f"distill.rois.num={ROIS}"]
    for key, value in arm.options.items():
        arguments += ["-o", f"distill.{key}={value}"]
    bccd.train(arguments, work_dir(out, kind, name, seed), epochs or EPOCHS[kind])


def measure_on_test(data: Path, folder: Path) -> None:
    """AP of a finished student on test.json, into `test.json` of its folder."""
    if (folder / "test.json").exists() or not (folder / "result.json").exists():
        return
    places = ["--ann-file", str(data / "test.json"), "--img-dir", str(data / "JPEGImages"), "--scale", SCALE]
    log = folder / "test.log"
    log.unlink(missing_ok=True)
    bccd.run(["evaluate", "--ckpt", str(folder / "student.pth"), *places], log)
    match = re.search(r"[01]\.\d{3}", log.read_text())
    if match is None:
        raise click.ClickException(f"{log} holds no AP.")
    (folder / "test.json").write_text(json.dumps({"ap": float(match.group())}))


def aps(out: Path, kind: str, name: str, seeds: int, measured: str) -> dict[int, float]:
    """AP of each seed that is done."""
    files = {seed: work_dir(out, kind, name, seed) / f"{measured}.json" for seed in range(seeds)}
    return {seed: json.loads(file.read_text())["ap"] for seed, file in files.items() if file.exists()}


def last_epoch(out: Path, kind: str, name: str, seeds: int, value: str) -> str:
    """Mean of a logged value over the last epoch of all seeds; empty where it is not logged."""
    aps: list[float] = []
    for seed in range(seeds):
        lines = [
            json.loads(line)
            for file in sorted(work_dir(out, kind, name, seed).glob("*/vis_data/scalars.json"))
            for line in file.read_text().splitlines()
        ]
        logged = [(line["epoch"], line[value]) for line in lines if value in line]
        aps += [number for epoch, number in logged if epoch == max(epoch for epoch, _ in logged)]
    return f"{statistics.mean(aps):.3f}" if aps else ""


def change(aps: Mapping[int, float], beside: Mapping[int, float]) -> str:
    """Mean difference of the seeds that both have, in points, with its 95 % interval."""
    points = [100 * (aps[seed] - beside[seed]) for seed in aps if seed in beside]
    if len(points) < 2:
        return f"{points[0]:+.2f}" if points else ""
    width = QUANTILES[len(points)] * statistics.stdev(points) / len(points) ** 0.5
    return f"{statistics.mean(points):+.2f} ± {width:.2f}"


def table(out: Path, seeds: int, measured: str) -> str:
    """What is known so far, as Markdown."""
    lines = [
        "| student | arm | AP of each seed | mean | minus | points | minus none | top1 | spread |",
        "|---" * 9 + "|",
    ]
    for kind, name, arm in rows(()):
        row_aps, none = (aps(out, kind, row, seeds, measured) for row in (name, "none"))
        if not row_aps:
            continue
        beside = aps(out, kind, arm.beside, seeds, measured) if arm.beside else {}
        cells = [
            kind,
            name,
            ", ".join(f"{ap:.3f}" for ap in row_aps.values()),
            f"{statistics.mean(row_aps.values()):.3f}",
        ]
        cells += [arm.beside, change(row_aps, beside), change(row_aps, none) if arm.beside else ""]
        cells += [last_epoch(out, kind, name, seeds, value) for value in ("ckd_top1", "ckd_spread")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), default=Path("../shared/data/bccd"))
@click.option("--cache", type=click.Path(exists=True, path_type=Path), required=True, help="Of bccd's train.json.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--only", multiple=True, help='Only rows "student, arm" that hold this; several: any of them.')
@click.option("--seeds", type=click.IntRange(1, max(QUANTILES)), default=6, show_default=True)
@click.option("--epochs", type=int, help=f"In place of {EPOCHS}; needs a folder of its own.")
@click.option("--test", is_flag=True, help="Measure on test.json what is trained already, and train nothing.")
def main(data: Path, cache: Path, out: Path, only: tuple[str, ...], seeds: int, epochs: int | None, test: bool) -> None:
    """Train all arms of all students from one cache, print the table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    out.mkdir(parents=True, exist_ok=True)
    (out / "retinanet.py").write_text(bccd.RETINANET)
    write_validation(data, out / "val.json")
    for seed in range(seeds):
        for row in rows(only):
            if test:
                measure_on_test(data, work_dir(out, row[0], row[1], seed))
                continue
            train_student(data, out, cache, row, seed, epochs)
            (out / "contrast.md").write_text(table(out, seeds, "result"))
            click.echo(table(out, seeds, "result"))
    if test:
        (out / "test.md").write_text(table(out, seeds, "test"))
        click.echo(table(out, seeds, "test"))


if __name__ == "__main__":
    main()
