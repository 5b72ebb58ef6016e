"""The AP of the teacher on the images that its students are measured on, where that is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.identity import digest_tensors
from kdpipe.cache.read.reader import TeacherCache
from kdpipe.pipelines.compare.cells import Cell
from kdpipe.pipelines.data.provenance import recorded_entry, recorded_path
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.training.work_dir import WorkDir

__all__ = ["TeacherAP", "checkpoint_of", "known_ap"]


@dataclass(frozen=True)
class TeacherAP:
    """AP of a teacher, and where it is from."""

    ap: float
    source: str


def known_ap(teacher: Path, cells: Sequence[Cell]) -> TeacherAP | None:
    """What the training that made a teacher reached, if that was measured with its weights on the images of all cells.

    Args:
        teacher: Its checkpoint, in the work directory of `train-teacher`.
        cells: Finished trainings of its students.
    """
    work = WorkDir(teacher.parent)
    record, result = work.record(), work.read("result.json")
    if record is None or result is None or result.get("ap") is None or not record.get("validation"):
        return None
    records = [WorkDir(cell.folder).record() or {} for cell in cells]
    if any(each.get("validation") != record["validation"] for each in records):
        return None
    weights = {recorded_entry(each, "teacher", "teacher", "weights") for each in records}
    if weights != {_last_weights(work)}:  # of an earlier epoch, or the training has gone on since
        return None
    return TeacherAP(float(result["ap"]), str(work.path / "result.json"))


def _last_weights(work: WorkDir) -> str | None:
    """Digest of the weights that the result of a training of `train-teacher` is of."""
    try:
        return digest_tensors(load_checkpoint(work.path / "teacher.pth").state_dict)
    except KdpipeError:
        return None


def checkpoint_of(cache: TeacherCache) -> Path | None:
    """The checkpoint that a cache was made from."""
    return recorded_path(cache.metadata, "teacher", "checkpoint")
