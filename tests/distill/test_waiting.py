"""Where a step of distillation waits for a GPU: nowhere but in a few places, once each.

A GPU computes what was asked of it while Python goes on, until somebody asks for a value: how many boxes are positive,
which rows a mask selects. mmdet's assigners and samplers ask a lot; what is added to them should not. On a CPU, the
operations are counted that would wait for a GPU; on a GPU, torch says itself who waited.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kdpipe.cache
import kdpipe.distill
from kdpipe.distill.detector import DistilledDetector
from kdpipe.distill.losses.boxes import box_kd_loss
from kdpipe.distill.losses.ckd import CKD
from kdpipe.distill.losses.ckd_queue import TeacherKeys
from kdpipe.distill.losses.cross import cross_loss
from kdpipe.distill.losses.hard import hard_label_loss
from kdpipe.distill.losses.prediction import (
    class_aware_regression_kd_loss,
    classification_kd_loss,
    dense_classification_kd_loss,
    recode_deltas,
    regression_kd_loss,
)
from kdpipe.distill.losses.relations import relation_kd_loss
from kdpipe.distill.losses.sgfi import SGFI
from kdpipe.distill.teacher.any_box import TeacherView
from kdpipe.distill.teacher.maps import StoredMaps
from kdpipe.distill.teacher.targets import RoiTargets
from kdpipe.pipelines.teacher.arithmetic import full_precision

if TYPE_CHECKING:
    from tests.distill.conftest import OtherDevices, Pair

# mmdet's own heads use what is deprecated
pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{what}:UserWarning") for what in ("num_anchors", "meshgrid")]

OURS = Path(str(kdpipe.distill.__file__)).resolve().parent
CACHE = Path(str(kdpipe.cache.__file__)).resolve().parent
OTHERS = ("/mmdet/", "/mmengine/", "/mmcv/", "/mmcv_ops/")  # what waits below these is not the distillation's

WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "bincount", "argwhere"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "histc", "isin"),
}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


def who_asks() -> str | None:
    """The function of the distillation that is being executed, as MODULE.FUNCTION; None below mmdet."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if any(name in str(file) for name in OTHERS):
            return None
        is_ours = any(file.resolve().is_relative_to(folder) for folder in (OURS, CACHE))
        if is_ours and file.name != "rows.py":
            return f"{file.stem}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


class AskedOps(TorchDispatchMode):
    """Counts operations whose result has a size, or is a number of Python, that only the device knows."""

    def __init__(self, asked: "Counter[str]") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._asked = asked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = [
            x for x in (args[1] if name in INDEXED else ()) if x is not None and x.dtype in (torch.bool, torch.uint8)
        ]
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if (name in WAITING or masks or repeats) and (who := who_asks()):
            self._asked[who] += 1
        return func(*args, **(kwargs or {}))


class AskedCopies(TorchFunctionMode):
    """Counts copies between host and device that wait for it: by how they are written, since a CPU makes none."""

    def __init__(self, asked: "Counter[str]") -> None:
        super().__init__()
        self._asked = asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        to_host = func in (Tensor.tolist, Tensor.cpu, Tensor.numpy)
        to_device = func is Tensor.new_tensor or (
            func in (torch.tensor, torch.as_tensor) and options.get("device") is not None
        )
        device = [x for x in (*args[1:], options.get("device")) if isinstance(x, torch.device | str)]
        moves = func is Tensor.to and bool(device) and not options.get("non_blocking")
        index = args[1] if func is Tensor.__getitem__ else ()
        by_list = any(isinstance(x, list) for x in (index if isinstance(index, tuple) else (index,)))
        if (to_host or to_device or moves or by_list) and (who := who_asks()):
            self._asked[who] += 1
        return func(*args, **options)


@contextmanager
def watch_cpu(asked: "Counter[str]") -> Iterator[None]:
    with AskedOps(asked), AskedCopies(asked):
        yield


