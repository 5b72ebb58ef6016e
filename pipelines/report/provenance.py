"""What was run: versions, command lines, seeds, data and cache, so that somebody else can repeat it."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdpipe.pipelines.data.provenance import recorded_entry
from kdpipe.pipelines.report.page import NOTHING, Section, Table
from kdpipe.pipelines.report.trainings import Training, TrainingGroup

__all__ = ["provenance_section"]

_VERSION = re.compile(r"^\s*(Python|PyTorch|TorchVision|OpenCV|MMEngine|GPU \d[\d,]*): (.+)$")
_HEAD = 200  # lines of a log that say what it ran on


def provenance_section(groups: Sequence[TrainingGroup]) -> Section:
    """What was run, a row per training; and the command lines, where they are recorded."""
    section = Section("run", "What was run")
    trainings = [training for group in groups for training in group.trainings]
    columns = ("folder", "seed", "epochs", "batch", "rate", "cache or teacher", "training data", "validation data")
    section.tables.append(Table(columns, [_row(training) for training in trainings]))
    section.tables.append(Table(("what", "version"), list(_versions(trainings).items())))
    commands = [(training, command_line(training)) for training in trainings]
    known = [f"# {training.name}\n{line}" for training, line in commands if line is not None]
    if known:
        section.code.append(("Commands", "\n".join(known)))
    if len(known) < len(commands):
        missing = ", ".join(training.name for training, line in commands if line is None)
        section.notes.append(f"An older kdpipe did not record the command line of {missing}.")
    section.intro = "Data and weights of the teacher are named by the first digits of their SHA-256."
    return section


def _row(training: Training) -> list[str]:
    record = training.record
    teacher = recorded_entry(record, "teacher", "teacher", "weights")
    source = training.options.get("cache") or training.options.get("teacher_ckpt") or NOTHING
    rate = record.get("lr")
    return [
        training.name,
        str(training.seed),
        str(record.get("epochs")),
        f"{record.get('batch_size')} x {record.get('processes')}",
        f"{rate:.4g}" if isinstance(rate, float) else NOTHING,
        f"{Path(source).name} (teacher {_short(teacher)})" if not training.is_teacher else NOTHING,
        _short(record.get("data")),
        _short(record.get("validation")),
    ]


def _short(digest: Any) -> str:
    return digest[:12] if isinstance(digest, str) else NOTHING


def _versions(trainings: Sequence[Training]) -> dict[str, str]:
    """Versions of what the trainings ran with; where they differ, all."""
    versions: dict[str, list[str]] = {}
    for training in trainings:
        found = {"kdpipe": str(training.record.get("kdpipe")), **_log_versions(training)}
        for name, value in found.items():
            if value not in versions.setdefault(name, []):
                versions[name].append(value)
    return {name: ", ".join(values) for name, values in versions.items()}


def _log_versions(training: Training) -> dict[str, str]:
    """What mmengine says at the head of its log."""
    if training.log is None:
        return {}
    with training.log.open(encoding="utf-8", errors="replace") as file:
        matches = [_VERSION.match(line) for line, _ in zip(file, range(_HEAD), strict=False)]
    return {match[1]: match[2].strip() for match in matches if match}


def command_line(training: Training) -> str | None:
    """The command that makes the training again; None where it is not recorded.

    Args:
        training: The training.
    """
    options: Mapping[str, Any] = training.options
    if not options:
        return None
    words = ["kdpipe", f"train-{training.record['training']}"]
    for name, value in options.items():
        flag = {"overrides": "-o", "roi_source": "--rois"}.get(name, f"--{name.replace('_', '-')}")
        for each in value if isinstance(value, list) and name == "overrides" else [value]:
            if each is True:
                words.append(flag)
            elif name == "scale" and isinstance(each, list):
                words += [flag, "x".join(map(str, each))]
            elif each not in (False, None):
                words += [flag, str(each)]
    return shlex.join(words)
