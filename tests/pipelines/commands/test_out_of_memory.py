"""What a command says when memory runs out in the middle, and what it leaves: one message, and nothing is lost."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.teacher.setup import TRIAL
from kdpipe.pipelines.teacher.teacher import Teacher
from kdpipe.pipelines.training.runner import QuietRunner
from kdpipe.pipelines.training.seeding import SeedStepHook

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

LARGE = ("--scale", "1333x800")  # needs memory that is not held already
REASON = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 GiB is free."
    " Of the allocated memory 77.00 GiB is allocated by PyTorch, and 1.00 GiB is reserved."
)


def _raise() -> None:
    raise torch.OutOfMemoryError(REASON)


def _leave_little() -> None:
    """Let the GPU have no memory for what is not allocated now."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((1 << 20) / torch.cuda.get_device_properties(0).total_memory)


@pytest.fixture(params=["raised", pytest.param("on a GPU", marks=pytest.mark.cuda)])
def exhaust(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Memory runs out where this is called, or soon after."""
    if request.param == "raised":
        yield _raise
        return
    yield _leave_little
    torch.cuda.set_per_process_memory_fraction(1.0)


def refused(kit: "Kit", *command: object) -> str:
    """The message, which says how much memory there was, and not what torch advises programmers."""
    message = kit.refused(*command)
    assert "There is too little memory: CUDA out of memory" in message
    assert " is free.\n" in message
    assert "allocated by PyTorch" not in message
    return message


def test_cache_teacher_keeps_what_is_committed(
    kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch, exhaust: Callable[[], None]
) -> None:
    small = LARGE if exhaust is _leave_little else ("--scale", "128x96")
    command = ("cache-teacher", *kit.source, *small, "--targets", "predictions", "--part-size", "32KiB")
    kit.run(*command, "--out", work / "undisturbed.zarr")
    record, names = Teacher.record, []

    def failing(self: Teacher, *args: Any, **options: Any) -> Any:
        if options["file_name"] != TRIAL:
            names.append(options["file_name"])
        if len(names) == 7:
            exhaust()
        return record(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "record", failing)
        message = refused(kit, *command, "--out", work / "x.zarr")
    assert all(word in message for word in ("the same command goes on", "--device", "--scale", "--proposals"))
    assert 0 < len(open_cache(work / "x.zarr", allow_partial=True)) < 8
    if exhaust is _leave_little:
        torch.cuda.set_per_process_memory_fraction(1.0)
    kit.run(*command, "--out", work / "x.zarr")
    assert kit.tree(work / "x.zarr") == kit.tree(work / "undisturbed.zarr")


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_training_keeps_its_last_checkpoint(
    kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch, exhaust: Callable[[], None], kind: str
) -> None:
    command: tuple[object, ...]
    if kind == "teacher":
        options = ("--recipe", "paper", "--epochs", 2, "--batch-size", 4, "--workers", 0)
        command = ("train-teacher", "--config", kit.student, *kit.data, "--work-dir", work / "w", *options)
    else:
        command = kit.student_command(work / "w", "--epochs", 2)
    command = (*command, *(LARGE if exhaust is _leave_little else ()))
    begin = SeedStepHook.before_train_iter

    def failing(self: SeedStepHook, runner: Any, *args: Any, **options: Any) -> None:
        begin(self, runner, *args, **options)
        if runner.epoch == 1:
            exhaust()

    with monkeypatch.context() as patch:
        patch.setattr(SeedStepHook, "before_train_iter", failing)
        message = refused(kit, *command)
    assert all(word in message for word in ("--batch-size", "--scale", "--amp", "RoIs", "sampler.num", "--resume"))
    assert (work / "w" / "last_checkpoint").read_text().endswith("epoch_1.pth")
    if exhaust is _leave_little:
        torch.cuda.set_per_process_memory_fraction(1.0)
    kit.run(*command, "--resume")
    assert (work / "w" / "epoch_2.pth").exists()


def test_evaluate(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch, exhaust: Callable[[], None]) -> None:
    test = QuietRunner.test

    def failing(self: QuietRunner) -> Any:
        exhaust()
        return test(self)

    monkeypatch.setattr(QuietRunner, "test", failing)
    data = ("--ann-file", kit.val_ann, "--img-dir", kit.val_img)
    message = refused(kit, "evaluate", "--ckpt", kit.teacher, *data, *LARGE)
    assert "--batch-size or --scale" in message


@pytest.mark.parametrize("text", ["CUDA error: out of memory\nCUDA kernel errors might", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_other_words_for_it(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """CUDA itself and its libraries raise no OutOfMemoryError."""

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(QuietRunner, "test", fail)
    data = ("--ann-file", kit.val_ann, "--img-dir", kit.val_img)
    message = kit.refused("evaluate", "--ckpt", kit.teacher, *data)
    assert f"There is too little memory: {text.splitlines()[0]}\n" in message
