"""What `cache-teacher` says of mirrored targets."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdpipe.pipelines.data.datasets import load_coco, read_image
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.teacher.mirroring import MirrorError, mirror_errors
from kdpipe.pipelines.teacher.setup import CacheOptions, prepare_teacher, with_classes
from kdpipe.pipelines.teacher.teacher import Teacher, teacher_config

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


def setting(kit: "Kit", view: str = "identity", tier: str = "pyramid") -> Any:
    data = load_coco(kit.ann, kit.img)
    checkpoint = load_checkpoint(kit.teacher)
    options = CacheOptions(tier=tier, views=(view,), scale=(128, 96), proposals=40)
    teacher, spec = prepare_teacher(checkpoint, teacher_config(checkpoint, None), options, torch.device("cpu"))
    return teacher, *with_classes(spec, data, None, "the teacher")


def test_is_said_of_one_view_only(kit: "Kit", work: Path) -> None:
    for field in ("features", "embeddings", "logits", "deltas"):
        assert re.search(rf"{field}\W+-?[01]\.\d\d\W+\d+ %", kit.made.out), kit.made.out
    assert "4 images" in kit.made.out
    assert kit.made.out.splitlines()[-1].startswith(str(kit.cache))
    options = (*kit.source, *kit.VIEW, "--targets", "predictions", "--out", work / "x.zarr")
    ended = kit.run("cache-teacher", *options)
    assert "logits" in ended.out
    assert "embeddings" not in ended.out
    assert "mirrored" not in kit.run("cache-teacher", *options).out  # nothing new
    both = kit.run("cache-teacher", *kit.source, *kit.VIEW, "--views", "identity,hflip", "--out", work / "y.zarr")
    assert "mirrored" not in both.out


@pytest.mark.parametrize("view", ["identity", "hflip"])
def test_is_the_distance_between_mirrored_and_true(kit: "Kit", view: str) -> None:
    """Against figures from the teacher's own answers at the boxes and their mirror images."""
    teacher, spec, data = setting(kit, view)
    found = mirror_errors(teacher, data, spec, 1)
    info = data.images[0]
    image = read_image(data.img_dir / info.file_name)
    model = teacher.model
    with torch.no_grad():
        levels = [teacher.pyramid(image, (96, 128), flip) for flip in (view == "hflip", view != "hflip")]
        proposals = model.rpn_head.predict(levels[0][0], [levels[0][1]], rescale=False)[0].bboxes
        truth = torch.from_numpy(data.gt_boxes(info.image_id))
        if view == "hflip":
            truth = 128 - truth[:, [2, 1, 0, 3]] * torch.tensor([1, -1, 1, -1]) - torch.tensor([0, 128, 0, 128])
        boxes = torch.cat([proposals, truth])
        there = torch.stack([128 - boxes[:, 2], boxes[:, 1], 128 - boxes[:, 0], boxes[:, 3]], dim=1)
        rois = [torch.cat([torch.zeros(len(x), 1), x], dim=1) for x in (boxes, there)]
        said, true = (model.roi_head._bbox_forward(x[0], r) for x, r in zip(levels, rois, strict=True))
    sign = torch.tensor([-1.0, 1, 1, 1]).repeat(6)
    pairs = {
        "features": (said["bbox_feats"].flip(-1), true["bbox_feats"]),
        "logits": (said["cls_score"], true["cls_score"]),
        "deltas": (said["bbox_pred"] * sign, true["bbox_pred"]),
    }
    for name, (left, right) in pairs.items():
        a, b = left.flatten(1).numpy(), right.flatten(1).numpy()
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert found[name].boxes == len(boxes)
        assert found[name].cosine == pytest.approx(cosines.mean(), abs=1e-4), name
        assert found[name].relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-3), name
        assert found[name].relative > 0.01


def test_a_teacher_that_is_its_own_mirror_image_has_none(kit: "Kit", monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, spec, data = setting(kit)
    see = Teacher.see

    def symmetric(self: Teacher, pixels: Tensor, **known: Any) -> Any:
        levels, sample = see(self, pixels, **known)
        mirrored, _ = see(self, pixels.flip(-1), **known)
        return tuple((x + y.flip(-1)) / 2 for x, y in zip(levels, mirrored, strict=True)), sample

    monkeypatch.setattr(Teacher, "see", symmetric)
    error = mirror_errors(teacher, data, spec, 2)["features"]
    assert error.cosine > 0.999
    assert error.relative < 0.01


def test_images_that_cannot_be_read_are_left_out(kit: "Kit", work: Path) -> None:
    teacher, spec, data = setting(kit, tier="predictions")
    full = mirror_errors(teacher, data, spec, 3)
    assert set(full) == {"logits", "deltas"}
    images = work / "images"
    images.mkdir()
    for info in data.images[1:]:
        (images / info.file_name).write_bytes((data.img_dir / info.file_name).read_bytes())
    fewer = mirror_errors(teacher, replace(data, img_dir=images), spec, 3)
    assert 0 < fewer["logits"].boxes < full["logits"].boxes


def test_nothing_to_compare() -> None:
    error = MirrorError()
    assert (error.cosine, error.relative) == (0.0, 0.0)
