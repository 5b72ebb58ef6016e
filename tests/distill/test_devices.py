"""What the losses are made of, on each device: the same numbers as on the CPU, forward and backward.

On a CPU, that compares the ways that other devices go with the shortcuts that a CPU takes.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdpipe.cache.quantize import quantize
from kdpipe.cache.views import map_boxes
from kdpipe.distill.losses.ckd import CKD
from kdpipe.distill.losses.ckd_negatives import NoNegatives, same_object
from kdpipe.distill.losses.ckd_queue import TeacherKeys
from kdpipe.distill.losses.prediction import (
    class_aware_regression_kd_loss,
    classification_kd_loss,
    dense_classification_kd_loss,
    recode_deltas,
    regression_kd_loss,
)
from kdpipe.distill.losses.sgfi import SGFI
from kdpipe.distill.outputs import BatchRois
from kdpipe.distill.rois.align import assign_levels, roi_align_assigned, roi_align_levels
from kdpipe.distill.rois.frames import ImageFrames
from kdpipe.distill.rois.pairing import pair_boxes
from kdpipe.distill.rois.sampling import RoiSampling, best_overlap, sample_rois
from kdpipe.distill.teacher.any_box import TeacherView, apply_teacher_head
from kdpipe.distill.teacher.heads.build import frozen_head
from kdpipe.distill.teacher.pyramids import StoredPyramid, TeacherPyramids
from kdpipe.pipelines.teacher.arithmetic import full_precision

if TYPE_CHECKING:
    from tests.distill.conftest import OtherDevices, Pair

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
Results = list[Tensor]


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    """Without TensorFloat-32, whose products have 10 bits."""
    with full_precision(torch.device("cuda")):
        yield


class Made:
    """Random tensors on a device, the same on every device."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device)

    def learned(self, *shape: int) -> Tensor:
        return self.normal(*shape).requires_grad_()

    def whole(self, high: int, count: int) -> Tensor:
        return torch.randint(0, high, (count,), generator=self._generator).to(self.device)

    def boxes(self, count: int, side: float = 60.0, within: float = 100.0) -> Tensor:
        corner, size = torch.rand(2, count, 2, generator=self._generator)
        return torch.cat([corner * within, corner * within + 3 + size * side], dim=1).to(self.device)

    def rois(self, count: int, images: int = 2) -> Tensor:
        boxes = self.boxes(count)
        return torch.cat([self.whole(images, count)[:, None].to(boxes), boxes], dim=1)

    def pyramid(self, channels: int = 6, images: int = 2) -> list[Tensor]:
        return [self.learned(images, channels, 160 // stride, 160 // stride) for stride in (4, 8, 16, 32)]

    def keys(self, count: int, dim: int = 20) -> TeacherKeys:
        ids = self.whole(4, count).sort().values
        return TeacherKeys(self.normal(count, dim), self.boxes(count), ids)


def gradients(value: Tensor, made: Made, learned: list[Tensor]) -> Results:
    """A tensor, and the gradients of a weighted sum of it."""
    return [value, *torch.autograd.grad((value * made.normal(*value.shape)).sum(), learned)]


def align_levels(made: Made, pair: "type[Pair]") -> Results:
    pyramid = made.pyramid()
    return gradients(roi_align_levels(pyramid, (4, 8, 16, 32), made.rois(50)), made, pyramid)


def align_assigned(made: Made, pair: "type[Pair]") -> Results:
    pyramid, rois = made.pyramid(), made.rois(50)
    pooled = roi_align_assigned(pyramid, (4, 8, 16, 32), rois, finest_scale=14)
    return [assign_levels(rois[:, 1:], 14, 4), *gradients(pooled, made, pyramid)]


def stored_pyramids(made: Made, pair: "type[Pair]") -> Results:
    """In whole numbers, of images of two sizes, one of them without a level that no box needs."""
    shapes = {0: (40, 20, 10, 5), 1: (48, 24, 12, 6), 2: (40, 20, 10, 5), 3: (48, 24, 12, 6)}
    stored: dict[int, StoredPyramid] = {}
    for image, sizes in shapes.items():
        levels = [quantize(made.normal(pair.channels, size, size).cpu(), torch.float16) for size in sizes]
        scale = torch.stack([scale.float() for _, scale in levels]).to(made.device)
        values = [values.to(made.device) for values, _ in levels]
        stored[image] = [*values[:3], None if image == 3 else values[3]], scale
    return [TeacherPyramids(stored, pair.spec).roi_align(made.rois(60, images=4))]


def pairs(made: Made, pair: "type[Pair]") -> Results:
    others = made.boxes(400)
    boxes = torch.cat([made.boxes(40), others[::10] + made.normal(40, 4).abs()])
    return [*pair_boxes(boxes, others, 0.5), *best_overlap(boxes, others)]


def samples(made: Made, pair: "type[Pair]") -> Results:
    truth = made.boxes(5)
    boxes = torch.cat([truth.repeat(20, 1) + made.normal(100, 4), made.boxes(100), truth])
    generator = torch.Generator().manual_seed(3)
    options = {"sampling": RoiSampling(num=64), "num_classes": 3, "generator": generator}
    sample = sample_rois(boxes, 200, truth, made.whole(3, 5), **options)  # type: ignore[arg-type]
    none = sample_rois(boxes, 200, truth[:0], made.whole(3, 0), **options)  # type: ignore[arg-type]
    return [*vars(sample).values(), *vars(none).values()]


def negatives(made: Made, pair: "type[Pair]") -> Results:
    keys = made.keys(200)
    own = keys[:50]
    rows = NoNegatives(own, keys, 0.3)[10:40]
    return [same_object(own.boxes, own.image_ids, keys.boxes, keys.image_ids, 0.3), rows]


def sgfi(made: Made, pair: "type[Pair]") -> Results:
    module = filled(SGFI(8, 6), made)
    student = made.learned(30, 4, 8, 7, 7)
    result = module(student, made.normal(30, 6, 7, 7))
    return [result.level, *gradients(result.loss, made, [student, *module.parameters()])]


def ckd(made: Made, pair: "type[Pair]") -> Results:
    """The fourth step, whose keys are of the first three, and fill the queue more than once."""
    module = filled(CKD(12, 20, dim=8, queue_size=100, anchors=3, projection="nonlinear"), made)
    for _ in range(4):
        student = made.learned(40, 12)
        result = module(student, made.keys(40), made.whole(3, 40))
    buffers = [buffer.double() for buffer in module.buffers()]
    figures = [result.top1, result.spread, result.queue]
    return [*figures, *buffers, *gradients(result.loss, made, [student, *module.parameters()])]


def predictions(made: Made, pair: "type[Pair]") -> Results:
    logits, teacher_logits, labels = made.learned(40, 4), made.normal(40, 4), made.whole(4, 40)
    deltas = made.learned(40, 3, 4)
    teacher_deltas = recode_deltas(made.normal(40, 3, 4), [0.0] * 4, [0.1] * 4, [0.0] * 4, [0.1, 0.1, 0.2, 0.2])
    losses = {
        logits: [
            classification_kd_loss(logits, teacher_logits),
            dense_classification_kd_loss(logits, teacher_logits),
        ],
        deltas: [
            regression_kd_loss(deltas, teacher_deltas, labels),
            regression_kd_loss(deltas, teacher_deltas[:, :1], labels),
            class_aware_regression_kd_loss(deltas, teacher_deltas, teacher_logits),
        ],
    }
    return [x for of, values in losses.items() for value in values for x in gradients(value, made, [of])]


def frames(made: Made, pair: "type[Pair]") -> Results:
    matrix = np.array([[-1.5, 0, 200], [0, 1.2, -3], [0, 0, 1]])
    samples = pair.batch(2)["data_samples"]
    samples[1].set_metainfo({"homography_matrix": matrix})
    boxes = ImageFrames.of(samples, torch.device(made.device)).original_boxes(made.rois(30))
    return [boxes, map_boxes(made.boxes(30), matrix)]


def teacher_head(made: Made, pair: "type[Pair]") -> Results:
    """At RoIs of three images, of which one is mirrored and one has none."""
    views = [
        TeacherView(kind, matrix, tuple(level[0].detach() for level in made.pyramid(pair.channels, 1)), size=(160, 160))
        for kind, matrix in (("exact", np.eye(3)), ("mirrored", np.diag([-1.0, 1, 1])), ("exact", np.eye(3)))
    ]
    rois = made.rois(30)
    rois[rois[:, 0] == 1, 1:] = map_boxes(rois[rois[:, 0] == 1, 1:], np.diag([-1.0, 1, 1]))
    labels = made.whole(4, 30)
    head = frozen_head(pair.state(pair.head()), pair.spec)
    needs = ("logits", "deltas", "embeddings", "roi_features")
    outputs = apply_teacher_head(views, BatchRois(rois, labels, labels < 3), head, pair.spec, needs)
    only = apply_teacher_head(views, BatchRois(rois, labels, labels < 3), head, pair.spec, needs[3:])
    return [*vars(outputs).values(), only.roi_features]


def cascade_teacher(made: Made, pair: "type[Pair]") -> Results:
    """Whose stages move the boxes."""
    stds = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1))
    spec = replace(pair.spec, cascade_stds=stds)
    state = {
        name.replace("bbox_head.", f"bbox_head.{stage}."): value
        for stage in range(len(stds))
        for name, value in pair.state(pair.head()).items()
    }
    levels = tuple(level[0].detach() for level in made.pyramid(pair.channels, 1))
    views = [TeacherView("exact", np.eye(3), levels, size=(160, 160))] * 2
    rois, labels = made.rois(30), made.whole(4, 30)
    needs = ("logits", "deltas", "embeddings")
    outputs = apply_teacher_head(views, BatchRois(rois, labels, labels < 3), frozen_head(state, spec), spec, needs)
    return [value for value in vars(outputs).values() if value is not None]


