"""`train-student` on a GPU: gone on with, run twice, beside the live teacher, and how targets get there."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from kdpipe.cache.read.reader import open_cache
from kdpipe.distill.teacher.source import CachedTargets
from kdpipe.distill.teacher.targets import map_tensors
from kdpipe.pipelines.teacher.arithmetic import full_precision

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:.*meshgrid:UserWarning"),  # of mmdet's FCOS head
    pytest.mark.filterwarnings("ignore:.*Synchronization debug mode:UserWarning"),
]

LOGGED = ("-o", "default_hooks.logger.interval=1", "-o", "log_processor.window_size=1")
QUEUE = ("-o", "distill.ckd.queue_size=256")


@pytest.fixture(scope="module")
def students(kit: "Kit", tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[object, ...]]:
    """Options that name a student, which starts with proposals that rounding does not reorder."""
    folder = tmp_path_factory.mktemp("students")
    options: dict[str, tuple[object, ...]] = {}
    for family, config in {"faster": kit.config(channels=8, fc=24), "retinanet": kit.dense("retinanet")}.items():
        path = kit.save_detector(folder / f"{family}.pth", config)
        checkpoint = torch.load(path, weights_only=True)
        for name, weight in checkpoint["state_dict"].items():
            if name.endswith("retina_cls.weight"):
                torch.nn.init.normal_(weight, std=0.5)
        torch.save(checkpoint, path)
        (folder / f"{family}.py").write_text(config.pretty_text)
        options[family] = ("--student", folder / f"{family}.py", "-o", f"load_from={path}")
    return options


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Convolutions with all bits of float32; and what a training with `deterministic` switches on goes off again."""
    with full_precision(torch.device("cuda")):
        torch.backends.cudnn.deterministic = False  # as trainings have it
        yield
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)


def rows(work_dir: Path) -> list[dict[str, float]]:
    """What was logged of each step, of all runs in a work directory one after the other."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"), key=lambda file: file.stat().st_mtime_ns)
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def losses(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if "loss" in name or name == "kd_positive"}


def weights(work_dir: Path) -> dict[str, Tensor]:
    path = work_dir / "student.pth"
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return state


def straight_and_resumed(
    kit: "Kit", work: Path, *options: object
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """What is logged of two epochs of two steps, and of the same with a stop between them."""
    kit.train_student(work / "straight", "--epochs", 2, *LOGGED, *options)
    kit.interrupted(*kit.student_command(work / "stopped", "--epochs", 2, *LOGGED, *options))
    kit.train_student(work / "stopped", "--epochs", 2, *LOGGED, *options, "--resume")
    straight, resumed = rows(work / "straight"), rows(work / "stopped")
    assert len(straight) == len(resumed) == 4
    return straight, resumed


@pytest.mark.parametrize("family", ["faster", "retinanet"])
def test_a_resumed_training_has_the_losses_of_the_undisturbed_one(
    kit: "Kit", work: Path, students: dict[str, Any], family: str
) -> None:
    for step, (one, two) in enumerate(zip(*straight_and_resumed(kit, work, *students[family]), strict=True)):
        # sums on a GPU have no order: after a few steps another box may be in the sample
        assert losses(two) == pytest.approx(losses(one), rel=(1e-6, 1e-3, 0.1, 0.1)[step]), step


@pytest.mark.parametrize("family", ["faster", "retinanet"])
def test_a_deterministic_training_is_the_same_to_the_last_bit(
    kit: "Kit", work: Path, students: dict[str, Any], family: str
) -> None:
    options = ("-o", "randomness.deterministic=True", *students[family])
    with torch.compiler.set_stance("force_eager"):  # torchvision compiles its deterministic RoIAlign, to save memory
        straight, resumed = straight_and_resumed(kit, work, *options)
    assert [losses(row) for row in straight] == [losses(row) for row in resumed]
    one, two = weights(work / "straight"), weights(work / "stopped")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("family", ["faster", "retinanet"])
def test_cached_training_is_that_beside_the_live_teacher(
    kit: "Kit", work: Path, students: dict[str, Any], family: str
) -> None:
    cache = work / "x.zarr"
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--dtype", "float32", "--views", "identity,hflip", "--out", cache)
    options = (*LOGGED, *QUEUE, "--epochs", 1, *students[family])
    kit.train_student(work / "cached", *options, cache=cache)
    kit.run(*kit.online_command(work / "live", *options))
    cached, live = rows(work / "cached"), rows(work / "live")
    assert {"loss_sgfi", "loss_ckd", "loss_kd_cls"} <= cached[0].keys()
    for step, (one, two) in enumerate(zip(cached, live, strict=True)):
        assert losses(two) == pytest.approx(losses(one), rel=1e-3 if step else 1e-4), step


def tensors(targets: Any) -> list[Tensor]:
    """All tensors of the targets of some images."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    for target in targets:
        map_tensors(target, keep)
    return found


@pytest.mark.parametrize(("dtype", "stored"), [("int8", torch.int8), ("int4", torch.uint8)])
@pytest.mark.parametrize("rois", ["student", "teacher"])
def test_targets_come_from_pinned_memory_as_they_are_stored(
    kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch, rois: str, dtype: str, stored: torch.dtype
) -> None:
    cache = work / "x.zarr"
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--dtype", dtype, "--out", cache)
    batches: list[tuple[list[Tensor], list[Tensor]]] = []
    images: list[Tensor] = []
    give = CachedTargets.targets

    def watched(self: CachedTargets, data: Any, device: torch.device) -> Any:
        torch.cuda.set_sync_debug_mode("error")  # the copy must not wait
        targets = give(self, data, device)
        torch.cuda.set_sync_debug_mode("default")
        batches.append((tensors(data["targets"]), tensors(targets)))
        images.extend(data["inputs"])
        return targets

    monkeypatch.setattr(CachedTargets, "targets", watched)
    kit.train_student(work / "w", "--rois", rois, cache=cache, workers=2)
    assert len(batches) == 2
    assert all(image.is_pinned() for image in images)
    for sent, arrived in batches:
        assert all(tensor.is_pinned() for tensor in sent if tensor.numel())
        assert all(tensor.is_cuda for tensor in arrived)
        assert [tensor.dtype for tensor in arrived] == [tensor.dtype for tensor in sent]
        assert any(tensor.dtype == stored and tensor.dim() == 3 for tensor in arrived)  # a level of a pyramid


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_a_loud_teacher_does_not_overflow_half_precision(
    kit: "Kit", work: Path, students: dict[str, Any], amp: str
) -> None:
    checkpoint = torch.load(kit.teacher, weights_only=True)
    for name, value in checkpoint["state_dict"].items():
        if "fpn_convs" in name:
            value.mul_(100)
    torch.save(checkpoint, work / "loud.pth")
    data, cache = ("--ann-file", kit.ann, "--img-dir", kit.img), work / "x.zarr"
    kit.run("cache-teacher", "--ckpt", work / "loud.pth", *data, *kit.VIEW, "--dtype", "float16", "--out", cache)
    image_id = int(open_cache(cache).image_ids[0])
    levels = open_cache(cache).targets(image_id, fields=("features",), rows=()).features
    assert levels is not None
    assert levels[0] is not None
    assert levels[0].dtype == torch.float16
    assert levels[0].float().std() > 10
    kit.train_student(work / "w", "--amp", amp, "--epochs", 2, *LOGGED, *students["faster"], cache=cache)
    logged = rows(work / "w")
    assert len(logged) == 4
    for row in logged:
        assert all(math.isfinite(value) for value in row.values())
        assert row["loss_sgfi"] > 100  # a mean square
