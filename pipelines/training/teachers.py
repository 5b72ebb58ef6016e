"""The teacher of a training: one that lies in a cache, or one that runs beside the student."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mmengine.config import Config, ConfigDict
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.identity import difference
from kdpipe.cache.read.reader import TeacherCache
from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.teacher.heads.build import frozen_head
from kdpipe.distill.teacher.heads.fc import TeacherHeadError
from kdpipe.distill.teacher.source import CachedTargets, check_serves_student_rois
from kdpipe.pipelines.data.class_matching import match_classes
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.provenance import recorded_entry
from kdpipe.pipelines.detectors.mmdet2 import dictionaries
from kdpipe.pipelines.teacher.live import LiveTeacherInfo
from kdpipe.pipelines.training.config import world_size
from kdpipe.pipelines.training.data import innermost
from kdpipe.pipelines.training.reading import check_read_alike, check_seen_alike
from kdpipe.pipelines.training.training_record import check_resumed, plain_values
from kdpipe.pipelines.training.transforms import AddTeacherTargets, record_places, with_teacher_targets

__all__ = ["CachedTrainingTeacher", "LiveTrainingTeacher", "TrainingTeacher", "training_pipelines"]


class TrainingTeacher(Protocol):
    """What a training asks of its teacher, wherever it is.

    Attributes:
        name: As messages call it.
    """

    name: str

    @property
    def cache(self) -> TeacherCache | None:
        """That it lies in, or None."""

    @property
    def spec(self) -> CacheSpec:
        """What it is; the classes of a live one are placeholders before `with_data`."""

    @property
    def record(self) -> dict[str, Any]:
        """What the record of a training says of it."""

    def check(self, begun: Mapping[str, Any], work_dir: Path) -> None:
        """Refuse it, if that is possible before any data is read.

        Args:
            begun: Record of the training that is gone on with; empty for a new one.
            work_dir: Of the training.

        Raises:
            KdpipeError: It is not the one that the training began with, or cannot be used yet.
        """

    def refusal(self) -> str:
        """Why it cannot be asked about boxes that the student chose; empty where it can."""

    def head_refusal(self) -> str:
        """Why its box head cannot be rebuilt from its weights; empty where it can.

        Raises:
            CacheError: It is missing in the cache, or damaged.
        """

    def with_data(
        self, data: DetectionData, begun: Mapping[str, Any], work_dir: Path, console: Console
    ) -> tuple[DetectionData, list[int] | None]:
        """Bring it together with the images to train on.

        Args:
            data: The images.
            begun: Record of the training that is gone on with; empty for a new one.
            work_dir: Of the training.
            console: Where it is said which images are left out.

        Returns:
            The images that it can teach, with its classes; and their ids where more of them may come.

        Raises:
            KdpipeError: The images are not those that it saw, or it knows other classes.
        """

    def source(self, losses: Sequence[str], roi_source: str | None, distill: ConfigDict) -> dict[str, Any]:
        """Config of its `TargetSource`.

        Args:
            losses: As `expand_methods` gives them.
            roi_source: `teacher` or `student`: who chooses the RoIs; None where there are no losses.
            distill: As `distill_options` gives them.
        """

    def prepare_pipelines(self, cfg: Config, targets: Mapping[str, Any], distill: ConfigDict) -> None:
        """Let the pipelines of a training config show the student what the losses compare.

        Args:
            cfg: Training config, which is changed.
            targets: Options of `AddTeacherTargets` beside those of the cache.
            distill: As `distill_options` gives them.

        Raises:
            KdpipeError: A pipeline that the targets cannot follow.
        """


def training_pipelines(cfg: Config) -> list[Any]:
    """All pipelines that training images go through, those that mmdet's PipelineSwitchHook puts in later included."""
    parts = [*dictionaries(cfg.train_dataloader.dataset), *_switch_hooks(cfg)]
    return [part.get("pipeline") or part.get("switch_pipeline") or [] for part in parts]


def _switch_hooks(cfg: Config) -> list[Any]:
    return [hook for hook in cfg.get("custom_hooks") or () if "switch_pipeline" in hook]


def _check_same(begun: Mapping[str, Any], record: Mapping[str, Any], work_dir: Path) -> None:
    """Refuse to go on with another cache or teacher than a training began with.

    Raises:
        KdpipeError: Naming what differs.
    """
    if "teacher" in begun:
        check_resumed({"teacher": begun["teacher"]}, {"teacher": plain_values(record)}, str(work_dir))


