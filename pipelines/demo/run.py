"""`kdpipe demo`: the whole way on a data set drawn from nothing, small enough for two cores and ten minutes."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.read.reader import open_cache
from kdpipe.cache.store.location import open_location
from kdpipe.pipelines.commands.cache_teacher import cache_teacher
from kdpipe.pipelines.commands.options import StudentOptions
from kdpipe.pipelines.commands.train_student import train_student
from kdpipe.pipelines.data.datasets import DetectionData, load_coco
from kdpipe.pipelines.data.find import DataSource
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.demo.drawing import draw_shapes, is_drawn
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.detectors.configs import find_config
from kdpipe.pipelines.runtime.console import ProgressBar, bytes_text
from kdpipe.pipelines.teacher.options import CacheOptions
from kdpipe.pipelines.teacher.teacher import teacher_config
from kdpipe.pipelines.training.options import TrainingOptions
from kdpipe.pipelines.training.run import train_detector
from kdpipe.pipelines.training.teachers import CachedTrainingTeacher
from kdpipe.pipelines.training.work_dir import WorkDir

__all__ = ["DemoSettings", "Width", "run_demo"]

_CONFIG = "faster-rcnn_r50_fpn_1x_coco"


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


@dataclass(frozen=True)
class Outcome:
    """What a step came to, for the table.

    Attributes:
        ap: COCO AP of what it trained.
        seconds_per_step: Of its training.
        size: Bytes of what it made.
    """

    ap: float | None = None
    seconds_per_step: float | None = None
    size: int | None = None


def run_demo(out: Path, *, fresh: bool, console: Console, settings: DemoSettings | None = None) -> None:
    """Draw a data set, train a teacher, cache it, train a student with and without distillation, and print a table.

    Interrupted, the same call goes on: a step whose output is there is skipped, and an unfinished one continues where
    it was.

    Args:
        out: Folder for all of it.
        fresh: Delete what an earlier demo left in `out`, and nothing else.
        console: Where progress and the table are shown.
        settings: Size of the demo; by default what two cores do in ten minutes.

    Raises:
        KdpipeError: What is in the place of a step's output is something else.
    """
    settings = settings or DemoSettings()
    if fresh:
        _clear(out)
    steps: dict[str, Callable[[], Outcome]] = {
        "data set": partial(_draw, out, settings, console),
        "teacher": partial(_teacher, out, settings, console),
        "cache": partial(_cache, out, settings, console),
        "student": partial(_student, out, settings, console, "student", ()),
        "distilled student": partial(_student, out, settings, console, "distilled", settings.methods),
    }
    table = Table("", "AP", "s per training step", "time", "on disk", show_footer=True, title="kdpipe demo")
    begin = time.perf_counter()
    for number, (name, step) in enumerate(steps.items(), start=1):
        console.print(f"{number}/{len(steps)} {name}")
        start = time.perf_counter()
        outcome = step()
        table.add_row(
            name,
            "" if outcome.ap is None else f"{outcome.ap:.3f}",
            "" if outcome.seconds_per_step is None else f"{outcome.seconds_per_step:.2f}",
            _time_text(time.perf_counter() - start),
            "" if outcome.size is None else bytes_text(outcome.size),
        )
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].footer, table.columns[3].footer = "all", _time_text(time.perf_counter() - begin)
    console.print(table)


def _clear(out: Path) -> None:
    """Delete what a demo made, the last step first, so that what an interruption leaves is a demo that can go on.

    Raises:
        KdpipeError: A folder of another origin is in the place of a step's; nothing has been deleted.
    """
    made = [out / name for name in ("distilled", "student", "shapes.zarr", "teacher", "shapes")]
    made = [folder for folder in made if folder.exists()]
    for folder in made:
        if folder.suffix == ".zarr":
            open_cache(folder, allow_partial=True)
        elif not (is_drawn(folder) if folder.name == "shapes" else WorkDir(folder).record()):
            raise KdpipeError(f"{folder} is there, and no demo made it: move it away, or choose another --out.")
    for folder in made:
        shutil.rmtree(folder)


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


def _both(out: Path) -> tuple[DetectionData, DetectionData]:
    """Training and validation images."""
    data = out / "shapes"
    train, val = (load_coco(data / "annotations" / f"{split}.json", data / split) for split in ("train", "val"))
    return train, val


def _teacher(out: Path, settings: DemoSettings, console: Console) -> Outcome:
    def train(work_dir: Path, resume: bool) -> None:
        options = _training(settings, settings.teacher, settings.teacher_epochs, ())
        train_detector(_config(), partial(_both, out), options, work_dir, resume=resume, console=console)

    return _trained(out / "teacher", settings.teacher_epochs, train)


def _cache(out: Path, settings: DemoSettings, console: Console) -> Outcome:
    checkpoint = load_checkpoint(out / "teacher" / "teacher.pth")
    train, val = _both(out)
    source = DataSource(DataOptions(train.ann_file, train.img_dir), val=(val.ann_file, val.img_dir))
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
    def train(work_dir: Path, resume: bool) -> None:
        distill = (f"distill.rois.num={settings.rois}", f"distill.ckd.queue_size={settings.queue}")
        training = _training(settings, settings.student, settings.student_epochs, distill)
        options = StudentOptions(roi_source="teacher")
        teacher, data = CachedTrainingTeacher(open_cache(out / "shapes.zarr")), partial(_both, out)
        train_student(_config(), teacher, data, methods, training, options, work_dir, resume=resume, console=console)

    return _trained(out / name, settings.student_epochs, train)


def _trained(work_dir: Path, epochs: int, train: Callable[[Path, bool], None]) -> Outcome:
    """What is written of a training, which is gone on with, or begun, where it is not done."""
    result = WorkDir(work_dir).read("result.json") or {}
    if result.get("epoch") != epochs or result.get("ap") is None:
        train(work_dir, (work_dir / "last_checkpoint").exists())
        result = WorkDir(work_dir).read("result.json") or {}
    return Outcome(ap=result["ap"], seconds_per_step=result["seconds_per_step"])


def _config() -> Config:
    return find_config(_CONFIG)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _training(settings: DemoSettings, width: Width, epochs: int, overrides: Sequence[str]) -> TrainingOptions:
    """From scratch, for small objects and narrow layers, with one validation at the end."""
    optimizer = {"type": "AdamW", "lr": settings.lr, "weight_decay": 0.05}  # from scratch it learns faster than SGD
    stages = [width.base * factor for factor in (1, 2, 4, 8)]
    return TrainingOptions(
        epochs=epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        scale=settings.scale,
        overrides=(
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
            *overrides,
        ),
    )
