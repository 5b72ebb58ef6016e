"""What it costs the training process to be handed a batch by a loader worker: torch's way, and in one piece.

    python tests/benchmarks/batches.py

One worker, batches of eight images with 256 RoIs of a teacher each, made up. Two cores that other work shared, three
rounds by turns, milliseconds of the training process's own time per batch: 800 x 1088 pixels 14.3 to 15.4 by torch, 5.5
to 5.9 in one piece; 192 x 256 pixels 11.0 to 11.2 and 2.8 to 3.0. Beside that, one piece needs no room in /dev/shm.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from torch.utils.data import DataLoader, Dataset

import kdpipe.pipelines  # noqa: F401  (mmcv's ops, in the worker too)
from kdpipe.distill.teacher.targets import RoiTargets
from kdpipe.pipelines.training.parcel import pack_batch

BATCH, BATCHES, ROUNDS = 8, 60, 3
SIZES = ((800, 1088), (192, 256))


class Samples(Dataset[dict[str, Any]]):
    """As a training pipeline makes them, without any work.

    Args:
        size: `(h, w)` of the images.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __len__(self) -> int:
        return BATCH * BATCHES

    def __getitem__(self, index: int) -> dict[str, Any]:
        from mmdet.structures import DetDataSample
        from mmdet.structures.bbox import HorizontalBoxes
        from mmengine.structures import InstanceData

        sample = DetDataSample(metainfo={"img_id": index})
        for name, count in (("gt_instances", 10), ("ignored_instances", 0)):
            boxes, labels = HorizontalBoxes(torch.zeros(count, 4)), torch.zeros(count, dtype=torch.long)
            setattr(sample, name, InstanceData(bboxes=boxes, labels=labels))
        targets = RoiTargets(
            boxes=torch.zeros(256, 4),
            labels=torch.zeros(256, dtype=torch.long),
            num_positive=30,
            view="exact",
            logits=torch.zeros(256, 81, dtype=torch.float16),
            deltas=torch.zeros(30, 80, 4, dtype=torch.float16),
            embeddings=torch.zeros(256, 1024, dtype=torch.float16),
            roi_features=torch.zeros(30, 256, 7, 7, dtype=torch.int8),
        )
        image = torch.zeros(3, *self.size, dtype=torch.uint8)
        return {"inputs": image, "data_samples": sample, "targets": targets}


def milliseconds(collate: Callable[[Any], Any], size: tuple[int, int]) -> tuple[float, float]:
    """Wall clock, and time of this process, per batch."""
    loader = DataLoader(Samples(size), BATCH, num_workers=1, collate_fn=collate, multiprocessing_context="forkserver")
    batches = iter(loader)
    for _ in range(4):  # the worker has begun
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    count = sum(1 for _ in batches)
    return 1e3 * (time.perf_counter() - wall) / count, 1e3 * (time.process_time() - cpu) / count


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in SIZES:
        for _ in range(ROUNDS):
            for name, collate in (("torch", pseudo_collate), ("one piece", pack_batch)):
                wall, own = milliseconds(collate, size)
                print(f"{size[0]} x {size[1]}, {name}: {wall:.1f} ms per batch, {own:.1f} of this process", flush=True)
