"""What all tests share."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from obstore.exceptions import BaseError
from obstore.store import S3Store

import kdpipe.pipelines  # noqa: F401  mmdet finds mmcv's ops from here on

ROOT = Path(__file__).resolve().parents[1]

settings.register_profile("kdpipe", deadline=None)  # how long an example takes depends on what else the machine does
settings.load_profile("kdpipe")


def pytest_configure(config: pytest.Config) -> None:
    # mmcv 2.1 warns about an import that mmdet 3.3 itself does
    config.addinivalue_line("filterwarnings", "ignore:``MultiScaleDeformableAttention`` has been moved:ImportWarning")
    if "cuda" not in config.option.markexpr:
        # the others compare with what a CPU made, and would find a GPU used by default
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: make test-gpu")


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
        """End the server. It is told so: a process that a test forked may still hold the pipe open."""
        with self._server:
            self.ask({"end": True})


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


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts processes that have imported what the commands need."""
    needed = ("cli.main", "commands.cache_teacher", "training.process_group", "training.run")
    forks = Forks(ROOT / "tests", *(f"kdpipe.pipelines.{name}" for name in needed), "mmdet.models")
    yield forks
    forks.close()


class S3:
    """An S3 server of this machine, started by a test and ended with it.

    Args:
        command: of the server; `{port}` stands for its port.
        folder: that it runs in.
        bucket: that it has when it is ready; None asks for no bucket.
        **options: of the store, for those that use it.
    """

    def __init__(self, command: list[str], folder: Path, bucket: str | None = None, **options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.options = {"endpoint": self.url, "region": "us-east-1", **options}
        self._command = [word.format(port=self.port) for word in command]
        self._folder, self._bucket = folder, bucket
        self.start()

    def start(self) -> None:
        """Start it, again if it was stopped, and wait until it answers."""
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, cwd=self._folder, stdout=log, stderr=log)
        until = time.monotonic() + 60
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                pytest.fail(f"the server did not start:\n{(self._folder / 'server.log').read_text()[-4000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it at once, in the middle of whatever it does."""
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            if self._bucket is not None:
                options: dict[str, Any] = {**self.options, "allow_http": "true"}
                store = S3Store(self._bucket, retry_config={"max_retries": 0}, **options)
                return list(store.list()) is not None
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
                connection.request("GET", "/")
                return connection.getresponse().status < 500
        except (BaseError, OSError, http.client.HTTPException):
            return False


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on; SeaweedFS also takes the one 10,000 above."""
    while True:
        with socket.socket() as free, socket.socket() as above:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                above.bind(("127.0.0.1", port + 10_000))
                return port


@pytest.fixture
def weed(tmp_path: Path) -> Iterator[S3]:
    """SeaweedFS with the bucket `kdpipe`, which the keys `writer` may change and the keys `reader` only read."""
    rights = {"writer": ["Admin"], "reader": ["Read:kdpipe", "List:kdpipe"]}
    identities = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": "not-so-secret"}], "actions": actions}
        for name, actions in rights.items()
    ]
    folder = tmp_path / "weed"
    folder.mkdir()
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    ports = {name: free_port() for name in ("master", "volume", "filer")}
    off = ["-webdav=false", "-admin.ui=false", "-master.telemetry=false", "-s3.autoCreateBucket=false"]
    command = [
        str(Path(sys.executable).with_name("weed")),
        "mini",
        "-dir=.",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *off,
    ]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += ["-s3.port={port}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.config=s3.json", "-bucket=kdpipe"]
    server = S3(command, folder, "kdpipe", access_key_id="writer", secret_access_key="not-so-secret")
    yield server
    server.stop()


@pytest.fixture
def closed_port() -> int:
    """A port at which nobody answers."""
    return free_port()


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A small S3 server with the bucket `kdpipe`, which keeps its objects in memory."""
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "{port}"]
    server = S3(command, tmp_path_factory.mktemp("moto"), access_key_id="writer", secret_access_key="not-so-secret")
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
        connection.request("PUT", "/kdpipe")
        assert connection.getresponse().status == 200
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def own_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test uses the keys and proxies of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
