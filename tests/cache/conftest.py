"""A small data set and a made-up teacher, as functions of the image alone."""

import hashlib
import http.client
import http.server
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from zarr.storage import LocalStore

from kdpipe.cache import CacheSpec, CacheWriter, ImageInfo, TeacherRecord
from kdpipe.cache.format.layout import part_layout
from kdpipe.cache.format.zarr_arrays import WrittenFiles
from kdpipe.cache.identity import canonical_json, digest_json
from kdpipe.cache.plan import level_shapes
from kdpipe.cache.read.root import read_root
from kdpipe.cache.store.bucket import Bucket
from kdpipe.cache.store.folder import Folder
from kdpipe.cache.store.location import Place
from kdpipe.cache.views import input_size
from kdpipe.cache.write.arrays import write_array

if TYPE_CHECKING:
    from tests.conftest import Forks

_count = iter(range(1_000_000))


class Kit:
    """What the tests of the cache make caches with."""

    @staticmethod
    def spec(**changes: Any) -> CacheSpec:
        values: dict[str, Any] = {
            "tier": "pyramid",
            "dtype": "int8",
            "codec": "zstd",
            "class_names": ("red", "white", "größe"),
            "category_ids": (1, 2, 7),
            "channels": 6,
            "strides": (8, 16, 32, 64),
            "roi_levels": 3,
            "finest_scale": 56,
            "roi_size": 7,
            "roi_sampling_ratio": 0,
            "roi_aligned": True,
            "embedding_dim": 10,
            "box_means": (0.0, 0.0, 0.0, 0.0),
            "box_stds": (0.1, 0.1, 0.2, 0.2),
            "class_agnostic": False,
            "proposals": 12,
            "views": ("identity",),
            "scale": (96, 64),
        }
        return CacheSpec(**{**values, **changes})

    @staticmethod
    def images(count: int = 7) -> list[ImageInfo]:
        return [
            ImageInfo(1000 - 7 * n, f"folder/bild_{n:03d}_ü.jpg", 48 + 8 * (n % 3), 80 - 5 * (n % 4), n % 4)
            for n in range(count)
        ]

    @staticmethod
    def record(image: ImageInfo, view: str, spec: CacheSpec, rois: int | None = None) -> TeacherRecord:
        """What the teacher says of an image: the same whenever it is asked."""
        g = torch.Generator().manual_seed(image.image_id * 2 + (view == "hflip"))
        size = input_size((image.height, image.width), spec.scale)
        count = spec.proposals + image.num_gt if rois is None else rois
        corner = torch.rand(count, 2, generator=g) * torch.tensor([image.width * 0.6, image.height * 0.6])
        sides = torch.rand(count, 2, generator=g) * torch.tensor([image.width * 0.4, image.height * 0.4]) + 1
        proposals = min(spec.proposals, count)
        for row in range(0, proposals if count > proposals else 0, 3):  # near an object
            truth = proposals + row // 3 % (count - proposals)
            corner[row], sides[row] = corner[truth] + 0.02 * sides[truth], sides[truth] * (0.95 - 0.01 * row)
        classes = 1 if spec.class_agnostic else spec.num_classes
        shape = (count, spec.channels, spec.roi_size, spec.roi_size)
        return TeacherRecord(
            image_id=image.image_id,
            view=view,
            file_name=image.file_name,
            original_size=(image.height, image.width),
            input_size=size,
            num_proposals=proposals,
            boxes=torch.cat([corner, torch.minimum(corner + sides, torch.tensor([image.width, image.height]))], dim=1),
            logits=torch.randn(count, spec.num_classes + 1, generator=g),
            deltas=torch.randn(count, classes, 4, generator=g),
            embeddings=torch.randn(count, spec.embedding_dim, generator=g),
            roi_features=torch.randn(shape, generator=g) if "roi_features" in spec.fields else None,
            features=[torch.randn(spec.channels, h, w, generator=g) for h, w in level_shapes(size, spec.strides)],
            file_digest=image.image_id - 2**63,
        )

    @classmethod
    def writer(cls, path: Place, spec: CacheSpec, images: Sequence[ImageInfo], **changes: Any) -> CacheWriter:
        values: dict[str, Any] = {
            "part_size": 6_000,
            "identity": {"teacher": "t1", "data": "d1", "options": {"device": "cpu"}},
            "metadata": {"config": "x = 1"},
        }
        return CacheWriter(path, spec, images, **{**values, **changes})

    @classmethod
    def fill(cls, writer: CacheWriter, indices: Sequence[int] | None = None) -> None:
        """Write parts (all that are pending)."""
        writer.write_head(cls.head())
        for index in writer.pending() if indices is None else indices:
            with writer.part(index) as part:
                for position in writer.parts[index]:
                    for view in writer.spec.views:
                        part.add(cls.record(writer.images[position], view, writer.spec))

    @classmethod
    def fill_at_once(cls, place: Callable[[], Place]) -> list[BaseException]:
        """Write all parts by three writers at the same time, whether they are there or not; what went wrong."""
        failed: list[BaseException] = []

        def write() -> None:
            try:
                writer = cls.writer(place(), cls.spec(), cls.images())
                cls.fill(writer, range(len(writer.parts)))
            except BaseException as error:
                failed.append(error)

        writers = [threading.Thread(target=write) for _ in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        return failed

    @classmethod
    def make(cls, path: Path, spec: CacheSpec | None = None, count: int = 7) -> Path:
        """A finished cache."""
        cls.fill(cls.writer(path, cls.spec() if spec is None else spec, cls.images(count)))
        return path

    @staticmethod
    def head() -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(3)
        return {
            "roi_head.fc.weight": torch.randn(5, 4, generator=g),
            "roi_head.fc.bias": torch.randn(5, generator=g).double(),
            "bn.num_batches_tracked": torch.tensor(17),
            "empty": torch.zeros(0, 3),
        }

    @staticmethod
    def files(path: Path, key: str) -> Path:
        """The folder of files of a part, of the head, or of the plan."""
        (folder,) = (entry for entry in (path / key).iterdir() if entry.is_dir())
        return folder

    @classmethod
    def forge(
        cls,
        path: Path,
        key: str,
        change: Callable[[dict[str, Any]], object] = lambda record: None,
        listed: Callable[[dict[str, Any]], object] = lambda files: None,
        content: bytes | None = None,
    ) -> None:
        """Make record and list of files of a part, the head or the cache ("") anew, as somebody would who can count.

        Args:
            path: of the cache.
            key: of the group.
            change: what is done to the record before its checksum is made.
            listed: what is done to the list of the files that are there before its digest is made.
            content: of the list of files, in its place.
        """
        folder = cls.files(path, key or "plan")
        contents = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.parent != folder}
        files: dict[str, Any] = {
            str(file.relative_to(folder)): [len(data), hashlib.sha256(data).hexdigest()]
            for file, data in contents.items()
        }
        listed(files)
        content = canonical_json(files) if content is None else content
        (folder / "files.json").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        folder.rename(folder.with_name(digest[:16]))
        group = json.loads((path / key / "zarr.json").read_bytes())
        record = group["attributes"]["kdpipe"]
        del record["checksum"]
        record["files"] = digest
        change(record)
        record["checksum"] = digest_json(record)
        (path / key / "zarr.json").write_bytes(canonical_json(group))

    @classmethod
    def put(cls, path: Path, part: int, name: str, values: "np.ndarray[Any, Any]") -> None:
        """Write other values of an array of a part, with sound checksums."""
        folder = cls.files(path, f"parts/{part:05d}")
        shutil.rmtree(folder / name)
        write_array(WrittenFiles(LocalStore(folder)), name, part_layout(read_root(Folder(path)).spec)[name], values)
        cls.forge(path, f"parts/{part:05d}")

    @staticmethod
    def tree(path: Path) -> dict[str, str]:
        """Digest of each file below a folder, and the names of the folders."""
        return {
            str(entry.relative_to(path)): hashlib.sha256(entry.read_bytes()).hexdigest()
            if entry.is_file()
            else "folder"
            for entry in sorted(path.rglob("*"))
        }

    @staticmethod
    def flip_bit(file: Path, at: float = 0.3) -> None:
        """Damage one bit."""
        data = bytearray(file.read_bytes())
        data[int(len(data) * at)] ^= 16
        file.write_bytes(data)