def filled(module: nn.Module, made: Made) -> Any:
    module = module.to(made.device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(made.normal(*parameter.shape) * 0.3)
    return module


PARTS: list[Callable[[Made, "type[Pair]"], Results]] = [
    align_levels,
    align_assigned,
    stored_pyramids,
    pairs,
    samples,
    negatives,
    sgfi,
    ckd,
    predictions,
    frames,
    teacher_head,
    cascade_teacher,
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", PARTS, ids=[part.__name__ for part in PARTS])
def test_a_part_gives_what_it_gives_on_the_cpu(
    part: Callable[..., Results], device: str, pair: "type[Pair]", other_devices: "OtherDevices"
) -> None:
    expected = part(Made("cpu"), pair)
    with other_devices.ways():
        actual = part(Made(device), pair)
    assert {x.device.type for x in actual} == {device}
    for a, b in zip(actual, expected, strict=True):
        scale = float(b.detach().abs().max()) if b.numel() and b.is_floating_point() else 0.0
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("device", DEVICES)
def test_no_boxes_keep_the_graph(device: str, pair: "type[Pair]", other_devices: "OtherDevices") -> None:
    made = Made(device)
    pyramid, logits, deltas = made.pyramid(), made.learned(0, 4), made.learned(0, 3, 4)
    sgfi, ckd = filled(SGFI(6, 6), made), filled(CKD(12, 20, dim=8, queue_size=100), made)
    with other_devices.ways():
        features = roi_align_levels(pyramid, (4, 8, 16, 32), made.rois(0))
        assigned = roi_align_assigned(pyramid, (4, 8, 16, 32), made.rois(0), finest_scale=14)
        losses = [
            assigned.sum(),
            sgfi(features, made.normal(0, 6, 7, 7)).loss,
            ckd(made.learned(0, 12), made.keys(0)).loss,
            classification_kd_loss(logits, made.normal(0, 4)),
            regression_kd_loss(deltas, made.normal(0, 3, 4), made.whole(4, 0)),
        ]
        torch.stack(losses).sum().backward()
    parameters = [*pyramid, *sgfi.parameters(), *ckd.parameters(), deltas, logits]
    assert all(loss.item() == 0 for loss in losses)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in parameters)
