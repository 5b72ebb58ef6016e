"""`kdpipe compare` as users start it, with a process of its own for each training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


def command(kit: "Kit", work_dir: str, *options: object) -> tuple[object, ...]:
    small = ("--recipe", "paper", "--epochs", 6, "--batch-size", 1, "--workers", 1, *kit.val)
    which = ("--student", kit.student, "--methods", "none", "--methods", "sgfi,pred", "--jobs", 2)
    return ("compare", "--cache", kit.cache, *which, *small, "--work-dir", work_dir, *options)


def same(one: Path, other: Path) -> bool:
    for name in ("none", "sgfi-pred"):
        mine, theirs = (
            torch.load(folder / "student" / name / "seed-0" / "student.pth", weights_only=True)["state_dict"]
            for folder in (one, other)
        )
        if not all(torch.equal(mine[key], theirs[key]) for key in theirs):
            return False
    return True


def trainings(work_dir: Path) -> list[int]:
    """Processes that train below a folder, loader workers included."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(work_dir).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def undisturbed(kit: "Kit", tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = kit.start(*command(kit, "w"), cwd=folder)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    return folder / "w"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ended_it_goes_on(kit: "Kit", work: Path, undisturbed: Path, number: int) -> None:
    """By Ctrl-C or at once: no training goes on alone, and the same command goes on to what is undisturbed."""
    process = kit.start(*command(kit, "w"), cwd=work)
    while not any((work / "w").glob("*/*/seed-0/last_checkpoint")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), out + err
    until = time.monotonic() + 60
    while pids := trainings(work / "w"):
        assert time.monotonic() < until, f"{pids} go on alone"
        time.sleep(0.05)
    assert not any((work / "w").glob("*/*/seed-0/result.json"))
    logs = [log.read_text() for log in (work / "w").glob("*/*/seed-0.log")]
    assert all(log.rstrip().endswith("Interrupted.") for log in logs), "\n\n".join(logs)
    process = kit.start(*command(kit, "w"), cwd=work)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert any("of 6 epochs are done; the others follow" in log.read_text() for log in (work / "w").glob("*/*/*.log"))
    assert same(work / "w", undisturbed)


@pytest.mark.slow
def test_printed_commands_run_by_bash(kit: "Kit", work: Path) -> None:
    few = ("--epochs", 2)
    lines = kit.run(*command(kit, "by bash", *few, "--print-commands")).out
    assert len(lines.splitlines()) == 2
    (work / "bin").mkdir()
    (work / "bin" / "kdpipe").symlink_to(Path(sys.executable).with_name("kdpipe"))
    path = {"PATH": f"{work / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-e"], input=lines, text=True, cwd="/", env={**os.environ, **path}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    process = kit.start(*command(kit, "w", *few), cwd=work)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert same(work / "w", work / "by bash")
    files = [
        {
            path.relative_to(folder)
            for path in folder.rglob("*")
            if not any(part[0].isdigit() for part in path.parts[-3:])
        }
        for folder in (work / "w" / "student" / "none" / "seed-0", work / "by bash" / "student" / "none" / "seed-0")
    ]
    assert files[0] == files[1]
    again = kit.run(*command(kit, "by bash", *few)).out
    assert "2 of which are finished" in again
    rows = [json.loads((work / folder / "compare.json").read_text())["rows"] for folder in ("w", "by bash")]
    assert [row["ap"] for row in rows[0]] == [row["ap"] for row in rows[1]]
