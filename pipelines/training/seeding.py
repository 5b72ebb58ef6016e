"""Random choices that depend on nothing but the seed and the place in the training.

Every random choice of a training run is a function of the seed and of the epoch and image, or of the step. A resumed
run therefore continues exactly as the undisturbed one would have, whatever the number of loader workers.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import DATASETS
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS
from torch.utils.data import Sampler

from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.data.checked_dataset import read_item
from kdpipe.pipelines.data.picture_comparison import compare_picture

__all__ = ["EpochSampler", "SeedStepHook", "SeededDataset", "seed_everything"]


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and torch (CPU and devices) from a tuple of non-negative integers."""
    torch.cuda.manual_seed_all(_seed_cpu(*key))


def _seed_cpu(*key: int) -> int:
    states = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(states[0]))
    np.random.seed(states[1])
    torch.default_generator.manual_seed(int(states[2]))
    return int(states[2])


@contextmanager
def _own_randomness(*key: int) -> Iterator[None]:
    """Random numbers from a key; those of the training process, where there are no workers, go on as if undisturbed."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_cpu(*key)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@DATASETS.register_module()
class SeededDataset:
    """A data set whose item `epoch * len + i` is image `i`, augmented with the random numbers of that epoch.

    Args:
        dataset: Config of the mmdet data set.
        seed: Seed of the run.
        cache: Path of a cache; each image is compared with the one that the teacher saw when a process first reads it.
    """

    def __init__(self, dataset: dict[str, Any], seed: int, cache: str | None = None) -> None:
        self.dataset = DATASETS.build(dataset)
        self.dataset.full_init()
        self.seed = seed
        self.cache = None if cache is None else open_cache(cache, allow_partial=True)
        self._compared = np.zeros(len(self.dataset), dtype=bool)

    @property
    def metainfo(self) -> dict[str, Any]:
        return dict(self.dataset.metainfo)

    def __len__(self) -> int:
        return len(self.dataset)

    def get_data_info(self, index: int) -> dict[str, Any]:
        """Annotation record of an item, without reading its image."""
        return dict(self.dataset.get_data_info(index % len(self)))

    def get_cat_ids(self, index: int) -> list[int]:
        """Labels of the objects of an item, for samplers that choose by class."""
        return list(self.dataset.get_cat_ids(index % len(self)))

    def update_skip_type_keys(self, names: Sequence[str]) -> None:
        """Leave steps out of a data set that mixes images, as mmdet's hook for YOLOX wants it."""
        self.dataset.update_skip_type_keys(names)

    @property
    def pipeline(self) -> Any:
        """The transforms of the data set, inside those that repeat it; mmdet's `PipelineSwitchHook` replaces them."""
        return self._with_pipeline().pipeline

    @pipeline.setter
    def pipeline(self, transforms: Any) -> None:
        self._with_pipeline().pipeline = transforms

    def _with_pipeline(self) -> Any:
        dataset = self.dataset
        while not hasattr(dataset, "pipeline"):
            dataset = dataset.dataset
        return dataset

    def __getitem__(self, index: int) -> Any:
        """The image, augmented.

        Raises:
            KdpipeError: It cannot be read, or what belongs to it, or it is not what the teacher saw; the file is named.
        """
        place = index % len(self)
        if self.cache is not None and not self._compared[place]:
            info = self.dataset.get_data_info(place)
            compare_picture(self.cache, info["img_id"], Path(info["img_path"]))
            self._compared[place] = True
        with _own_randomness(self.seed, index):
            return read_item(self.dataset, place)


@DATA_SAMPLERS.register_module()
class EpochSampler(Sampler[int]):
    """A sampler of mmdet's or mmengine's, with the epoch carried in the index (see `SeededDataset`).

    Args:
        dataset: That is sampled.
        sampler: Config of the sampler.
        seed: Of its order.
    """

    def __init__(self, dataset: Any, sampler: dict[str, Any], seed: int | None = None) -> None:
        self.dataset = dataset
        self.sampler = DATA_SAMPLERS.build(sampler, default_args={"dataset": dataset, "seed": seed})
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        offset = self.epoch * len(self.dataset)
        return (offset + index for index in self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of that epoch."""
        self.epoch = epoch
        self.sampler.set_epoch(epoch)


@HOOKS.register_module()
class SeedStepHook(Hook):  # type: ignore[misc]
    """Seeds the training process itself (RoI sampling) at the start of each step, per rank.

    Not of each epoch: a loader draws a random number whenever it starts workers, and those may be kept over epochs.
    """

    priority = "VERY_HIGH"

    def before_run(self, runner: Any) -> None:
        """Let a student start from the same weights, whatever is built beside it: they are drawn next."""
        seed_everything(runner.seed)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        seed_everything(runner.seed, runner.iter, runner.rank)
