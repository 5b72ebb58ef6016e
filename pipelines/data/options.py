"""Which images a command works on, as the command line says it. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["DataOptions", "ValOptions"]


@dataclass(frozen=True)
class DataOptions:
    """Images and their annotations; what is None is taken from elsewhere, such as a cache or a config.

    Attributes:
        ann_file: COCO JSON.
        img_dir: Folder of the images.
        voc: Pascal VOC folder, in place of both.
        split: Its image set.
    """

    ann_file: Path | None = None
    img_dir: Path | None = None
    voc: Path | None = None
    split: str | None = None


@dataclass(frozen=True)
class ValOptions:
    """Images that AP is measured on.

    Attributes:
        val_ann_file: COCO JSON.
        val_img_dir: Folder of the images; None is that of the training images.
        val_split: Image set of the VOC folder that is trained on, in place of both.
    """

    val_ann_file: Path | None = None
    val_img_dir: Path | None = None
    val_split: str | None = None
