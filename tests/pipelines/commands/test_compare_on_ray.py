"""`kdpipe compare --ray`: by a stand-in for Ray, and on a real cluster that loses a node."""

import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.compare import ray_cell, run
from kdpipe.pipelines.compare.cells import Cell
from kdpipe.pipelines.compare.on_ray import RayEngine
from kdpipe.pipelines.compare.process import CellProcess, Outcome
from kdpipe.pipelines.runtime.ray_cluster import own_versions
from kdpipe.pipelines.training.work_dir import WorkDir
from tests.pipelines.commands.ray_stand_in import NodeDiedError, RayError, RayStandIn, RayTaskError

if TYPE_CHECKING:
    from tests.pipelines.commands.conftest import Nodes
    from tests.pipelines.conftest import Kit


EPOCHS = 20  # of real trainings: some are left when something is lost


class StandIn(RayStandIn):
    def __init__(self, answer: Callable[[str, float], Any], **resources: float) -> None:
        super().__init__(resources)
        self.answer, self.resources, self.cancelled = answer, resources, list[Any]()

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        def submit(*args: Any) -> Callable[[], Any]:
            if "scheduling_strategy" in options:
                return lambda: ray_cell.cell_faults(*args)
            assert options["max_retries"] == 0
            return lambda: self.answer(args[2].rpartition("/")[2], args[3])

        return lambda function: SimpleNamespace(remote=submit)

    def cancel(self, task: Any) -> None:
        self.cancelled.append(task)


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    monkeypatch.setattr(run, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(run, "is_finished", lambda cell: True)
    options = {"cache": str(tmp_path / "coco.zarr"), "methods": "none"}
    return [Cell(seed, tmp_path / f"seed-{seed}", ("x",), {"options": options}) for seed in range(5)]


def ran(cells: list[Cell], ray: StandIn, gpus: float | None = None) -> tuple[dict[str, Outcome], str]:
    said = io.StringIO()
    console = Console(file=said, width=200)
    return run.run_cells(cells, 0, RayEngine(ray, None, gpus, console), console), said.getvalue()


def test_as_many_at_once_as_there_is_room(cells: list[Cell]) -> None:
    ray = StandIn(lambda name, patience: (0, ""), CPU=2.0)
    assert ran(cells, ray)[0] == {}
    assert ray.most == 2
    ray = StandIn(lambda name, patience: (0, ""), CPU=8.0, GPU=1.0)
    assert ran(cells, ray)[0] == {}
    assert ray.most == 1
    assert ran(cells, ray, gpus=0.5)[0] == {}
    assert ray.most == 2


def test_what_is_lost_goes_on_and_what_fails_is_said(cells: list[Cell]) -> None:
    lost: dict[str, list[Exception]] = {"seed-1": [NodeDiedError("gone")] * 5, "seed-2": [RayError("oom")] * 2}
    lost["seed-3"] = [RayError("out of memory\nmore")] * 3
    waited = []

    def answer(name: str, patience: float) -> Any:
        waited.append((name, patience > 0))
        if lost.get(name):
            return lost[name].pop()
        return (1, "a bad picture (on a)") if name == "seed-4" else (0, "")

    failed, said = ran(cells, StandIn(answer, CPU=1.0))
    messages = {name.rpartition("/")[2]: outcome.message for name, outcome in failed.items()}
    assert messages["seed-3"] == ("it ended its worker 3 times, most likely because memory ran out: out of memory")
    assert messages["seed-4"] == "a bad picture (on a)"
    assert len(failed) == 2
    assert said.count("seed-1: its machine or process was lost; it will go on from its last epoch") == 5
    assert [patient for name, patient in waited if name == "seed-2"] == [False, True, True]


def test_an_error_of_the_task_itself(cells: list[Cell]) -> None:
    failed, _ = ran(cells[:1], StandIn(lambda name, patience: RayTaskError(ImportError("No module kdpipe")), CPU=1.0))
    assert [outcome.message for outcome in failed.values()] == ["No module kdpipe"]


def test_nodes_that_do_not_see_the_files(cells: list[Cell], tmp_path: Path) -> None:
    engine = RayEngine(StandIn(lambda name, patience: (0, ""), CPU=1.0), None, None, Console(quiet=True))
    with pytest.raises(
        KdpipeError, match=r"1 of 1 nodes of the cluster cannot train:\n  a \(::1\): .*coco.zarr is not"
    ):
        engine.check_nodes(cells, tmp_path / "w")
    (tmp_path / "coco.zarr").mkdir()
    engine.check_nodes(cells, tmp_path / "w")
    assert (tmp_path / "w").is_dir()
    assert ray_cell.cell_faults([], {**own_versions(), "torch": "1.0"}) == [f"torch {own_versions()['torch']}, not 1.0"]


def test_when_it_is_stopped_tasks_are_given_up(cells: list[Cell]) -> None:
    def answer(name: str, patience: float) -> Any:
        raise KeyboardInterrupt

    ray = StandIn(answer, CPU=3.0)
    with pytest.raises(KeyboardInterrupt):
        ran(cells, ray)
    assert len(ray.cancelled) == 2  # the one that was asked for its result is gone


def test_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "seed-0"
    (folder / "kdpipe").mkdir(parents=True)
    busy = iter([True, True, False])
    monkeypatch.setattr(WorkDir, "is_busy", lambda self: next(busy))
    monkeypatch.setattr(ray_cell, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(CellProcess, "program", ("/bin/sh", "-c", 'echo "Error: $1 is bad"; exit $2'))
    code, message = ray_cell.run_cell(["picture", "1"], "shown", str(folder), 10.0)
    assert code == 1
    assert message.startswith("picture is bad (on ")
    assert next(busy, None) is None
    assert (tmp_path / "seed-0.log").read_text().startswith("$ shown\n")


@pytest.fixture
def command(kit: "Kit") -> tuple[object, ...]:
    small = ("--recipe", "paper", "--epochs", EPOCHS, "--batch-size", 1, "--workers", 0)
    which = ("--student", kit.student, "--methods", "none", "--methods", "pred")
    return ("compare", "--cache", kit.cache, *which, *small, *kit.val, "--work-dir", "w")


@pytest.fixture
def epochs_of(work: Path) -> Callable[[], list[int]]:
    def epochs() -> list[int]:
        """The newest epochs that are saved."""
        saved = [path.read_text().strip() for path in (work / "w").glob("*/*/seed-0/last_checkpoint")]
        return sorted(int(name.rpartition("_")[2].partition(".")[0]) for name in saved if name)

    return epochs


@pytest.mark.slow
def test_a_node_is_lost(
    kit: "Kit", work: Path, nodes: "Nodes", command: tuple[object, ...], epochs_of: Callable[[], list[int]]
) -> None:
    process = nodes.start(*command, cwd=work)
    while len(epochs_of()) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    nodes.ask(remove=1)
    nodes.ask(add=3)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    assert "its machine or process was lost; it will go on from its last epoch" in out
    rows = json.loads((work / "w" / "compare.json").read_text())["rows"]
    assert [cell["epoch"] for row in rows for cell in row["cells"]] == [EPOCHS, EPOCHS]
    logs = [path.read_text() for path in (work / "w" / "student").glob("*/seed-0.log")]
    assert sum(f"of {EPOCHS} epochs are done; the others follow" in log for log in logs) >= 1
    here = command[:-1]
    process = kit.start(*here, "here", cwd=work)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    for name in ("none", "pred"):
        states = [
            torch.load(work / folder / "student" / name / "seed-0" / "student.pth", weights_only=True)["state_dict"]
            for folder in ("w", "here")
        ]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


@pytest.mark.slow
def test_stopped_on_a_cluster(
    work: Path, nodes: "Nodes", command: tuple[object, ...], epochs_of: Callable[[], list[int]]
) -> None:
    process = nodes.start(*command, cwd=work)
    while len(epochs_of()) < 1:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130, out + err
    assert "which can go on from their last epoch" in out
    logs = [path.read_text() for path in (work / "w" / "student").glob("*/seed-0.log")]
    assert any(log.rstrip().endswith("Interrupted.") for log in logs)
    process = nodes.start(*command, cwd=work)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
