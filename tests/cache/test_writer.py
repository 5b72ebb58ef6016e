import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kdpipe.cache import CacheError, ImageInfo, open_cache
from kdpipe.cache.format.record import files_key, read_files, read_record
from kdpipe.cache.store.folder import Folder
from kdpipe.cache.store.location import part_key
from kdpipe.cache.store.temporary import temporary_folder

if TYPE_CHECKING:
    from tests.cache.conftest import Kit
    from tests.conftest import Forks


class KilledError(Exception):
    pass


def write_half(kit: "type[Kit]", path: Path) -> None:
    """One whole part, and an exception in the middle of the next."""
    writer = kit.writer(path, kit.spec(), kit.images())
    kit.fill(writer, [1])
    with pytest.raises(KilledError), writer.part(0) as part:
        part.add(kit.record(writer.images[0], "identity", writer.spec))
        raise KilledError
    assert writer.pending() == [0, *range(2, len(writer.parts))]


def test_a_resumed_cache_is_the_same_byte_for_byte(tmp_path: Path, cache_path: Path, kit: "type[Kit]") -> None:
    other = tmp_path / "other.zarr"
    write_half(kit, other)
    kit.make(other)
    assert kit.tree(other) == kit.tree(cache_path)
    before = kit.tree(other)
    kit.make(other)  # nothing is left to do
    assert kit.tree(other) == before


def test_order_and_threads_do_not_change_the_bytes(tmp_path: Path, kit: "type[Kit]") -> None:
    spec, images = kit.spec(views=("identity", "hflip")), kit.images()
    kit.fill(kit.writer(tmp_path / "a.zarr", spec, images))
    writer = kit.writer(tmp_path / "b.zarr", spec, images)
    writer.write_head(kit.head())
    torch.set_num_threads(2)
    for index in reversed(writer.pending()):
        with writer.part(index) as part:
            for view in reversed(spec.views):
                for n in reversed(writer.parts[index]):
                    part.add(kit.record(images[n], view, spec))
    torch.set_num_threads(1)
    assert kit.tree(tmp_path / "a.zarr") == kit.tree(tmp_path / "b.zarr")


KILLED = """
import os, sys, conftest
kit = conftest.Kit
writer = kit.writer(conftest.Path(sys.argv[1]), kit.spec(), kit.images())
kit.fill(writer, [0])
with writer.part(1) as part:
    part.add(kit.record(writer.images[writer.parts[1].start], "identity", writer.spec))
    os.kill(os.getpid(), 9)
"""


def test_a_killed_process_leaves_a_cache_to_go_on_with(
    tmp_path: Path, cache_path: Path, kit: "type[Kit]", forks: "Forks"
) -> None:
    path = tmp_path / "other.zarr"
    assert forks.start(KILLED, path, cwd=tmp_path).wait() == -9
    assert [entry.name for entry in (path / "parts").iterdir() if entry.name.endswith(".tmp")]
    with pytest.raises(CacheError, match="incomplete"):
        open_cache(path)
    kit.make(path)
    assert kit.tree(path) == kit.tree(cache_path)


