"""Rows of gpu.py about teachers: their forward pass, cache-teacher, and where its time goes."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gpu_inputs  # type: ignore[import-not-found]
import torch
from gpu_stages import Clocks  # type: ignore[import-not-found]
from rich.console import Console

from kdpipe.cache.read.reader import open_cache
from kdpipe.cache.store.location import open_location
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

PART_SIZE = 128 << 20  # raw bytes: several parts, so that commits run beside the teacher as they do for a data set
WARM = 8  # images that a rate leaves out


class Teachers:
    """Pictures, teachers and caches in a folder.

    Args:
        folder: An empty one.
        device: A `Device`.
        size: A `Size`.
    """

    def __init__(self, folder: Path, device: Any, size: Any) -> None:
        self.folder, self.device, self.size = folder, device, size
        self.ann_file = gpu_inputs.draw(folder / "data", size)
        self.img_dir = self.ann_file.parent / "images"
        self.bare: dict[str, float] = {}  # seconds per image of each teacher's forward pass

    def checkpoint(self, name: str) -> Path:
        """That of a teacher, made unless it is there."""
        path: Path = gpu_inputs.teacher(self.folder / f"{name}.pth", name, self.size)
        return path

    def forward(self, name: str) -> dict[str, object]:
        """mmdet's own prediction, one image after the other, each on the device already."""
        from mmdet.structures import DetDataSample

        checkpoint = load_checkpoint(self.checkpoint(name), trust=False)
        config = teacher_config(checkpoint, None)
        teacher = load_teacher(checkpoint, config, proposals=1000, device=self.device.torch)
        data, batches = load_coco(self.ann_file, self.img_dir), []
        for info in data.images:
            original = (info.height, info.width)
            pixels, size = teacher.pixels.view(
                read_image(data.img_dir / info.file_name, original), self.size.scale, False
            )
            meta = {"img_shape": size, "ori_shape": original, "scale_factor": (size[1] / original[1],) * 2}
            image = torch.from_numpy(pixels.transpose(2, 0, 1).copy()).to(self.device.torch)
            batches.append({"inputs": [image], "data_samples": [DetDataSample(metainfo=meta)]})
        with torch.inference_mode():
            pyramid, sample = teacher.pyramid_of_input(batches[0]["inputs"][0])
            proposals = teacher.proposals(pyramid, sample)
            with full_precision(self.device.torch):  # as cache-teacher computes
                seconds = self._predicting(teacher.model, batches)
            as_torch = self._predicting(teacher.model, batches) if self.device.is_gpu else seconds
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
        self.device.wait()
        start = time.perf_counter()
        for batch in batches:
            model.test_step(batch)
        self.device.wait()
        return (time.perf_counter() - start) / len(batches)

    def _make_cache(self, name: str, path: Path, tier: str, limit: int | None = None) -> CachingResult:
        checkpoint = load_checkpoint(self.checkpoint(name), trust=False)
        options = CacheOptions(tier=tier, scale=self.size.scale, part_size=PART_SIZE, proposals=self.size.proposals)
        return cache_teacher(
            checkpoint,
            teacher_config(checkpoint, None),
            DataSource(DataOptions(self.ann_file, self.img_dir), limit),
            open_location(path),
            options,
            device=self.device.torch,
            console=Console(quiet=True),
        )

    def _cache_path(self, name: str, tier: str) -> Path:
        return self.folder / f"{name}-{tier}.zarr"

    def caching(self, name: str, tier: str) -> dict[str, object]:
        """The command, beside the forward pass: from an early image to the last one, and to the end."""
        shutil.rmtree(self._cache_path(name, tier), ignore_errors=True)  # made for a student before
        bare, before = self.bare.get(name, float("nan")), self.device.watch_memory()
        with ticks() as times:
            result = self._make_cache(name, self._cache_path(name, tier), tier)
        cache = open_cache(result.location)
        views = len(cache.spec.views)
        ids = cache.image_ids.tolist()
        boxes = sum(cache.index(image_id, cache.spec.views[0]).num_rois for image_id in ids) / len(ids)
        cells: dict[str, object] = {"views": views}
        warm = min(WARM, len(times) // 2)
        steady = (times[-1] - times[warm - 1]) / (len(times) - warm)
        cells |= {"views/s": views / steady, "x forward pass": steady / views / bare}
        each = result.seconds / result.images
        return cells | {
            "to the end, views/s": views / each,
            "to the end, x forward pass": each / views / bare,
            "boxes": boxes,
            "MB per image": result.disk_bytes / result.images / 1e6,
            "GPU memory, GiB": self.device.peak(before),
        }

    def stages(self, name: str, tier: str) -> dict[str, object]:
        """Milliseconds per view of each stage, the device waited for around each."""
        clocks = Clocks(self.device.wait)
        path = self._cache_path(name, f"{tier}-stages")
        with clocks.running():
            result = self._make_cache(name, path, tier, limit=max(2, self.size.images // 3))
        views = result.images * len(open_cache(result.location).spec.views)
        cells: dict[str, object] = {"all": 1e3 * result.seconds / views}
        cells |= {stage: 1e3 * seconds / views for stage, seconds in clocks.seconds.items()}
        return cells | ({"not found": ", ".join(clocks.missing)} if clocks.missing else {})

    def cache(self, tier: str) -> Path:
        """The cache of a tier that students learn from, made now unless it is there."""
        path = self._cache_path("x101", tier)
        if not path.exists() or not open_cache(path, allow_partial=True).is_complete:
            self._make_cache("x101", path, tier)
            self.device.free()
        return path


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
