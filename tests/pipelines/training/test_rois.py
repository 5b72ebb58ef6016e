"""`train-student --rois`: who chooses the RoIs, what is read for that, and what is said."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

from kdpipe.cache.read.reader import TeacherCache, open_cache
from kdpipe.distill.teacher.heads.fc import TeacherHeadError
from kdpipe.distill.teacher.source import CachedTargets, check_serves_student_rois
from kdpipe.distill.teacher.targets import map_tensors

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


def log(work_dir: Path) -> list[dict[str, float]]:
    (file,) = work_dir.glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[str, ...], Any]]:
    """Fields and levels of each reading of targets."""
    calls: list[tuple[tuple[str, ...], Any]] = []
    read = TeacherCache.targets

    def watch(self: TeacherCache, image_id: int, view: str = "identity", **options: Any) -> Any:
        calls.append((tuple(options["fields"]), options.get("levels")))
        return read(self, image_id, view, **options)

    monkeypatch.setattr(TeacherCache, "targets", watch)
    return calls


def test_the_student_chooses_where_it_is_asked_to(kit: "Kit", work: Path, reads: list[Any]) -> None:
    ended = kit.train_student(work / "w", "--rois", "student")
    assert "RoIs: those of the student (asked for)." in ended.out
    assert {fields for fields, _ in reads[2:]} == {("features",)}  # the first two look at the head
    assert {tuple(levels) for _, levels in reads[2:]} == {(0, 1, 2, 3)}
    assert len(reads) == 2 + 8
    steps = log(work / "w")
    # the student's sampler takes 32 RoIs of an image, at most 8 of them positive
    assert all(0 < row["kd_positive"] <= 4 * 8 for row in steps)
    assert all(row["kd_positive"] + row["kd_negative"] <= 4 * 32 for row in steps)


@pytest.mark.parametrize(("asked", "why"), [((), "the default with a cache"), (("--rois", "teacher"), "asked for")])
def test_the_teacher_chooses(kit: "Kit", work: Path, reads: list[Any], asked: tuple[str, ...], why: str) -> None:
    ended = kit.train_student(work / "w", *asked, "-o", "distill.rois.num=16")
    assert f"RoIs: those of the teacher ({why})." in ended.out
    assert ("boxes", "logits", "deltas", "embeddings") in {fields for fields, _ in reads}
    assert all(row["kd_positive"] + row["kd_negative"] <= 4 * 16 for row in log(work / "w"))


@pytest.mark.parametrize("tier", ["objects", "predictions"])
def test_a_cache_without_pyramid_serves_the_teachers_rois(kit: "Kit", work: Path, tier: str) -> None:
    cache = work / "x.zarr"
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--targets", tier, "--out", cache)
    ended = kit.train_student(work / "w", "--methods", "cls", cache=cache)
    reason = f"its tier '{tier}' holds no feature pyramid (--targets pyramid does)"
    assert "RoIs: those of the teacher (the default with a cache)." in ended.out
    command = kit.student_command(work / "v", "--methods", "cls", "--rois", "student", cache=cache)
    message = kit.refused(*command)
    assert f"cannot serve --rois student: {reason}. Use --rois teacher." in message


def test_a_damaged_head_is_said(kit: "Kit", work: Path) -> None:
    cache = work / "x.zarr"
    shutil.copytree(kit.cache, cache)
    (weight,) = cache.glob("head/*/roi_head.bbox_head.fc_cls.weight")
    shutil.rmtree(weight)
    message = kit.refused(*kit.student_command(work / "w", "--rois", "student", cache=cache))
    assert "The teacher's head" in message
    assert "damaged" in message
    dense = ("--student", kit.DENSE["retinanet"], "-o", "model.backbone.init_cfg=None")
    message = kit.refused(*kit.student_command(work / "w", *dense, cache=cache))  # whose default methods ask the head
    assert "The teacher's head" in message
    assert "damaged" in message
    ended = kit.train_student(work / "w", "--methods", "cls", cache=cache)  # at the cached boxes, nobody asks it
    assert "RoIs: those of the teacher" in ended.out


def test_a_head_that_does_not_give_what_is_cached_is_found(kit: "Kit", monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(kit.cache)
    check_serves_student_rois(cache)
    right = cache.head()
    wrong = {name: torch.rand_like(value) if "shared_fcs.1" in name else value for name, value in right.items()}
    monkeypatch.setattr(TeacherCache, "head", lambda self: wrong)
    with pytest.raises(TeacherHeadError, match=r"% off"):
        check_serves_student_rois(cache)


def test_options_for_the_teachers_rois_are_refused_with_those_of_the_student(kit: "Kit", work: Path) -> None:
    message = kit.refused(*kit.student_command(work / "w", "--rois", "student", "-o", "distill.rois.num=16"))
    assert "distill.rois.num is for RoIs that the teacher chose" in message
    assert "--rois teacher" in message


def test_stages_one_by_one_are_for_cascades_and_the_students_rois(kit: "Kit", work: Path) -> None:
    command = kit.student_command(work / "w", "-o", "distill.stagewise=True")
    assert "the teacher has 1 and the student 1. Leave it out." in kit.refused(*command, "--rois", "student")
    assert "add --rois student" in kit.refused(*command)


def test_the_control_without_a_teacher(kit: "Kit", work: Path) -> None:
    for rois in ("teacher", "student"):
        kit.train_student(work / rois, "--methods", "hard", "--rois", rois)
        assert all(row["loss_hard"] > 0 for row in log(work / rois))


def test_no_rois_without_losses(kit: "Kit", work: Path) -> None:
    assert "RoIs" not in kit.train_student(work / "w", "--methods", "none").out


@pytest.mark.parametrize(("dtype", "stored"), [("int8", torch.int8), ("int4", torch.uint8)])
@pytest.mark.parametrize("roi_source", ["student", "teacher"])
def test_all_of_a_target_is_pinned_as_it_is_stored(
    kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch, roi_source: str, dtype: str, stored: torch.dtype
) -> None:
    cache, batches = work / "x.zarr", []
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--dtype", dtype, "--out", cache)
    give = CachedTargets.targets

    def watched(self: CachedTargets, data: Any, device: torch.device) -> Any:
        batches.append(data["targets"])
        return give(self, data, device)

    monkeypatch.setattr(CachedTargets, "targets", watched)
    kit.train_student(work / "w", "--rois", roi_source, cache=cache)
    pinned: list[Tensor] = []

    def pin(self: Tensor) -> Tensor:
        pinned.append(self.clone())
        return pinned[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    for target in pin_memory(batches[0]):  # as torch's loaders call it
        found = tensors(target)
        assert {id(tensor) for tensor in found} <= {id(tensor) for tensor in pinned}
        assert any(tensor.dtype == stored and tensor.dim() == 3 for tensor in found)  # a level of a pyramid


def tensors(target: Any) -> list[Tensor]:
    """All tensors of a target."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(target, keep)
    assert found
    return found
