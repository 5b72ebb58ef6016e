"""What all tests share."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import kdpipe.pipelines  # noqa: F401  mmdet finds mmcv's ops from here on

ROOT = Path(__file__).resolve().parents[1]

settings.register_profile("kdpipe", deadline=None)  # how long an example takes depends on what else the machine does
settings.load_profile("kdpipe")


def pytest_configure(config: pytest.Config) -> None:
    # mmcv 2.1 warns about an import that mmdet 3.3 itself does
    config.addinivalue_line("filterwarnings", "ignore:``MultiScaleDeformableAttention`` has been moved:ImportWarning")


@pytest.fixture(scope="session")
def bccd() -> Path:
    """Folder of the blood cell data set: photographs in Pascal VOC layout, and their COCO JSON splits."""
    folder = Path(os.environ.get("KDPIPE_BCCD", ROOT.parent / "shared" / "data" / "bccd"))
    if not (folder / "train.json").is_file():
        pytest.skip(f"no bccd data set in {folder}; set KDPIPE_BCCD to its folder")
    return folder


class Forks:
    """Starts Python processes that have imported already what they need; see `fork_server.py`."""

    def __init__(self, folder: Path, *modules: str) -> None:
        self._lock = threading.Lock()
        command = [sys.executable, str(ROOT / "tests" / "fork_server.py"), str(folder), *modules]
        self._server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )

    def start(self, code: str, *args: object, cwd: Path, **env: object) -> "Forked":
        """Run code in a process of its own, with these arguments and additions to the environment."""
        count = len(list(cwd.glob("*.err")))
        out, err = cwd / f"{count}.out", cwd / f"{count}.err"
        err.touch()
        request = {"code": code, "args": [str(arg) for arg in args], "cwd": str(cwd), "out": str(out), "err": str(err)}
        return Forked(self, self.ask({**request, "env": {name: str(value) for name, value in env.items()}}), out, err)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with self._lock:
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        self._server.communicate()


class Forked:
    """A process that `Forks` started."""

    def __init__(self, forks: Forks, pid: int, out: Path, err: Path) -> None:
        self._forks, self.pid, self._out, self._err = forks, pid, out, err
        self.code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        if self.code is None:
            self.code = self._forks.ask({"poll": self.pid})
        return self.code

    def wait(self, seconds: float = 120) -> int:
        """The exit code; a process that takes longer is killed, and the test fails."""
        until = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                self.kill()
                pytest.fail(f"a process hangs:\n{self.out}\n{self.err}")
            time.sleep(0.002)
        return code

    def send(self, number: int) -> None:
        """Send a signal, if the process has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send(signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)

    @property
    def out(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def err(self) -> str:
        return self._err.read_text()


@pytest.fixture(scope="session")
def forking() -> type[Forks]:
    """The class `Forks`, for fixtures that know what to import."""
    return Forks
