"""Of one seed, all trainings of a student begin with the same weights and see the same images in the same views."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kdpipe.pipelines.training.seeding import SeedStepHook

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


class Watch:
    """What trainings begin with, and what they are shown."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.views: list[tuple[Any, ...]] = []
        begin = SeedStepHook.before_train_iter

        def watched(hook: SeedStepHook, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            if runner.iter == 0:
                student = getattr(runner.model, "student", runner.model)
                self.weights = {name: value.clone() for name, value in student.state_dict().items()}
            for sample, image in zip(data_batch["data_samples"], data_batch["inputs"], strict=True):
                self.views.append(
                    (runner.iter, sample.img_id, sample.flip, tuple(sample.img_shape), image.float().sum().item())
                )
            begin(hook, runner, batch_idx, data_batch)

        patch.setattr(SeedStepHook, "before_train_iter", watched)


def seen(
    kit: "Kit", work: Path, student: Path, name: str, *options: object
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    start = ("train-student", "--cache", kit.cache, "--student", student, "--recipe", "paper", "--batch-size", 4)
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        kit.run(*start, "--epochs", 2, "--work-dir", work / name, *options)
    return watch.weights, watch.views


# Multi-scale and a random crop, so that each image draws more than a flip.
CROPPED = """
_base_ = {base!r}
train_pipeline = [
    dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomChoiceResize", scales=[(128, 96), (112, 84), (96, 72)], keep_ratio=True),
    dict(type="RandomCrop", crop_size=(64, 64)),
    dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
"""


@pytest.mark.parametrize("family", ["two-stage", "retinanet"])
def test_methods_share_weights_order_and_views(kit: "Kit", work: Path, family: str) -> None:
    base = kit.student
    if family != "two-stage":
        base = work / "dense.py"
        base.write_text(kit.dense(family).pretty_text)
    student = work / "student.py"
    student.write_text(CROPPED.format(base=str(base)))
    weights, views = seen(kit, work, student, "none", "--methods", "none", "--workers", 0)
    assert len(views) == 16
    assert len({view[3:] for view in views}) > 8  # they are views, and not one
    choices: list[tuple[object, ...]] = [
        ("--methods", "sgfi,ckd,pred", "--workers", 0),
        ("--methods", "sgfi,ckd,pred", "--rois", "teacher", "-o", "distill.rois.num=16", "--workers", 0),
    ]
    for number, options in enumerate(choices):
        other_weights, other_views = seen(kit, work, student, str(number), *options)
        assert other_weights.keys() == weights.keys()
        assert [name for name in weights if not torch.equal(weights[name], other_weights[name])] == []
        assert other_views == views
    another, other_views = seen(kit, work, student, "another", "--methods", "none", "--workers", 0, "--seed", 1)
    assert any(not torch.equal(weights[name], another[name]) for name in weights)
    assert other_views != views
