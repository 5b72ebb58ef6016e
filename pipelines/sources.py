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
from kdpipe.pipelines.class_matching import match_classes
from kdpipe.pipelines.datasets import DetectionData, load_coco, load_voc
from kdpipe.pipelines.layouts import dataset_paths

__all__ = ["DataSource", "cached_data", "find_data", "named_data", "named_val", "torch_device"]


DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class DataSource:
    """The images to cache, where they came from, and where the cache goes.

    Attributes:
        data: The images.
        out: Path of the cache.
        limit: Only the first so many images of the annotation file.
        val: Annotation file and image folder of the validation images that the config names.
        voc: Pascal VOC folder and split, where they came from one.
    """

    data: DetectionData
    out: Path
    limit: int | None
    val: tuple[Path, Path] | None
    voc: tuple[Path, str] | None = None

    def record(self) -> dict[str, Any]:
        """What the cache remembers of it, as JSON values."""
        voc = {"voc": str(self.voc[0].resolve()), "split": self.voc[1]} if self.voc else {}
        return {
            **(voc or {"ann_file": str(self.data.ann_file.resolve())}),
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
    split: str | None,
    out: Path | None,
    limit: int | None,
) -> DataSource:
    """The data set of a teacher: the one named, or the training images of its config.

    Raises:
        KdpipeError: Options that exclude each other, or no data set.
    """
    if voc is not None or ann_file is not None or img_dir is not None:
        data = named_data(ann_file, img_dir, voc=voc, split=split, limit=limit)
        named_voc = None if voc is None else (voc, split or DEFAULT_SPLIT)
        return DataSource(data, out or _cache_name(voc or data.ann_file), limit, None, named_voc)
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
    data = load_coco(*paths, limit)
    return DataSource(data, out or _cache_name(data.ann_file), limit, dataset_paths(config, "val"))


def _cache_name(source: Path) -> Path:
    """A cache in this folder, named after a VOC folder, or the folder of an annotation file."""
    source = source.resolve()
    folder = source if source.is_dir() else source.parent
    folder = folder.parent if folder.name == "annotations" else folder
    return Path(f"{folder.name or 'cache'}.zarr")


def named_data(
    ann_file: Path | None,
    img_dir: Path | None,
    *,
    voc: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> DetectionData:
    """The data set of `--ann-file` and `--img-dir`, or of `--voc` and `--split`.

    Raises:
        KdpipeError: Options that exclude each other, or are missing; or bad data.
    """
    if voc is None and split is not None:
        raise KdpipeError("--split names an image set of a VOC folder: give the folder, too: --voc.")
    if voc is not None:
        if ann_file is not None or img_dir is not None:
            raise KdpipeError("Give either --voc (with --split), or --ann-file and --img-dir, not both.")
        return load_voc(voc, split or DEFAULT_SPLIT, limit)
    if ann_file is None or img_dir is None:
        raise KdpipeError("--ann-file and --img-dir belong together; one of them is missing.")
    return load_coco(ann_file, img_dir, limit)


def cached_data(
    cache: TeacherCache,
    *,
    ann_file: Path | None,
    img_dir: Path | None,
    voc: Path | None = None,
    split: str | None = None,
) -> tuple[DetectionData, DetectionData | None]:
    """The images that a cache was made of, and the validation images that belong to them, where they are on disk.

    Args:
        cache: The cache.
        ann_file: Where the annotation file moved.
        img_dir: Where the images moved.
        voc: Where the VOC folder moved that it was made of.
        split: The image set of the VOC folder, where it has another name now.

    Returns:
        Both with the classes of the cache.

    Raises:
        KdpipeError: They are not where the cache says, or have other classes.
    """
    source = cache.metadata["data"]
    if voc is None and ann_file is None and "voc" in source:
        voc = Path(source["voc"])
    if voc is not None:
        if not voc.exists():
            raise KdpipeError(f"{voc} is not there, which {cache.path} was made of. Say where it moved: --voc.")
        data = named_data(ann_file, img_dir, voc=voc, split=split or source.get("split"), limit=source["limit"])
    else:
        ann_file = ann_file or Path(source["ann_file"])
        img_dir = img_dir or Path(source["img_dir"])
        for path, option in ((ann_file, "--ann-file"), (img_dir, "--img-dir")):
            if not path.exists():
                raise KdpipeError(f"{path} is not there, which {cache.path} was made of. Say where it moved: {option}.")
        data = named_data(ann_file, img_dir, split=split, limit=source["limit"])
    val, whose = named_val(source["val"]), f"the cache {cache.path.name}"
    return (
        match_classes(data, cache.spec.class_names, whose),
        val and match_classes(val, cache.spec.class_names, whose),
    )


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
