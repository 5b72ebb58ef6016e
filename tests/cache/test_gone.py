"""A cache that goes away while it is read is gone, and not damaged; what the system says is passed on."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kdpipe.cache import CacheError, open_cache

if TYPE_CHECKING:
    pass


def remove_cache(path: Path) -> None:
    shutil.rmtree(path)


def move_cache(path: Path) -> None:
    path.rename(path.with_name("moved.zarr"))


def remove_part(path: Path) -> None:
    shutil.rmtree(path / "parts" / "00000")


@pytest.mark.parametrize("has_read", [True, False])
@pytest.mark.parametrize(
    ("go", "said"),
    [
        (remove_cache, "The cache {path} is gone"),
        (move_cache, "The cache {path} is gone"),
        (remove_part, "Part 0 of the cache {path} is gone"),
    ],
)
def test_what_was_deleted_is_gone(cache_path: Path, go: Callable[[Path], None], said: str, has_read: bool) -> None:
    cache = open_cache(cache_path)
    if has_read:
        cache.targets(1000)
    go(cache_path)
    with pytest.raises(CacheError) as caught:
        cache.targets(1000)
    message = str(caught.value)
    assert message.startswith(said.format(path=cache_path))
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
def test_what_the_system_says_is_passed_on(cache_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Of the record of a part, and of its arrays when the record was read before."""
    first, second = open_cache(cache_path), open_cache(cache_path)
    second.targets(1000)

    def fail(*args: Any, **options: Any) -> bytes:
        raise OSError(number, os.strerror(number), str(args[0]))

    monkeypatch.setattr(Path, "read_bytes", fail)
    monkeypatch.setattr("kdpipe.cache.read.array_reader.os.open", fail)
    for cache in (first, second):
        with pytest.raises(CacheError) as caught:
            cache.targets(1000)
        assert os.strerror(number) in str(caught.value)
        assert "sound" in str(caught.value)
        assert "damaged" not in str(caught.value)
