"""The trainings of a comparison: one cell for each student, choice of methods, and seed."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.identity import difference
from kdpipe.pipelines.training.training_record import recorded_values
from kdpipe.pipelines.training.work_dir import WorkDir

__all__ = ["PLAIN", "Cell", "Row", "check_cell", "is_finished", "methods_folder"]

PLAIN = "none"  # of methods: without distillation
_OF_DISTILLATION = ("methods", "roi_source", "ckd_branch", "missing_view", "cache", "teacher_ckpt", "teacher_config")
_LINES = 12


@dataclass(frozen=True)
class Cell:
    """One training of a comparison, which is a function of its words and its folder.

    Attributes:
        seed: Of all that is random.
        folder: Its work directory.
        words: What stands behind `kdpipe` on its command line.
        command: What the training records of its options (`recipe.json`: `command`).
        teacher: What it records of its teacher; None where that is not known before it has run.
        secret_words: Options of an object store, which are not shown.
    """

    seed: int
    folder: Path
    words: tuple[str, ...]
    command: Mapping[str, Any]
    teacher: Mapping[str, Any] | None = None
    secret_words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Such as `retinanet_r18_fpn_1x_coco/sgfi-ckd/seed-0`."""
        return "/".join(self.folder.parts[-3:])

    @property
    def log(self) -> Path:
        """File of all that it prints."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def line(self) -> str:
        """Its command line, for a shell."""
        return shlex.join(["kdpipe", *self.words])


@dataclass(frozen=True)
class Row:
    """The cells of one student with one choice of methods, which differ in their seed only.

    Attributes:
        student: Name of the student.
        methods: As `--methods` has them, such as `sgfi,ckd` or `none`.
        config: mmdet config of the student: a name of the zoo, or a file.
        cells: One for each seed.
        scale: Network input of the student; None is that of its config.
        baseline: Student of the row without distillation that it is compared with; None finds it.
    """

    student: str
    methods: str
    config: str
    cells: Sequence[Cell]
    scale: tuple[int, int] | None = None
    baseline: str | None = None

    @property
    def name(self) -> str:
        return f"{self.student}, {self.methods}"

    def find_baseline(self, rows: Sequence["Row"]) -> "Row | None":
        """The same student without distillation, among rows; None where it is not there, or this is one."""
        if self.methods == PLAIN:
            return None
        plain = [row for row in rows if row.methods == PLAIN]
        if self.baseline is not None:
            return next((row for row in plain if row.student == self.baseline), None)
        own = [row for row in plain if row.student == self.student]
        return next((row for row in [*own, *plain] if row._detector() == self._detector()), None)

    def _detector(self) -> dict[str, Any]:
        """The options that stay when the distillation is taken away."""
        command = self.cells[0].command
        options = {name: value for name, value in command["options"].items() if name not in (*_OF_DISTILLATION, "seed")}
        overrides = [each for each in options.pop("overrides", []) if not each.strip().startswith("distill")]
        return {**options, "overrides": overrides, "config": command["config"], "scale": self.scale}


def methods_folder(methods: str) -> str:
    """`sgfi,ckd` -> `sgfi-ckd`."""
    return methods.replace(",", "-")


def is_finished(cell: Cell) -> bool:
    """Whether it was trained to its end."""
    return WorkDir(cell.folder).is_finished


def check_cell(cell: Cell) -> None:
    """Refuse a cell in whose folder there is something else than this training, begun or finished.

    One that was stopped before its first checkpoint begins anew, whatever its options were.

    Raises:
        KdpipeError: Naming what differs.
    """
    work = WorkDir(cell.folder)
    record = work.record()
    if record is None or not (work.has_checkpoint or work.is_finished):
        return
    begun = record.get("command")
    if begun is None:
        raise KdpipeError(
            f"{cell.folder} holds a training of which the options are not recorded: no comparison began it. Choose "
            "another --work-dir, or move it away."
        )
    lines = difference(_named(begun), _named(recorded_values(cell.command)))
    if cell.teacher is not None:
        teacher = recorded_values(cell.teacher)
        lines += difference({"teacher": record.get("teacher")}, {"teacher": teacher})
    if lines:
        more = f"\n  and {len(lines) - _LINES} more" if len(lines) > _LINES else ""
        raise KdpipeError(
            f"{cell.name} was trained with other options:\n  "
            + "\n  ".join(lines[:_LINES])
            + f"{more}\nGive those, or choose another --work-dir. To train it anew, remove {cell.folder}."
        )


def _named(command: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a command under names that a user knows."""
    return {**command["options"], "config of the student (digest)": command["config"]}
