"""`kdpipe cache-teacher --dry-run`, and the refusal to begin what cannot fit."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from kdpipe.cache.records import TeacherRecord
from kdpipe.cache.store.folder import Folder
from kdpipe.pipelines.teacher.teacher import Teacher

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def leave_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(1 << 40, 0, free))


def row(text: str, name: str) -> list[float]:
    """Byte figures of a table's row."""
    (line,) = (line for line in text.splitlines() if re.search(rf"^│ {name} ", line))
    return [float(value) * UNITS[unit] for value, unit in re.findall(r"([\d.]+) ([KMG]?i?B)", line)]


def test_shows_cost_and_writes_nothing(kit: "Kit", work: Path) -> None:
    out = kit.run("cache-teacher", *kit.source, *kit.VIEW, "--out", work / "x.zarr", "--dry-run").out
    assert not list(work.iterdir())
    raw, disk = row(out, "features")
    stored = sum(file.stat().st_size for file in kit.cache.glob("parts/*/*/features/c*"))
    assert disk == pytest.approx(stored, rel=0.1)  # sampled from half of the images
    assert raw > disk
    predictions, objects, pyramid = (row(out, name) for name in ("predictions", "objects", "pyramid"))
    assert predictions[0] == predictions[1] <= predictions[2] < predictions[3]  # int4 is for features alone
    assert objects[0] < objects[1] < objects[2] < objects[3]
    assert predictions[1] < objects[1]
    assert pyramid[0] < pyramid[1] < pyramid[2] < pyramid[3]
    head = sum(file.stat().st_size for file in kit.cache.glob("head/*/*/*"))
    assert row(out, "head's weights, once") == [pytest.approx(head, rel=0.01)]
    assert re.search(r"--targets objects: [\d.]+ KiB, for --rois teacher alone; views identity, hflip", out)
    assert re.search(r"Time: about \d+:\d\d:\d\d at [\d.]+ images/s", out)
    assert "It fits." in out


@pytest.mark.parametrize("tier", ["objects", "pyramid"])
def test_the_estimate_of_photographs_is_right(kit: "Kit", work: Path, bccd: Path, tier: str) -> None:
    """Fifty of them, of which eight are sampled: within a tenth of what they take."""
    names = ("Platelets", "RBC", "WBC")
    config = kit.config(classes=len(names))
    ckpt = kit.save_detector(work / "teacher.pth", config, names)
    data = ("--ann-file", bccd / "train.json", "--img-dir", bccd / "JPEGImages", "--limit", 50)
    command = (
        "cache-teacher",
        "--ckpt",
        ckpt,
        *data,
        "--scale",
        "256x192",
        "--targets",
        tier,
        "--out",
        work / "x.zarr",
    )
    estimated = row(kit.run(*command, "--dry-run").out, "targets")[1]
    ended = kit.run(*command)
    parts = sum(file.stat().st_size for file in (work / "x.zarr" / "parts").rglob("*") if file.is_file())
    head = sum(file.stat().st_size for file in (work / "x.zarr" / "head").rglob("*") if file.is_file())
    assert estimated == pytest.approx(parts, rel=0.1)
    match = re.search(
        r"([\d.]+) (\w+) on disk \(\d+ % of the raw bytes\), and ([\d.]+) (\w+) of the teacher's heads", ended.out
    )
    assert match is not None
    assert float(match[1]) * UNITS[match[2]] == pytest.approx(parts, rel=0.05)  # with the root of the cache
    assert float(match[3]) * UNITS[match[4]] == pytest.approx(head, rel=0.01)


def test_what_does_not_fit_is_refused_before_anything_is_made(
    kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_free(monkeypatch, 40_000 + sum(file.stat().st_size for file in kit.cache.glob("head/*/*/*")))
    command = ("cache-teacher", *kit.source, *kit.VIEW, "--out", work / "x.zarr")
    message = kit.refused(*command)
    assert "will not fit" in message
    assert "--targets predictions --dtype int8" in message
    assert "--targets pyramid --dtype int4" not in message
    assert re.search(r"\(--targets objects needs [\d.]+ [KM]iB\)", message)
    assert not list(work.iterdir())
    assert "It does not fit" in kit.run(*command, "--dry-run").out
    leave_free(monkeypatch, 10)
    assert "--limit" in kit.refused(*command)


def test_what_fits_only_compressed_is_begun(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = sum(file.stat().st_size for file in kit.cache.rglob("c*") if file.is_file())
    leave_free(monkeypatch, int(1.1 * needed))
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--out", work / "x.zarr")


def test_only_what_is_missing_has_to_fit(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(kit.cache, work / "x.zarr")
    leave_free(monkeypatch, 0)
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--out", work / "x.zarr")


def test_free_bytes_of_a_path_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_paths: list[Any] = []

    def disk_usage(path: Path) -> Usage:
        asked_paths.append(path)
        return Usage(2, 1, 1)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    assert Folder(tmp_path / "a" / "b" / "x.zarr").free_bytes() == 1
    assert asked_paths == [tmp_path]


def test_numbers_beyond_float16_leave_the_other_types_out(
    kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that a float32 cache alone can hold has its estimate of that."""
    record = Teacher.record

    def large(*args: Any, **options: Any) -> TeacherRecord:
        made = record(*args, **options)
        return replace(made, features=tuple(1e7 * (1 + level.abs()) for level in made.features or ()))

    monkeypatch.setattr(Teacher, "record", large)
    start = ("cache-teacher", "--ckpt", kit.teacher, *kit.data, *kit.VIEW, "--out", "x.zarr")
    shown = kit.run(*start, "--targets", "pyramid", "--dtype", "float32", "--dry-run").out
    assert "—: the teacher gives numbers there that float16 cannot hold." in shown.replace("\n", " ")
    assert "not finite as float16" in kit.refused(*start, "--targets", "pyramid", "--dtype", "float16", "--dry-run")
    leave_free(monkeypatch, 5000)
    assert "The cache will not fit" in kit.refused(*start, "--targets", "pyramid", "--dtype", "float32")
