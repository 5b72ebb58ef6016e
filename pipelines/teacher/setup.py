"""A teacher made ready before any data is read: built, checked, loaded, and asked once."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from mmengine.config import Config

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.identity import digest_json
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.write.encode import encode_record
from kdpipe.pipelines.data.class_matching import match_classes
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.detectors.checkpoints import Checkpoint, class_names
from kdpipe.pipelines.teacher.family_checks import TeacherError
from kdpipe.pipelines.teacher.options import CacheOptions, tier_defaults
from kdpipe.pipelines.teacher.teacher import Teacher, load_teacher

__all__ = ["digest_model", "prepare_teacher", "with_classes"]

TRIAL = "a picture of noise"  # that a teacher is tried on, by its name in messages
_TRIAL_SIZE = (96, 64)  # its width and height


def prepare_teacher(
    checkpoint: Checkpoint, cfg: Config, options: CacheOptions, device: torch.device
) -> tuple[Teacher, CacheSpec]:
    """The teacher, which has answered once, and what a cache of it will hold.

    No data is needed: the classes of the specification are placeholders, for which `with_classes` puts the real ones.

    Args:
        checkpoint: The teacher's.
        cfg: Its config, as `teacher_config` gives it.
        options: What is kept.
        device: Where the teacher runs.

    Raises:
        KdpipeError: Checkpoint, config and options do not fit together.
    """
    defaults = tier_defaults(options.tier)
    proposals = options.proposals or defaults.proposals
    teacher = load_teacher(checkpoint, cfg, proposals=proposals, device=device)
    scale = options.scale or teacher.pixels.own_scale()
    teacher.pixels.check_scale(scale)
    class_list = class_names(checkpoint)
    if class_list is not None and len(class_list) != teacher.num_classes:
        raise TeacherError(
            f"The teacher's box head knows {teacher.num_classes} classes, and its checkpoint {checkpoint.path.name} "
            f"names {len(class_list)} ({', '.join(class_list[:8])}). Give the config that belongs to the checkpoint."
        )
    spec = teacher.spec(
        tier=options.tier,
        dtype=options.dtype or defaults.dtype,
        codec=options.codec,
        class_names=[f"class {number}" for number in range(teacher.num_classes)],
        category_ids=range(teacher.num_classes),
        proposals=proposals,
        views=options.views or defaults.views,
        scale=scale,
        jittered=defaults.jittered,
    )
    spec = with_levels(spec, options.levels)
    _ask_once(teacher, spec)
    return teacher, spec


def with_levels(spec: CacheSpec, names: Sequence[str] | None) -> CacheSpec:
    """The specification of a cache with some levels of the pyramid only; None keeps it.

    Raises:
        TeacherError: The cache holds no pyramid, or the teacher's has no such level.
    """
    if names is None:
        return spec
    level_names = [spec.level_name(level) for level in range(len(spec.strides))]
    if "features" not in spec.fields:
        raise TeacherError(
            f"--levels chooses from the feature pyramid, and --targets {spec.tier} keeps none. Leave --levels out, or "
            "use --targets pyramid."
        )
    if unknown := [name for name in names if name not in level_names]:
        raise TeacherError(
            f"--levels {','.join(names)}: the teacher has no {', '.join(unknown)}. Its pyramid has "
            f"{', '.join(level_names)} (strides {', '.join(map(str, spec.strides))})."
        )
    return replace(spec, levels=tuple(level for level, name in enumerate(level_names) if name in names))


def with_classes(
    spec: CacheSpec, data: DetectionData, teacher_classes: Sequence[str] | None, whose: str
) -> tuple[CacheSpec, DetectionData]:
    """The specification of a teacher with the classes of a data set, and the data set with the teacher's labels.

    Args:
        spec: As `prepare_teacher` gives it.
        data: The data set.
        teacher_classes: Names of the teacher's classes; None where its checkpoint names none.
        whose: The teacher's, for messages, e.g. `the teacher x.pth`.

    Raises:
        KdpipeError: The teacher knows other classes.
    """
    if teacher_classes is not None:
        data = match_classes(data, teacher_classes, whose)
    if spec.num_classes != len(data.class_names):
        raise TeacherError(
            f"The teacher knows {spec.num_classes} classes and {data.ann_file} has {len(data.class_names)} "
            f"({', '.join(data.class_names[:8])}). Cache it on a data set with the classes that it was trained on."
        )
    return replace(spec, class_names=data.class_names, category_ids=data.category_ids), data


def _ask_once(teacher: Teacher, spec: CacheSpec) -> None:
    """Refuse a teacher whose answers do not fit what a cache of it would hold.

    Raises:
        KdpipeError: It cannot answer, or with other shapes, or with numbers that are not finite.
    """
    width, height = _TRIAL_SIZE
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    box = np.array([[8, 8, 48, 40]], dtype=np.float32)
    scale = min(_TRIAL_SIZE, spec.scale, key=max)  # a Pad of its pipeline may have no room for more
    small = replace(spec, scale=scale, dtype="float32")
    try:
        record = teacher.record(noise, box, spec=small, image_id=0, file_name=TRIAL, view=spec.views[0])
    except (KdpipeError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of whatever layers its config puts together
        raise TeacherError(
            f"The teacher cannot answer ({type(error).__name__}): {str(error).strip()}\n"
            f"It was asked about {TRIAL}. Do the layers of its config fit each other (channels, levels, "
            "strides)? kdpipe --debug shows where it happened."
        ) from error
    encode_record(record, small)


def digest_model(cfg: Config) -> str:
    """Identity of what a config says of the model beyond its weights, such as how it normalises images."""
    model = {name: value for name, value in cfg.model.to_dict().items() if name != "train_cfg"}
    return digest_json(json.dumps(model, sort_keys=True, default=str))
