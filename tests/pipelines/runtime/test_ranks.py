"""`kdpipe cache-teacher` in several processes, started as torchrun and Slurm start them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.runtime.ranks import Ranks

if TYPE_CHECKING:
    from tests.conftest import Forked, Forks
    from tests.pipelines.conftest import Kit

# The layout of the recorded config as in this process, see `kit`; `slow` are ranks that take their time with an image.
COMMAND = """
import sys, time
import mmengine.config.config
import kdpipe.pipelines.runtime.ranks as ranks
from kdpipe.pipelines.cli.main import main
from kdpipe.pipelines.teacher.teacher import Teacher
mmengine.config.config.FormatCode = lambda text, **options: (text, False)
rank, slow, *args = sys.argv[1:]
ranks._DEAD_SECONDS = 5.0
if rank in slow.split(","):
    record = Teacher.record
    def slowly(*args, **options):
        time.sleep(0.4)
        return record(*args, **options)
    Teacher.record = slowly
main(args)
"""
SCRIPT = Path(sys.executable).with_name("kdpipe")
MODULES = (
    "kdpipe.pipelines.cli.main",
    "kdpipe.pipelines.commands.cache_teacher",
    "kdpipe.pipelines.runtime.ranks",
    "mmdet.models",
)


@pytest.fixture(scope="module")
def forks(forking: "type[Forks]") -> "Iterator[Forks]":
    forks = forking(Path(__file__).parents[1], *MODULES)
    yield forks
    forks.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port


def many(kit: "Kit", work: Path) -> tuple[object, ...]:
    """The command that caches 24 images in about as many parts; without the name of the cache."""
    ann = kit.annotations(work / "many.json", copies=3)
    data = ("--ann-file", ann, "--img-dir", kit.img)
    return "cache-teacher", "--ckpt", kit.teacher, *data, *kit.VIEW, "--part-size", "64KiB", "--out"


def start(forks: "Forks", work: Path, size: int, *args: object, slow: str = "") -> "list[Forked]":
    """The processes of a Slurm step."""
    step = {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_NTASKS": size, "SLURM_NODELIST": "localhost"}
    step["MASTER_PORT"] = free_port()
    return [
        forks.start(COMMAND, rank, slow, *args, cwd=work, **step, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        for rank in range(size)
    ]


def committed(cache: Path) -> list[str]:
    return sorted(entry.name for entry in (cache / "parts").glob("0*"))


def wait_for_parts(cache: Path, count: int, *processes: "Forked") -> None:
    while len(committed(cache)) < count:
        assert not any(process.poll() for process in processes), [process.err for process in processes]
        time.sleep(0.01)


def test_the_cache_is_that_of_one_process(kit: "Kit", work: Path, forks: "Forks") -> None:
    command = many(kit, work)
    processes = start(forks, work, 2, *command, "x.zarr")
    assert [process.wait() for process in processes] == [0, 0], processes[0].err + processes[1].err
    assert "24 images, 0 skipped" in processes[0].out
    assert "24 new images" in processes[0].out
    assert processes[1].out + processes[0].err + processes[1].err == ""
    kit.run(*command, "one.zarr")
    assert kit.tree(work / "x.zarr") == kit.tree(work / "one.zarr")
    assert len(committed(work / "x.zarr")) > 8


def test_the_faster_process_does_more(kit: "Kit", work: Path, forks: "Forks") -> None:
    command = many(kit, work)
    begin = time.monotonic()
    processes = start(forks, work, 2, *command, "x.zarr", "--limit", 20, slow="1")
    assert [process.wait() for process in processes] == [0, 0]
    assert len(open_cache("x.zarr")) == 20
    assert time.monotonic() - begin > 0.4  # the slow one did take part


def test_a_killed_process_does_not_hang_the_others(kit: "Kit", work: Path, forks: "Forks") -> None:
    """As under Slurm, which does not look after the others; what it held is made by the first."""
    command = many(kit, work)
    processes = start(forks, work, 3, *command, "x.zarr", slow="1,2")
    wait_for_parts(work / "x.zarr", 4, *processes)
    processes[1].kill()
    assert [process.wait(60) for process in processes] == [0, -signal.SIGKILL, 0], processes[0].err
    kit.run(*command, "one.zarr")
    assert kit.tree(work / "x.zarr") == kit.tree(work / "one.zarr")
    assert not [name for name in os.listdir(work / "x.zarr" / "parts") if name.endswith(".tmp")]  # noqa: PTH208


def test_without_the_first_the_others_end(kit: "Kit", work: Path, forks: "Forks") -> None:
    command = many(kit, work)
    processes = start(forks, work, 3, *command, "x.zarr", slow="0,1,2")
    wait_for_parts(work / "x.zarr", 2, *processes)
    processes[0].kill()
    assert [process.wait(30) for process in processes[1:]] == [1, 1]
    assert processes[1].err.startswith("Error: The first process of this run is gone")
    assert processes[2].err == ""
    assert 2 <= len(committed(work / "x.zarr")) < 20
    again = start(forks, work, 2, *command, "x.zarr")  # another number of them
    assert [process.wait() for process in again] == [0, 0]
    assert "images are cached already" in again[0].out
    kit.run(*command, "one.zarr")
    assert kit.tree(work / "x.zarr") == kit.tree(work / "one.zarr")


@pytest.mark.parametrize("size", [2, 3])
def test_a_bad_image_is_one_message(kit: "Kit", work: Path, forks: "Forks", size: int) -> None:
    shutil.copytree(kit.img, work / "images")
    bad = sorted((work / "images").iterdir())[4]
    bad.write_bytes(b"no image")
    command = [*many(kit, work), "x.zarr"]
    command[command.index(kit.img)] = work / "images"
    processes = start(forks, work, size, *command)
    assert [process.wait() for process in processes] == [1] * size
    errors = [process.err for process in processes if process.err]
    assert len(errors) == 1, errors
    assert str(bad) in errors[0]
    assert len(errors[0].splitlines()) == 1
    skipping = start(forks, work, size, *command, "--skip-bad-images")
    assert [process.wait() for process in skipping] == [0] * size
    assert "21 images, 3 skipped" in skipping[0].out
    assert skipping[0].out.count(f"skipped: image {bad}") in range(4)
    assert [process.out for process in skipping[1:]] == [""] * (size - 1)
    shutil.copy(kit.img / bad.name, bad)


def test_bad_options_are_one_message(kit: "Kit", work: Path, forks: "Forks") -> None:
    shutil.copytree(kit.cache, work / "x.zarr")
    for command, words, code in (
        (("cache-teacher", "--ckpt", "no.pth", *kit.data, "--out", "y.zarr"), "does not exist", 1),
        (("cache-teacher", *kit.source, *kit.VIEW, "--out", "x.zarr", "--dtype", "float16"), "made with something", 1),
        (("cache-teacher", "--colour"), "No such option", 2),
    ):
        processes = start(forks, work, 2, *command)
        assert [process.wait() for process in processes] == [code] * 2
        errors = [process.err for process in processes if process.err]
        assert len(errors) == 1, errors
        assert words in errors[0]
    assert kit.tree(work / "x.zarr") == kit.tree(kit.cache)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_it_can_go_on(kit: "Kit", work: Path, forks: "Forks", number: signal.Signals) -> None:
    command = many(kit, work)
    processes = start(forks, work, 2, *command, "x.zarr", slow="0,1")
    wait_for_parts(work / "x.zarr", 2, *processes)
    for process in processes if number == signal.SIGTERM else processes[:1]:
        process.send(number)
    assert [process.wait(30) for process in processes] == [130, 130]
    assert "the same command goes on from there" in processes[0].out
    assert processes[0].err.strip() == "Interrupted."
    assert (processes[1].out + processes[1].err).strip() == ""
    assert len(open_cache("x.zarr", allow_partial=True)) >= 2
    kit.run(*command, "x.zarr")
    kit.run(*command, "one.zarr")
    assert kit.tree(work / "x.zarr") == kit.tree(work / "one.zarr")


def test_two_commands_at_once_do_no_harm(kit: "Kit", work: Path, forks: "Forks") -> None:
    command = many(kit, work)
    processes = [forks.start(COMMAND, 0, "", *command, "x.zarr", cwd=work) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0], processes[0].err + processes[1].err
    kit.run(*command, "one.zarr")
    assert kit.tree(work / "x.zarr") == kit.tree(work / "one.zarr")


def torchrun(work: Path, size: int, *args: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    return subprocess.Popen(
        [*command, "--no-python", SCRIPT, *map(str, args)],
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def same_content(kit: "Kit", one: Path, other: Path) -> bool:
    """All but the recorded config, which is laid out otherwise in this process."""
    return all(kit.tree(one / folder) == kit.tree(other / folder) for folder in ("parts", "head", "plan"))


def test_torchrun(kit: "Kit", work: Path) -> None:
    command = many(kit, work)
    process = torchrun(work, 2, *command, "x.zarr")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "24 images, 0 skipped" in out
    kit.run(*command, "one.zarr")
    assert same_content(kit, work / "x.zarr", work / "one.zarr")


def workers_of(pid: int) -> list[int]:
    """Processes that torchrun started, in the order of ranks."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sorted(int(child) for child in children if b"cache-teacher" in Path(f"/proc/{child}/cmdline").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("victim", range(4))
