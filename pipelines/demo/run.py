"""`kdpipe demo`: the whole way on a data set drawn from nothing, small enough for two cores and ten minutes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from kdpipe.cache.read.reader import open_cache
from kdpipe.cache.store.location import open_location
from kdpipe.pipelines.commands.cache_teacher import cache_teacher
from kdpipe.pipelines.commands.evaluate import evaluate
from kdpipe.pipelines.commands.train_student import train_student
from kdpipe.pipelines.data.datasets import DetectionData, load_coco
from kdpipe.pipelines.data.find import DataSource
from kdpipe.pipelines.demo.drawing import draw_shapes
from kdpipe.pipelines.demo.journal import Journal, Outcome
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.detectors.configs import find_config
from kdpipe.pipelines.runtime.console import ProgressBar, bytes_text
from kdpipe.pipelines.teacher.setup import CacheOptions
from kdpipe.pipelines.teacher.teacher import teacher_config
from kdpipe.pipelines.training.config import Recipe
from kdpipe.pipelines.training.run import TrainingResult, train_detector

__all__ = ["DemoSettings", "Width", "run_demo"]

_CONFIG = "faster-rcnn_r50_fpn_1x_coco"
_FOLDERS = {  # that the steps make
    "data set": "shapes",
    "teacher": "teacher",
    "cache": "shapes.zarr",
    "student": "student",
    "distilled student": "distilled",
}


@dataclass(frozen=True)
class Width:
    """How wide a Faster R-CNN with ResNet-18 is.

    Attributes:
        base: Channels of the first stage of the backbone; 64 is the usual width.
        pyramid: Channels of the feature pyramid and of the RPN.
        head: Width of the fully connected layers of the box head.
    """

    base: int
    pyramid: int
    head: int


@dataclass(frozen=True)
class DemoSettings:
    """Size of the demo.

    Attributes:
        train: Pictures to train on.
        val: Pictures to measure AP on.
        size: (height, width) of a picture in pixels, which is the network input too.
        teacher: Width of the teacher.
        student: Width of both students.
        teacher_epochs: Passes of the teacher over the pictures.
        student_epochs: Passes of each student.
        batch_size: Pictures per step.
        lr: Peak learning rate, of AdamW.
        rois: Boxes sampled per picture, by the detector's own loss and by the distillation.
        proposals: Boxes of the teacher kept per picture.
        queue: Length of CKD's queue.
        methods: What the distilled student learns from the teacher.
        seed: Seed of both students and of the teacher.
    """

    train: int = 400
    val: int = 100
    size: tuple[int, int] = (128, 160)
    teacher: Width = field(default_factory=lambda: Width(24, 48, 256))
    student: Width = field(default_factory=lambda: Width(8, 32, 128))
    teacher_epochs: int = 12
    student_epochs: int = 5
    batch_size: int = 4
    lr: float = 0.002
    rois: int = 64
    proposals: int = 100
    queue: int = 8192
    methods: tuple[str, ...] = ("sgfi", "ckd", "pred")
    seed: int = 0

    @property
    def scale(self) -> tuple[int, int]:
        """`(w, h)` of mmdet's Resize."""
        return self.size[1], self.size[0]


def run_demo(out: Path, *, fresh: bool, console: Console, settings: DemoSettings | None = None) -> None:
    """Draw a data set, train a teacher, cache it, train a student with and without distillation, and print a table.

    Interrupted, the same call goes on: finished steps are kept, and an unfinished one continues where it was.

    Args:
        out: Folder for all of it.
        fresh: Delete what an earlier demo left in `out`, and nothing else.
        console: Where progress and the table are shown.
        settings: Size of the demo; by default what two cores do in ten minutes.

    Raises:
        KdpipeError: `out` holds something else, or the demo of other settings; or a folder of a step is there that
            this demo did not make.
    """
    settings = settings or DemoSettings()
    steps: dict[str, Callable[[], Outcome]] = {
        "data set": partial(_draw, out, settings, console),
        "teacher": partial(_teacher, out, settings, console),
        "cache": partial(_cache, out, settings, console),
        "student": partial(_student, out, settings, console, "student", ()),
        "distilled student": partial(_student, out, settings, console, "distilled", settings.methods),
    }
    journal = Journal(out, {"version": version("kdpipe"), **asdict(settings)}, _FOLDERS)
    if fresh:
        journal.clear()
    outcomes = journal.read()
    for number, (name, step) in enumerate(steps.items(), start=1):
        known = outcomes.get(name, Outcome(finished=False))
        console.print(f"{number}/{len(steps)} {name}{': done before' if known.finished else ''}")
        if known.finished:
            continue
        outcomes[name] = journal.begin(name, outcomes)
        start = time.perf_counter()
        outcome = Outcome(finished=False)
        try:
            outcome = step()
        finally:  # an interrupted step leaves its time
            outcomes[name] = replace(outcome, seconds=known.seconds + time.perf_counter() - start)
            journal.write(outcomes)
    console.print(_table(outcomes))


def _table(outcomes: dict[str, Outcome]) -> Table:
    total = sum(outcome.seconds for outcome in outcomes.values())
    table = Table("", "AP", "s per training step", "time", "on disk", show_footer=True, title="kdpipe demo")
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].footer, table.columns[3].footer = "all", _time_text(total)
    for name, outcome in outcomes.items():
        table.add_row(
            name,
            "" if outcome.ap is None else f"{outcome.ap:.3f}",
            "" if outcome.seconds_per_step is None else f"{outcome.seconds_per_step:.2f}",
            _time_text(outcome.seconds),
            "" if outcome.size is None else bytes_text(outcome.size),
        )
    return table


