"""Does distillation from a cache help on real images? One command trains everything and prints a table.

    python tests/benchmarks/bccd.py --data path/to/bccd --out /tmp/bccd --study methods

A ResNet-18 teacher and students of a quarter of its width, from scratch, at 256 x 192, on the photographs of bccd: one
teacher, its cache, and from that cache, by `kdpipe compare`, one student per row of the study and seed. Started again,
it goes on from where it was stopped; the table is written to `STUDY.md` in the output folder, the grid to `STUDY.toml`.
Seconds per step mean something only with `--jobs 1` on an idle machine.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

KDPIPE = (sys.executable, "-m", "kdpipe.pipelines.cli")
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
class Row:
    """Students of a grid that differ in their methods only, and the teacher of their cache."""

    name: str
    methods: Sequence[str]
    overrides: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    teacher: str = "teacher"
    cache: str = "bccd.zarr"

    def toml(self, out: Path) -> str:
        """The row, as `kdpipe compare --grid` has it."""
        place = {} if "teacher-ckpt" in self.options else {"cache": str(out / self.cache)}
        values = {"methods": list(self.methods), "cfg-options": self.overrides[1::2], **place, **self.options}
        return f"[rows.{self.name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def studies(out: Path) -> dict[str, list[Row]]:
    small, wide, three = two_stage(16, 64, 256), two_stage(16, 128, 512), two_stage(16, 64, 256, 3)
    methods, mine = ("sgfi", "ckd", "pred", ALL), {"rois": "student"}
    plain = Row("plain", ["none"], small)
    cascade: dict[str, Any] = {"overrides": three, "teacher": "cascade-teacher", "cache": "cascade.zarr"}
    online = {"rois": "student", "scale": SCALE}
    return {
        "methods": [plain, Row("teacher-rois", methods, [*small, "-o", "distill.rois.num=96"], {"rois": "teacher"})],
        "rois": [
            plain,
            Row("student-rois", methods, small, mine),
            Row(
                "online",
                [ALL],
                small,
                {**online, "teacher-ckpt": str(out / "teacher" / "teacher.pth"), "baseline": "plain"},
            ),
        ],
        "views": [
            plain,
            Row("student-rois", [ALL], small, mine),
            Row("exact", [ALL], small, mine, cache="both-views.zarr"),
            Row("skipped", [ALL], small, {**mine, "missing-view": "skip"}),
        ],
        "ht": [Row("wide", ["none", "ht", ALL, f"{ALL},ht"], wide, mine)],
        "cascade": [
            Row("cascade", ["none", ALL_AGNOSTIC], options={**mine, "student": CASCADE}, **cascade),
            Row(
                "cascade-online",
                [ALL_AGNOSTIC],
                options={
                    **online,
                    "student": CASCADE,
                    "teacher-ckpt": str(out / "cascade-teacher" / "teacher.pth"),
                    "baseline": "cascade",
                },
                **cascade,
            ),
        ],
        "dense": [
            Row(
                name,
                ["none", "sgfi", "ckd", "pred", "sgfi,ckd"],
                [*one_stage(name, 16, 64), "-o", "distill.rois.num=128"],
                {"student": config, "rois": "teacher"},
            )
            for name, config in (("retinanet", str(out / "retinanet.py")), ("fcos", FCOS))
        ],
    }


def run(arguments: Sequence[str], log: Path) -> float:
    """Run kdpipe with its output in a file; returns the seconds it took."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("a") as output:
        code = subprocess.run([*KDPIPE, *arguments], stdout=output, stderr=subprocess.STDOUT).returncode
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


def grid(data: Path, out: Path, study: str) -> str:
    """The rows of a study, as `kdpipe compare --grid` has them. AP is measured after the last epoch only."""
    epochs = 36 if study == "dense" else 12
    images = str(data / "JPEGImages")
    values = {
        **{"recipe": "paper", "epochs": epochs, "batch-size": 8, "lr": 0.02, "student": FASTER},
        **{"ann-file": str(data / "train.json"), "img-dir": images},
        **{"val-ann-file": str(data / "test.json"), "val-img-dir": images},
        "cfg-options": ["distill.ckd.queue_size=8192", f"train_cfg.val_interval={epochs}"],
    }
    shared = "[options]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    return "\n".join([shared, *(row.toml(out) for row in studies(out)[study])])


def table(out: Path, summary: Mapping[str, Any]) -> str:
    """What `compare` found, as Markdown."""
    lines = []
    for record in sorted(out.glob("*.zarr.json")):
        cached = json.loads(record.read_text())
        lines += [f"{record.stem}: {cached['bytes'] / 2**20:.1f} MiB in {cached['seconds']:.0f} s, start included."]
    for result in sorted(out.glob("*teacher/result.json")):
        lines += [f"{result.parent.name}: AP {json.loads(result.read_text())['ap']:.3f}."]
    lines += [
        "",
        "| student | methods | AP, mean | lowest to highest | seeds | gain | s per step | peak memory, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary["rows"]:
        ap, gain = row["ap"], row["gain"]
        if ap is None:
            continue
        interval = f" ({gain['interval'][0]:+.3f} to {gain['interval'][1]:+.3f})" if gain and gain["interval"] else ""
        gained = f"{gain['mean']:+.3f}{interval}" if gain else ""
        lines.append(
            f"| {row['student']} | {row['methods']} | {ap['mean']:.3f} | {ap['lowest']:.3f} to {ap['highest']:.3f} "
            f"| {ap['count']} | {gained} | {row['seconds_per_step']:.2f} | {row['peak_memory'] / 2**20:.0f} |"
        )
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), default=Path("../shared/data/bccd"))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--study", type=click.Choice(list(studies(Path()))), default="methods", show_default=True)
@click.option("--seeds", type=int, default=3, show_default=True)
@click.option(
    "--jobs", type=int, default=1, show_default=True, help="Students at once; the cores are shared among them."
)
def main(data: Path, out: Path, study: str, seeds: int, jobs: int) -> None:
    """Train the teacher, cache it, train all students of a study, print its table."""
    out, data = out.absolute(), data.absolute()
    out.mkdir(parents=True, exist_ok=True)
    (out / "retinanet.py").write_text(RETINANET)
    rows = studies(out)[study]
    for teacher in dict.fromkeys(row.teacher for row in rows):
        train_teacher(data, out, teacher)
    for row in rows:
        cache(data, out, row.teacher, row.cache)
    (out / f"{study}.toml").write_text(grid(data, out, study))
    places = ["--grid", str(out / f"{study}.toml"), "--work-dir", str(out / "students")]
    command = [*KDPIPE, "compare", *places, "--seeds", str(seeds), "--jobs", str(jobs)]
    code = subprocess.run(command).returncode
    (out / f"{study}.md").write_text(table(out, json.loads((out / "students" / "compare.json").read_text())))
    click.echo((out / f"{study}.md").read_text())
    sys.exit(code)


if __name__ == "__main__":
    main()
