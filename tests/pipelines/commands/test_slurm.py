"""A real Slurm of two nodes on this machine: a cache by an array and by srun, a student by srun, and nodes that die."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.pipelines.commands.conftest import Parts
    from tests.pipelines.conftest import Kit

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
TOOL = Path(os.environ.get("KDPIPE_SLURM", ROOT.parent / "shared" / "tools" / "slurm.sh"))
KDPIPE = f"{sys.executable} -m kdpipe.pipelines.cli"


class Slurm:
    """Two nodes of one CPU each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        said = self._tool("start")
        self._env = {**os.environ, "SLURM_CONF": said.split("SLURM_CONF=")[1].strip()}
        self._env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "PYTHONWARNINGS": "ignore"}

    def _tool(self, what: str, *more: object) -> str:
        command = ["bash", str(TOOL), what, str(self._folder), *map(str, more)]
        # the daemons stay where they were started, longer than the folder of a test
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, *command: object, cwd: Path) -> str:
        done = subprocess.run(
            [str(word) for word in command], cwd=cwd, env=self._env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, script: str, *options: str, cwd: Path) -> str:
        """The number of a job of this script."""
        (cwd / "job.sh").write_text(f"#!/bin/bash\n{script}\n")
        return self.run("sbatch", "--parsable", "--requeue", "--open-mode=append", *options, "job.sh", cwd=cwd).strip()

    def lose_and_revive(self, node: int) -> None:
        """End a node with all that runs on it, and start it again."""
        # told first: a task that is ended before what watches it has failed by itself, and is not queued again
        self.run("scontrol", "update", f"NodeName=n{node}", "State=DOWN", "Reason=lost", cwd=self._folder)
        self._tool("kill", node)
        self._tool("revive", node)

    def wait(self, job: str, cwd: Path) -> None:
        """Return when a job, and all tasks of its array, have left the queue."""
        until = time.monotonic() + 300
        while queue := self.run("squeue", "-h", "-r", "-j", job, "-o", "%i %r", cwd=cwd).splitlines():
            assert time.monotonic() < until, self.run("squeue", cwd=cwd) + self.run("sinfo", "-N", cwd=cwd)
            # what Slurm sent to the node in the moment that this died, it leaves to people
            if held := [line.split()[0] for line in queue if "held" in line]:
                self._let_go_on(held)
            time.sleep(0.2)

    def _let_go_on(self, jobs: list[str]) -> None:
        """What an administrator does: nodes on which a launch failed are taken back, and the jobs are released."""
        for line in self.run("sinfo", "-h", "-N", "-o", "%N %T", cwd=self._folder).splitlines():
            node, state = line.split()
            if state.startswith(("drain", "down")):
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", cwd=self._folder)
        self.run("scontrol", "release", ",".join(jobs), cwd=self._folder)

    def close(self) -> None:
        self._tool("stop")
        until = time.monotonic() + 20
        while list(self._folder.glob("*.own")) and time.monotonic() < until:  # each daemon removes its own, last
            time.sleep(0.05)
        shutil.rmtree(self._folder)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if not TOOL.is_file():
        pytest.skip(f"no {TOOL}; set KDPIPE_SLURM to a script that starts a Slurm of two nodes")
    for program in ("slurmctld", "slurmd", "srun", "munged"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: Debian's packages slurmctld, slurmd, slurm-client and munge")
    if os.getuid() != 0:
        pytest.skip("only root may start the nodes")
    folder = Path("/tmp") / f"kdpipe-slurm-{os.getpid()}"
    found = Slurm(folder)
    yield found
    found.close()


def script_command(parts: "Parts", copies: int) -> str:
    """The command that makes `x.zarr`, as a script has it."""
    return " ".join(map(str, (KDPIPE, *parts.command(copies), "x.zarr")))


def is_that_of_one_process(kit: "Kit", parts: "Parts", work: Path, command: str) -> bool:
    """Whether `x.zarr` is the cache that one process makes."""
    kit.run(*command.split()[3:-1], work / "one.zarr")
    return parts.same_content(work / "x.zarr", work / "one.zarr")


def test_an_array_of_which_a_node_dies(kit: "Kit", parts: "Parts", work: Path, slurm: Slurm) -> None:
    command = script_command(parts, copies=20)
    job = slurm.submit(
        f"echo begins ${{SLURM_RESTART_COUNT:-0}}\n{command}", "--array=0-3", "--output=%a.log", cwd=work
    )
    until = time.monotonic() + 120
    while len(parts.committed(work / "x.zarr")) < 10:
        assert time.monotonic() < until, [log.read_text() for log in work.glob("*.log")]
        time.sleep(0.02)
    slurm.lose_and_revive(1)
    assert len(parts.committed(work / "x.zarr")) < 160
    slurm.wait(job, work)
    logs = [(work / f"{task}.log").read_text() for task in range(4)]
    for task, log in enumerate(logs):
        assert f"Shard {task}/4, by SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT." in log
        assert f"Shard {task}/4 is done" in log
    assert any("begins 1" in log for log in logs), logs  # the task that was lost
    assert any("the cache is complete" in log for log in logs), logs
    assert is_that_of_one_process(kit, parts, work, command)


def test_tasks_of_one_step(kit: "Kit", parts: "Parts", work: Path, slurm: Slurm) -> None:
    command = script_command(parts, copies=3)
    out = slurm.run("srun", "-n2", "-l", *command.split(), cwd=work)
    for task in range(2):
        assert f"{task}: Shard {task}/2, by SLURM_PROCID and SLURM_STEP_NUM_TASKS." in out
        assert f"{task}: Shard {task}/2 is done" in out
    assert "the cache is complete" in out
    assert "24 images, 0 skipped" in out
    assert is_that_of_one_process(kit, parts, work, command)
    script = slurm.submit(command, "-n2", "--output=script.log", cwd=work)  # without srun, in the script itself
    slurm.wait(script, work)
    log = (work / "script.log").read_text()
    assert "Warning: This job has 2 tasks, and this is one process: start it by srun" in log
    assert "0 new images" in log


def test_a_student_of_which_a_node_dies(kit: "Kit", work: Path, slurm: Slurm) -> None:
    command = kit.student_command(work / "w", "--epochs", 20, "-o", "default_hooks.checkpoint.interval=1")
    train = " ".join([KDPIPE, *map(str, command)])
    job = slurm.submit(
        f"[ -e w/last_checkpoint ] && resume=--resume\nexec srun --kill-on-bad-exit=1 {train} $resume",
        "-n2",
        "--output=train.log",
        cwd=work,
    )
    until = time.monotonic() + 200
    while not (work / "w" / "epoch_2.pth").exists():
        assert time.monotonic() < until, (work / "train.log").read_text()
        time.sleep(0.02)
    slurm.lose_and_revive(2)
    slurm.wait(job, work)
    log = (work / "train.log").read_text()
    assert log.count("Waiting for 2 processes") == 2, log
    assert (work / "w" / "epoch_20.pth").exists(), log
    assert (work / "w" / "student.pth").exists()
    assert "AP not measured" in log
