"""Random choices that depend on nothing but the seed and the place in the training.

Every random choice of a training run is a function of the seed and of the epoch and image, or of the step. A resumed
run therefore continues exactly as the undisturbed one would have, whatever the number of loader workers.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmdet.registry import DATASETS
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.reader import open_cache
from kdpipe.pipelines.images import ImageError, image_problem

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
        only_in: Path of a cache; images that it does not hold are left out.
    """

    def __init__(self, dataset: dict[str, Any], seed: int, only_in: str | None = None) -> None:
        self.dataset = DATASETS.build(dataset)
        self.dataset.full_init()
        self.seed = seed
        if only_in is not None:
            cache = open_cache(only_in, allow_partial=True)
            known = [i for i in range(len(self.dataset)) if self.dataset.get_data_info(i)["img_id"] in cache]
            self.dataset.get_subset_(known)

    @property
    def metainfo(self) -> dict[str, Any]:
        return dict(self.dataset.metainfo)

    def __len__(self) -> int:
        return len(self.dataset)

    def get_data_info(self, index: int) -> dict[str, Any]:
        """Annotation record of an item, without reading its image."""
        return dict(self.dataset.get_data_info(index % len(self)))

    def __getitem__(self, index: int) -> Any:
        """The image, augmented.

        Raises:
            KdpipeError: It cannot be read, or what belongs to it; the file is named.
        """
        with _own_randomness(self.seed, index):
            try:
                return self.dataset[index % len(self)]
            except KdpipeError:
                raise
            except Exception as error:  # of mmdet's pipeline, which does not always say which image it was
                info = self.get_data_info(index)
                problem = image_problem(info["img_path"], info["width"], info["height"])
                if problem is None:
                    raise
                raise ImageError(problem) from error


@DATA_SAMPLERS.register_module()
class EpochSampler(DefaultSampler):  # type: ignore[misc]
    """mmengine's default sampler, with the epoch carried in the index (see `SeededDataset`)."""

    def __iter__(self) -> Iterator[int]:
        offset = self.epoch * len(self.dataset)
        return (offset + index for index in super().__iter__())


@HOOKS.register_module()
class SeedStepHook(Hook):  # type: ignore[misc]
    """Seeds the training process itself (RoI sampling) at the start of each step, per rank.

    Not of each epoch: a loader draws a random number whenever it starts workers, and those may be kept over epochs.
    """

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        seed_everything(runner.seed, runner.iter, runner.rank)