@contextmanager
def watch_cuda(asked: "Counter[str]") -> Iterator[None]:
    def show(message: Warning | str, *args: Any, **options: Any) -> None:
        if "called a synchronizing" in str(message) and (who := who_asks()):
            asked[who] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_what_would_wait_is_counted() -> None:
    """As if these lines were of the distillation."""
    x = torch.arange(6.0)
    lines = """
def asks(x, torch):
    x[x > 2]; x[x > 2] = 0; int(x[0]); bool(x.any()); x.nonzero(); x.tolist(); x.unique()
    x[[0, 2]]; x.new_tensor([1.0])
    torch.tensor([1], device=x.device); torch.tensor([1]).to(x.device); torch.equal(x, x)
    torch.repeat_interleave(x, torch.tensor([1, 2, 1, 0, 1, 1])); x.cpu(); x.masked_select(x > 2)

def goes_on(x, torch):
    x[torch.arange(2)]; torch.where(x > 2, x, 0.0).sum(); torch.tensor([1]).to(x.device, non_blocking=True); x.sort()
    x[:2]; x.new_full((), 1.0); x.argsort()[:2]; torch.arange(3, device=x.device)
"""
    made: dict[str, Any] = {}
    exec(compile(lines, str(OURS / "made_up.py"), "exec"), made)
    asked: Counter[str] = Counter()
    with watch_cpu(asked):
        made["asks"](x.clone(), torch)
        made["goes_on"](x, torch)
    assert asked == {"made_up.asks": 15}


# Losses


