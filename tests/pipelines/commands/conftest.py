"""Caches of many parts, which several processes make together."""

from pathlib import Path
from typing import TYPE_CHECKING

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
