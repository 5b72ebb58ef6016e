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
        bdd: Detection labels of BDD100K, in place of `ann_file`.
    """

    ann_file: Path | None = None
    img_dir: Path | None = None
    voc: Path | None = None
    split: str | None = None
    bdd: Path | None = None


@dataclass(frozen=True)
class ValOptions:
    """Images that AP is measured on.

    Attributes:
        val_ann_file: COCO JSON.
        val_img_dir: Folder of the images; None is that of the training images.
        val_voc: Pascal VOC folder, in place of both; None is the one that is trained on, where `val_split` is given.
        val_split: Its image set.
        val_bdd: Detection labels of BDD100K, in place of `val_ann_file`.
    """

    val_ann_file: Path | None = None
    val_img_dir: Path | None = None
    val_voc: Path | None = None
    val_split: str | None = None
    val_bdd: Path | None = None
