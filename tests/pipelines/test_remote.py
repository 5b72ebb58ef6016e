"""Commands on caches in an object store: the whole way, and that nobody's keys end up in a file or a line."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

SECRET = "not-so-secret"


@pytest.fixture(scope="module")
def url() -> str:
    return f"s3://kdpipe/commands-{os.getpid()}/shapes.zarr"


@pytest.fixture(scope="module")
def options(moto: Any) -> list[str]:
    values = {**moto.options, "secret_access_key": SECRET}
    return [word for name, value in values.items() for word in ("--store-option", f"{name}={value}")]


@pytest.fixture(scope="module")
def made(kit: "Kit", url: str, options: list[str]) -> Any:
    """What `cache-teacher` said, once for all tests."""
    return kit.run("cache-teacher", *kit.source, *kit.VIEW, "--out", url, *options)


def files_with(folder: Path, text: str) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


def test_made(kit: "Kit", made: Any, url: str) -> None:
    assert f"{url}: 8 images" in made.out
    assert made.out.replace(url, "") == made.out.replace(url, "").replace(SECRET, "")


def test_resumed(kit: "Kit", made: Any, url: str, options: list[str]) -> None:
    assert "0 new images" in kit.run("cache-teacher", *kit.source, *kit.VIEW, "--out", url, *options).out


def test_verified_and_inspected(kit: "Kit", made: Any, url: str, options: list[str]) -> None:
    assert f"{url}: 8 images" in kit.run("verify", url, *options).out
    described = json.loads(kit.run("inspect", url, "--json", *options).out)
    local = json.loads(kit.run("inspect", kit.cache, "--json").out)
    assert (described.pop("path"), local.pop("path")) == (url, str(kit.cache))
    command = described.pop("command")
    assert command[command.index("--out") + 1] == url
    assert [word.replace(url, str(kit.cache)) for word in command] == local.pop("command")
    assert described == local
    assert "40 proposals" in kit.run("inspect", url, "--image", "1", *options).out


def test_dry_run(kit: "Kit", url: str, options: list[str]) -> None:
    printed = kit.run("cache-teacher", *kit.source, *kit.VIEW, "--out", url, "--dry-run", *options).out
    assert "features" in printed
    assert "Free at" not in printed  # there is no end to a bucket


def test_trained_from(kit: "Kit", made: Any, url: str, options: list[str], tmp_path: Path) -> None:
    """As from a folder, number for number, with loader workers; what is recorded has no options."""
    work, other = tmp_path / "work", tmp_path / "other"
    local = ("--local-copy", tmp_path / "disk", "--local-bytes", "1GiB")
    printed = kit.train_student(work, *options, *local, cache=url, workers=1).out
    kit.train_student(other, cache=kit.cache, workers=1)
    assert "Local copy in" in printed
    assert {path.parent.name for path in (tmp_path / "disk").rglob("zarr.json")} >= {"features", "boxes", "index"}
    assert metrics(work) == metrics(other)
    assert files_with(work, SECRET) == []
    assert files_with(work, "127.0.0.1") == []


def test_options_from_the_environment(
    kit: "Kit", made: Any, url: str, moto: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "writer")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    kit.run("inspect", url)


def metrics(work: Path) -> Any:
    lines = next(work.rglob("scalars.json")).read_text().splitlines()
    dropped = ("time", "data_time", "memory")
    return [{k: v for k, v in json.loads(line).items() if k not in dropped} for line in lines]


def test_wrong_options(kit: "Kit", url: str, moto: Any) -> None:
    assert "no option colour" in kit.refused("inspect", url, "--store-option", "colour=red")
    message = kit.refused("inspect", url, "--store-option", "SECRETKEY", code=2)
    assert "KEY=VALUE" in message
    assert "SECRETKEY" not in message
    assert "is a folder" in kit.refused("inspect", kit.cache, "--store-option", "region=eu-west-1")
    assert "neither a path nor s3://" in kit.refused("verify", "ftp://x/y")
    lonely = ("train-student", "--cache", kit.cache, "--local-bytes", "1GiB")
    assert "--local-bytes is for trainings with --local-copy" in kit.refused(*lonely, code=2)
    endpoint = ("--store-option", f"endpoint={moto.url}", "--store-option", "skip_signature=true")
    assert "no such bucket" in kit.refused("train-student", "--cache", "s3://nowhere/x", *endpoint)
