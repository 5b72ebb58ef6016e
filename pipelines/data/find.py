"""Which images and annotations a command works on, when its options say so and when they do not."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from kdpipe.cache.errors import KdpipeError, present
from kdpipe.cache.read.reader import TeacherCache
from kdpipe.pipelines.data.datasets import DetectionData, load_coco, load_voc
from kdpipe.pipelines.data.options import DataOptions, ValOptions
from kdpipe.pipelines.detectors.mmdet2 import dataset_paths

__all__ = ["DataSource", "cached_source", "find_data", "torch_device", "training_data"]


DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class DataSource:
    """Where images and annotations are: in COCO JSON and a folder, or in a Pascal VOC folder. `load` reads them.

    Attributes:
        ann_file: COCO JSON.
        img_dir: Folder of its images.
        voc: Pascal VOC folder.
        split: Image set of the VOC folder; by default `train`.
        limit: Only the first so many images.
        val: Annotation file and image folder of the validation images that belong to them.

    Raises:
        KdpipeError: Options that exclude each other, or are missing.
    """

    ann_file: Path | None = None
    img_dir: Path | None = None
    voc: Path | None = None
    split: str | None = None
    limit: int | None = None
    val: tuple[Path, Path] | None = None

    def __post_init__(self) -> None:
        if self.voc is None and self.split is not None:
            raise KdpipeError("--split names an image set of a VOC folder: give the folder, too: --voc.")
        if self.voc is not None and (self.ann_file is not None or self.img_dir is not None):
            raise KdpipeError("Give either --voc (with --split), or --ann-file and --img-dir, not both.")
        if self.voc is None and (self.ann_file is None or self.img_dir is None):
            raise KdpipeError("--ann-file and --img-dir belong together; one of them is missing.")

    @property
    def images(self) -> Path:
        """Folder of the images."""
        return present(self.img_dir, "the folder of the images") if self.voc is None else self.voc / "JPEGImages"

    def load(self) -> DetectionData:
        """Read and check the annotations.

        Raises:
            KdpipeError: Bad data.
        """
        if self.voc is not None:
            return load_voc(self.voc, self.split or DEFAULT_SPLIT, self.limit)
        return load_coco(present(self.ann_file, "the annotation file"), self.images, self.limit)

    def record(self) -> dict[str, Any]:
        """What a cache remembers of it, as JSON values."""
        if self.voc is not None:
            place = {"voc": str(self.voc.resolve()), "split": self.split or DEFAULT_SPLIT}
        else:
            place = {"ann_file": str(present(self.ann_file, "the annotation file").resolve())}
        return {
            **place,
            "img_dir": str(self.images.resolve()),
            "limit": self.limit,
            "val": [str(path.resolve()) for path in self.val] if self.val else None,
        }

    def cache_path(self) -> Path:
        """A cache in this folder, named after the VOC folder, or the folder of the annotation file."""
        source = (self.voc or self.ann_file or Path()).resolve()
        folder = source if source.is_dir() else source.parent
        folder = folder.parent if folder.name == "annotations" else folder
        return Path(f"{folder.name or 'cache'}.zarr")


def find_data(config: Config, data: DataOptions, limit: int | None = None) -> DataSource:
    """The data set of a teacher: the one named, or the training images of its config.

    Args:
        config: The teacher's.
        data: What is named.
        limit: Only the first so many images.

    Raises:
        KdpipeError: Options that exclude each other, or no data set.
    """
    if data != DataOptions():
        return DataSource(data.ann_file, data.img_dir, data.voc, data.split, limit)
    paths = dataset_paths(config, "train")
    if paths is None:
        raise KdpipeError(
            "The teacher's config names no COCO data set. Give --ann-file and --img-dir, or --voc and --split."
        )
    if not paths[0].exists():
        raise KdpipeError(
            f"The teacher's config names the annotation file {paths[0]}, and there is none. "
            "Run where data/ lies, or give --ann-file and --img-dir, or --voc and --split."
        )
    return DataSource(*paths, limit=limit, val=dataset_paths(config, "val"))


def cached_source(cache: TeacherCache, moved: DataOptions) -> DataSource:
    """Where the images are that a cache was made of, and the validation images that belong to them.

    Args:
        cache: The cache.
        moved: Where they moved since.

    Raises:
        KdpipeError: They are not where the cache says, or it does not say.
    """
    ann_file, img_dir, voc, split = moved.ann_file, moved.img_dir, moved.voc, moved.split
    try:
        source = cache.metadata["data"]
        limit, val = source["limit"], source["val"] and (Path(source["val"][0]), Path(source["val"][1]))
        if voc is None and ann_file is None and "voc" in source:
            voc = Path(source["voc"])
        if voc is not None:
            split = split or source.get("split")
            paths = {"--voc": voc}
        else:
            ann_file = ann_file or Path(source["ann_file"])
            img_dir = img_dir or Path(source["img_dir"])
            paths = {"--ann-file": ann_file, "--img-dir": img_dir}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise KdpipeError(f"The cache {cache.location} does not record which data set it was made of.") from error
    for option, path in paths.items():
        if not path.exists():
            raise KdpipeError(f"{path} is not there, which {cache.location} was made of. Say where it moved: {option}.")
    return DataSource(ann_file, img_dir, voc, split, limit, val)


def training_data(source: DataSource, named: ValOptions) -> tuple[DetectionData, DetectionData | None]:
    """Training images, and validation images: those named, or those of the source where they are on disk.

    Args:
        source: Where the training images are.
        named: The validation images.

    Raises:
        KdpipeError: Options that exclude each other; or bad data.
    """
    val_ann_file, val_img_dir, val_split = named.val_ann_file, named.val_img_dir, named.val_split
    if val_split is not None and (source.voc is None or val_ann_file is not None or val_img_dir is not None):
        raise KdpipeError("--val-split names an image set of the VOC folder (--voc), in place of --val-ann-file.")
    train, val = source.load(), source.val
    if val_split is not None and source.voc is not None:
        return train, load_voc(source.voc, val_split)
    if val_ann_file is not None:
        return train, load_coco(val_ann_file, val_img_dir or source.images)
    if val is None or not all(path.exists() for path in val):
        return train, None
    return train, load_coco(*val)


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
