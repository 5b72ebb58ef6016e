"""`kdpipe cache-teacher --ray` on real clusters, which are given workers, nodes and the run itself to lose."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.pipelines.commands.conftest import Parts
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


@pytest.fixture(scope="module")
def temporary() -> Iterator[str]:
    """A folder for what Ray leaves behind, with a name that is short enough for its sockets."""
    with tempfile.TemporaryDirectory(prefix="kd-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


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


class Nodes:
    """A cluster without a network, in whose network commands are started."""

    def __init__(self, folder: str) -> None:
        script = Path(__file__).with_name("ray_nodes.py")
        self._server = subprocess.Popen(
            ["unshare", "-n", sys.executable, "-W", "ignore", str(script)],
            cwd=folder,
            env={
                **os.environ,
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_worker_niceness": "0",
                "OMP_NUM_THREADS": "1",
                "TMPDIR": folder,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._answer()

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        while not (line := self._server.stdout.readline()).startswith(('"', "null")):
            assert line, "the cluster ended"
        return json.loads(line)

    def ask(self, **request: Any) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        self._answer()

    def start(self, *args: object, cwd: Path) -> "subprocess.Popen[str]":
        inside = ["nsenter", f"--net=/proc/{self._server.pid}/ns/net", sys.executable, "-m", "kdpipe.pipelines.cli"]
        return subprocess.Popen(
            [*inside, *map(str, args), "--ray", self.address],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def workers(self) -> list[int]:
        """Processes of this cluster that make a part now."""
        own, found = Path(f"/proc/{self._server.pid}/ns/net").readlink(), []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                is_at_work = (process / "cmdline").read_bytes().startswith(b"ray::make_part")
                if is_at_work and (process / "ns/net").readlink() == own:
                    found.append(int(process.name))
            except OSError:
                continue
        return found

    def close(self) -> None:
        with self._server:
            pass  # its input ends


@pytest.fixture(scope="module")
def nodes(temporary: str) -> Iterator[Nodes]:
    pytest.importorskip("ray")
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: a cluster cannot be kept off the network")
    if subprocess.run(["unshare", "-n", "-m", "true"], capture_output=True).returncode:
        pytest.skip("unshare -n is not allowed here: a cluster cannot be kept off the network")
    found = Nodes(temporary)
    found.ask(add=1)
    found.ask(add=2)
    yield found
    found.close()


def wait_for_parts(parts: "Parts", cache: Path, count: int, process: "subprocess.Popen[str]") -> None:
    while len(parts.committed(cache)) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_workers_nodes_and_the_run_itself_may_be_lost(kit: "Kit", parts: "Parts", work: Path, nodes: Nodes) -> None:
    command = parts.command(copies=20)
    process = nodes.start(*command, "x.zarr", cwd=work)
    wait_for_parts(parts, work / "x.zarr", 5, process)
    process.kill()  # the run itself
    process.communicate()
    time.sleep(1)
    assert 5 <= len(parts.committed(work / "x.zarr")) < 100
    process = nodes.start(*command, "x.zarr", cwd=work)
    wait_for_parts(parts, work / "x.zarr", len(parts.committed(work / "x.zarr")) + 5, process)
    while not (workers := nodes.workers()):
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
def test_a_path_that_one_node_lacks(kit: "Kit", parts: "Parts", work: Path, nodes: Nodes) -> None:
    command = [*parts.command(), "x.zarr"]
    shutil.copytree(kit.img, work / "data" / "images")
    command[command.index(kit.img)] = work / "data" / "images"
    nodes.ask(add=4, hide=str(work / "data"))
    try:
        process = nodes.start(*command, cwd=work)
        _, err = process.communicate(timeout=300)
    finally:
        nodes.ask(remove=4)
    assert process.returncode == 1
    assert "1 of 3 nodes of the cluster cannot make parts:" in err
    assert f"{work / 'data' / 'images'} is not there" in err
    assert len(parts.committed(work / "x.zarr")) == 0