class CachedTrainingTeacher:
    """A teacher in a cache: `TrainingTeacher`.

    Args:
        cache: The cache.
    """

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache
        self.name = f"the cache {cache.location}"

    @property
    def spec(self) -> CacheSpec:
        return self.cache.spec

    @property
    def record(self) -> dict[str, Any]:
        return {**self.cache.identity, "spec": self.spec.to_json()}

    def check(self, begun: Mapping[str, Any], work_dir: Path) -> None:
        cache = self.cache
        if not cache.is_complete and begun.get("images") is None:
            if not len(cache):
                raise KdpipeError(f"The cache {cache.location} has no finished part yet. Wait for one.")
            if world_size() > 1:
                raise KdpipeError(
                    f"The cache {cache.location} is still being made, and may grow while several processes open it. "
                    "Train on it in one process, or when it is finished."
                )
        _check_same(begun, self.record, work_dir)

    def refusal(self) -> str:
        try:
            if len(self.cache):
                check_serves_student_rois(self.cache)
        except TeacherHeadError as error:
            return str(error)
        return ""

    def head_refusal(self) -> str:
        try:
            frozen_head(self.cache.head(), self.spec)
        except TeacherHeadError as error:
            return str(error)
        return ""

    def with_data(
        self, data: DetectionData, begun: Mapping[str, Any], work_dir: Path, console: Console
    ) -> tuple[DetectionData, list[int] | None]:
        data = self._checked_data(data)
        images = self._image_ids(data, begun, console)
        data = data if images is None else data.only(images)
        if skipped := {image["image_id"] for image in self.cache.skipped}:
            data = data.only([image.image_id for image in data.images if image.image_id not in skipped])
        return data, images

    def _checked_data(self, data: DetectionData) -> DetectionData:
        """The same data with the classes of the cache, if the teacher saw these images and annotations."""
        cache = self.cache
        data = match_classes(data, cache.spec.class_names, f"the cache {cache.location.title}")
        if not difference({"data": cache.identity.get("data")}, {"data": data.digest()}):
            return data
        given_ids = {image.image_id for image in data.images}
        cached_ids = self._known_ids()
        raise KdpipeError(
            f"The cache {cache.location} was made from another data set than {data.ann_file}: "
            f"{len(given_ids - cached_ids)} images are only in the annotation file, {len(cached_ids - given_ids)} only "
            "in the cache"
            + ("" if given_ids != cached_ids else " (the same ids, but other names, sizes or boxes)")
            + ". Use the annotation file that was cached, or cache the teacher on this one."
        )

    def _known_ids(self) -> set[int]:
        """Ids of the images that the cache holds, and of those that were left out of it."""
        return {*self.cache.image_ids.tolist(), *(int(image["image_id"]) for image in self.cache.skipped)}

    def _image_ids(self, data: DetectionData, begun: Mapping[str, Any], console: Console) -> list[int] | None:
        """Ids of the images of a cache, of which some may be missing still; None where all are there.

        A training that is resumed has the images that it began with, whatever the cache has got meanwhile.
        """
        cache = self.cache
        begun_ids: list[int] | None = begun.get("images")
        if begun_ids is not None:
            if missing := len(set(begun_ids) - self._known_ids()):
                raise KdpipeError(
                    f"The cache {cache.location} lacks {missing} of the {len(begun_ids)} images that the training "
                    "began with. Make them again with cache-teacher, or begin anew in another --work-dir."
                )
            return begun_ids
        if cache.is_complete:
            return None
        console.print(f"The cache is not finished: training on {len(cache)} of {len(data.images)} images.")
        return list(cache.image_ids.tolist())

    def source(self, losses: Sequence[str], roi_source: str | None, distill: ConfigDict) -> dict[str, Any]:
        return {"type": CachedTargets.__name__, "cache": self.cache.location.address}

    def prepare_pipelines(self, cfg: Config, targets: Mapping[str, Any], distill: ConfigDict) -> None:
        pixels = recorded_entry(self.cache.identity, "teacher", "pixels") or {}
        transform = {
            "type": AddTeacherTargets.__name__,
            "cache": self.cache.location.address,
            **targets,
            "allow_partial": True,  # it was the caller's to refuse
        }
        dataset = innermost(cfg.train_dataloader.dataset)
        for part, key in [(dataset, "pipeline"), *((hook, "switch_pipeline") for hook in _switch_hooks(cfg))]:
            check_read_alike(part[key], pixels)
            part[key] = with_teacher_targets(part[key], transform, distill.transforms)


class LiveTrainingTeacher:
    """A teacher that runs beside the student: `TrainingTeacher`.

    Args:
        info: What is known of it.
    """

    def __init__(self, info: LiveTeacherInfo) -> None:
        self.cache = None
        self.name = info.name
        self._info = info

    @property
    def spec(self) -> CacheSpec:
        return self._info.spec

    @property
    def record(self) -> dict[str, Any]:
        return {**self._info.identity, "spec": self.spec.to_json()}

    def check(self, begun: Mapping[str, Any], work_dir: Path) -> None:
        """Its record is known with the data only."""

    def refusal(self) -> str:
        return self._info.refusal

    def head_refusal(self) -> str:
        return self._info.refusal

    def with_data(
        self, data: DetectionData, begun: Mapping[str, Any], work_dir: Path, console: Console
    ) -> tuple[DetectionData, list[int] | None]:
        self._info, data = self._info.with_data(data, partial(console.print, markup=False, highlight=False))
        _check_same(begun, self.record, work_dir)
        return data, None

    def source(self, losses: Sequence[str], roi_source: str | None, distill: ConfigDict) -> dict[str, Any]:
        at_proposals = {"methods": list(losses), "roi_sampling": distill.rois} if roi_source == "teacher" else {}
        return {**self._info.source(), **at_proposals}

    def prepare_pipelines(self, cfg: Config, targets: Mapping[str, Any], distill: ConfigDict) -> None:
        pipelines = training_pipelines(cfg)
        check_seen_alike(pipelines, recorded_entry(self._info.identity, "teacher", "pixels") or {})
        for pipeline in pipelines:
            record_places(pipeline)
