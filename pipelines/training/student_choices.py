"""What a training of a student chooses where its options leave it open: methods, RoIs, network input."""

from collections.abc import Sequence

from mmengine.config import Config, ConfigDict
from rich.console import Console

from kdpipe.distill.methods import CLASS_AGNOSTIC_METHODS, DEFAULT_METHODS, DENSE_METHODS, ContractError
from kdpipe.distill.rois.sampling import RoiSampling
from kdpipe.pipelines.detectors.configs import apply_options
from kdpipe.pipelines.detectors.mmdet2 import dictionaries
from kdpipe.pipelines.training.config import own_config
from kdpipe.pipelines.training.options import MULTI_SCALE, TrainingOptions
from kdpipe.pipelines.training.student_check import model_options
from kdpipe.pipelines.training.teachers import TrainingTeacher
from kdpipe.pipelines.training.transforms import resizes_to_one_size

__all__ = ["ROI_SAMPLING", "choose_methods", "choose_roi_source", "choose_scale"]

ROI_SAMPLING = {"num": RoiSampling.num, "positive_fraction": RoiSampling.positive_fraction}


def choose_methods(
    asked: Sequence[str] | None, config: Config, options: Sequence[str], teacher: TrainingTeacher, console: Console
) -> Sequence[str]:
    """The methods of a training: those asked for, or those that suit teacher and student, which is said.

    Args:
        asked: Some of `METHODS`, or None.
        config: mmdet config of the student.
        options: `KEY=VALUE` overrides of it.
        teacher: The teacher.
        console: Where it is said.
    """
    if asked is not None:
        return asked
    model = apply_options(config, model_options(options)).model
    if "roi_head" not in model:
        return _of_dense(teacher, console)
    agnostic = {
        "the teacher": teacher.spec.class_agnostic,
        "the student": any(head.get("reg_class_agnostic") for head in dictionaries(model.roi_head.get("bbox_head"))),
    }
    if not any(agnostic.values()):
        return DEFAULT_METHODS
    who = " and ".join(name for name, value in agnostic.items() if value)
    console.print(
        f"Methods: {','.join(CLASS_AGNOSTIC_METHODS)}, with cls and reg in place of pred, which needs a box for each "
        f"class; that of {who} is for all classes."
    )
    return CLASS_AGNOSTIC_METHODS


def _of_dense(teacher: TrainingTeacher, console: Console) -> Sequence[str]:
    """Those of a student that predicts boxes densely."""
    reason = "The head of HTC cannot serve it." if teacher.spec.semantic else teacher.head_refusal()
    methods = tuple(name for name in DENSE_METHODS if name != "cross" or not reason)
    unfit = f" Without cross: {reason}" if reason else ""
    console.print(f"Methods: {','.join(methods)}, which suit a dense student.{unfit}", markup=False)
    return methods


def choose_scale(
    options: TrainingOptions, config: Config, teacher: TrainingTeacher, console: Console
) -> tuple[int, int] | None:
    """The network input of a training: that asked for, or the teacher's; None where the config's pipelines stay.

    That is where they resize otherwise than to one size with the ratio kept, such as to several sizes or to squares,
    which is said.

    Args:
        options: Of the command.
        config: mmdet config of the student.
        teacher: The teacher.
        console: Where it is said.
    """
    if options.scale is not None:
        return options.scale
    width, height = teacher.spec.scale
    if options.schedule == MULTI_SCALE or resizes_to_one_size(own_config(config, options)):
        return width, height
    console.print(
        f"Network input: as the config's pipelines resize images, which is not to one size with the ratio kept. The "
        f"teacher saw {width}x{height}; --scale {width}x{height} takes that."
    )
    return None


def choose_roi_source(
    teacher: TrainingTeacher, asked: str | None, distill: ConfigDict, dense: bool, console: Console
) -> str:
    """Whose RoIs are used, said on the console with the reason.

    Args:
        teacher: The teacher.
        asked: `teacher` or `student`; None takes those of a cached teacher, and the student's where the teacher runs in
            every step and can say what it says of any box.
        distill: As `distill_options` gives them.
        dense: For a student that predicts boxes densely.
        console: Where it is said.

    Raises:
        ContractError: The RoIs that were asked for cannot be served; or options are for those of the teacher.
    """
    default = ("student", "without a cache") if teacher.cache is None else ("teacher", "with a cache")
    roi_source, why = (asked, "asked for") if asked else (default[0], f"the default {default[1]}")
    if roi_source == "student" and (reason := teacher.refusal().removesuffix(".")):
        if asked:
            raise ContractError(f"{teacher.name} cannot serve --rois student: {reason}. Use --rois teacher.")
        roi_source, why = "teacher", f"{teacher.name} cannot be asked about those of the student: {reason}"
    if distill.stagewise and roi_source == "teacher":
        raise ContractError(
            "distill.stagewise asks one stage of the teacher at a time, about the RoIs of the student; of its own RoIs "
            "the teacher says what all of its stages say together. Leave it out, or add --rois student."
        )
    for name, value in distill.rois.items():
        if roi_source == "student" and not dense and value != ROI_SAMPLING[name]:
            raise ContractError(
                f"distill.rois.{name} is for RoIs that the teacher chose, and with --rois student the student's own "
                "sampler decides (model.train_cfg.rcnn.sampler). Leave it out, or add --rois teacher."
            )
    console.print(f"RoIs: those of the {roi_source} ({why}).")
    return roi_source
