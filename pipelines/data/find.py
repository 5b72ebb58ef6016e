"""Which images and annotations a command works on, when its options say so and when they do not."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config

from kdpipe.cache.errors import KdpipeError, present
from kdpipe.cache.read.reader import TeacherCache
from kdpipe.pipelines.data.datasets import DetectionData, load_bdd, load_coco, load_voc
from kdpipe.pipelines.data.options import DataOptions, ValOptions
from kdpipe.pipelines.detectors.mmdet2 import dataset_paths

__all__ = ["DataSource", "cached_source", "find_data", "training_data", "val_source"]


DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class DataSource:
    """Where images and annotations are; `load` reads them.

    Attributes:
        named: COCO JSON or BDD100K's labels, and a folder; or a Pascal VOC folder, whose split is `train` by default.
        limit: Only the first so many images.
        val: Annotation file (COCO JSON) and image folder of the validation images that belong to them.

    Raises:
        KdpipeError: Options that exclude each other, or are missing.
    """

    named: DataOptions
    limit: int | None = None
    val: tuple[Path, Path] | None = None

    def __post_init__(self) -> None:
        _check_named(self.named, "--")

    @property
    def images(self) -> Path:
        """Folder of the images."""
        voc = self.named.voc
        return present(self.named.img_dir, "the folder of the images") if voc is None else voc / "JPEGImages"

    def load(self) -> DetectionData:
        """Read and check the annotations.

        Raises:
            KdpipeError: Bad data.
        """
        if self.named.voc is not None:
            return load_voc(self.named.voc, self.named.split or DEFAULT_SPLIT, self.limit)
        if self.named.bdd is not None:
            return load_bdd(self.named.bdd, self.images, self.limit)
        return load_coco(present(self.named.ann_file, "the annotation file"), self.images, self.limit)

    def record(self) -> dict[str, Any]:
        """What a cache remembers of it, as JSON values."""
        named = self.named
        if named.voc is not None:
            place = {"voc": str(named.voc.resolve()), "split": named.split or DEFAULT_SPLIT}
        elif named.bdd is not None:
            place = {"bdd": str(named.bdd.resolve())}
        else:
            place = {"ann_file": str(present(named.ann_file, "the annotation file").resolve())}
        return {
            **place,
            "img_dir": str(self.images.resolve()),
            "limit": self.limit,
            "val": [str(path.resolve()) for path in self.val] if self.val else None,
        }

    def cache_path(self) -> Path:
        """A cache in this folder, named after the VOC folder, BDD100K's file, or the folder of the annotation file."""
        if self.named.bdd is not None:
            return Path(f"{self.named.bdd.stem}.zarr")
        source = (self.named.voc or self.named.ann_file or Path()).resolve()
        folder = source if source.is_dir() else source.parent
        folder = folder.parent if folder.name == "annotations" else folder
        return Path(f"{folder.name or 'cache'}.zarr")


def _check_named(named: DataOptions, prefix: str) -> None:
    """Refuses options that exclude each other, or are missing; `prefix` is that of their names."""
    labels = [named.ann_file, named.bdd]
    if named.voc is not None:
        if named.img_dir is not None or any(labels):
            raise KdpipeError(
                f"Give either {prefix}voc (with {prefix}split), or {prefix}ann-file or {prefix}bdd and "
                f"{prefix}img-dir, not both."
            )
        return
    if named.split is not None:
        raise KdpipeError(f"{prefix}split names an image set of a VOC folder: give the folder, too: {prefix}voc.")
    if all(labels):
        raise KdpipeError(f"Give either {prefix}ann-file (COCO JSON) or {prefix}bdd (labels of BDD100K), not both.")
    if named.img_dir is None or not any(labels):
        raise KdpipeError(
            f"{prefix}ann-file (or {prefix}bdd) and {prefix}img-dir belong together; one of them is missing."
        )


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
        return DataSource(data, limit)
    paths = dataset_paths(config, "train")
    if paths is None:
        raise KdpipeError(
            "The teacher's config names no COCO data set. Give --ann-file (or --bdd) and --img-dir, or --voc and "
            "--split."
        )
    if not paths[0].exists():
        raise KdpipeError(
            f"The teacher's config names the annotation file {paths[0]}, and there is none. "
            "Run where data/ lies, or give --ann-file (or --bdd) and --img-dir, or --voc and --split."
        )
    return DataSource(DataOptions(*paths), limit=limit, val=dataset_paths(config, "val"))


def cached_source(cache: TeacherCache, moved: DataOptions) -> DataSource:
    """Where the images are that a cache was made of, and the validation images that belong to them.

    Args:
        cache: The cache.
        moved: Where they moved since.

    Raises:
        KdpipeError: They are not where the cache says, or it does not say.
    """
    try:
        source = cache.metadata["data"]
        limit, val = source["limit"], source["val"] and (Path(source["val"][0]), Path(source["val"][1]))
        named = _recorded_options(source, moved)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise KdpipeError(f"The cache {cache.location} does not record which data set it was made of.") from error
    for option in ("voc", "bdd", "ann_file", "img_dir"):
        path = getattr(named, option)
        if path is not None and not path.exists():
            flag = f"--{option.replace('_', '-')}"
            raise KdpipeError(f"{path} is not there, which {cache.location} was made of. Say where it moved: {flag}.")
    return DataSource(named, limit, val)


def _recorded_options(source: Mapping[str, Any], moved: DataOptions) -> DataOptions:
    """What a cache records, with what is said of where it moved."""
    if moved.voc is None and moved.bdd is None and moved.ann_file is None:
        place = {name: Path(source[name]) for name in ("voc", "bdd") if name in source}
        moved = replace(moved, **(place or {"ann_file": Path(source["ann_file"])}))  # type: ignore[arg-type]
    if moved.voc is not None:
        return replace(moved, split=moved.split or source.get("split"))
    return replace(moved, img_dir=moved.img_dir or Path(source["img_dir"]))


def training_data(source: DataSource, val_options: ValOptions) -> tuple[DetectionData, DetectionData | None]:
    """Training images, and validation images: those named, or those of the source where they are on disk.

    Args:
        source: Where the training images are.
        val_options: The validation images.

    Raises:
        KdpipeError: Options that exclude each other; or bad data.
    """
    val = val_source(source, val_options)
    return source.load(), None if val is None else val.load()


def val_source(source: DataSource, val_options: ValOptions) -> DataSource | None:
    """Where the validation images are: those named, or those of the source where they are on disk; None without any.

    Args:
        source: Where the training images are.
        val_options: The validation images.

    Raises:
        KdpipeError: Options that exclude each other.
    """
    if val_options == ValOptions():
        if source.val is None or not all(path.exists() for path in source.val):
            return None
        return DataSource(DataOptions(*source.val))
    voc, img_dir = val_options.val_voc, val_options.val_img_dir
    if val_options.val_split is not None and voc is None:
        voc = source.named.voc
    if voc is not None and val_options.val_split is None:
        raise KdpipeError("--val-voc needs --val-split here: which image set is AP measured on?")
    if voc is None and (val_options.val_ann_file or val_options.val_bdd):
        img_dir = img_dir or source.images
    val_data = DataOptions(val_options.val_ann_file, img_dir, voc, val_options.val_split, val_options.val_bdd)
    _check_named(val_data, "--val-")
    return DataSource(val_data)
