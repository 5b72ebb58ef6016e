"""Reading for a long time, from many parts, and in the children of a process that has read."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kdpipe.cache import open_cache

if TYPE_CHECKING:
    from tests.cache.conftest import Kit

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")

# Of a spec whose images are some megabytes each.
LARGE = {"channels": 1024, "dtype": "float16", "codec": "none"}

LOADERS = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset
from kdpipe.cache import open_cache

class Boxes(Dataset):
    def __init__(self, cache):
        self.cache = cache
    def __len__(self):
        return len(self.cache)
    def __getitem__(self, n):
        targets = self.cache.targets(int(self.cache.image_ids[n]))
        return [targets.boxes.sum().item(), sum(level.double().sum().item() for level in targets.features)]

if __name__ == "__main__":
    torch.set_num_threads(4)  # so that this process reads by threads of its own
    cache = open_cache(sys.argv[1])
    boxes = Boxes(cache)
    wanted = [boxes[n] for n in range(len(boxes))]
    for method in sys.argv[2].split(","):
        loader = DataLoader(boxes, batch_size=None, num_workers=2, multiprocessing_context=method, timeout=240)
        assert list(loader) == wanted, method
    assert [boxes[n] for n in range(len(boxes))] == wanted
"""


@pytest.mark.parametrize("methods", ["fork", pytest.param("spawn,forkserver", marks=pytest.mark.slow)])
def test_workers_of_a_process_that_has_read(tmp_path: Path, kit: "type[Kit]", methods: str) -> None:
    script = tmp_path / "loaders.py"
    script.write_text(LOADERS)
    path = kit.make(tmp_path / "x.zarr", kit.spec(**LARGE))
    subprocess.run([sys.executable, str(script), str(path), methods], timeout=550, check=True)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def check_growth(path: Path, reads: int) -> None:
    """The second half of the reads leaves nothing behind."""
    cache = open_cache(path)
    ids = np.random.default_rng(0).choice(cache.image_ids, reads).tolist()
    for image_id in ids[: reads // 2]:
        cache.targets(image_id)
    before = descriptors(), resident_bytes()
    for image_id in ids[reads // 2 :]:
        cache.targets(image_id)
    assert descriptors() <= before[0]
    assert resident_bytes() <= before[1] + (4 << 20)


@needs_proc
@pytest.mark.parametrize("changes", [{}, LARGE], ids=["small", "large"])
def test_nothing_grows(tmp_path: Path, kit: "type[Kit]", changes: dict[str, Any]) -> None:
    check_growth(kit.make(tmp_path / "x.zarr", kit.spec(**changes), count=4), reads=400)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"codec": "none"}, LARGE], ids=["zstd", "none", "large"])
def test_nothing_grows_over_ten_thousand_reads(tmp_path: Path, kit: "type[Kit]", changes: dict[str, Any]) -> None:
    check_growth(kit.make(tmp_path / "x.zarr", kit.spec(**changes)), reads=10_000)


@needs_proc
def test_more_parts_than_files_may_be_open(tmp_path: Path, kit: "type[Kit]") -> None:
    images = kit.images(30)
    writer = kit.writer(tmp_path / "x.zarr", kit.spec(tier="predictions"), images, part_size=1)
    kit.fill(writer)
    cache = open_cache(writer.location)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 10, limits[1]))
    try:
        for image in [*images, *images]:
            assert cache.targets(image.image_id).image_id == image.image_id
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