HOLDING = """
import sys, time
from pathlib import Path
from kdpipe.cache.store.temporary import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_folders_of_dead_writers_are_removed_and_of_live_ones_never(cache_path: Path, kit: "type[Kit]") -> None:
    """Whatever their age: a process holds a lock as long as it lives, however it ends."""
    parts = cache_path / "parts"
    command = [sys.executable, "-c", HOLDING, str(parts / "00001")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    alive = Path(process.stdout.readline().strip())
    dead = [parts / f".00000.{'0' * 16}.tmp", cache_path / f".head.{'1' * 16}.tmp"]
    dead.append(cache_path.parent / f".{cache_path.name}.{'2' * 16}.tmp")
    kept_folders = [parts / ".mine.tmp", cache_path.parent / f".other.zarr.{'3' * 16}.tmp", parts / ".00000.host.7.tmp"]
    for folder in dead + kept_folders:
        folder.mkdir()
        (folder / "file").write_text("x")
    with temporary_folder(parts / "00002") as own_folder:
        kit.writer(cache_path, kit.spec(), kit.images())
        assert [folder.exists() for folder in dead] == [False] * 3
        assert [folder.exists() for folder in (*kept_folders, own_folder, alive)] == [True] * 5
        assert (alive / "file").read_text() == "x"
    process.kill()
    process.communicate()
    assert alive.exists()
    kit.writer(cache_path, kit.spec(), kit.images())
    assert not alive.exists()


@pytest.mark.parametrize("damage", ["truncate", "remove", "bit", "other part", "cut array", "no array"])
def test_a_part_without_a_valid_record_is_made_again(
    tmp_path: Path, cache_path: Path, kit: "type[Kit]", damage: str
) -> None:
    other = shutil.copytree(cache_path, tmp_path / "other.zarr")
    record = other / "parts" / "00001" / "zarr.json"
    if damage == "truncate":
        record.write_bytes(record.read_bytes()[:-40])
    elif damage == "remove":
        record.unlink()
    elif damage == "bit":
        kit.flip_bit(record, at=0.5)
    elif damage == "other part":
        shutil.copy(other / "parts" / "00000" / "zarr.json", record)
    elif damage == "cut array":
        file = kit.files(other, part_key(1)) / "features" / "c.0"
        file.write_bytes(file.read_bytes()[:-1])
    else:
        (kit.files(other, part_key(1)) / "features" / "c.0").unlink()
    writer = kit.writer(other, kit.spec(), kit.images())
    assert writer.pending() == [1]
    kit.fill(writer)
    assert kit.tree(other) == kit.tree(cache_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"identity": {"teacher": "t2", "data": "d1", "options": {"device": "cpu"}}},
            'teacher: found "t1", wanted "t2"',
        ),
        ({"part_size": 6_001}, r"plan\.part_size: found 6000, wanted 6001"),
        ({"images": "fewer"}, "plan.images: found 7, wanted 6"),
        ({"images": "renamed"}, "plan.digest"),
        ({"spec": {"scale": (128, 64)}}, r"spec.scale: found \[96, 64\], wanted \[128, 64\]"),
        ({"spec": {"codec": "lz4"}}, 'spec.codec: found "zstd", wanted "lz4"'),
    ],
)
def test_another_identity_is_refused(cache_path: Path, kit: "type[Kit]", change: dict[str, Any], message: str) -> None:
    before = kit.tree(cache_path)
    images = kit.images()
    if change.get("images") == "fewer":
        images = images[:-1]
    elif change.get("images") == "renamed":
        images[2] = ImageInfo(images[2].image_id, "other.jpg", images[2].height, images[2].width, images[2].num_gt)
    options = {name: value for name, value in change.items() if name not in ("images", "spec")}
    with pytest.raises(CacheError, match=message):
        kit.writer(cache_path, kit.spec(**change.get("spec", {})), images, **options)
    assert kit.tree(cache_path) == before


def test_other_metadata_is_no_other_cache(cache_path: Path, kit: "type[Kit]") -> None:
    kit.writer(cache_path, kit.spec(), kit.images(), metadata={"config": "elsewhere"})
    assert open_cache(cache_path).metadata == {"config": "x = 1"}


@pytest.mark.parametrize("kind", ["file", "folder", "zarr", "dangling link"])
def test_what_is_no_cache_is_left_alone(tmp_path: Path, kit: "type[Kit]", kind: str) -> None:
    path = tmp_path / "x.zarr"
    if kind == "file":
        path.write_text("mine")
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
        (path / ("zarr.json" if kind == "zarr" else "photo.jpg")).write_text('{"attributes": {"mine": 1}}')
    before = kit.tree(tmp_path)
    with pytest.raises(CacheError, match=r"not a kdpipe cache|is no folder"):
        kit.writer(path, kit.spec(), kit.images())
    assert kit.tree(tmp_path) == before


def test_folders_that_nothing_can_be_renamed_to(
    tmp_path: Path, kit: "type[Kit]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused before anything is written, with what to do."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.zarr").symlink_to(tmp_path / "disk")
    with pytest.raises(CacheError, match=r"is a link to a folder, .*Name one in it: --out .*link\.zarr/x\.zarr"):
        kit.writer(tmp_path / "link.zarr", kit.spec(), kit.images())
    monkeypatch.chdir(tmp_path / "disk")
    with pytest.raises(CacheError, match="is the current folder"):
        kit.writer(Path(), kit.spec(), kit.images())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(CacheError, match="is a mounted disk"):
        kit.writer(tmp_path / "disk", kit.spec(), kit.images())
    assert not any((tmp_path / "disk").iterdir())
    kit.make(tmp_path / "link.zarr" / "x.zarr", count=2)
    assert len(open_cache(tmp_path / "disk" / "x.zarr")) == 2
    (tmp_path / "other.zarr").symlink_to(tmp_path / "disk" / "x.zarr")
    kit.writer(tmp_path / "other.zarr", kit.spec(), kit.images(2))  # a link to a cache is as good as the cache


@pytest.mark.parametrize("place", ["new", "parts/new", "parts", "parts/00000"])
def test_no_cache_in_a_cache(cache_path: Path, kit: "type[Kit]", place: str) -> None:
    before = sorted(cache_path.rglob("*"))
    with pytest.raises(CacheError, match="lies in the cache"):
        kit.writer(cache_path / place, kit.spec(), kit.images())
    assert sorted(cache_path.rglob("*")) == before


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path, kit: "type[Kit]") -> None:
    (tmp_path / "x.zarr").mkdir()
    kit.make(tmp_path / "x.zarr", count=2)
    kit.make(tmp_path / "a" / "b" / "x.zarr", count=2)
    assert kit.tree(tmp_path / "x.zarr") == kit.tree(tmp_path / "a" / "b" / "x.zarr")
    assert not list(tmp_path.glob(".*"))


def test_two_writers_at_once_do_no_harm(tmp_path: Path, cache_path: Path, kit: "type[Kit]") -> None:
    path = tmp_path / "other.zarr"
    assert kit.fill_at_once(lambda: path) == []
    assert kit.tree(path) == kit.tree(cache_path)


def test_the_loser_drops_its_part(cache_path: Path, kit: "type[Kit]") -> None:
    before = kit.tree(cache_path)
    stamp = (cache_path / "parts" / "00000").stat().st_ino
    kit.fill(kit.writer(cache_path, kit.spec(), kit.images()), [0])
    assert kit.tree(cache_path) == before
    assert (cache_path / "parts" / "00000").stat().st_ino == stamp


def test_skipped_images_are_recorded(tmp_path: Path, kit: "type[Kit]") -> None:
    spec, images = kit.spec(views=("identity", "hflip")), kit.images(5)
    writer = kit.writer(tmp_path / "x.zarr", spec, images)
    for index in writer.pending():
        with writer.part(index) as part:
            for n in writer.parts[index]:
                if n in (1, 4):
                    part.skip(images[n].image_id, images[n].file_name, "truncated file")
                else:
                    for view in spec.views:
                        part.add(kit.record(images[n], view, spec))
    cache = open_cache(tmp_path / "x.zarr")
    assert cache.image_ids.tolist() == [images[n].image_id for n in (0, 2, 3)]
    assert [entry["image_id"] for entry in cache.skipped] == [images[1].image_id, images[4].image_id]
    assert cache.skipped[0] == {"image_id": 993, "file_name": images[1].file_name, "reason": "truncated file"}
    assert images[1].image_id not in cache
    assert cache.targets(images[2].image_id, "hflip").num_proposals == 12
    with pytest.raises(CacheError, match="skipped when it was made: truncated file"):
        cache.targets(images[1].image_id)


def test_a_part_of_skipped_images_only(tmp_path: Path, kit: "type[Kit]") -> None:
    writer = kit.writer(tmp_path / "x.zarr", kit.spec(), kit.images(1))
    with writer.part(0) as part:
        part.skip(1000, "a.jpg", "missing")
    assert len(open_cache(tmp_path / "x.zarr")) == 0


def test_records_that_do_not_belong(tmp_path: Path, kit: "type[Kit]") -> None:
    spec, images = kit.spec(), kit.images()
    writer = kit.writer(tmp_path / "x.zarr", spec, images)
    record = kit.record(images[0], "identity", spec)

    def attempt(message: str, *records: Any) -> None:
        with pytest.raises(CacheError, match=message), writer.part(0) as part:
            for entry in records:
                part.add(entry)

    attempt("does not belong to part 0", kit.record(images[-1], "identity", spec))
    attempt("does not belong to part 0", kit.record(images[0], "hflip", spec))
    attempt("twice", record, record)
    attempt("records missing, first image 993", record)
    wrong = kit.record(images[0], "identity", kit.spec(embedding_dim=11))
    attempt(r"embeddings of image 1000 .* should be .* \(12, 10\), found .* \(12, 11\)", wrong)
    attempt(r"feature levels, found 3", kit.record(images[0], "identity", kit.spec(strides=(8, 16, 32))))
    attempt("takes at most 12", kit.record(images[0], "identity", kit.spec(proposals=13)))
    attempt("lacks logits", type(record)(**{**record.__dict__, "logits": None}))
    level = torch.zeros(spec.channels, 900, 2)  # no teacher pads by that much, and no reader takes it
    attempt(
        "a level of .900, 2. cells",
        type(record)(**{**record.__dict__, "features": [level, *(record.features or ())[1:]]}),
    )
    attempt("a network input of", type(record)(**{**record.__dict__, "input_size": (10, 10)}))
    attempt("not finite", type(record)(**{**record.__dict__, "boxes": record.boxes * float("nan")}))
    attempt("should be a float tensor", type(record)(**{**record.__dict__, "boxes": record.boxes.long()}))
    assert writer.pending() == list(range(len(writer.parts)))
    assert not list((tmp_path / "x.zarr" / "parts").iterdir())


def test_the_record_is_not_tied_to_the_callers_tensors(tmp_path: Path, kit: "type[Kit]") -> None:
    spec = kit.spec(dtype="float32")
    writer = kit.writer(tmp_path / "x.zarr", spec, kit.images(2), part_size=1 << 30)
    with writer.part(0) as part:
        second = kit.record(writer.images[1], "identity", spec)
        part.add(second)  # waits for the first
        assert second.features is not None
        assert second.logits is not None
        for x in (second.boxes, second.logits, *second.features):
            x.zero_()
        part.add(kit.record(writer.images[0], "identity", spec))
    targets = open_cache(tmp_path / "x.zarr").targets(writer.images[1].image_id)
    again = kit.record(writer.images[1], "identity", spec)
    np.testing.assert_array_equal(targets.boxes, again.boxes)
    assert again.features is not None
    assert targets.features is not None
    np.testing.assert_array_equal(targets.features[0], again.features[0])


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "is full.*free space"),
        (errno.EACCES, "cannot be written"),
        (errno.EROFS, "cannot be written"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_errors_of_the_disk(
    cache_path: Path, kit: "type[Kit]", monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    shutil.rmtree(cache_path / "parts" / "00001")
    before = kit.tree(cache_path)
    writer = kit.writer(cache_path, kit.spec(), kit.images())

    def fail(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(CacheError, match=message):
            kit.fill(writer)
    assert kit.tree(cache_path) == before
    kit.fill(writer)
    assert writer.pending() == []


FULL = """
import resource, signal, sys, conftest
from kdpipe.cache import CacheError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
kit = conftest.Kit
writer = kit.writer(conftest.Path(sys.argv[1]), kit.spec(codec="none"), kit.images())
kit.fill(writer, [0])
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    kit.fill(writer)
except CacheError as error:
    print(error)
