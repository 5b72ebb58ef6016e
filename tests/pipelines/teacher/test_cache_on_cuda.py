"""A cache that is made on a GPU is that of the CPU, within rounding, and has the same bytes each time."""

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from kdpipe.cache.errors import present
from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.data.datasets import load_coco
from kdpipe.pipelines.runtime.devices import describe_device, torch_device
from kdpipe.pipelines.teacher.compare import compare_with_teacher, load_recorded_teacher

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

DEVICE = "cuda"
BOTH = ("--views", "identity,hflip")
# Ends as by `kill -9` at the 11th record, when some parts are committed. The first record is the trial's.
KILLED = """
import os, signal
from kdpipe.pipelines.teacher.teacher import Teacher
record, count = Teacher.record, 0
def counted(*args, **options):
    global count
    count += 1
    if count == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return record(*args, **options)
Teacher.record = counted
"""

pytestmark = pytest.mark.cuda


def command(kit: "Kit", out: Path, device: str, *options: object) -> tuple[object, ...]:
    return "cache-teacher", *kit.source, *kit.VIEW, *BOTH, *options, "--device", device, "--out", out


@pytest.fixture(scope="module")
def int8_cache(kit: "Kit", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made on the CPU."""
    out = tmp_path_factory.mktemp("int8") / "cpu.zarr"
    kit.run(*command(kit, out, "cpu", "--dtype", "int8"))
    return out


@pytest.mark.parametrize("tier", ["predictions", "embeddings", "objects", "pyramid"])
def test_float32_targets_are_those_of_the_cpu(kit: "Kit", work: Path, tier: str) -> None:
    """Compared at the same boxes: which of two equally good proposals comes first may differ."""
    out = work / "gpu.zarr"
    kit.run(*command(kit, out, DEVICE, "--targets", tier, "--dtype", "float32"))
    cache = open_cache(out)
    teacher = load_recorded_teacher(cache, kit.teacher, config=None, device=torch.device("cpu"), trust=False)
    errors = compare_with_teacher(cache, teacher, load_coco(kit.ann, kit.img), 4, Console(quiet=True))
    assert set(errors) == set(cache.spec.fields)
    for field, error in errors.items():
        assert error.count > 0, field
        assert error.magnitude > 0, field
        if field != "boxes":
            assert error.relative < 1e-3, field
        if field == "features":
            assert error.largest < 1e-2 * error.magnitude / error.count


@pytest.mark.parametrize(
    ("tier", "dtype"),
    [
        ("predictions", "float16"),
        ("embeddings", "int8"),
        ("objects", "int4"),
        ("pyramid", "int4"),
        ("pyramid", "int8"),
        ("pyramid", "float32"),
    ],
)
def test_two_runs_give_the_same_bytes(kit: "Kit", work: Path, tier: str, dtype: str) -> None:
    for name in ("first", "second"):
        kit.run(*command(kit, work / name, DEVICE, "--targets", tier, "--dtype", dtype))
    assert kit.tree(work / "first") == kit.tree(work / "second")


def test_killed_and_resumed_it_has_the_same_bytes(kit: "Kit", work: Path) -> None:
    small = ("--part-size", "32KiB")
    kit.run(*command(kit, work / "undisturbed", DEVICE, *small))
    arguments = map(str, command(kit, work / "x.zarr", DEVICE, *small))
    # no fork: CUDA does not work in one
    killed = subprocess.run([sys.executable, "-c", KILLED + kit.COMMAND, *arguments], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert 0 < len(open_cache(work / "x.zarr", allow_partial=True)) < 8
    kit.run(*command(kit, work / "x.zarr", DEVICE, *small))
    trees = [kit.tree(work / name) for name in ("x.zarr", "undisturbed")]
    for tree in trees:
        del tree["zarr.json"]  # the text of the config in it is laid out in other processes only
    assert trees[0] == trees[1]


def test_int8_is_within_a_step_of_the_cpu(kit: "Kit", work: Path, int8_cache: Path) -> None:
    """Pyramids, and what is said of the boxes that both have: those near objects and the ground truth."""
    kit.run(*command(kit, work / "gpu.zarr", DEVICE, "--dtype", "int8"))
    _compare_int8(int8_cache, work / "gpu.zarr")
    for name, device in (("objects_cpu", "cpu"), ("objects_gpu", DEVICE)):
        kit.run(*command(kit, work / name, device, "--dtype", "int8", "--targets", "objects"))
    _compare_int8(work / "objects_cpu", work / "objects_gpu")


def _compare_int8(expected: Path, actual: Path) -> None:
    cpu, gpu = open_cache(expected), open_cache(actual)
    assert cpu.image_ids.tolist() == gpu.image_ids.tolist()
    for image_id in cpu.image_ids.tolist():
        for view in cpu.spec.views:
            ours, theirs = cpu.targets(image_id, view), gpu.targets(image_id, view)
            behind = slice(ours.num_proposals, None), slice(theirs.num_proposals, None)
            assert torch.allclose(ours.boxes[behind[0]], theirs.boxes[behind[1]], atol=1e-3)
            counts = [ours.num_jittered, len(ours.boxes) - ours.num_proposals]
            assert counts == [theirs.num_jittered, len(theirs.boxes) - theirs.num_proposals]
            for name in ("embeddings", "embedding_scale"):
                mine, other = getattr(ours, name)[behind[0]], getattr(theirs, name)[behind[1]]
                if name == "embeddings":
                    _within_a_step(mine, other)
                else:
                    assert torch.allclose(mine, other, rtol=1e-3)
            for name in ("features", "roi_features"):
                assert (getattr(ours, name) is None) == (getattr(theirs, name) is None)
            if ours.features is not None:
                for mine, other in zip(ours.features, present(theirs.features, "features"), strict=True):
                    _within_a_step(present(mine, "level"), present(other, "level"))
                assert torch.allclose(present(ours.scale, "scale"), present(theirs.scale, "scale"), rtol=1e-3)
            if ours.roi_features is not None and (truth := counts[1] - counts[0]):
                _within_a_step(ours.roi_features[-truth:], present(theirs.roi_features, "RoI features")[-truth:])


def _within_a_step(first: torch.Tensor, second: torch.Tensor) -> None:
    assert first.dtype == second.dtype == torch.int8
    assert first.shape == second.shape
    assert bool(((first.int() - second.int()).abs() <= 1).all())
    assert bool(first.any())


def test_commands_that_ask_the_teacher(kit: "Kit", work: Path, int8_cache: Path) -> None:
    ended = kit.run("verify", int8_cache, "--ckpt", kit.teacher, "--sample", 2, "--device", DEVICE)
    assert "no faults" in ended.out
    assert "mean error" in ended.out
    ended = kit.run(*command(kit, work / "x.zarr", DEVICE), "--dry-run")
    assert "images/s" in ended.out
    assert not (work / "x.zarr").exists()
    data = ("--ann-file", kit.val_ann, "--img-dir", kit.val_img)
    assert "AP50" in kit.run("evaluate", "--ckpt", kit.teacher, *data, "--batch-size", 2).out


def test_which_gpu_it_is(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = torch.cuda.device_count()
    name = torch.cuda.get_device_name(0)
    for variable in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(variable, raising=False)
    assert torch_device("cuda") == torch_device(None) == torch_device("cuda:0") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", str(count + count - 1))
    assert torch_device("cuda") == torch_device(None) == torch.device("cuda", count - 1)
    assert torch_device("cpu") == torch.device("cpu")
    assert describe_device("cuda") == f"cuda:0 ({name})"
    message = kit.refused(*command(kit, work / "x.zarr", f"cuda:{count}"), code=2)
    assert f"cuda:{count - 1}" in message
    assert name in message
    assert "cuda:0" in kit.run("doctor", code=None).out
