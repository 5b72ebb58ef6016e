"""`kdpipe cache-teacher` in several processes that know nothing of each other but their numbers."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kdpipe.cache.read.reader import open_cache

if TYPE_CHECKING:
    from tests.conftest import Forked, Forks
    from tests.pipelines.commands.conftest import Parts
    from tests.pipelines.conftest import Kit

# The layout of the recorded config as in this process, see `kit`; a slow process takes its time with an image.
COMMAND = """
import sys, time
import mmengine.config.config
from kdpipe.pipelines.cli.main import main
from kdpipe.pipelines.runtime import console
from kdpipe.pipelines.teacher import missing
from kdpipe.pipelines.teacher.teacher import Teacher
mmengine.config.config.FormatCode = lambda text, **options: (text, False)
console._LINE_SECONDS = missing._LOOK_SECONDS = 0.01
seconds, record = float(sys.argv[1]), Teacher.record
def slowly(*args, **options):
    time.sleep(seconds)
    return record(*args, **options)
Teacher.record = slowly
main(sys.argv[2:])
"""


def wait_for_parts(parts: "Parts", cache: Path, count: int, *processes: "Forked") -> None:
    while len(parts.committed(cache)) < count:
        assert not any(process.poll() for process in processes), [process.err for process in processes]
        time.sleep(0.01)


def test_shards_by_hand(kit: "Kit", parts: "Parts", work: Path) -> None:
    command = parts.command(copies=3)
    out = kit.run(*command, "x.zarr", "--shard", "1/3").out
    assert out.startswith("Shard 1/3, by --shard.\n")
    assert "Shard 1/3 is done: 8 new images" in out
    assert "Other shards still have to make 16 of 24 parts" in out
    assert parts.committed(work / "x.zarr") == list(range(1, 24, 3))
    assert "24 images" not in out

    printed = kit.run("inspect", "x.zarr").out.splitlines()
    assert [line for line in printed if line.startswith("missing  part 0")] == ["missing  part 0 of 1 images"]
    assert "missing  16 parts; this makes them:" in printed
    words = shlex.split(printed[-1])
    assert words[0] == "kdpipe"
    again = kit.run(*words[1:], "--shard", "0/2").out  # another number of them
    assert "8 of 24 images are cached already" in again
    assert "Other shards still have to make 8 of 24 parts" in again
    last = kit.run(*words[1:], "--shard", "1/2").out
    assert "Shard 1/2 is done, and the cache is complete" in last
    assert "24 images, 0 skipped" in last
    kit.run(*command, "one.zarr")
    assert kit.tree(work / "x.zarr") == kit.tree(work / "one.zarr")
    assert "0 new images" in kit.run(*words[1:], "--shard", "0/2").out


def test_the_command_of_a_cache_has_its_options(kit: "Kit", work: Path) -> None:
    (work / "teacher.py").write_text(kit.config().pretty_text)
    options = ("--config", "teacher.py", "--limit", 3, "--part-size", "1KiB", "--levels", "P3,P4", "--dtype", "float16")
    more = ("--views", "identity,hflip", "--skip-bad-images", "--out", "x.zarr")
    kit.run("cache-teacher", *kit.source, *kit.VIEW, *options, *more, "--shard", "0/2")
    words = json.loads(kit.run("inspect", "x.zarr", "--json").out)["command"]
    for name, value in (("--config", str(work / "teacher.py")), ("--limit", "3"), ("--levels", "P3,P4")):
        assert words[words.index(name) + 1] == value
    assert "--skip-bad-images" in words
    assert shlex.join(words) in kit.run("verify", "x.zarr", code=1).out.splitlines()
    assert "3 images, 0 skipped" in kit.run(*words[1:]).out


@pytest.mark.parametrize("shard", ["3/3", "/0", "1", "1/2/3", "-1/2", "a/b"])
def test_what_is_no_shard(kit: "Kit", work: Path, shard: str) -> None:
    assert "is no shard; expected I/N" in kit.refused("cache-teacher", *kit.source, "--shard", shard, code=2)


def test_an_indexed_job_of_kubernetes(kit: "Kit", parts: "Parts", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    out = kit.run(*parts.command(), "x.zarr", "--shard", "/4").out
    assert out.startswith("Shard 2/4, by JOB_COMPLETION_INDEX.\n")
    assert parts.committed(work / "x.zarr") == [2, 6]
    out = kit.run(*parts.command(), "x.zarr").out
    assert out.startswith("Warning: JOB_COMPLETION_INDEX is set: without --shard")
    assert len(open_cache("x.zarr")) == 8


def test_a_killed_shard_changes_nothing_for_the_others(kit: "Kit", parts: "Parts", work: Path, forks: "Forks") -> None:
    """As under Slurm; all begin at once, where there is no cache yet."""
    command = parts.command(copies=3)
    step = {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_NTASKS": 3}
    processes = [
        forks.start(COMMAND, seconds, *command, "x.zarr", cwd=work, **step, SLURM_PROCID=rank)
        for rank, seconds in enumerate((0.01, 0.5, 0.3))
    ]
    wait_for_parts(parts, work / "x.zarr", 4, *processes)
    processes[1].kill()
    assert [process.wait(60) for process in processes] == [0, -signal.SIGKILL, 0], [each.err for each in processes]
    for rank in (0, 2):
        assert processes[rank].out.startswith(f"Shard {rank}/3, by SLURM_PROCID and SLURM_NTASKS.\n")
        assert set(range(rank, 24, 3)) <= set(parts.committed(work / "x.zarr"))
        assert "Other shards still have to make" in processes[rank].out
    lines = re.findall(r"^cache teacher: (\d+)/8, .*, all shards (\d+)/24, .* left$", processes[2].out, re.MULTILINE)
    assert lines, processes[2].out
    assert all(int(own_count) <= 8 for own_count, _ in lines)
    assert max(int(whole) for _, whole in lines) > 8  # what others made is seen
    kit.run(*command, "x.zarr")
    kit.run(*command, "one.zarr")
    assert kit.tree(work / "x.zarr") == kit.tree(work / "one.zarr")


def test_shards_that_overlap_do_no_harm(kit: "Kit", parts: "Parts", work: Path, forks: "Forks") -> None:
    """One of two, the same once more, and one that makes all, of which the first is asked to end."""
    command = parts.command(copies=3)
    shards = ("0/2", "0/2", "0/1")
    processes = [forks.start(COMMAND, 0.05, *command, "x.zarr", "--shard", shard, cwd=work) for shard in shards]
    wait_for_parts(parts, work / "x.zarr", 2, *processes)
    processes[0].send(signal.SIGTERM)
    assert [process.wait() for process in processes] == [130, 0, 0], [each.err for each in processes]
    assert "the same command goes on from there" in processes[0].out
    assert processes[0].err.strip() == "Interrupted."
    kit.run(*command, "one.zarr")
    assert kit.tree(work / "x.zarr") == kit.tree(work / "one.zarr")


def test_the_annotations_of_voc_may_be_converted_by_all_at_once(kit: "Kit", work: Path, forks: "Forks") -> None:
    voc = work / "drawn"
    (voc / "Annotations").mkdir(parents=True)
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    shutil.copytree(kit.img, voc / "JPEGImages")
    content = json.loads(kit.ann.read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    for image in content["images"]:
        boxes = [box for box in content["annotations"] if box["image_id"] == image["id"]]
        objects = ""
        for box in boxes:
            x, y, w, h = (int(side) for side in box["bbox"])
            corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w + 1}</xmax><ymax>{y + h + 1}</ymax>"
            objects += f"<object><name>{names[box['category_id']]}</name><bndbox>{corners}</bndbox></object>"
        stem = Path(image["file_name"]).stem
        (voc / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{objects}</annotation>")
        with (voc / "ImageSets" / "Main" / "train.txt").open("a") as split:
            split.write(f"{stem}\n")
    ckpt = kit.save_detector(work / "teacher.pth", kit.config(), classes=tuple(sorted(kit.classes)))
    command = ("cache-teacher", "--ckpt", ckpt, "--voc", voc, *kit.VIEW, "--part-size", "1KiB", "--shard")
    processes = [forks.start(COMMAND, 0, *command, f"{index}/2", cwd=work) for index in range(2)]
    assert [process.wait() for process in processes] == [0, 0], processes[0].err + processes[1].err
    assert len(open_cache("drawn.zarr")) == 8
    assert not list(work.glob("*.tmp"))


def workers_of(pid: int) -> list[int]:
    """Processes that torchrun started, in the order of ranks."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(int(child) for child in children if b"cache-teacher" in Path(f"/proc/{child}/cmdline").read_bytes())


@pytest.mark.slow
def test_torchrun_starts_a_killed_process_again(kit: "Kit", parts: "Parts", work: Path) -> None:
    command = parts.command(copies=20)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    process = subprocess.Popen(
        [*run, "--no-python", Path(sys.executable).with_name("kdpipe"), *map(str, command), "x.zarr"],
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while len(parts.committed(work / "x.zarr")) < 10:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.kill(workers_of(process.pid)[1], signal.SIGKILL)
        out, err = process.communicate(timeout=300)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert process.returncode == 0, err
    assert out.count("Shard 1/2, by RANK and WORLD_SIZE.") == 2
    assert "are cached already" in out
    assert "160 images, 0 skipped" in out
    kit.run(*command, "one.zarr")
    for folder in ("parts", "head", "plan"):  # the recorded config is laid out otherwise in this process
        assert kit.tree(work / "x.zarr" / folder) == kit.tree(work / "one.zarr" / folder)