def normal(device: str, seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def keys(device: str, count: int) -> TeacherKeys:
    corner = normal(device, 1, count, 2).abs() * 50
    ids = torch.arange(count, device=device)
    return TeacherKeys(normal(device, 3, count, 20), torch.cat([corner, corner + 20], dim=1), ids // 10)


def loss_functions(device: str) -> dict[str, Callable[[], Tensor]]:
    """Losses of random inputs, which lie on the device already."""
    features, of_teacher = normal(device, 1, 20, 4, 8, 7, 7).requires_grad_(), normal(device, 2, 20, 6, 7, 7)
    logits, of_logits, labels = (
        normal(device, 3, 20, 4).requires_grad_(),
        normal(device, 4, 20, 4),
        torch.arange(20, device=device) % 4,
    )
    deltas, of_deltas = normal(device, 5, 20, 3, 4).requires_grad_(), normal(device, 6, 20, 3, 4)
    embeddings, anchors = normal(device, 7, 20, 12).requires_grad_(), labels % 3
    sgfi, ckd = SGFI(8, 6).to(device), CKD(12, 20, dim=8, queue_size=50).to(device)
    of_anchors = CKD(12, 20, dim=8, queue_size=50, anchors=3).to(device)
    coder = [0.0] * 4, [0.1] * 4, [0.0] * 4, [0.2] * 4
    return {
        "sgfi": lambda: sgfi(features, of_teacher).loss,
        "ckd": lambda: ckd(embeddings, keys(device, 20)).loss,
        "ckd of anchors": lambda: of_anchors(embeddings, keys(device, 20), anchors).loss,
        "cls": lambda: classification_kd_loss(logits, of_logits),
        "cls, dense": lambda: dense_classification_kd_loss(logits, of_logits),
        "reg": lambda: regression_kd_loss(recode_deltas(deltas, *coder), of_deltas, labels),
        "careg": lambda: class_aware_regression_kd_loss(deltas, of_deltas, of_logits),
        "hard": lambda: hard_label_loss(logits, deltas, labels, of_deltas[:, 0]),
        "dist": lambda: relation_kd_loss(logits, of_logits),
        "cross": lambda: cross_loss(logits, deltas, of_logits, of_deltas).loss,
        "box": lambda: box_kd_loss(deltas, of_deltas, of_logits),
    }


LOSSES = {
    "sgfi": {},
    "ckd": {"ckd_negatives._near": 1},  # which keys are of the same images
    "ckd of anchors": {"ckd_negatives._near": 1, "ckd.lifted": 1},  # how many boxes are of which anchor
    "cls": {},
    "cls, dense": {},
    "reg": {},
    "careg": {},
    "hard": {},
    "dist": {},
    "cross": {},
    "box": {},
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_hardly_wait(name: str, other_devices: "OtherDevices") -> None:
    loss, asked = loss_functions("cpu")[name], Counter[str]()
    loss().backward()
    with other_devices.ways(), watch_cpu(asked):
        loss().backward()
    assert asked == LOSSES[name]


@pytest.mark.cuda
@pytest.mark.parametrize("name", LOSSES)
def test_losses_hardly_wait_on_cuda(name: str) -> None:
    loss, asked = loss_functions("cuda")[name], Counter[str]()
    loss().backward()
    with watch_cuda(asked):
        loss().backward()
    assert set(asked) <= set(LOSSES[name])


@pytest.mark.cuda
@pytest.mark.parametrize("name", [name for name, asked in LOSSES.items() if not asked])
def test_losses_run_where_waiting_is_an_error(name: str) -> None:
    loss = loss_functions("cuda")[name]
    loss().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: not all that waits is found
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# Whole steps


def detector(pair: "type[Pair]", kind: str) -> DistilledDetector:
    torch.manual_seed(0)
    methods = ("sgfi", "ckd", "pred", "reg") if kind == "faster_rcnn" else ("sgfi", "ckd", "cls")
    options: dict[str, Any] = {"ckd": {"dim": 8, "queue_size": 64}, "roi_sampling": {"num": 32}, "share_interval": 1}
    source = pair.source(pair.state(pair.head()))
    model = DistilledDetector(pair.student_of(kind), pair.spec.to_json(), methods, source, **options)
    model.init_weights()
    if kind in ("retinanet", "fcos"):  # boxes as large as objects, as after some training
        for name, weight in model.student.bbox_head.named_parameters():
            if name.endswith(("_reg.weight", "_cls.weight")):
                torch.nn.init.normal_(weight, std=0.1)
    if kind == "fcos":
        torch.nn.init.constant_(model.student.bbox_head.conv_reg.bias, 2.3)
    return model.train()


def levels(pair: "type[Pair]", seed: int) -> tuple[Tensor, ...]:
    sizes = [64 // stride for stride in pair.spec.strides[: pair.spec.roi_levels]]
    return tuple(normal("cpu", seed + level, pair.channels, size, size) for level, size in enumerate(sizes))


def targets(pair: "type[Pair]", rois: str, seed: int) -> Any:
    """What a teacher says of an image: of RoIs of the student, or of cached ones, with RoI features or the pyramid."""
    if rois == "student":
        return TeacherView("exact", np.eye(3), levels(pair, seed), size=(64, 64))
    corner = normal("cpu", seed, 12, 2).abs() * 15
    boxes = torch.cat([corner, corner + 4 + normal("cpu", seed + 1, 12, 2).abs() * 20], dim=1)
    boxes[:3] = pair.batch(2)["data_samples"][seed].gt_instances.bboxes
    labels = torch.tensor([0, 1, 2, 0] + [pair.classes] * 8)
    heads: dict[str, Any] = {
        "logits": normal("cpu", seed + 2, 12, 4).half(),
        "deltas": normal("cpu", seed + 3, 12, 3, 4).half(),
        "embeddings": normal("cpu", seed + 4, 12, pair.width).half(),
    }
    if rois == "cached":
        features = normal("cpu", seed + 5, 4, pair.channels, 7, 7)
        return RoiTargets(boxes, labels, 4, "exact", roi_features=features, **heads)
    maps = StoredMaps(np.eye(3), levels(pair, seed), None, (64, 64))
    return RoiTargets(boxes, labels, 4, "exact", maps=maps, teacher_boxes=boxes[:4], **heads)


# How many there are, once each: RoIs that are none, keys of the same images; and positives, in the backward pass of
# mmdet's own loss, through which the shares of the losses go
AT_ALL_ROIS = {"align.roi_align_levels": 1, "ckd_negatives._near": 1}
OF_MMDET = {"shares.gradient_shares": 1}
# images of the same size, and RoIs on each level
OF_PYRAMIDS = {"pyramids.roi_align": 1, "align.roi_align_assigned": 1}
# images with RoIs
OF_HEAD = {"any_box._in_teachers_view": 1, **OF_PYRAMIDS}
# RoIs of each image, RoIs with a partner, and these on each level
PAIRED = {"dense_forward.outputs_at": 2, "dense_forward._at": 1, "targets.pair_with": 1}
# of each of the two images: boxes with an area, positives, negatives; then as above
SAMPLED = {
    "proposals.propose": 2,
    "sampling._draw": 4,
    "dense_forward.sampled": 1,
    "dense_forward._at": 1,
    "any_box.pair_with": 1,
}
ANCHORS = {"ckd.lifted": 1}

STEPS: dict[tuple[str, str], dict[str, int]] = {
    ("faster_rcnn", "cached"): AT_ALL_ROIS | OF_MMDET,
    ("faster_rcnn", "pyramid"): AT_ALL_ROIS | OF_MMDET | OF_PYRAMIDS,
    ("faster_rcnn", "student"): AT_ALL_ROIS | OF_MMDET | OF_HEAD,
    ("cascade_rcnn", "cached"): dict.fromkeys(AT_ALL_ROIS | OF_MMDET, 3)
    | {"align.roi_align_levels": 1},  # the same RoIs
    ("cascade_rcnn", "student"): dict.fromkeys(AT_ALL_ROIS | OF_MMDET | OF_HEAD, 3),
    ("retinanet", "cached"): AT_ALL_ROIS | PAIRED | ANCHORS,
    ("retinanet", "student"): AT_ALL_ROIS | SAMPLED | OF_HEAD | ANCHORS | {"outputs.positive_rows": 1},
    ("fcos", "cached"): AT_ALL_ROIS | PAIRED,
    ("fcos", "student"): AT_ALL_ROIS | SAMPLED | OF_HEAD | {"outputs.positive_rows": 1},
}


def step(pair: "type[Pair]", kind: str, rois: str, device: str) -> Callable[[], dict[str, Any]]:
    """A step of a training, up to its losses; images and targets are on the device already."""
    model = detector(pair, kind).to(device)
    prepared = model.data_preprocessor.student(pair.batch(2), True)
    batch = [targets(pair, rois, seed).to(device) for seed in range(2)]

    def losses() -> dict[str, Any]:
        torch.manual_seed(5)
        result: dict[str, Any] = model(prepared["inputs"], prepared["data_samples"], mode="loss", targets=batch)
        return result

    return losses


@pytest.mark.parametrize(("kind", "rois"), STEPS)
def test_a_step_hardly_waits(kind: str, rois: str, pair: "type[Pair]", other_devices: "OtherDevices") -> None:
    losses, asked = step(pair, kind, rois, "cpu"), Counter[str]()
    expected = losses()
    with other_devices.ways(), watch_cpu(asked):
        found = losses()
    assert asked == STEPS[kind, rois]
    assert found.keys() == expected.keys()
    assert found["kd_positive"] > 0
    assert found["loss_sgfi"] > 0


@pytest.mark.cuda
@pytest.mark.parametrize(("kind", "rois"), STEPS)
def test_a_step_hardly_waits_on_cuda(kind: str, rois: str, pair: "type[Pair]") -> None:
    losses, asked = step(pair, kind, rois, "cuda"), Counter[str]()
    losses()
    with watch_cuda(asked):
        losses()
    assert set(asked) <= set(STEPS[kind, rois])


def step_of_maps(pair: "type[Pair]", kind: str, device: str) -> Callable[[], dict[str, Any]]:
    """As `step`, of the losses of whole feature maps; the second image is mirrored."""
    torch.manual_seed(0)
    source, methods = pair.source({}), ("whole", "gt-mask", "anchor-mask", "gaussian-mask", "pkd")
    options: dict[str, Any] = {"share_interval": 0}
    model = DistilledDetector(pair.student_of(kind), pair.spec.to_json(), methods, source, **options).to(device).train()
    prepared = model.data_preprocessor.student(pair.batch(2), True)
    pyramids = [
        tuple(normal("cpu", seed, pair.channels, 64 // x, 64 // x).to(device) for x in pair.spec.strides)
        for seed in range(2)
    ]
    matrices = np.eye(3), np.array([[-1.0, 0, 64], [0, 1, 0], [0, 0, 1]])
    batch = [TeacherView("exact", *view, size=(64, 64)) for view in zip(matrices, pyramids, strict=True)]

    def losses() -> dict[str, Any]:
        torch.manual_seed(5)
        result: dict[str, Any] = model(prepared["inputs"], prepared["data_samples"], mode="loss", targets=batch)
        return result

    return losses


FAMILIES = ("faster_rcnn", "cascade_rcnn", "retinanet", "fcos")


@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_of_maps_do_not_wait(kind: str, pair: "type[Pair]", other_devices: "OtherDevices") -> None:
    losses, asked = step_of_maps(pair, kind, "cpu"), Counter[str]()
    with other_devices.ways(), watch_cpu(asked):
        found = losses()
    assert asked == {"structure.base_anchors": 5}  # of each level; they are on the CPU
    assert all(found[name] > 0 for name in ("loss_whole", "loss_gt_mask", "loss_anchor_mask", "loss_pkd"))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_of_maps_do_not_wait_on_cuda(kind: str, pair: "type[Pair]") -> None:
    losses, asked = step_of_maps(pair, kind, "cuda"), Counter[str]()
    first = losses()
    with watch_cuda(asked):
        losses()
    assert not asked
    expected = step_of_maps(pair, kind, "cpu")()
    for name in ("loss_whole", "loss_gt_mask", "loss_anchor_mask", "loss_gaussian_mask", "loss_pkd"):
        assert first[name].item() == pytest.approx(expected[name].item(), rel=1e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_at_cached_rois_are_those_of_the_cpu(kind: str, pair: "type[Pair]") -> None:
    with full_precision(torch.device("cuda")):
        expected, found = (step(pair, kind, "cached", device)() for device in ("cpu", "cuda"))
    names = [name for name in expected if name in ("loss_sgfi", "loss_ckd") or name.startswith(("loss_kd", "kd_"))]
    assert len(names) >= 8
    for name in names:
        assert found[name].is_cuda
        torch.testing.assert_close(found[name].cpu(), expected[name], rtol=1e-3, atol=1e-6)