def _time_text(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _draw(out: Path, settings: DemoSettings, console: Console) -> Outcome:
    total = settings.train + settings.val
    with ProgressBar(console, "drawing", total) as progress:
        start = time.perf_counter()

        def update(done: int) -> None:
            progress.update(done, f"{done / (time.perf_counter() - start):.0f} pictures/s")

        draw_shapes(out / "shapes", train=settings.train, val=settings.val, size=settings.size, progress=update)
    return Outcome(size=open_location(out / "shapes").size(""))


def _data(out: Path, split: str) -> DetectionData:
    return load_coco(out / "shapes" / "annotations" / f"{split}.json", out / "shapes" / split)


def _teacher(out: Path, settings: DemoSettings, console: Console) -> Outcome:
    work_dir = out / "teacher"
    result = train_detector(
        _config(),
        lambda: (_data(out, "train"), _data(out, "val")),
        _recipe(settings, settings.teacher, settings.teacher_epochs, ()),
        work_dir,
        resume=_has_checkpoint(work_dir),
        console=console,
    )
    return _trained(out, result, console)


def _cache(out: Path, settings: DemoSettings, console: Console) -> Outcome:
    checkpoint = load_checkpoint(out / "teacher" / "teacher.pth")
    train, val = _data(out, "train"), _data(out, "val")
    source = DataSource(train.ann_file, train.img_dir, val=(val.ann_file, val.img_dir))
    result = cache_teacher(
        checkpoint,
        teacher_config(checkpoint, None),
        source,
        open_location(out / "shapes.zarr"),
        CacheOptions(proposals=settings.proposals, scale=settings.scale, part_size=1 << 26),
        device=_device(),
        console=console,
    )
    return Outcome(size=result.disk_bytes)


def _student(out: Path, settings: DemoSettings, console: Console, name: str, methods: Sequence[str]) -> Outcome:
    work_dir = out / name
    distill = (f"distill.rois.num={settings.rois}", f"distill.ckd.queue_size={settings.queue}")
    result = train_student(
        _config(),
        open_cache(out / "shapes.zarr"),
        lambda: (_data(out, "train"), _data(out, "val")),
        methods,
        _recipe(settings, settings.student, settings.student_epochs, distill),
        work_dir,
        rois="teacher",
        resume=_has_checkpoint(work_dir),
        console=console,
    )
    return _trained(out, result, console)


def _trained(out: Path, result: TrainingResult, console: Console) -> Outcome:
    ap = result.ap
    if ap is None:  # it was stopped between the last step and the end of the validation
        val = _data(out, "val")
        metrics = evaluate(
            result.checkpoint,
            config=None,
            ann_file=val.ann_file,
            img_dir=val.img_dir,
            scale=None,
            batch_size=1,
            trust=False,
            console=console,
        )
        ap = metrics["bbox_mAP"]
    timed = result.seconds_per_step == result.seconds_per_step  # NaN where a resumed training had no step left
    return Outcome(ap=ap, seconds_per_step=result.seconds_per_step if timed else None)


def _config() -> Config:
    return find_config(_CONFIG)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _has_checkpoint(work_dir: Path) -> bool:
    return (work_dir / "last_checkpoint").exists()


def _recipe(settings: DemoSettings, width: Width, epochs: int, options: Sequence[str]) -> Recipe:
    """From scratch, for small objects and narrow layers, with one validation at the end."""
    optimizer = {"type": "AdamW", "lr": settings.lr, "weight_decay": 0.05}  # from scratch it learns faster than SGD
    stages = [width.base * factor for factor in (1, 2, 4, 8)]
    return Recipe(
        epochs=epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        scale=settings.scale,
        options=(
            "model.backbone.depth=18",
            f"model.backbone.base_channels={width.base}",
            "model.backbone.frozen_stages=-1",
            "model.backbone.norm_eval=False",
            "model.backbone.init_cfg=None",
            f"model.neck.in_channels={stages}",
            f"model.neck.out_channels={width.pyramid}",
            f"model.rpn_head.in_channels={width.pyramid}",
            f"model.rpn_head.feat_channels={width.pyramid}",
            "model.rpn_head.anchor_generator.scales=[4]",
            f"model.roi_head.bbox_roi_extractor.out_channels={width.pyramid}",
            "model.roi_head.bbox_roi_extractor.finest_scale=28",
            f"model.roi_head.bbox_head.in_channels={width.pyramid}",
            f"model.roi_head.bbox_head.fc_out_channels={width.head}",
            f"model.train_cfg.rpn.sampler.num={settings.rois}",
            f"model.train_cfg.rcnn.sampler.num={settings.rois}",
            *(f"model.{phase}.nms_pre=500" for phase in ("train_cfg.rpn_proposal", "test_cfg.rpn")),
            *(f"model.{phase}.max_per_img=200" for phase in ("train_cfg.rpn_proposal", "test_cfg.rpn")),
            f"optim_wrapper.optimizer={optimizer}",
            f"train_cfg.val_interval={epochs}",
            *options,
        ),
    )
