"""A cache that goes away while it is read is gone, and not damaged; what the system says is passed on."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdpipe.cache import CacheError, open_cache
from kdpipe.cache.store.location import GoneError


def remove_cache(path: Path) -> None:
    shutil.rmtree(path)


def move_cache(path: Path) -> None:
    path.rename(path.with_name("moved.zarr"))


def remove_part(path: Path) -> None:
    shutil.rmtree(path / "parts" / "00000")


@pytest.mark.parametrize("has_read", [True, False])
@pytest.mark.parametrize(
    ("go", "expected_text"),
    [
        (remove_cache, "The cache {path} is gone"),
        (move_cache, "The cache {path} is gone"),
        (remove_part, "Part 0 of the cache {path} is gone"),
    ],
)
def test_what_was_deleted_is_gone(
    cache_path: Path, go: Callable[[Path], None], expected_text: str, has_read: bool
) -> None:
    cache = open_cache(cache_path)
    if has_read:
        cache.targets(1000)
    go(cache_path)
    with pytest.raises(CacheError) as caught:
        cache.targets(1000)
    message = str(caught.value)
    assert message.startswith(expected_text.format(path=cache_path))
    assert "damaged" not in message
    assert "--repair" not in message
    assert "cache-teacher" in message
    assert "--resume" in message


def test_the_head_of_a_cache_that_is_gone(cache_path: Path) -> None:
    cache = open_cache(cache_path)
    remove_cache(cache_path)
    with pytest.raises(CacheError, match="is gone"):
        cache.head()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOTCONN])
@pytest.mark.parametrize("name", ["parts/00000/zarr.json", "boxes/zarr.json"])
def test_what_the_system_says_is_passed_on(
    cache_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    cache, plain_open = open_cache(cache_path), os.open

    def fail(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith(name):
            raise OSError(number, os.strerror(number), str(path))
        return plain_open(path, *arguments, **options)

    monkeypatch.setattr("kdpipe.cache.store.folder.os.open", fail)
    with pytest.raises(CacheError) as caught:
        cache.targets(1000)
    assert os.strerror(number) in str(caught.value)
    assert "sound" in str(caught.value)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "is_damage"),
    [
        (ValueError("DATA_LOSS: Digest mismatch [source locations='x.cc:1']"), True),
        (ValueError("NOT_FOUND: chunk is missing"), True),
        (RuntimeError("decompression failed"), True),
        (GoneError("parts/00000/boxes/c.0.0"), True),
        (ValueError("PERMISSION_DENIED: Error opening file [OS error 13: EACCES]"), False),
        (ValueError("RESOURCE_EXHAUSTED: Error opening file [OS error 24: EMFILE]"), False),
        (OSError(errno.EIO, os.strerror(errno.EIO)), False),
    ],
)
def test_what_libraries_say_of_data(
    cache_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, is_damage: bool
) -> None:
    """tensorstore and zarr have one type of error for many things."""

    class Failing:
        def result(self) -> None:
            raise error

    cache = open_cache(cache_path)
    cache.targets(1000)
    monkeypatch.setattr("kdpipe.cache.read.arrays.ArrayReader.start", lambda *arguments: Failing())
    with pytest.raises(CacheError) as caught:
        cache.targets(1000)
    assert ("is damaged" in str(caught.value)) == is_damage
    assert ("cannot be read" in str(caught.value)) != is_damage
    assert "source locations" not in str(caught.value)
