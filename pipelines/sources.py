"""Which images and annotations a command works on, when its options say so and when they do not."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.reader import TeacherCache
from kdpipe.pipelines.datasets import DetectionData, convert_voc, load_coco
from kdpipe.pipelines.layouts import dataset_paths

__all__ = ["DataSource", "cached_data", "find_data", "named_data", "named_val", "torch_device"]


@dataclass(frozen=True)
class DataSource:
    """The images to cache, where they came from, and where the cache goes.

    Attributes:
        data: The images.
        out: Path of the cache.
        limit: Only the first so many images of the annotation file.
        val: Annotation file and image folder of the validation images that the config names.
    """

    data: DetectionData
    out: Path
    limit: int | None
    val: tuple[Path, Path] | None

    def record(self) -> dict[str, Any]:
        """What the cache remembers of it, as JSON values."""
        return {
            "ann_file": str(self.data.ann_file.resolve()),
            "img_dir": str(self.data.img_dir.resolve()),
            "limit": self.limit,
            "val": [str(path.resolve()) for path in self.val] if self.val else None,
        }


def find_data(
    config: Config,
    *,
    ann_file: Path | None,
    img_dir: Path | None,
    voc: Path | None,
    split: str,
    out: Path | None,
    limit: int | None,
) -> DataSource:
    """The data set of `cache-teacher`: the one named, or the training images of the teacher's config.

    Raises:
        KdpipeError: Options that exclude each other, or no data set.
    """
    val = None
    if voc is not None:
        if ann_file is not None or img_dir is not None:
            raise KdpipeError("Give either --voc (with --split), or --ann-file and --img-dir, not both.")
        out = out or Path(f"{voc.resolve().name}.zarr")
        ann_file = convert_voc(voc, split, out.with_suffix(".json"))
        img_dir = voc / "JPEGImages"
    elif ann_file is None and img_dir is None:
        paths = dataset_paths(config, "train")
        if paths is None:
            raise KdpipeError(
                "The teacher's config names no COCO data set. Give --ann-file and --img-dir, or --voc and --split."
            )
        ann_file, img_dir = paths
        val = dataset_paths(config, "val")
        if not ann_file.exists():
            raise KdpipeError(
                f"The teacher's config names the annotation file {ann_file}, and there is none. "
                "Run where data/ lies, or give --ann-file and --img-dir, or --voc and --split."
            )
    elif ann_file is None or img_dir is None:
        raise KdpipeError("--ann-file and --img-dir belong together; one of them is missing.")
    folder = ann_file.resolve().parent
    folder = folder.parent if folder.name == "annotations" else folder
    return DataSource(load_coco(ann_file, img_dir, limit), out or Path(f"{folder.name or 'cache'}.zarr"), limit, val)


def named_data(ann_file: Path, img_dir: Path) -> DetectionData:
    """The data set of `--ann-file` and `--img-dir`."""
    return load_coco(ann_file, img_dir)


def cached_data(
    cache: TeacherCache, *, ann_file: Path | None, img_dir: Path | None
) -> tuple[DetectionData, DetectionData | None]:
    """The images that a cache was made of, and the validation images that belong to them, where they are on disk.

    Args:
        cache: The cache.
        ann_file: Where the annotation file moved.
        img_dir: Where the images moved.

    Raises:
        KdpipeError: They are not where the cache says.
    """
    source = cache.metadata["data"]
    ann_file = ann_file or Path(source["ann_file"])
    img_dir = img_dir or Path(source["img_dir"])
    for path, option in ((ann_file, "--ann-file"), (img_dir, "--img-dir")):
        if not path.exists():
            raise KdpipeError(f"{path} is not there, which {cache.path} was made of. Say where it moved: {option}.")
    return load_coco(ann_file, img_dir, source["limit"]), named_val(source["val"])


def named_val(val: Sequence[Path | str] | None) -> DetectionData | None:
    """Validation images from their annotation file and folder, where these are on disk."""
    if val is None or not all(Path(path).exists() for path in val):
        return None
    return load_coco(Path(val[0]), Path(val[1]))


def torch_device(name: str | None) -> torch.device:
    """The device of `--device`; by default the GPU that is this process's by LOCAL_RANK, or the CPU.

    Raises:
        KdpipeError: There is no such device.
    """
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise KdpipeError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
