"""Which options name a data set together, and which exclude each other."""

from pathlib import Path

import pytest

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.data.find import DataSource, training_data
from kdpipe.pipelines.data.options import DataOptions, ValOptions

FILE, FOLDER = Path("x.json"), Path("x")


@pytest.mark.parametrize(
    ("name_in_message", "message"),
    [
        (DataOptions(), "--ann-file .or --bdd. and --img-dir belong together"),
        (DataOptions(FILE), "belong together"),
        (DataOptions(img_dir=FOLDER), "belong together"),
        (DataOptions(bdd=FILE), "belong together"),
        (DataOptions(FILE, FOLDER, split="val"), "--split names an image set of a VOC folder"),
        (DataOptions(voc=FOLDER, img_dir=FOLDER), "Give either --voc .* not both"),
        (DataOptions(voc=FOLDER, bdd=FILE), "Give either --voc .* not both"),
        (DataOptions(FILE, FOLDER, bdd=FILE), "Give either --ann-file .* or --bdd"),
    ],
)
def test_options_that_are_no_data_set(name_in_message: DataOptions, message: str) -> None:
    with pytest.raises(KdpipeError, match=message):
        DataSource(name_in_message)


@pytest.mark.parametrize(
    ("name_in_message", "message"),
    [
        (ValOptions(val_img_dir=FOLDER), "--val-ann-file .or --val-bdd. and --val-img-dir belong together"),
        (ValOptions(val_ann_file=FILE, val_bdd=FILE), "Give either --val-ann-file .* or --val-bdd"),
        (ValOptions(val_voc=FOLDER), "--val-voc needs --val-split"),
        (ValOptions(val_split="val"), "give the folder, too: --val-voc"),
        (ValOptions(val_voc=FOLDER, val_split="val", val_ann_file=FILE), "Give either --val-voc .* not both"),
    ],
)
def test_options_that_are_no_validation_images(name_in_message: ValOptions, message: str) -> None:
    """Before any annotation is read: the training images are not there."""
    with pytest.raises(KdpipeError, match=message):
        training_data(DataSource(DataOptions(FILE, FOLDER)), name_in_message)


def test_names_of_caches(tmp_path: Path) -> None:
    (tmp_path / "VOC2007").mkdir()
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for options, name in (
        (DataOptions(bdd=tmp_path / "labels" / "det_20" / "det_train.json", img_dir=FOLDER), "det_train"),
        (DataOptions(voc=tmp_path / "VOC2007"), "VOC2007"),
        (DataOptions(tmp_path / "coco" / "annotations" / "a.json", FOLDER), "coco"),
    ):
        assert DataSource(options).cache_path() == Path(f"{name}.zarr")
