"""What gpu.py measures, one function for each kind of row."""

import gc
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gpu_inputs  # type: ignore[import-not-found]
import gpu_stages  # type: ignore[import-not-found]
import torch
from mmengine.runner import Runner
from rich.console import Console

from kdpipe.cache.read.reader import open_cache
from kdpipe.cache.store.location import open_location
from kdpipe.pipelines.cli.main import cli
from kdpipe.pipelines.commands import train_student as train_student_module
from kdpipe.pipelines.commands.cache_teacher import CachingResult, cache_teacher
from kdpipe.pipelines.data.datasets import load_coco
from kdpipe.pipelines.data.find import DataSource
from kdpipe.pipelines.data.images import read_image
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.runtime.console import ProgressBar
from kdpipe.pipelines.teacher.arithmetic import full_precision
from kdpipe.pipelines.teacher.options import CacheOptions
from kdpipe.pipelines.teacher.teacher import load_teacher, teacher_config
from kdpipe.pipelines.training import run as plain_training_module
from kdpipe.pipelines.training.workers import end_workers, preload_workers

METHODS = {"embeddings": "ckd,pred"}  # of a tier that does not serve all; the others have the default
PART_SIZE = 128 << 20  # raw bytes: several parts, so that commits run beside the teacher as they do for a data set
WARM = 8  # images that a rate leaves out


class Stopped(Exception):  # noqa: N818
    """Thrown where a command has got as far as is wanted of it."""


