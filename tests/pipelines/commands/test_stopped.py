"""What can stop `kdpipe cache-teacher`: one message, what was committed stays, and the same command finishes."""

import errno
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kdpipe.cache.read.reader import open_cache
from kdpipe.cache.records import TeacherRecord
from kdpipe.cache.write.arrays import ArrayWriter
from kdpipe.pipelines.teacher.setup import TRIAL
from kdpipe.pipelines.teacher.teacher import Teacher

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


def stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of everything below a folder."""
    return {
        str(entry.relative_to(folder)): (entry.stat().st_ino, entry.stat().st_size, entry.stat().st_mtime_ns)
        for entry in (folder, *folder.rglob("*"))
    }


def parts(cache: Path) -> dict[str, tuple[int, int, int]]:
    """The same of the committed parts' files."""
    return {name: stamp for name, stamp in stamps(cache).items() if name.startswith("parts/0")}


def command(kit: "Kit", out: Path) -> tuple[object, ...]:
    return "cache-teacher", *kit.source, *kit.VIEW, "--part-size", "32KiB", "--out", out


@pytest.fixture
def undisturbed(kit: "Kit", work: Path) -> dict[str, str]:
    """Digests of the files of the finished cache."""
    kit.run(*command(kit, work / "undisturbed.zarr"))
    return kit.tree(work / "undisturbed.zarr")


def check_stopped(kit: "Kit", out: Path, undisturbed: dict[str, str], words: str) -> dict[str, Any]:
    """Run until it is stopped after some parts, and see what it leaves; returns stamps of what was committed."""
    message = kit.refused(*command(kit, out))
    assert words in message
    assert len(message.splitlines()) == 1
    committed = kit.tree(out / "parts")
    assert 0 < len(open_cache(out, allow_partial=True)) < 8
    assert all(undisturbed[f"parts/{name}"] == digest for name, digest in committed.items())
    return parts(out)


def check_finished(kit: "Kit", out: Path, undisturbed: dict[str, str], committed: dict[str, Any]) -> None:
    """Run again: what was committed is not made again, and all is as if nothing had happened."""
    kit.run(*command(kit, out))
    assert kit.tree(out) == undisturbed
    assert committed.items() <= parts(out).items()


def at_image(monkeypatch: pytest.MonkeyPatch, number: int, happen: Any) -> None:
    """Let something happen when the teacher is asked about the n-th image."""
    record, asked_ids = Teacher.record, []

    def asking(self: Teacher, *args: Any, **options: Any) -> TeacherRecord:
        if options["file_name"] != TRIAL:
            asked_ids.append(options["image_id"])
        if len(asked_ids) == number:
            happen()
        return record(self, *args, **options)

    monkeypatch.setattr(Teacher, "record", asking)


@pytest.fixture
def tmpfs(work: Path) -> Iterator[Path]:
    """A small file system."""
    folder = work / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(file: Path) -> None:
    """Take all the space that there is."""
    with file.open("wb", buffering=0) as ballast, pytest.raises(OSError, match="No space left"):
        while ballast.write(b"\1" * 4096):
            pass


def test_the_disk_becomes_full(
    kit: "Kit", tmpfs: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmpfs / "x.zarr"
    with monkeypatch.context() as patch:
        at_image(patch, 5, lambda: fill(tmpfs / "ballast"))
        committed = check_stopped(kit, out, undisturbed, "is full")
    kit.refused(*command(kit, out))  # it still is
    assert parts(out) == committed
    (tmpfs / "ballast").unlink()
    check_finished(kit, out, undisturbed, committed)


def test_the_target_is_read_only(kit: "Kit", tmpfs: Path, undisturbed: dict[str, str]) -> None:
    shutil.copytree("undisturbed.zarr", tmpfs / "x.zarr")
    shutil.rmtree(sorted((tmpfs / "x.zarr" / "parts").glob("0*"))[1])
    before = stamps(tmpfs)
    subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)
    for out in (tmpfs / "x.zarr", tmpfs / "new.zarr"):
        message = kit.refused(*command(kit, out))
        assert "Read-only file system" in message
        assert "choose another --out" in message
    assert stamps(tmpfs) == before
    subprocess.run(["mount", "-o", "remount,rw", tmpfs], check=True)
    check_finished(kit, tmpfs / "x.zarr", undisturbed, {})