@pytest.fixture(params=["memory", "moto"])
def location(request: pytest.FixtureRequest) -> Bucket:
    """An empty place in an object store."""
    name = f"cache-{os.getpid()}-{next(_count)}.zarr"
    if request.param == "memory":
        return Bucket(f"memory://{name}", {})
    return Bucket(f"s3://kdpipe/tests/{name}", request.getfixturevalue("moto").options)


@pytest.fixture(scope="session")
def kit() -> type[Kit]:
    return Kit


@pytest.fixture(scope="session")
def forks(forking: "type[Forks]") -> "Iterator[Forks]":
    """Starts processes that have imported this file and `kdpipe.cache`."""
    forks = forking(Path(__file__).parent, "conftest", "kdpipe.cache")
    yield forks
    forks.close()


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not survive a power cut; they are ten times faster without waiting for the disk."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="session")
def sound_path(tmp_path_factory: pytest.TempPathFactory, kit: type[Kit]) -> Path:
    """A finished cache with several parts, which nobody changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        return kit.make(tmp_path_factory.mktemp("sound") / "x.zarr")


@pytest.fixture
def cache_path(tmp_path: Path, sound_path: Path) -> Path:
    """A copy of that cache."""
    return shutil.copytree(sound_path, tmp_path / "x.zarr")


Fault = Callable[[str, str], "int | float | str | None"]


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a server, and does wrong what `fault(method, path)` says.

    A whole number is the status of an answer in place of the server's, a fraction the seconds until the request is
    passed on; "lost" passes it on and cuts the connection in place of an answer, "cut" cuts it before.
    """

    daemon_threads = True
    request_queue_size = 128  # many clients connect at once

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.origin = port
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.fault: Fault = lambda method, path: None
        self.requests: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that clients end are no matter."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {self.path.partition('?')[0]}")
        fault = self.server.fault(self.command, self.path)
        if isinstance(fault, float):
            threading.Event().wait(fault)
        if fault == "cut":
            self.close_connection = True
            return
        if isinstance(fault, int):
            self.reply(fault, {}, b"<Error><Code>Test</Code></Error>")
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.origin)
        connection.request(self.command, self.path, body or None, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault == "lost":
            self.close_connection = True
            return
        self.reply(answer.status, dict(answer.getheaders()), data)

    def reply(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        dropped = ("connection", "transfer-encoding", "content-length")
        for name, value in headers.items():
            if name.lower() not in dropped:
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def proxy(moto: Any) -> Iterator[Proxy]:
    server = Proxy(moto.port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
