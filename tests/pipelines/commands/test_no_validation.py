"""A training without validation images leaves checkpoints that are used as any other."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config

from kdpipe.cache.read.reader import open_cache

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


@pytest.fixture(scope="module")
def trained(kit: "Kit", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work directory of a teacher that was trained at another scale than its config says."""
    folder = tmp_path_factory.mktemp("trained") / "t"
    kit.run(*training(kit, folder))
    return folder


def training(kit: "Kit", folder: Path) -> tuple[object, ...]:
    options = ("--epochs", 1, "--scale", "96x72", "--batch-size", 4, "--workers", 0, "--work-dir", folder)
    return ("train-teacher", "--config", kit.student, *kit.data, *options)


def test_it_is_evaluated_cached_and_loaded_by_mmdet(kit: "Kit", work: Path, trained: Path) -> None:
    ckpt = trained / "teacher.pth"
    assert "AP50" in kit.run("evaluate", "--ckpt", ckpt, *kit.data).out
    assert "--ann-file" in kit.refused("evaluate", "--ckpt", ckpt)  # the images that it was trained on are no test
    kit.run("cache-teacher", "--ckpt", ckpt, *kit.data, "--proposals", 8, "--out", "c.zarr")
    assert open_cache(work / "c.zarr").spec.scale == (96, 72)
    config = Config.fromstring(torch.load(ckpt)["meta"]["cfg"], ".py")
    assert config.val_dataloader is None
    model = init_detector(config, str(ckpt), device="cpu")
    actual = inference_detector(model, str(next(kit.img.iterdir())))
    assert actual.metainfo["img_shape"] == (72, 96)
    assert model.dataset_meta["classes"] == kit.classes
