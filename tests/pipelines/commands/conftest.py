"""Caches of many parts, which several processes make together; and clusters of Ray."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


class Parts:
    """Caches of `many.json` in the folder of a test, in which each image has a part of its own."""

    def __init__(self, kit: "Kit", work: Path) -> None:
        self._kit, self._work = kit, work

    def command(self, copies: int = 1) -> tuple[object, ...]:
        """The command that caches eight images, or several times as many; without the name of the cache."""
        ann = self._kit.annotations(self._work / "many.json", copies=copies)
        data = ("--ann-file", ann, "--img-dir", self._kit.img)
        return "cache-teacher", "--ckpt", self._kit.teacher, *data, *self._kit.VIEW, "--part-size", "1KiB", "--out"

    @staticmethod
    def committed(cache: Path) -> list[int]:
        """Numbers of the parts that are there."""
        return sorted(int(entry.name) for entry in (cache / "parts").glob("0*[0-9]"))

    def same_content(self, one: Path, other: Path) -> bool:
        """All but the recorded config, which is laid out otherwise in this process."""
        return all(
            self._kit.tree(one / folder) == self._kit.tree(other / folder) for folder in ("parts", "head", "plan")
        )


@pytest.fixture
def parts(kit: "Kit", work: Path) -> Parts:
    return Parts(kit, work)


@pytest.fixture(scope="module")
def temporary() -> Iterator[str]:
    """A folder for what Ray leaves behind, with a name that is short enough for its sockets."""
    with tempfile.TemporaryDirectory(prefix="kd-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


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

    def workers(self, task: str) -> list[int]:
        """Processes of this cluster that run such a task now."""
        own, found = Path(f"/proc/{self._server.pid}/ns/net").readlink(), []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                is_at_work = (process / "cmdline").read_bytes().startswith(f"ray::{task}".encode())
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