"""


def test_a_full_disk(tmp_path: Path, kit: "type[Kit]", forks: "Forks") -> None:
    path = tmp_path / "x.zarr"
    process = forks.start(FULL, path, cwd=tmp_path)
    assert process.wait() == 0, process.err
    assert "is full" in process.out
    assert "run the same command again" in process.out
    writer = kit.writer(path, kit.spec(codec="none"), kit.images())
    assert writer.pending() == list(range(1, len(writer.parts)))
    assert not list(path.glob("parts/.*"))
    kit.fill(writer)
    assert len(open_cache(path)) == 7


def test_errors_of_the_thread_surface_in_the_next_add(
    tmp_path: Path, kit: "type[Kit]", monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, images = kit.spec(), kit.images(40)
    writer = kit.writer(tmp_path / "x.zarr", spec, images, part_size=1 << 30)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kdpipe.cache.write.part_writer._PartFiles.append", fail)
    added = 0
    with pytest.raises(CacheError, match="is full"), writer.part(0) as part:
        for image in images:
            part.add(kit.record(image, "identity", spec))
            added += 1
    assert added < len(images)


def test_everything_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, kit: "type[Kit]", monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    monkeypatch.setattr("os.fsync", lambda handle: synced.add(os.fstat(handle).st_ino))
    rename, checked = Path.rename, []

    def careful(self: Path, target: Path) -> Path:
        if ".tmp" not in str(target):
            for entry in (self, *self.rglob("*")):
                assert entry.stat().st_ino in synced, entry
            checked.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", careful)
    kit.make(tmp_path / "x.zarr", count=2)
    assert checked == ["x.zarr", "head", "00000"]


def test_the_list_of_files_names_every_file(cache_path: Path) -> None:
    location = Folder(cache_path)
    for key, place in [("", "plan"), ("head", "head"), *((part_key(n), part_key(n)) for n in range(3))]:
        record = read_record(location, key)
        assert record is not None
        folder = cache_path / files_key(place, record)
        files = [file for file in folder.rglob("*") if file.is_file() and file.name != "files.json"]
        contents = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
        listed = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()}
        assert read_files(location, files_key(place, record), record["files"]) == listed


@pytest.mark.parametrize("name", ["a/b", "__x", "..", "", "a\\b", "a\n", "files.json", "x" * 300])
def test_names_that_no_array_can_have(tmp_path: Path, kit: "type[Kit]", name: str) -> None:
    writer = kit.writer(tmp_path / "x.zarr", kit.spec(), kit.images(1))
    with pytest.raises(CacheError, match="cannot be the name"):
        writer.write_head({name: torch.zeros(1)})


def test_arguments_that_make_no_cache(tmp_path: Path, kit: "type[Kit]") -> None:
    with pytest.raises(CacheError, match="no images"):
        kit.writer(tmp_path / "x.zarr", kit.spec(), [])
    with pytest.raises(CacheError, match="JSON values"):
        kit.writer(tmp_path / "x.zarr", kit.spec(), kit.images(), metadata={"path": tmp_path})
    assert list(tmp_path.iterdir()) == []
