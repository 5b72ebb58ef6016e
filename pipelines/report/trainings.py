"""The trainings that lie in a folder: what each was begun with, what it measured, and which belong together."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.identity import digest_json
from kdpipe.pipelines.compare.results import find_trainings as trainings_below
from kdpipe.pipelines.compare.results import read_losses, read_validations
from kdpipe.pipelines.compare.statistics import Gain, gap_closed, paired_gain
from kdpipe.pipelines.data.provenance import recorded_entry
from kdpipe.pipelines.training.work_dir import WorkDir

__all__ = ["Training", "TrainingGroup", "find_trainings", "group_trainings", "names_beside"]

_RECORD = "kdpipe/recipe.json"
_SEED = re.compile(r"[-_/ ]?seed[-_ ]?\d+$")


@dataclass(frozen=True, eq=False)
class Training:
    """A training, finished or not, as its work directory tells.

    Attributes:
        path: The work directory.
        name: Of the work directory, below the folder that the report is of.
        record: What it was begun with (`training_record`).
        result: `result.json`; of a training that has not ended, the epoch and the metrics of its last validation.
        is_finished: Whether it has ended.
    """

    path: Path
    name: str
    record: Mapping[str, Any]
    result: Mapping[str, Any]
    is_finished: bool

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of its command line, where they are recorded."""
        return recorded_entry(self.record, "command", "options") or {}

    @property
    def methods(self) -> tuple[str, ...]:
        """Of the distillation; empty without one."""
        return tuple(recorded_entry(self.record, "distillation", "methods") or ())

    @property
    def methods_text(self) -> str:
        """Such as `sgfi + ckd`; `plain` of a student without distillation, `teacher` of a detector of train-teacher."""
        return "teacher" if self.is_teacher else " + ".join(self.methods) or "plain"

    @property
    def is_teacher(self) -> bool:
        """Whether it is a training of `train-teacher`."""
        return self.record.get("training") == "teacher"

    @property
    def seed(self) -> int | None:
        """Of its random numbers."""
        seed = recorded_entry(self.record, "config", "randomness", "seed")
        return seed if isinstance(seed, int) else None

    @property
    def student(self) -> str:
        """Name of the detector: that of its config, or its type and backbone."""
        given = self.options.get("student") or self.options.get("config")
        if isinstance(given, str):
            return Path(given).stem
        model = recorded_entry(self.record, "config", "model") or {}
        backbone = model.get("backbone") or {}
        return f"{model.get('type', 'detector')} {backbone.get('type', '')}-{backbone.get('depth', '')}".rstrip(" -")

    @property
    def own_training(self) -> str:
        """Digest of all that stays when the distillation is taken away, but for the seed."""
        names = ("training", "epochs", "batch_size", "lr", "data", "validation")
        return digest_json([_seedless(self.record["config"]), *(self.record.get(name) for name in names)])

    @property
    def ap(self) -> float | None:
        """COCO AP on the validation images, where it was measured."""
        ap = (self.result.get("metrics") or {}).get("bbox_mAP")
        return None if ap is None else float(ap)

    @property
    def state(self) -> str:
        """How far it is."""
        epoch, epochs = self.result.get("epoch"), self.record.get("epochs")
        return f"{epoch or 0} of {epochs} epochs" + ("" if self.is_finished else ", not finished")

    @property
    def checkpoint(self) -> Path:
        """The bare detector's newest checkpoint, which need not be there."""
        return self.path / f"{self.record.get('training')}.pth"

    @property
    def log(self) -> Path | None:
        """The log of its last start."""
        logs = sorted(self.path.glob("[0-9]*_[0-9]*/*.log"))
        return logs[-1] if logs else None

    @cached_property
    def losses(self) -> list[dict[str, Any]]:
        """What was logged of steps, as `read_losses` gives it."""
        return read_losses(self.path)

    @cached_property
    def validations(self) -> list[dict[str, Any]]:
        """What was logged of validations, as `read_validations` gives it."""
        return read_validations(self.path)

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Epochs done, and a value that was logged then, such as `loss_sgfi`, `time` or `ap`."""
        if name == "ap":
            return [(float(row["epoch"]), float(row["coco/bbox_mAP"])) for row in self.validations]
        steps = max((row["step"] / row["epoch"] for row in self.losses), default=1.0)  # per epoch
        return [
            (row["step"] / steps, float(row[name])) for row in self.losses if isinstance(row.get(name), int | float)
        ]

    def logged(self, prefix: str) -> list[str]:
        """Names of logged values that begin like this, in the order of the log."""
        return list(dict.fromkeys(name for row in self.losses for name in row if name.startswith(prefix)))


@dataclass(frozen=True, eq=False)
class TrainingGroup:
    """Trainings that differ in their seed alone.

    Attributes:
        label: What they are called in tables and figures.
        trainings: By seed.
    """

    label: str
    trainings: tuple[Training, ...]

    @property
    def first(self) -> Training:
        """That of the first seed."""
        return self.trainings[0]

    @property
    def is_named_by_methods(self) -> bool:
        """Whether its label says the methods, and at most the student beside these."""
        methods = self.first.methods_text
        return self.label in (methods, f"{self.first.student}, {methods}")

    @property
    def is_plain(self) -> bool:
        """Whether these are students without distillation."""
        return not self.first.is_teacher and not self.first.methods

    @property
    def is_distilled(self) -> bool:
        """Whether these are students with distillation."""
        return bool(self.first.methods)

    @property
    def aps(self) -> list[float]:
        """COCO AP of each seed that has one."""
        return list(self._ap_of_seed().values())

    def _ap_of_seed(self) -> dict[int, float]:
        return {training.seed or 0: training.ap for training in self.trainings if training.ap is not None}

    def gain_over(self, other: "TrainingGroup") -> Gain | None:
        """What AP gains over that of others, over seeds that both have; None where there is none."""
        return paired_gain(self._ap_of_seed(), other._ap_of_seed())

    def gap_closed(self, other: "TrainingGroup", teacher_ap: float | None) -> float | None:
        """The gain as a share of the distance from others to the teacher, over the same seeds; None where unknown."""
        return gap_closed(self._ap_of_seed(), other._ap_of_seed(), teacher_ap)

    @property
    def ap(self) -> float | None:
        """Mean over the seeds."""
        return statistics.mean(self.aps) if self.aps else None


def find_trainings(folder: Path) -> list[Training]:
    """The training whose work directory a folder is, or all those below it.

    Args:
        folder: A work directory, or a folder with several.

    Raises:
        KdpipeError: There is none, or a record cannot be read.
    """
    paths = [folder] if (folder / _RECORD).is_file() else trainings_below(folder)
    trainings = [_read(path, folder) for path in paths]
    found = [training for training in trainings if training is not None]
    if not found:
        raise KdpipeError(
            f"{folder} holds no training of kdpipe (no {_RECORD} there, nor in the folders below it), and it is no "
            "cache. Name the work directory of train-student or compare, or a cache."
        )
    return found


def _read(path: Path, folder: Path) -> Training | None:
    work = WorkDir(path)
    record = work.record()
    if record is None or not record.get("saved"):  # it has not got to its first step
        return None
    result = work.read("result.json")
    name = path.name if path == folder else path.relative_to(folder).as_posix()
    return Training(path, name, record, result or work.read("kdpipe/validation.json") or {}, result is not None)


def names_beside(groups: Sequence[TrainingGroup]) -> dict[str, str]:
    """What groups are called where only these are shown, by their labels: their methods, if these tell them apart."""
    methods = [group.first.methods_text for group in groups]
    is_clear = len(set(methods)) == len(methods)
    return {group.label: name if is_clear else group.label for group, name in zip(groups, methods, strict=True)}


def group_trainings(trainings: Iterable[Training]) -> list[TrainingGroup]:
    """Trainings by what they have in common: students without distillation first, then as their folders are named."""
    groups: dict[str, list[Training]] = {}
    for training in trainings:
        groups.setdefault(_without_seed(training.record), []).append(training)
    members = [sorted(group, key=lambda training: training.seed or 0) for group in groups.values()]
    labels = _labels([group[0] for group in members])
    named = [TrainingGroup(label, tuple(group)) for label, group in zip(labels, members, strict=True)]
    return sorted(named, key=lambda group: (group.first.student, not group.first.is_teacher, not group.is_plain))


def _without_seed(record: Mapping[str, Any]) -> str:
    left_out = ("config", "saved", "kdpipe", "images", "command", "processes")
    rest = {key: value for key, value in record.items() if key not in left_out}
    return digest_json([_seedless(record["config"]), rest])


def _seedless(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "randomness"}


def _labels(trainings: Sequence[Training]) -> list[str]:
    """The shortest names that tell trainings apart: methods, then student and methods, then their folders."""
    folders = ["teacher" if training.is_teacher else _SEED.sub("", training.name) for training in trainings]
    for labels in (
        [training.methods_text for training in trainings],
        [f"{training.student}, {training.methods_text}" for training in trainings],
        folders,
    ):
        if len(set(labels)) == len(labels):
            return labels
    return [training.name for training in trainings]
