"""The AP of the teacher on the images that its students are measured on, where that is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdpipe.cache.read.reader import TeacherCache
from kdpipe.pipelines.compare.cells import Cell
from kdpipe.pipelines.data.provenance import recorded_path
from kdpipe.pipelines.training.work_dir import WorkDir

__all__ = ["TeacherAP", "checkpoint_of", "known_ap"]


@dataclass(frozen=True)
class TeacherAP:
    """AP of a teacher, and where it is from."""

    ap: float
    source: str


def known_ap(teacher: Path, cells: Sequence[Cell]) -> TeacherAP | None:
    """What the training that made a teacher reached, if it was measured on the images of all cells.

    Args:
        teacher: Its checkpoint, in the work directory of `train-teacher`.
        cells: Finished trainings of its students.
    """
    work = WorkDir(teacher.parent)
    record, result = work.record(), work.read("result.json")
    if record is None or result is None or result.get("ap") is None or not record.get("validation"):
        return None
    images = [(WorkDir(cell.folder).record() or {}).get("validation") for cell in cells]
    if any(each != record["validation"] for each in images):
        return None
    return TeacherAP(float(result["ap"]), str(work.path / "result.json"))


def checkpoint_of(cache: TeacherCache) -> Path | None:
    """The checkpoint that a cache was made from."""
    return recorded_path(cache.metadata, "teacher", "checkpoint")
