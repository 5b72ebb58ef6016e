"""A drawn data set, an untrained teacher, its cache, and the commands as users type them."""

import contextlib
import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from kdpipe.pipelines.cli.main import main
from kdpipe.pipelines.demo.drawing import CLASS_NAMES, draw_shapes
from kdpipe.pipelines.detectors.configs import apply_options, find_config, set_num_classes
from kdpipe.pipelines.detectors.mmdet2 import dictionaries
from kdpipe.pipelines.runtime.console import stop
from kdpipe.pipelines.training.seeding import SeedStepHook
from kdpipe.pipelines.training.transforms import set_scale

SCALE = (128, 96)  # (w, h) of the drawn pictures too


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


class Kit:
    """Tiny inputs of the commands, made once; tests do not change them.

    Attributes:
        ann, img, val_ann, val_img: the data set.
        teacher: checkpoint in the layout of mmdet 3.x.
        student: config file of a detector that is narrower than the teacher.
        cache: made from the teacher with the default options and `VIEW`.
    """

    DENSE: ClassVar = {"retinanet": "retinanet_r18_fpn_1x_coco", "fcos": "fcos_r50-caffe_fpn_gn-head_1x_coco"}
    VIEW = ("--scale", "128x96", "--proposals", "40")
    COMMAND = "import sys; from kdpipe.pipelines.cli.main import main; main(sys.argv[1:])"  # for a process of its own
    classes = CLASS_NAMES

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        data = folder / "shapes"
        draw_shapes(data, train=8, val=3, size=(96, 128))
        self.ann, self.img = data / "annotations" / "train.json", data / "train"
        self.val_ann, self.val_img = data / "annotations" / "val.json", data / "val"
        self.teacher = self.save_detector(folder / "teacher.pth", self.config())
        self.student = folder / "student.py"
        self.student.write_text(self.config(channels=8, fc=24).pretty_text)
        self.cache = folder / "shapes.zarr"
        self.made = self.run("cache-teacher", *self.source, *self.VIEW, "--out", self.cache)

    @property
    def data(self) -> tuple[Path | str, ...]:
        return "--ann-file", self.ann, "--img-dir", self.img

    @property
    def val(self) -> tuple[Path | str, ...]:
        return "--val-ann-file", self.val_ann, "--val-img-dir", self.val_img

    @property
    def source(self) -> tuple[Path | str, ...]:
        """Teacher and data set of `cache-teacher`."""
        return "--ckpt", self.teacher, *self.data

    def student_command(
        self, work_dir: Path, *options: object, cache: Path | None = None, workers: int = 0
    ) -> tuple[object, ...]:
        """`train-student` of one epoch of the tiny student, with a short queue, where `options` say nothing else."""
        start = ("train-student", "--cache", cache or self.cache, "--student", self.student, "--work-dir", work_dir)
        epochs = () if "--epochs" in options else ("--epochs", 1)
        recipe = () if "--recipe" in options else ("--recipe", "paper")
        queue = () if "--methods" in options else ("-o", "distill.ckd.queue_size=256")
        return (*start, *epochs, *recipe, "--batch-size", 4, "--workers", workers, *queue, *options)

    def train_student(self, *args: Any, **options: Any) -> Ended:
        """Run `student_command`."""
        return self.run(*self.student_command(*args, **options))

    def online_command(self, work_dir: Path, *options: object) -> tuple[object, ...]:
        """`train-student` of the tiny student beside the teacher itself, where `options` say nothing else."""
        start = ("train-student", "--recipe", "paper", "--teacher-ckpt", self.teacher, "--student", self.student)
        small = ("--scale", "128x96", "--batch-size", 4, "--workers", 0)
        return (*start, *self.data, *small, "--work-dir", work_dir, *options)

    @staticmethod
    def run(*args: object, code: int | None = 0) -> Ended:
        """Run a command in this process.

        Args:
            args: what stands behind `kdpipe`.
            code: the exit code to insist on; None takes any.
        """
        out, err = io.StringIO(), io.StringIO()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        code_found = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main([str(arg) for arg in args])
        except SystemExit as stop:
            code_found = int(stop.code or 0)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        ended = Ended(code_found, out.getvalue(), err.getvalue())
        assert code is None or code_found == code, f"exit code {code_found}\n{ended.out}\n{ended.err}"
        return ended

    def refused(self, *args: object, code: int = 1) -> str:
        """Run a command that has to end with one clear message on standard error; returns it."""
        ended = self.run(*args, code=code)
        assert len(re.findall("^Error: ", ended.err, re.MULTILINE)) == 1, ended.err
        assert "Traceback" not in ended.err + ended.out
        assert "Internal" not in ended.err
        return ended.err

    def interrupted(self, *args: object, code: int = 130) -> Ended:
        """Run a command whose trainings stop, as by Ctrl-C, at the first step of their second epoch."""
        begin = SeedStepHook.before_train_iter

        def stop_early(self: SeedStepHook, runner: Any, *args: Any, **options: Any) -> None:
            begin(self, runner, *args, **options)
            if runner.epoch == 1:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SeedStepHook, "before_train_iter", stop_early)
            return self.run(*args, code=code)

    @staticmethod
    def start(*args: object, cwd: Path, **environment: str) -> "subprocess.Popen[str]":
        """Start a command in a process, and a session, of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "kdpipe.pipelines.cli", *map(str, args)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def annotations(self, path: Path, copies: int = 1, **changes: Any) -> Path:
        """Write the training annotations changed: other top-level lists, or every picture several times over."""
        content = {**json.loads(self.ann.read_text()), **changes}
        images, boxes = content["images"], content["annotations"]
        shift = 1000
        content["images"] = [{**x, "id": x["id"] + shift * n} for n in range(copies) for x in images]
        content["annotations"] = [
            {**x, "id": x["id"] + shift * n, "image_id": x["image_id"] + shift * n}
            for n in range(copies)
            for x in boxes
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    @staticmethod
    def tree(folder: Path) -> dict[str, str]:
        """Digest of every file below a folder."""
        return {
            str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }

    @staticmethod
    def config(
        name: str = "faster-rcnn_r50_fpn_1x_coco", *, channels: int = 16, fc: int = 32, classes: int = len(CLASS_NAMES)
    ) -> Config:
        """A config of mmdet's zoo, shrunk, and its images with it."""
        config = find_config(name)
        backbone = config.model.backbone
        deep = backbone.type != "ResNet"
        backbone.update(depth=50 if deep else 18, base_channels=8, frozen_stages=-1, norm_eval=False, init_cfg=None)
        if deep:
            backbone.update(groups=2, base_width=4)
        _narrow(config.model, {256: channels, 1024: fc})
        config.model.neck.in_channels = [32, 64, 128, 256] if deep else [8, 16, 32, 64]
        if "roi_head" in config.model:
            config.model.rpn_head.anchor_generator.scales = [4]
            config.model.roi_head.bbox_roi_extractor.finest_scale = 28
            config.model.train_cfg.rpn_proposal.max_per_img = 50
            config.model.train_cfg.rcnn.sampler.num = 32
            config.model.test_cfg.rpn.max_per_img = 50
        for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
            loader.dataset.pipeline = set_scale(loader.dataset.pipeline, SCALE)
        set_num_classes(config.model, classes)
        return config

    @classmethod
    def dense(cls, family: str, classes: int = len(CLASS_NAMES)) -> Config:
        """A student that predicts boxes densely, narrow, and with boxes of about 25 pixels as after some training."""
        config = cls.config(cls.DENSE[family], channels=8, classes=classes)
        config.model.backbone.norm_cfg.requires_grad = True
        head = config.model.bbox_head
        head.stacked_convs = 1
        if family == "fcos":
            head.norm_cfg = {"type": "GN", "num_groups": 2, "requires_grad": True}
            boxes = {"type": "Normal", "name": "conv_reg", "std": 0.1, "bias": 2.5}
            head.init_cfg = {"type": "Normal", "layer": "Conv2d", "std": 0.01, "override": boxes}
        else:
            head.anchor_generator.octave_base_scale = 2
        return config

    @staticmethod
    def tiny(name: str, *options: str, channels: int = 8, fc: int = 16, levels: int = 5) -> Config:
        """A config of mmdet's zoo with the layers that it has, each of them narrow."""
        config = apply_options(find_config(name), options)
        model = config.model
        backbone = model.backbone
        backbone.update(base_channels=8, frozen_stages=-1, norm_eval=False, init_cfg=None)
        if backbone.type == "ResNeXt":
            backbone.update(groups=2, base_width=4)
        for part in dictionaries(model):
            for key, value in part.items():
                if key in ("in_channels", "feat_channels", "out_channels", "conv_out_channels") and value == 256:
                    part[key] = channels
                if key == "fc_out_channels":
                    part[key] = fc
                if key == "finest_scale":
                    part[key] = 28
        if "neck" in model:
            inputs = [8, 16, 32, 64] if backbone.depth < 50 else [32, 64, 128, 256]
            model.neck.update(in_channels=inputs, num_outs=levels)
            model.rpn_head.anchor_generator.update(scales=[4], strides=[4, 8, 16, 32, 64][:levels])
        elif "shared_head" in model.roi_head:  # has one width only
            backbone.base_channels = 64
            model.roi_head.shared_head.init_cfg = None
        else:
            _narrow(model, {2048: 256})
        model.train_cfg.rpn_proposal.max_per_img = 50
        model.test_cfg.rpn.max_per_img = 50
        for stage in dictionaries(model.train_cfg.rcnn):
            if "sampler" in stage:
                stage["sampler"]["num"] = 32
        model.data_preprocessor.pop("batch_augments", None)
        for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
            if loader.dataset.get("dataset"):  # a wrapper repeats it
                loader.dataset = loader.dataset.dataset
            loader.dataset.pipeline = set_scale(loader.dataset.pipeline, SCALE)
        set_num_classes(model, len(CLASS_NAMES))
        return config

    @classmethod
    def save_detector(
        cls, path: Path, config: Config, classes: tuple[str, ...] = CLASS_NAMES, text: str | None = None
    ) -> Path:
        """A checkpoint of an untrained detector, its outputs made to differ from box to box."""
        register_all_modules(init_default_scope=True)
        torch.manual_seed(0)
        model = MODELS.build(config.model)
        for name, weight in model.named_parameters():
            if name.endswith(("rpn_cls.weight", "rpn_reg.weight", "fc_cls.weight", "fc_reg.weight")):
                torch.nn.init.normal_(weight, std=0.5)
        meta = {"cfg": config.pretty_text if text is None else text, "dataset_meta": {"classes": classes}, "epoch": 12}
        torch.save({"meta": meta, "state_dict": model.state_dict()}, path)
        return path


def _narrow(part: MutableMapping[str, Any], sizes: dict[int, int]) -> None:
    """Replace numbers of channels, in a config and all that is in it."""
    for key, value in part.items():
        if key.endswith("_channels") and value in list(sizes):
            part[key] = sizes[value]
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, MutableMapping):
                _narrow(inner, sizes)


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # mmdet's data sets collect garbage, among all that was imported
    with pytest.MonkeyPatch.context() as patch:
        # The layout of config text costs more than a training step; runs in a process of their own have it.
        patch.setattr("mmengine.config.config.FormatCode", lambda text, **options: (text, False))
        # Drawing takes longer than training here; tests/pipelines/report and runs in a process of their own have it.
        for command in ("training", "compare"):
            patch.setattr(f"kdpipe.pipelines.cli.{command}.report_trainings_in", lambda folder: None)
        yield Kit(tmp_path_factory.mktemp("kit"))
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _signals_of_their_own() -> Iterator[None]:
    """What a test asked to end does not end the tests behind it."""
    yield
    stop.forget()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