def deny(folder: Path) -> None:
    """Let nobody write to a folder, not even root; not before the file is closed that a thread is writing there."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    until = time.monotonic() + 30
    while (done := subprocess.run(["mount", "-o", "remount,bind,ro", folder], capture_output=True)).returncode:
        assert time.monotonic() < until, done.stderr
        time.sleep(0.01)


def test_a_permission_is_lost(
    kit: "Kit", tmpfs: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmpfs / "x.zarr"
    try:
        with monkeypatch.context() as patch:
            at_image(patch, 5, lambda: deny(out / "parts"))
            committed = check_stopped_with_leftovers(kit, out)
    finally:
        subprocess.run(["umount", out / "parts"], check=True)
    check_finished(kit, out, undisturbed, committed)


def check_stopped_with_leftovers(kit: "Kit", out: Path) -> dict[str, Any]:
    """As `check_stopped`; the folder of the part in the making cannot be removed."""
    message = kit.refused(*command(kit, out))
    assert "choose another --out" in message
    assert len(message.splitlines()) == 1
    assert 0 < len(open_cache(out, allow_partial=True)) < 8
    return parts(out)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(errno.EIO, os.strerror(errno.EIO)), 1, "Error: Writing part"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "is full"),
        (RuntimeError("no thread can be started"), 3, "Internal error: RuntimeError: no thread can be started"),
    ],
)
@pytest.mark.parametrize("place", ["kdpipe.cache.format.zarr_arrays.WrittenFiles.set", "append"])
def test_a_thread_of_the_writer_dies(
    kit: "Kit",
    work: Path,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    words: str,
    place: str,
) -> None:
    """The one that writes (`append`), or the one in which zarr does."""

    def die(*_: object) -> Any:
        raise error

    with monkeypatch.context() as patch:
        if place == "append":
            at_image(patch, 5, lambda: patch.setattr(ArrayWriter, "append", die))
        else:
            at_image(patch, 5, lambda: patch.setattr(place, die))
        ended = kit.run(*command(kit, work / "x.zarr"), code=code)
    assert words in ended.err
    assert "Traceback" not in ended.err
    committed = parts(work / "x.zarr")
    assert committed
    assert not list(work.rglob("*.tmp"))
    check_finished(kit, work / "x.zarr", undisturbed, committed)


def other_teacher(kit: "Kit", work: Path) -> tuple[object, ...]:
    content = torch.load(kit.teacher, weights_only=True)
    content["state_dict"]["backbone.conv1.weight"][0, 0, 0, 0] += 1e-6
    torch.save(content, work / "other.pth")
    return "--ckpt", work / "other.pth"


def other_config(kit: "Kit", work: Path) -> tuple[object, ...]:
    config = kit.config()
    config.model.data_preprocessor.std = [1.0, 1.0, 1.0]
    (work / "other.py").write_text(config.pretty_text)
    return "--config", work / "other.py"


def other_box(kit: "Kit", work: Path) -> tuple[object, ...]:
    boxes = json.loads(kit.ann.read_text())["annotations"]
    boxes[0]["bbox"][2] -= 1
    return "--ann-file", kit.annotations(work / "other.json", annotations=boxes)


def other_images(kit: "Kit", work: Path) -> tuple[object, ...]:
    return "--ann-file", kit.annotations(work / "other.json", copies=2)


def test_another_cache_than_the_one_that_is_there(kit: "Kit", work: Path) -> None:
    """Everything that a cache depends on: it is named where it differs, and nothing is touched."""
    out = work / "x.zarr"
    kit.run(*command(kit, out))
    shutil.rmtree(out / "parts" / "00001")
    others = {
        "teacher.weights": other_teacher(kit, work),
        "teacher.config": other_config(kit, work),
        "data: found": other_box(kit, work),
        "spec.tier": ("--targets", "embeddings"),
        "spec.dtype": ("--dtype", "float16"),
        "spec.codec": ("--codec", "lz4"),
        "spec.proposals": ("--proposals", 30),
        "spec.scale": ("--scale", "64x48"),
        "spec.views": ("--views", "identity,hflip"),
        "plan.part_size": ("--part-size", "128KiB"),
        "plan.images: found 8, wanted 7": ("--limit", 7),
    }
    before = stamps(out), kit.tree(out)
    for name, options in others.items():
        message = kit.refused(*command(kit, out), *options)
        assert name in message, message
        assert "stays as it is" in message
        assert (stamps(out), kit.tree(out)) == before, name
    assert "plan.images: found 8, wanted 16" in kit.refused(*command(kit, out), *other_images(kit, work))
    assert (stamps(out), kit.tree(out)) == before
