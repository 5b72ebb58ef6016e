"""What teacher and students find in the validation images, of all trainings of a report."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pycocotools.coco import COCO
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.read.reader import TeacherCache
from kdpipe.pipelines.commands.options import ReportOptions
from kdpipe.pipelines.report.accuracy import Accuracy, mean_accuracy, measure, read_truth
from kdpipe.pipelines.report.detections import (
    Results,
    ValidationImages,
    student_results,
    teacher_results,
    validation_images,
)
from kdpipe.pipelines.report.trainings import TrainingGroup

__all__ = ["TEACHER", "Found", "find_objects"]

TEACHER = "teacher"
_NAMED = 5  # trainings of which the same is missing


@dataclass
class Found:
    """What teacher and students find in the validation images.

    Attributes:
        images: The images; None where AP was not measured.
        truth: Their annotations.
        results: Of the teacher, and of the first seed of each group, by name.
        accuracies: The same; means over the seeds.
        notes: What is missing, and why.
        known_teacher_ap: What is recorded of the teacher.
    """

    images: ValidationImages | None = None
    truth: COCO | None = None
    results: dict[str, Results] = field(default_factory=dict)
    accuracies: dict[str, Accuracy] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    known_teacher_ap: float | None = None

    @property
    def teacher_ap(self) -> float | None:
        """AP of the teacher, where it could be measured, or was before."""
        return self.accuracies[TEACHER].ap if TEACHER in self.accuracies else self.known_teacher_ap


def find_objects(
    groups: Sequence[TrainingGroup],
    cache: TeacherCache | None,
    options: ReportOptions,
    console: Console,
) -> Found:
    """Collect what is found in the validation images; what cannot be had is noted.

    Args:
        groups: The trainings.
        cache: Of the teacher; None where it is not known.
        options: Where teacher and images moved, and whether a detector may run.
        console: Where progress is shown.
    """
    first = groups[0].first
    try:
        images = validation_images(first, options.img_dir)
    except KdpipeError as error:
        return Found(notes=[f"Detections are not shown: {error}"])
    if images is None:
        return Found(notes=["No validation images: AP was not measured. Name them with --val-ann-file."])
    truth = read_truth(images.ann_file)
    found = Found(images, truth)
    teachers = [group.ap for group in groups if group.first.is_teacher]
    found.known_teacher_ap = teachers[0] if len(teachers) == 1 else None
    if not any(group.first.is_teacher for group in groups):
        try:
            if cache is None:
                raise KdpipeError("the trainings do not record where its cache is: name it (--cache)")
            found.results[TEACHER] = teacher_results(cache, options, first, images, console)
            found.accuracies[TEACHER] = measure(truth, found.results[TEACHER])
        except KdpipeError as error:
            found.notes.append(f"The teacher's detections are missing: {error}")
    missing: dict[str, list[str]] = {}
    for group in groups:
        accuracies = []
        for training in group.trainings:
            if training.record.get("validation") != images.digest:
                missing.setdefault("they are of other validation images", []).append(training.name)
                continue
            try:
                results = student_results(training, images, options, console)
            except KdpipeError as error:
                missing.setdefault(str(error), []).append(training.name)
                continue
            found.results.setdefault(group.label, results)
            accuracies.append(measure(truth, results))
        if accuracies:
            found.accuracies[group.label] = mean_accuracy(accuracies)
    for reason, names in missing.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        found.notes.append(f"The detections of {', '.join(names[:_NAMED])}{more} are missing: {reason}")
    return found
