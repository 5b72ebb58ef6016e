"""What lies in a work directory is never replaced unless a training of kdpipe's left it there."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.training.work_dir import WorkDir

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

CONSOLE = Console(file=io.StringIO())
RECORD: dict[str, Any] = {"kdpipe": "1", "training": "student", "epochs": 3}
OWN = [
    *("student.pth", "teacher.pth", "student.partial", "epoch_1.pth", "epoch_12.student.pth", "epoch_3.pth.partial"),
    *("best_coco_bbox_mAP_epoch_1.pth", "last_checkpoint", "result.json", "kdpipe", "kdpipe/mine.txt"),
]


def begin(path: Path, *, resume: bool = False, steps: int = 1, saved: bool = False) -> None:
    """What a training does to its directory."""
    work = WorkDir(path)
    work.check(resume)
    with work.opened(RECORD, resume=resume, console=CONSOLE):
        (path / "20260101_000000").mkdir(exist_ok=True)
        if not steps:
            raise KdpipeError("refused by something else")
        work.begun = True
        work.write_record(RECORD, saved=saved)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("resume", [False, True])
def test_files_of_the_users_own_are_not_touched(kit: "Kit", tmp_path: Path, name: str, resume: bool) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = kit.tree(tmp_path)
    with pytest.raises(KdpipeError, match=rf"holds {name.split('/')[0]}, which no training.*--work-dir"):
        begin(tmp_path, resume=resume)
    assert kit.tree(tmp_path) == before


def test_a_link_that_leads_nowhere_is_there(tmp_path: Path) -> None:
    (tmp_path / "student.pth").symlink_to(tmp_path / "mine.pth")
    with pytest.raises(KdpipeError, match=r"holds student\.pth"):
        begin(tmp_path)


@pytest.mark.parametrize(
    "name", ["notes.txt", "train.json", "val.json", "cache.json", "cached.json", "tiny.py", "a.pth"]
)
def test_other_files_stay_as_they_are(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    begin(tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    begin(tmp_path, saved=True)  # the one before was stopped before its first checkpoint
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_1.pth"))
    with pytest.raises(KdpipeError, match="Add --resume"):
        begin(tmp_path)
    with pytest.raises(KdpipeError, match=r"is missing: epoch_1\.pth"):
        begin(tmp_path, resume=True)
    (tmp_path / "epoch_1.pth").touch()
    begin(tmp_path, resume=True)
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_that_came_before_the_first_checkpoint_is_not_ours(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "student.pth").write_text("mine")
    with pytest.raises(KdpipeError, match=r"holds student\.pth"):
        begin(tmp_path)


def test_a_finished_training_without_checkpoints_stays(tmp_path: Path) -> None:
    """Of a config whose CheckpointHook keeps none; there is nothing to resume, and nothing is replaced."""
    begin(tmp_path, saved=True)
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "student.pth").write_text("trained")
    with pytest.raises(KdpipeError, match=r"already holds a training\. Choose another --work-dir"):
        begin(tmp_path)


@pytest.mark.parametrize("left", ["epoch_1.pth", "epoch_1.pth.partial", "student.pth", "student.partial"])
def test_what_a_training_left_that_was_killed_is_ours(tmp_path: Path, left: str) -> None:
    begin(tmp_path, saved=True)
    (tmp_path / left).touch()
    begin(tmp_path)


@pytest.mark.parametrize("place", ["x.zarr", "x.zarr/parts", "x.zarr/new/w", "x.zarr/zarr.json", "link"])
def test_a_cache_is_no_work_directory(kit: "Kit", tmp_path: Path, place: str) -> None:
    (tmp_path / "x.zarr" / "parts").mkdir(parents=True)
    (tmp_path / "x.zarr" / "zarr.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "x.zarr")
    before = kit.tree(tmp_path)
    with pytest.raises(KdpipeError, match=r"(lies in, the cache|is no folder).*--work-dir"):
        begin(tmp_path / place)
    assert kit.tree(tmp_path) == before


def test_a_run_that_is_refused_leaves_nothing(kit: "Kit", tmp_path: Path) -> None:
    with pytest.raises(KdpipeError, match="something else"):
        begin(tmp_path / "new" / "w", steps=0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "20250101_000000").mkdir()
    with pytest.raises(KdpipeError, match="something else"):
        begin(tmp_path, steps=0)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "20250101_000000"}
    begin(tmp_path, saved=True)
    (tmp_path / "kdpipe" / "lock").unlink()
    before = kit.tree(tmp_path)
    for name in ("last_checkpoint", "epoch_1.pth"):
        (tmp_path / name).touch()
    with pytest.raises(KdpipeError, match="something else"):
        begin(tmp_path, resume=True, steps=0)
    for name in ("last_checkpoint", "epoch_1.pth"):
        (tmp_path / name).unlink()
    (tmp_path / "kdpipe" / "lock").unlink()
    assert kit.tree(tmp_path) == before


def test_one_training_at_a_time(tmp_path: Path) -> None:
    work = WorkDir(tmp_path)
    with work.opened(RECORD, resume=False, console=CONSOLE):
        work.begun = True
        work.write_record(RECORD, saved=True)
        for name in ("last_checkpoint", "epoch_1.pth"):
            (tmp_path / name).touch()
        for resume in (False, True):
            with pytest.raises(KdpipeError, match=r"Another training is running in .*: process \d+ on \S+ since 20"):
                begin(tmp_path, resume=resume)
        with (
            pytest.raises(KdpipeError, match="Another training"),
            WorkDir(tmp_path).opened(RECORD, resume=True, console=CONSOLE),
        ):
            pass
    assert (tmp_path / "kdpipe" / "lock").read_text()  # what a process leaves that is gone holds nobody up
    begin(tmp_path, resume=True)


def test_other_processes_of_a_run_do_not_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkDir(tmp_path).opened(RECORD, resume=False, console=CONSOLE):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        other = WorkDir(tmp_path)
        other.check(resume=False)
        with other.opened(RECORD, resume=False, console=CONSOLE):
            pass


def test_the_newest_checkpoint_is_found_where_the_directory_is_now(tmp_path: Path) -> None:
    for number in (2, 9, 10):
        (tmp_path / f"epoch_{number}.pth").touch()
    (tmp_path / "epoch_11.student.pth").touch()
    for text, newest in (
        ("/elsewhere/w/epoch_9.pth", "epoch_9.pth"),
        ("epoch_2.pth\n", "epoch_2.pth"),
        ("", "epoch_10.pth"),
    ):
        (tmp_path / "last_checkpoint").write_text(text)
        assert WorkDir(tmp_path).newest() == tmp_path / newest
    (tmp_path / "last_checkpoint").write_text("epoch_12.pth")
    with pytest.raises(KdpipeError, match=r"missing: epoch_12\.pth. There are: epoch_10\.pth, epoch_2"):
        WorkDir(tmp_path).newest()


def test_a_record_that_cannot_be_read(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "kdpipe" / "recipe.json").write_text("{")
    with pytest.raises(KdpipeError, match=r"recipe\.json cannot be read"):
        begin(tmp_path)
    (tmp_path / "kdpipe" / "recipe.json").write_text("[1]")
    with pytest.raises(KdpipeError):
        begin(tmp_path)
