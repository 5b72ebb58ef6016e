"""`kdpipe cache-teacher --ray` on real clusters, which are given workers, nodes and the run itself to lose."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.pipelines.commands.conftest import Nodes, Parts
    from tests.pipelines.conftest import Kit


def listening(pid: int) -> set[str]:
    """Addresses that a process and all that came from it listen on, in hexadecimal."""
    pids, found = [pid], set()
    for each in pids:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            pids += map(int, task.read_text().split())
    sockets = set()
    for each in pids:
        for descriptor in Path(f"/proc/{each}/fd").glob("*"):
            try:
                sockets.add(descriptor.readlink().name.removeprefix("socket:[").rstrip("]"))
            except OSError:  # closed meanwhile
                continue
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in sockets:
                found.add(words[1].split(":")[0])
    return found


def test_a_cluster_of_this_run_alone(kit: "Kit", parts: "Parts", work: Path, temporary: str) -> None:
    pytest.importorskip("ray")
    command = parts.command(copies=2)
    process = kit.start(*command, "x.zarr", "--ray", "local", "--ray-cpus", 2, cwd=work, TMPDIR=temporary)
    addresses = set()
    while process.poll() is None:
        try:
            addresses |= listening(process.pid)
        except OSError:  # it has just ended
            break
        time.sleep(0.2)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "16 images, 0 skipped" in out
    assert "16 new images" in out
    assert addresses
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    kit.run(*command, "one.zarr")
    assert parts.same_content(work / "x.zarr", work / "one.zarr")


def wait_for_parts(parts: "Parts", cache: Path, count: int, process: "subprocess.Popen[str]") -> None:
    while len(parts.committed(cache)) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_workers_nodes_and_the_run_itself_may_be_lost(kit: "Kit", parts: "Parts", work: Path, nodes: "Nodes") -> None:
    command = parts.command(copies=20)
    process = nodes.start(*command, "x.zarr", cwd=work)
    wait_for_parts(parts, work / "x.zarr", 5, process)
    process.kill()  # the run itself
    process.communicate()
    time.sleep(1)
    assert 5 <= len(parts.committed(work / "x.zarr")) < 100
    process = nodes.start(*command, "x.zarr", cwd=work)
    wait_for_parts(parts, work / "x.zarr", len(parts.committed(work / "x.zarr")) + 5, process)
    while not (workers := nodes.workers("make_part")):
        time.sleep(0.01)
    os.kill(workers[0], signal.SIGKILL)
    wait_for_parts(parts, work / "x.zarr", len(parts.committed(work / "x.zarr")) + 5, process)
    nodes.ask(remove=1)
    nodes.ask(add=3)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "are cached already" in out
    assert "A worker was lost while it made part" in out
    assert "160 images, 0 skipped" in out
    kit.run(*command, "one.zarr")
    assert parts.same_content(work / "x.zarr", work / "one.zarr")


@pytest.mark.slow
def test_a_path_that_one_node_lacks(kit: "Kit", parts: "Parts", work: Path, nodes: "Nodes") -> None:
    command = [*parts.command(), "x.zarr"]
    shutil.copytree(kit.img, work / "data" / "images")
    command[command.index(kit.img)] = work / "data" / "images"
    nodes.ask(add=4, hide=str(work / "data"))
    try:
        process = nodes.start(*command, cwd=work)
        _, err = process.communicate(timeout=300)
    finally:
        nodes.ask(remove=4)
    assert process.returncode == 1, err
    assert "1 of 3 nodes of the cluster cannot make parts:" in err
    assert f"{work / 'data' / 'images'} is not there" in err
    assert len(parts.committed(work / "x.zarr")) == 0
