"""What happens when an object store is away, busy, wrong or forbids something; and that credentials stay unsaid."""

import hashlib
import itertools
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.record import read_record, write_record
from kdpipe.cache.store import client as client_module
from kdpipe.cache.store.bucket import Bucket
from kdpipe.cache.store.location import Location, open_location
from kdpipe.cache.store.remote_errors import advice

_count = iter(range(1_000_000))


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for seconds."""
    monkeypatch.setattr(client_module, "_FIRST_PATIENCE", 0.3)
    monkeypatch.setattr(client_module, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(client_module, "_LONGEST_PAUSE", 0.2)


@pytest.fixture
def faulty(moto: Any, proxy: Any) -> Bucket:
    """An empty place in an object store behind a proxy."""
    return Bucket(f"s3://kdpipe/tests/faults-{os.getpid()}-{next(_count)}", {**moto.options, "endpoint": proxy.url})


def make(location: Location, key: str, size: int = 10_000) -> bool:
    """Write and publish a part of several files."""
    content = {f"array{number}/c.0": bytes([number]) * size for number in range(6)}
    with location.staging(key) as folder:
        for name, data in content.items():
            (folder / "new" / name).parent.mkdir(parents=True)
            (folder / "new" / name).write_bytes(data)
        files = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in content.items()}
        write_record(folder, {"part": 0}, files)
        with location.explained("Writing a part"):
            return location.publish(folder, key)


def keys(location: Bucket) -> set[str]:
    return {meta["path"] for meta in location._list("")}


@pytest.mark.parametrize("fault", [503, 500, 429, "cut", "lost"])
def test_uploads_survive_a_busy_server(
    faulty: Bucket, proxy: Any, fault: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    faulty.read("zarr.json")
    turns = itertools.count()
    proxy.fault = lambda method, path: fault if next(turns) % 3 == 0 else None
    with caplog.at_level(logging.WARNING, "kdpipe"):
        make(faulty, "parts/00000")
    proxy.fault = lambda method, path: None
    assert len(keys(faulty)) == 8
    assert read_record(faulty, "parts/00000") is not None
    assert len(caplog.records) == 1  # one message in a while, not one per request
    assert faulty.name in caplog.text
    assert "Trying again for up to 300 s" in caplog.text


def test_a_server_that_dies_and_comes_back(faulty: Bucket, proxy: Any) -> None:
    """It takes nothing for a while in the middle of a part; then the upload goes on."""
    faulty.read("zarr.json")
    uploads = itertools.count()
    down = threading.Event()

    def fault(method: str, path: str) -> str | None:
        if method == "PUT" and next(uploads) == 3:
            down.set()
            threading.Timer(0.6, down.clear).start()
        return "cut" if down.is_set() else None

    proxy.fault = fault
    assert make(faulty, "parts/00000")
    assert len(keys(faulty)) == 8


def test_a_server_that_stays_away_is_told(moto: Any, proxy: Any) -> None:
    """What was uploaded counts for nothing, and the next attempt finishes the part."""
    place = f"s3://kdpipe/tests/away-{os.getpid()}"
    options = {**moto.options, "endpoint": proxy.url}
    location = Bucket(place, {**options, "patience": "0.5"})
    uploads = itertools.count()
    proxy.fault = lambda method, path: 503 if method == "PUT" and next(uploads) > 2 else None
    with pytest.raises(CacheError, match=r"503 Service Unavailable.*, also after several attempts.*intact"):
        make(location, "parts/00000")
    assert location.read("parts/00000/zarr.json") is None
    time.sleep(0.5)
    before = len(proxy.requests)
    time.sleep(0.5)
    assert len(proxy.requests) == before  # uploads of the part that failed do not go on
    proxy.fault = lambda method, path: None
    assert make(location, "parts/00000")
    assert len(keys(location)) == 8


def test_slow_answers(faulty: Bucket, proxy: Any, moto: Any) -> None:
    make(faulty, "parts/00000")
    location = Bucket(faulty.name, {**moto.options, "endpoint": proxy.url, "timeout": "1s"})
    record = read_record(location, "parts/00000")
    assert record is not None
    turns = itertools.count()
    proxy.fault = lambda method, path: 3.0 if next(turns) == 0 else 0.2
    assert read_record(location, "parts/00000") == record
    assert next(turns) == 2  # it was asked again after a second


def test_a_record_that_arrived_though_the_answer_did_not(faulty: Bucket, proxy: Any) -> None:
    lost = iter([True])
    proxy.fault = lambda method, path: "lost" if path.endswith("00000/zarr.json") and next(lost, False) else None
    make(faulty, "parts/00000")
    assert read_record(faulty, "parts/00000") is not None


def test_two_writers_at_once(faulty: Bucket, proxy: Any) -> None:
    proxy.fault = lambda method, path: 0.02
    results: list[bool] = []
    writers = [threading.Thread(target=lambda: results.append(make(faulty, "parts/00000"))) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(results) == [False, False, False, True]
    assert len(keys(faulty)) == 8


def test_read_only(faulty: Bucket, proxy: Any) -> None:
    make(faulty, "parts/00000")
    proxy.fault = lambda method, path: 403 if method in ("PUT", "POST", "DELETE") else None
    assert faulty.read("parts/00000/zarr.json")
    with pytest.raises(CacheError, match=r"Writing a part failed\. s3://.* must not be read or written.*put"):
        make(faulty, "parts/00001")
    with pytest.raises(CacheError, match="delete"), faulty.explained("Removing"):
        faulty.discard("parts/00000")
    assert faulty.read("parts/00000/zarr.json")


def told(location: Bucket, key: str = "zarr.json") -> str:
    with pytest.raises(CacheError) as error, location.explained("Reading the cache"):
        location.read(key)
    assert error.value.__suppress_context__
    return str(error.value)


def test_no_such_bucket(moto: Any) -> None:
    location = Bucket("s3://missing/cache", moto.options)
    assert "There is no such bucket: s3://missing/cache" in told(location)
    with pytest.raises(CacheError, match="no such bucket"), location.explained("Making the cache"):
        location.check_new()
    with pytest.raises(CacheError, match="no such bucket"):
        make(location, "parts/00000")


def test_no_server(moto: Any, closed_port: int) -> None:
    start = time.monotonic()
    message = told(Bucket("s3://kdpipe/cache", {**moto.options, "endpoint": f"http://127.0.0.1:{closed_port}"}))
    assert "it cannot be reached (Connection refused)" in message
    assert "endpoint" in message
    assert time.monotonic() - start < 5
    with pytest.raises(CacheError, match="no http:// or https:// address"):
        Bucket("s3://kdpipe/cache", {**moto.options, "endpoint": "localhost:9000"})


def test_a_host_that_is_none(moto: Any) -> None:
    message = told(Bucket("s3://kdpipe/cache", {**moto.options, "endpoint": "http://nowhere.invalid"}))
    assert "it cannot be reached" in message


def test_no_credentials(moto: Any) -> None:
    options = {"endpoint": moto.url, "metadata_endpoint": "http://127.0.0.1:9", "region": "us-east-1"}
    assert "There are no credentials for s3://kdpipe/cache" in told(Bucket("s3://kdpipe/cache", options))


def test_wrong_region(faulty: Bucket, proxy: Any) -> None:
    proxy.fault = lambda method, path: 301
    assert "lies in another region" in told(faulty)
    text = "<Code>AuthorizationHeaderMalformed</Code><Message>wrong</Message><Region>eu-west-1</Region>"
    assert "--store-option region=eu-west-1" in advice(RuntimeError(text), "s3://b/c")


def test_wrong_keys() -> None:
    text = "Server returned non-2xx status code: 403 Forbidden: <Error><Code>InvalidAccessKeyId</Code>"
    text += "<AWSAccessKeyId>AKIASECRET</AWSAccessKeyId></Error>"
    message = advice(RuntimeError(text), "s3://b/c")
    assert "not accepted: it answers 403 Forbidden (InvalidAccessKeyId)" in message
    assert "AKIASECRET" not in message


def test_conditional_put_is_needed(faulty: Bucket, proxy: Any) -> None:
    proxy.fault = lambda method, path: 501 if path.endswith("00000/zarr.json") and method == "PUT" else None
    with pytest.raises(CacheError, match="cannot put an object only where none is"):
        make(faulty, "parts/00000")


def test_full_temporary_folder(faulty: Bucket) -> None:
    with pytest.raises(CacheError, match=r"No space left.*TMPDIR"), faulty.explained("Writing a part"):
        raise OSError(28, "No space left on device", "/tmp/x")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://key:secret@bucket/cache", "s3://bucket/cache holds more than a bucket"),
        ("s3://bucket/cache?X-Amz-Signature=secret", "s3://bucket/cache holds more"),
        ("az://container/cache?sig=secret#x", "az://container/cache holds more"),
        ("http://key:secret@host/cache?a=secret", "http://host/cache is neither a path nor s3://"),
        ("ftp://host/secret-less", "ftp://host/secret-less is neither"),
        ("s3:///cache", "empty name"),
        ("s3://bucket//cache", "empty name"),
    ],
)
def test_addresses(url: str, expected: str) -> None:
    with pytest.raises(CacheError, match=expected) as error:
        open_location(url)
    assert "secret@" not in str(error.value)
    assert "=secret" not in str(error.value)


def test_options_that_are_none(moto: Any) -> None:
    with pytest.raises(CacheError, match=r"S3Store has no option colour.*endpoint, region"):
        open_location("s3://bucket/cache", {"colour": "red"})
    with pytest.raises(CacheError, match="AzureStore has no option"):
        open_location("az://container/cache", {"skip_sig": "true"})
    with pytest.raises(CacheError, match=r"options of s3://bucket/cache do not fit.*boolean.*--store-option"):
        open_location("s3://bucket/cache", {"skip_signature": "perhaps"})
    with pytest.raises(CacheError, match="patience is a number"):
        open_location("s3://bucket/cache", {"patience": "long"})
    with pytest.raises(CacheError, match="is a folder"):
        open_location("/tmp/cache", {"region": "eu-west-1"})


def test_names_without_options() -> None:
    location = open_location("s3://bucket/a/b.zarr/", {"access_key_id": "AKIA", "secret_access_key": "hidden"})
    assert str(location) == "s3://bucket/a/b.zarr"
    assert "hidden" not in repr(location)
    assert str(open_location("gs://bucket/c", {"skip_signature": "true"})) == "gs://bucket/c"
    assert str(open_location("az://box/c", {"account_name": "me", "skip_signature": "true"})) == "az://box/c"


class TestProfiles:
    """Keys, region and endpoint from the shared configuration files of AWS."""

    @pytest.fixture(autouse=True)
    def files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moto: Any) -> None:
        (tmp_path / "config").write_text(
            f"[default]\nregion = eu-west-1\n[profile lab]\nendpoint_url = {moto.url}\nregion = eu-west-3\n"
            "[profile sso]\nsso_session = office\n"
        )
        (tmp_path / "credentials").write_text(
            "[default]\naws_access_key_id = one\naws_secret_access_key = two\n"
            "[lab]\naws_access_key_id = three\naws_secret_access_key = four\naws_session_token = five\n"
        )
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))

    def options(self, **options: str) -> dict[str, str]:
        from kdpipe.cache.store.aws_profile import complete_options

        return complete_options(options)[0]

    def test_default(self) -> None:
        assert self.options() == {"region": "eu-west-1", "access_key_id": "one", "secret_access_key": "two"}

    def test_named(self, monkeypatch: pytest.MonkeyPatch, moto: Any) -> None:
        monkeypatch.setenv("AWS_PROFILE", "lab")
        keys = {"access_key_id": "three", "secret_access_key": "four", "session_token": "five"}
        assert self.options() == {"endpoint": moto.url, "region": "eu-west-3", **keys}
        assert Bucket("s3://kdpipe/nothing", {}).check_new()  # it reaches the endpoint of the profile

    def test_environment_goes_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "from-environment")
        assert self.options() == {}

    def test_options_go_first(self) -> None:
        assert self.options(region="r", aws_access_key_id="k") == {"region": "r", "aws_access_key_id": "k"}
        assert self.options(skip_signature="true") == {"region": "eu-west-1", "skip_signature": "true"}

    def test_unknown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_PROFILE", "labb")
        with pytest.raises(CacheError, match="AWS_PROFILE names the profile 'labb', which is in none of"):
            open_location("s3://kdpipe/x")

    def test_broken_file(self, tmp_path: Path) -> None:
        (tmp_path / "credentials").write_text("aws_secret_access_key = hidden\n")
        with pytest.raises(CacheError, match="credentials cannot be read") as error:
            open_location("s3://kdpipe/x")
        assert "hidden" not in str(error.value)

    def test_keys_that_have_to_be_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_PROFILE", "sso")
        monkeypatch.setitem(sys.modules, "boto3", None)
        with pytest.raises(CacheError, match=r"profile 'sso' has no keys.*pip install kdpipe"):
            open_location("s3://kdpipe/x")