def test_torchrun_with_a_killed_process(kit: "Kit", work: Path, victim: int) -> None:
    ann = kit.annotations(work / "many.json", copies=20)
    data = ("--ann-file", ann, "--img-dir", kit.img)
    command = ("cache-teacher", "--ckpt", kit.teacher, *data, *kit.VIEW, "--part-size", "64KiB", "--out")
    process = torchrun(work, 4, *command, "x.zarr")
    try:
        while len(committed(work / "x.zarr")) < 10:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.kill(workers_of(process.pid)[victim], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    assert process.returncode == 1
    assert "\nError: " not in f"\n{err}"  # there is torchrun's own report
    assert 10 <= len(committed(work / "x.zarr")) < 150
    again = torchrun(work, 2 + victim % 3, *command, "x.zarr")
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "160 images, 0 skipped" in out
    assert "are cached already" in out
    kit.run(*command, "one.zarr")
    assert same_content(kit, work / "x.zarr", work / "one.zarr")


@pytest.mark.slow
def test_torchrun_with_a_bad_image(kit: "Kit", work: Path) -> None:
    shutil.copytree(kit.img, work / "images")
    bad = sorted((work / "images").iterdir())[4]
    bad.write_bytes(b"no image")
    command = [*many(kit, work), "x.zarr"]
    command[command.index(kit.img)] = work / "images"
    process = torchrun(work, 4, *command)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.count("\nError: ") + err.startswith("Error: ") == 1, err
    assert str(bad) in err


def test_one_process_alone() -> None:
    with Ranks() as ranks:
        assert ranks.first
        assert ranks.agreed(lambda: [3, 5]) == [3, 5]
        assert list(ranks.share([3, 5], lambda: [5], lambda: None)) == [3, 5]
        assert [ranks.count("images", 2), ranks.count("images", 3), ranks.count("images")] == [2, 5, 5]
        ranks.say("a")
        ranks.say("b")
        assert list(ranks.heard()) == ["a", "b"]
        assert list(ranks.heard()) == []


def test_what_cannot_be_reached(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert "Start several processes with torchrun or srun" in kit.refused("cache-teacher", *kit.source)
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert "Set MASTER_PORT to another one" in kit.refused("cache-teacher", *kit.source)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr("kdpipe.pipelines.runtime.rendezvous._START_SECONDS", 0.2)
    message = kit.refused("cache-teacher", *kit.source)
    assert "2 processes (1 came)" in message
    assert "unset RANK and WORLD_SIZE" in message


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
    processes = start(forks, work, 2, "cache-teacher", "--ckpt", ckpt, "--voc", voc, *kit.VIEW)
    assert [process.wait() for process in processes] == [0, 0], processes[0].err + processes[1].err
    assert len(open_cache("drawn.zarr")) == 8
    assert not list(work.glob("*.tmp"))
