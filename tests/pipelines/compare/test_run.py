"""Cells as processes: what they get of a machine, how they end, and how they are ended."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from kdpipe.pipelines.compare import run
from kdpipe.pipelines.compare.cells import Cell
from kdpipe.pipelines.compare.process import CellProcess, Outcome
from kdpipe.pipelines.compare.run import LocalEngine, gpu_names, run_cells, slot_environment
from kdpipe.pipelines.runtime.console import stop

# A stand-in for a training: its words are parent, folder, and what happens.
TRAINING = """
import json, os, signal, sys, time
from pathlib import Path
folder, what = Path(sys.argv[2]), sys.argv[3]
folder.mkdir(parents=True, exist_ok=True)
(folder / "environment").write_text(json.dumps({**os.environ}))
if what == "fail":
    print("so far so good")
    sys.exit("Error: the picture 7 is bad\\nTake another one.")
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    def interrupted(number, frame):
        (folder / "saved").write_text("")
        sys.exit(130)
    signal.signal(signal.SIGTERM, interrupted)
    (folder / "ready").write_text("")
    time.sleep(600)
if what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "ready").write_text("")
    time.sleep(600)
if what != "elsewhere":
    (folder / "kdpipe").mkdir()
    (folder / "kdpipe" / "recipe.json").write_text(json.dumps({"kdpipe": "0", "training": "student", "saved": True}))
    (folder / "result.json").write_text(json.dumps({"ap": 0.25}))
"""


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CellProcess, "program", (sys.executable, "-c", TRAINING))
    monkeypatch.setattr(run, "_POLL_SECONDS", 0.01)


@pytest.fixture
def cell(tmp_path: Path) -> Callable[..., Cell]:
    def make(what: str, seed: int = 0) -> Cell:
        folder = tmp_path / "student" / what / f"seed-{seed}"
        return Cell(seed, folder, (str(folder), what), {"options": {}, "config": ""}, secret_words=("key=secret",))

    return make


def ran(cells: list[Cell], jobs: int = 1, environment: dict[str, str] | None = None) -> tuple[dict[str, str], str]:
    """Run cells; returns the messages of those that failed, and what was shown."""
    said = io.StringIO()
    engine = LocalEngine(jobs, environment or {})
    failed = run_cells(cells, 1, engine, Console(file=said, width=200))
    return {name: outcome.message for name, outcome in failed.items()}, said.getvalue()


def test_one_that_fails_leaves_the_others_alone(cell: Callable[..., Cell]) -> None:
    cells = [cell(what) for what in ("fail", "killed", "elsewhere", "done")]
    failed, said = ran(cells, jobs=2)
    assert failed["student/fail/seed-0"] == "the picture 7 is bad\nTake another one."
    assert failed["student/killed/seed-0"] == "ended by SIGKILL (out of memory?)"
    assert "does not hold it: is it a shared disk?" in failed["student/elsewhere/seed-0"]
    assert len(failed) == 3
    assert "student/done/seed-0: done, AP 0.250\n" in said
    assert f"student/fail/seed-0: failed: the picture 7 is bad\nTake another one.\n  {cells[0].log}\n" in said
    log = cells[0].log.read_text()
    assert log.startswith(f"$ kdpipe {cells[0].folder} fail\nso far so good\n")
    assert "secret" not in log
    assert ran(cells[:1])[0] == {cells[0].name: failed[cells[0].name]}  # and not what it said the first time, too


def test_so_many_at_once(cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    most, start, running = 0, LocalEngine.start, set[str]()
    ended = LocalEngine.ended

    def started(self: LocalEngine, each: Cell) -> None:
        nonlocal most
        start(self, each)
        running.add(each.name)
        most = max(most, len(running))

    def gone(self: LocalEngine) -> list[tuple[Cell, Outcome | None]]:
        found = ended(self)
        running.difference_update(each.name for each, _ in found)
        return found

    monkeypatch.setattr(LocalEngine, "start", started)
    monkeypatch.setattr(LocalEngine, "ended", gone)
    assert ran([cell("done", seed) for seed in range(5)], jobs=3)[0] == {}
    assert most == 3


def test_each_has_its_share_of_the_machine(cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "cores", lambda: 16)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cells = [cell("done", seed) for seed in range(2)]
    assert LocalEngine(None, {}).jobs == 2
    assert ran(cells, jobs=2, environment={"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"})[0] == {}
    shares = [json.loads((each.folder / "environment").read_text()) for each in cells]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["GPU-a", "GPU-b"]
    assert {share["OMP_NUM_THREADS"] for share in shares} == {"8"}


def test_shares() -> None:
    def share(slot: int, jobs: int, gpus: list[str], **environment: str) -> dict[str, str]:
        found = slot_environment(slot, jobs, gpus, environment)
        found.pop("OMP_NUM_THREADS", None)
        return found

    assert share(0, 2, []) == {}
    assert [share(slot, 3, ["0", "5"])["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "5", "0"]
    assert "OMP_NUM_THREADS" not in slot_environment(0, 1, [], {"OMP_NUM_THREADS": "3"})
    assert int(slot_environment(0, 1000, [], {})["OMP_NUM_THREADS"]) == 1


def test_gpus_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert gpu_names({}) == ["0", "1"]
    assert gpu_names({"CUDA_VISIBLE_DEVICES": "3, 1"}) == ["3", "1"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert gpu_names({"CUDA_VISIBLE_DEVICES": "3"}) == []
    assert LocalEngine(None, {}).jobs == 1


def wait_for(*paths: Path) -> None:
    until = time.monotonic() + 30
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(("what", "seconds"), [("wait", 30.0), ("deaf", 0.1)])
def test_all_are_stopped(cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch, what: str, seconds: float) -> None:
    monkeypatch.setattr("kdpipe.pipelines.compare.process._SECONDS_TO_STOP", seconds)
    cells = [cell(what, seed) for seed in range(3)]
    pids = []
    original = subprocess.Popen

    def opened(*args: object, **options: object) -> "subprocess.Popen[bytes]":
        process = original(*args, **options)  # type: ignore[call-overload]
        pids.append(process.pid)
        return process  # type: ignore[no-any-return]

    monkeypatch.setattr(subprocess, "Popen", opened)
    check = stop.check

    def asked() -> None:
        wait_for(*(each.folder / "ready" for each in cells[:2]))
        stop._asked.set()
        check()

    monkeypatch.setattr(stop, "check", asked)
    with pytest.raises(KeyboardInterrupt):
        ran(cells, jobs=2)
    assert len(pids) == 2  # the third was not begun
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert [(each.folder / "saved").exists() for each in cells] == [what == "wait"] * 2 + [False]


def test_a_cell_ends_with_what_started_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "grid")  # of which nobody writes a word
    code = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'kdpipe.pipelines.cli.cell', str(os.getpid()), 'compare', '--grid', 'grid']\n"
        "process = subprocess.Popen(command, stderr=open('err', 'w'), start_new_session=True)\n"
        "open('pid', 'w').write(f'{process.pid} ')\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    wait_for(tmp_path / "pid")
    while not (text := (tmp_path / "pid").read_text()).endswith(" "):
        time.sleep(0.01)
    status = Path(f"/proc/{int(text)}/status")
    until = time.monotonic() + 30
    while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.5)  # it opens the grid
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 30
    while Path(f"/proc/{int(text)}").exists() and "Z" not in Path(f"/proc/{int(text)}/stat").read_text().split()[2]:
        assert time.monotonic() < until, "it goes on alone"
        time.sleep(0.01)
    assert (tmp_path / "err").read_text().strip() == "Interrupted."
