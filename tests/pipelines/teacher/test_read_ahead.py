"""Images are read ahead of the teacher, over the end of a part."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdpipe.cache.plan import ImageInfo
from kdpipe.pipelines.data.images import ImageError
from kdpipe.pipelines.teacher import parts
from kdpipe.pipelines.teacher.parts import ReadAhead

BAD = 5


@dataclass
class Reader:
    """A `ReadAhead` of a teacher that only names what it sees, and the numbers of the images that were read."""

    ahead: ReadAhead
    read: list[int]

    def part(self, images: range, following: range) -> list[str]:
        """What it gives of the images of a part."""
        answers = self.ahead.read(*([ImageInfo(i, str(i), 4, 4, 0) for i in span] for span in (images, following)))
        return [f"{info.image_id}: {x if isinstance(x, ImageError) else x.views['identity']}" for info, x in answers]

    def settle(self) -> list[int]:
        """The numbers that were read since the last call, once nothing is under way."""
        for begun in self.ahead._ahead.values():
            begun.result()
        read, self.read[:] = sorted(self.read), []
        return read


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Any:
    read: list[int] = []

    def load(path: Path, *_: object) -> Any:
        read.append(int(path.name))
        if read[-1] == BAD:
            raise ImageError("bad")
        return SimpleNamespace(pixels=path.name, digest=0, note="")

    monkeypatch.setattr(parts, "load_picture", load)
    teacher: Any = SimpleNamespace(
        device=torch.device("cpu"),
        pixels=SimpleNamespace(decoding=None),
        network_input=lambda pixels, *_: f"seen {pixels}",
    )
    spec: Any = SimpleNamespace(scale=(4, 4), views=("identity",))
    with ReadAhead(teacher, Path(), spec) as ahead:
        yield Reader(ahead, read)


def test_the_next_part_is_begun_before_it_is_asked_for(reader: Reader) -> None:
    assert reader.part(range(8), range(8, 20)) == [f"{i}: bad" if i == BAD else f"{i}: seen {i}" for i in range(8)]
    assert reader.settle() == list(range(8 + 3))  # four at once, of which the last image of the part was one
    assert reader.part(range(8, 20), range(0)) == [f"{i}: seen {i}" for i in range(8, 20)]
    assert reader.settle() == list(range(11, 20))  # none twice


def test_a_part_that_another_process_has_made_is_left_out(reader: Reader) -> None:
    reader.part(range(4), range(6, 9))
    assert reader.settle() == [0, 1, 2, 3, 6, 7, 8]
    assert reader.part(range(20, 23), range(0)) == [f"{i}: seen {i}" for i in range(20, 23)]
    assert reader.settle() == [20, 21, 22]