class Measures:
    """Inputs and caches in a folder, and measurements on a device.

    Args:
        folder: An empty one.
        out: Where tables of operators go.
        device: `cuda` or `cpu`.
        size: How large everything is.
    """

    def __init__(self, folder: Path, out: Path, device: str, size: Any) -> None:
        self.folder, self.out, self.device, self.size = folder, out, torch.device(device), size
        self.cuda = self.device.type == "cuda"
        self.ann_file = gpu_inputs.draw(folder / "data", size)
        self.bare: dict[str, float] = {}  # seconds per image of each teacher's forward pass
        self.steps: dict[str, float] = {}  # seconds per step by the name of the row
        self._runs = 0

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        """What nothing holds any more."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def machine(self) -> dict[str, object]:
        """Card and versions."""
        import mmdet
        import torchvision

        return {
            "card": torch.cuda.get_device_name(self.device) if self.cuda else "no GPU",
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "CUDA": torch.version.cuda if self.cuda else "none",
            "cuDNN": torch.backends.cudnn.version() if self.cuda else "none",
            "mmdet": mmdet.__version__,
            "size": self.size,
        }

    @property
    def _source(self) -> DataSource:
        return DataSource(DataOptions(self.ann_file, self.ann_file.parent / "images"))

    def _teacher(self, name: str) -> Any:
        """Checkpoint of a teacher, and its config."""
        path = gpu_inputs.teacher(self.folder / f"{name}.pth", name, self.size)
        checkpoint = load_checkpoint(path, trust=False)
        return checkpoint, teacher_config(checkpoint, None)

    # the teacher

    def forward(self, name: str) -> dict[str, object]:
        """mmdet's own prediction, one image after the other, each on the device already."""
        from mmdet.structures import DetDataSample

        checkpoint, cfg = self._teacher(name)
        teacher = load_teacher(checkpoint, cfg, proposals=1000, device=self.device)
        data, batches = load_coco(self.ann_file, self.ann_file.parent / "images"), []
        for info in data.images:
            original = (info.height, info.width)
            pixels, size = teacher.pixels.view(
                read_image(data.img_dir / info.file_name, original), self.size.scale, False
            )
            meta = {"img_shape": size, "ori_shape": original, "scale_factor": (size[1] / original[1],) * 2}
            image = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).to(self.device)
            batches.append({"inputs": [image], "data_samples": [DetDataSample(metainfo=meta)]})
        with torch.inference_mode():
            pyramid, sample = teacher.pyramid_of_input(batches[0]["inputs"][0])
            proposals = teacher.proposals(pyramid, sample)
            with full_precision(self.device):  # as cache-teacher computes
                seconds = self._predicting(teacher.model, batches)
            as_torch = self._predicting(teacher.model, batches) if self.cuda else seconds
        self.bare[name] = seconds
        return {
            "views/s": 1 / seconds,
            "x forward pass": 1.0,
            "boxes": len(proposals),
            "ms per view": 1e3 * seconds,
            "ms per view with torch's default, TF32": 1e3 * as_torch,
        }

    def _predicting(self, model: Any, batches: Sequence[dict[str, Any]]) -> float:
        """Seconds per batch of a detector's `test_step`."""
        for batch in batches[:WARM]:
            model.test_step(batch)
        self.wait()
        start = time.perf_counter()
        for batch in batches:
            model.test_step(batch)
        self.wait()
        return (time.perf_counter() - start) / len(batches)

    def _make_cache(self, name: str, tier: str) -> CachingResult:
        checkpoint, cfg = self._teacher(name)
        out = open_location(self._cache_path(name, tier))
        return cache_teacher(
            checkpoint, cfg, self._source, out, self._options(tier), device=self.device, console=_console()
        )

    def _options(self, tier: str) -> CacheOptions:
        proposals = self.size.proposals
        return CacheOptions(tier=tier, scale=self.size.scale, part_size=PART_SIZE, proposals=proposals)

    def _cache_path(self, name: str, tier: str) -> Path:
        return self.folder / f"{name}-{tier}.zarr"

    def caching(self, name: str, tier: str) -> dict[str, object]:
        """The command, beside the forward pass: from an early image to the last one, and to the end."""
        if name not in self.bare:
            self.forward(name)
            self.free()
        shutil.rmtree(self._cache_path(name, tier), ignore_errors=True)  # made for a student before
        before = self._start_of_memory()
        with ticks() as times:
            result = self._make_cache(name, tier)
        cache = open_cache(result.location)
        views = len(cache.spec.views)
        ids = cache.image_ids.tolist()
        boxes = sum(cache.index(image_id, cache.spec.views[0]).num_rois for image_id in ids) / len(ids)
        cells: dict[str, object] = {"views": views}
        warm = min(WARM, len(times) // 2)
        steady = (times[-1] - times[warm - 1]) / (len(times) - warm)
        cells |= {"views/s": views / steady, "x forward pass": steady / views / self.bare[name]}
        each = result.seconds / result.images
        return cells | {
            "to the end, views/s": views / each,
            "to the end, x forward pass": each / views / self.bare[name],
            "boxes": boxes,
            "MB per image": result.disk_bytes / result.images / 1e6,
            "GPU memory, GiB": self._peak_memory(before),
        }

    def stages(self, name: str, tier: str) -> dict[str, object]:
        """Milliseconds per view of each stage, the device waited for around each."""
        clocks = gpu_stages.Clocks(self.wait)
        place = self._cache_path(name, f"{tier}-stages")
        checkpoint, cfg = self._teacher(name)
        source = DataSource(self._source.named, limit=max(2, self.size.images // 3))
        with clocks.running():
            result = cache_teacher(
                checkpoint,
                cfg,
                source,
                open_location(place),
                self._options(tier),
                device=self.device,
                console=_console(),
            )
        views = result.images * len(open_cache(result.location).spec.views)
        cells: dict[str, object] = {"all": 1e3 * result.seconds / views}
        cells |= {stage: 1e3 * seconds / views for stage, seconds in clocks.seconds.items()}
        return cells | ({"not found": ", ".join(clocks.missing)} if clocks.missing else {})

    def cache(self, tier: str) -> Path:
        """The cache of a tier that students learn from, made now unless it is there."""
        path = self._cache_path("x101", tier)
        if not path.exists() or not open_cache(path, allow_partial=True).is_complete:
            self._make_cache("x101", tier)
            self.free()
        return path

    # the student

    def training(
        self, family: str, teacher: str, rois: str, steps: int, *, amp: bool = False, workers: int | None = None
    ) -> list[str]:
        """A training command: `train-teacher` without a teacher, else `train-student`.

        Args:
            family: One of `STUDENTS`.
            teacher: `plain`, `live`, or the tier of a cache.
            rois: Whose RoIs.
            steps: Of the training.
            amp: Mixed precision.
            workers: Of its loader.
        """
        self._runs += 1
        size = self.size
        times = -(-steps * size.batch // size.images)
        config = gpu_inputs.student(self.folder / f"{family}-{self._runs}.py", family, size, times)
        images = ["--ann-file", str(self.ann_file), "--img-dir", str(self.ann_file.parent / "images")]
        if teacher == "plain":
            command = ["train-teacher", "--config", str(config), *images]
        elif teacher == "live":
            checkpoint = gpu_inputs.teacher(self.folder / "x101.pth", "x101", size)
            command = ["train-student", "--student", str(config), "--teacher-ckpt", str(checkpoint), *images]
        else:
            command = ["train-student", "--student", str(config), "--cache", str(self.cache(teacher))]
        if teacher != "plain":
            command += ["--rois", rois, *(["--methods", METHODS[teacher]] if teacher in METHODS else [])]
            if size.rois is not None and (rois == "teacher" or family != "faster-rcnn"):
                command += ["-o", f"distill.rois.num={size.rois}"]
        command += ["--recipe", "paper", "--epochs", "1", "--lr", "1e-5", *(["--amp"] if amp else [])]
        command += ["--batch-size", str(size.batch), "--workers", str(size.workers if workers is None else workers)]
        return [
            *command,
            "--scale",
            "x".join(map(str, size.scale)),
            "--work-dir",
            str(self.folder / f"run{self._runs}"),
        ]

    def train(
        self, name: str, family: str, teacher: str = "plain", rois: str = "student", *, amp: bool = False
    ) -> dict[str, object]:
        """Seconds per step of a training, as mmengine logs them, and the most memory that it had on the GPU."""
        steps = self.size.live_steps if teacher == "live" else self.size.steps
        command = self.training(family, teacher, rois, steps, amp=amp)
        before = self._start_of_memory()
        with hubs() as seen:
            self._run_training(command)
        first = min(self.size.left_out, steps - 1)
        taken, waiting = (_logged(seen[-1], f"train/{key}")[first:steps] for key in ("time", "data_time"))
        seconds = sum(taken) / len(taken)
        self.steps[name] = seconds
        plain = self.steps.get("/".join([*name.split("/")[:3], "plain"]))
        cells: dict[str, object] = {"s/step": seconds, "median": statistics.median(taken)}
        cells["x plain"] = seconds / plain if plain else "-"
        cells["waiting for data, %"] = 100 * sum(waiting) / sum(taken)
        cells["GPU memory, GiB"] = self._peak_memory(before)
        if teacher != "plain":
            positive, negative = (_mean(seen[-1], f"train/kd_{x}") / self.size.batch for x in ("positive", "negative"))
            cells |= {"RoIs per image": positive + negative, "positive": positive}
        return {**cells, "steps": len(taken)}

    def _run_training(self, command: list[str]) -> None:
        try:
            run(command)
        finally:
            shutil.rmtree(command[command.index("--work-dir") + 1], ignore_errors=True)

    def _start_of_memory(self) -> int:
        if not self.cuda:
            return 0
        self.free()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())

    def _peak_memory(self, before: int) -> float | str:
        return (torch.cuda.max_memory_allocated() - before) / 2**30 if self.cuda else "-"

    def profile(self, family: str, teacher: str, rois: str, *, amp: bool = False) -> dict[str, object]:
        """What a few steps of a training are made of."""
        first, count = self.size.left_out, 1 if self.size.tiny else 3
        command = self.training(family, teacher, rois, first + count, amp=amp)
        with gpu_stages.profiled_steps(first, count, self.cuda) as done:
            self._run_training(command)
        file = self.out / f"profile-{family}-{teacher}-{rois}{'-amp' if amp else ''}.txt"
        cells: dict[str, object] = gpu_stages.profile_cells(done, count, file)
        return cells

    # the loaders

    def loading(self, tier: str, rois: str, workers: int, needed_by: Sequence[str]) -> dict[str, object]:
        """Samples per second of a training's loader, when nothing is done with them."""
        batches = 5 * workers  # two for each worker lie ready when the first is asked for
        family = "faster-rcnn"
        command = self.training(family, tier, rois, batches, workers=workers)
        caught: list[Any] = []

        def stop(cfg: Any, recorded: Any, data: Any, work: Any, *rest: Any, **options: Any) -> None:
            work.path.mkdir(parents=True, exist_ok=True)
            for each in data:
                each.coco_file.parent.mkdir(parents=True, exist_ok=True)
                each.write_copy()
            caught.append(cfg)
            raise Stopped

        with (
            suppress(Stopped),
            patch.object(train_student_module, "run_training", stop),
            patch.object(plain_training_module, "run_training", stop),
        ):
            run(command)
        preload_workers()
        loader = Runner.build_dataloader(caught[0].train_dataloader, seed=0)
        times = []
        try:
            for _ in loader:
                times.append(time.perf_counter())
        finally:
            end_workers([loader])
        warm = min(2 * workers, len(times) // 2)
        rate = (len(times) - 1 - warm) * self.size.batch / (times[-1] - times[warm])
        cells: dict[str, object] = {"samples/s": rate}
        for name in needed_by:
            label = f"needed by {name.removeprefix('train/')}"
            cells[label] = self.size.batch / self.steps[name] if name in self.steps else "-"
        return cells


def run(command: list[str]) -> None:
    """A command of kdpipe, whose errors come as they are; texts of configs are not laid out, which takes a second."""
    print("kdpipe", *command, flush=True)
    with patch("mmengine.config.config.FormatCode", lambda text, **options: (text, False)):
        cli.main(command, prog_name="kdpipe", standalone_mode=False)


def _console() -> Console:
    return Console(quiet=True)


@contextmanager
def ticks() -> Iterator[list[float]]:
    """When each image of a `cache-teacher` was done."""
    times: list[float] = []
    update = ProgressBar.update

    def watched(self: ProgressBar, done: int, rate: str) -> None:
        times.append(time.perf_counter())
        update(self, done, rate)

    with patch.object(ProgressBar, "update", watched):
        yield times


@contextmanager
def hubs() -> Iterator[list[Any]]:
    """What mmengine logs of each training."""
    seen: list[Any] = []
    train = Runner.train

    def watched(self: Any) -> Any:
        seen.append(self.message_hub)
        return train(self)

    with patch.object(Runner, "train", watched):
        yield seen


def _logged(hub: Any, name: str) -> list[float]:
    values: list[float] = hub.get_scalar(name).data[0].tolist()
    return values


def _mean(hub: Any, name: str) -> float:
    if name not in hub.log_scalars:
        return float("nan")
    values = _logged(hub, name)
    return sum(values) / len(values)
