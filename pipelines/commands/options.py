"""What each command is told, as the command line says it. Nothing heavy is imported here."""

from dataclasses import dataclass
from pathlib import Path

from kdpipe.pipelines.data.options import DataOptions

__all__ = ["EvaluateOptions", "RayOptions", "ReportOptions", "StudentOptions", "TeacherCheckOptions"]

_NO_DATA = DataOptions()


@dataclass(frozen=True)
class EvaluateOptions:
    """What AP is measured of, and how.

    Attributes:
        ckpt: Checkpoint of any mmdet detector.
        config: Its config; None reads it from the checkpoint.
        data: The images; by default those for validation of the config.
        strict_data: Refuse annotations of which some would be left out.
        scale: `(w, h)` of the network input; None takes the config's.
        batch_size: Images per forward pass.
        skip_bad_images: Measure without images that cannot be read or are not as annotated.
        trust: Unpickle the checkpoint even where it holds more than weights.
    """

    ckpt: Path
    config: str | None = None
    data: DataOptions = _NO_DATA
    strict_data: bool = False
    scale: tuple[int, int] | None = None
    batch_size: int = 1
    skip_bad_images: bool = False
    trust: bool = False


@dataclass(frozen=True)
class RayOptions:
    """Which cluster makes the parts of a cache, or trains the students of a comparison, and what each task takes.

    Attributes:
        address: Of its head, `auto` for the one that this machine belongs to, or `local` for one that is started here;
            None uses none.
        cpus: Of a task; None takes one.
        gpus: Of a task; None takes one where the cluster has any.
    """

    address: str | None = None
    cpus: float | None = None
    gpus: float | None = None


@dataclass(frozen=True)
class ReportOptions:
    """How a report is made.

    Attributes:
        out: The page; None is `report.html` in the folder of the trainings.
        png: Folder for the figures alone, in place of the page.
        cache: The cache that the students learned from, where the trainings do not say or it moved.
        teacher_ckpt: The teacher's checkpoint, where it is not where the cache says.
        img_dir: The validation images, where they moved; of the report of a cache, its images.
        no_inference: Run no detector over the validation images.
    """

    out: Path | None = None
    png: Path | None = None
    cache: str | None = None
    teacher_ckpt: Path | None = None
    img_dir: Path | None = None
    no_inference: bool = False


@dataclass(frozen=True)
class StudentOptions:
    """How a student is shown its teacher.

    Attributes:
        roi_source: `teacher` or `student`: who chooses the RoIs of each step; None takes the teacher's with a cache,
            and the student's beside a live teacher.
        ckd_branch: The branch of a dense student's head that CKD compares (`CKD_BRANCHES`); None: the config says.
        missing_view: `mirror` or `skip`: what becomes of a flipped image whose flipped view is not cached; None is
            `mirror`.
        local_copy: Folder of a local disk in which arrays of the cache are kept; None keeps none.
        local_bytes: That these may take; None takes most of what is free.
    """

    roi_source: str | None = None
    ckd_branch: str | None = None
    missing_view: str | None = None
    local_copy: Path | None = None
    local_bytes: int | None = None


@dataclass(frozen=True)
class TeacherCheckOptions:
    """How a cache is compared with its teacher.

    Attributes:
        ckpt: The teacher's checkpoint; None does not compare.
        config: Its config; None takes the one that the cache records.
        sample: How many images are compared.
        device: Where the teacher runs.
        ap: Compute the teacher's AP from the cache.
        data: Where images and annotations moved.
        strict_data: Refuse annotations of which some would be left out.
        trust: Unpickle the checkpoint even where it holds more than weights.
    """

    ckpt: Path | None = None
    config: str | None = None
    sample: int = 16
    device: str | None = None
    ap: bool = False
    data: DataOptions = _NO_DATA
    strict_data: bool = False
    trust: bool = False
