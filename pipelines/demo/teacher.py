"""The teacher that comes with kdpipe, and what is recorded of it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

__all__ = ["SHIPPED", "DemoTeacher"]


@dataclass(frozen=True)
class DemoTeacher:
    """A teacher of the demo's pictures.

    Attributes:
        folder: Holds `teacher.pth`, its weights in float16, and `teacher.json`, how it was made.
    """

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "teacher.pth"

    @property
    def record_file(self) -> Path:
        return self.folder / "teacher.json"

    @cached_property
    def record(self) -> dict[str, Any]:
        """Command, seed, pictures, epochs, versions, and AP on the demo's validation pictures."""
        content: dict[str, Any] = json.loads(self.record_file.read_text(encoding="utf-8"))
        return content

    @property
    def ap(self) -> float:
        """COCO AP on the demo's validation pictures, as it was measured when the teacher was made."""
        return float(self.record["ap"])


SHIPPED = DemoTeacher(Path(__file__).parent)
