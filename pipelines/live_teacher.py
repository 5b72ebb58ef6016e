"""Online distillation: a teacher that looks at every batch while a student trains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from torch import Tensor

from kdpipe.cache.fingerprint import digest_tensors
from kdpipe.cache.schema import CacheSpec
from kdpipe.distill.teacher_head import TeacherHead, TeacherHeadError
from kdpipe.distill.teacher_view import TeacherView
from kdpipe.pipelines.cache_teacher import CacheOptions, prepare_teacher
from kdpipe.pipelines.checkpoints import load_checkpoint
from kdpipe.pipelines.datasets import DetectionData
from kdpipe.pipelines.sources import find_data, named_val
from kdpipe.pipelines.teacher import Teacher, load_teacher, teacher_config

__all__ = ["LiveTeacher", "OnlineTeacher", "build_live_teacher", "online_teacher"]


class LiveTeacher:
    """A teacher source that runs backbone and neck on the images of each batch, in the view that the student sees.

    One image at a time and in full precision, as for a cache: padding to a common size would leak into the features.

    Args:
        teacher: The teacher.
        spec: What it is.
    """

    def __init__(self, teacher: Teacher, spec: CacheSpec) -> None:
        self.teacher = teacher
        self.spec = spec

    def head_state(self) -> Mapping[str, Tensor]:
        return self.teacher.head_state()

    @torch.no_grad()
    def targets(self, data: Mapping[str, Any], device: torch.device) -> Sequence[TeacherView]:
        self.teacher.to(device)
        views = []
        with torch.autocast(device.type, enabled=False):
            for image in data["inputs"]:
                pyramid, _ = self.teacher.see(image)
                levels = tuple(level[0] for level in pyramid[: self.spec.roi_levels])
                views.append(TeacherView("exact", np.eye(3), levels))
        return views


def build_live_teacher(
    ckpt: str, spec: Mapping[str, Any], config: str | None = None, trust: bool = False
) -> LiveTeacher:
    """A live teacher from its checkpoint.

    Args:
        ckpt: The checkpoint.
        spec: `CacheSpec.to_json()` of the teacher.
        config: Its config, a name of mmdet's zoo or a file; None takes the checkpoint's own.
        trust: Unpickle the checkpoint even where it holds more than weights.

    Raises:
        KdpipeError: It cannot be loaded.
    """
    checkpoint, known = load_checkpoint(Path(ckpt), trust=trust), CacheSpec.from_json(spec)
    cfg = teacher_config(checkpoint, config)
    with torch.random.fork_rng(devices=()):  # the student begins with the weights that it would have without a teacher
        teacher = load_teacher(checkpoint, cfg, proposals=known.proposals, device=torch.device("cpu"))
    return LiveTeacher(teacher, known)


MODELS.register_module(name=LiveTeacher.__name__, module=build_live_teacher)


@dataclass(frozen=True)
class OnlineTeacher:
    """What a training has to know of a teacher that it runs beside the student.

    Attributes:
        name: As messages call it.
        spec: What it is.
        identity: Digests of its weights, its config and the data.
        source: Config of its `LiveTeacher`.
    """

    name: str
    spec: CacheSpec
    identity: dict[str, Any]
    source: dict[str, Any]


def online_teacher(
    ckpt: Path, config: str | None, *, ann_file: Path | None, img_dir: Path | None, trust: bool
) -> tuple[OnlineTeacher, DetectionData, DetectionData | None]:
    """Load a teacher, and find the images to train on: those named, or those of the teacher's config.

    Args:
        ckpt: The checkpoint.
        config: Its config, a name of mmdet's zoo or a file; None takes the checkpoint's own.
        ann_file: COCO JSON of the training images.
        img_dir: Their folder.
        trust: Unpickle the checkpoint even where it holds more than weights.

    Returns:
        The teacher, the training images, and the validation images that its config names.

    Raises:
        KdpipeError: It cannot be loaded, there is no data, or it knows other classes.
    """
    checkpoint = load_checkpoint(ckpt, trust=trust)
    cfg = teacher_config(checkpoint, config)
    found = find_data(cfg, ann_file=ann_file, img_dir=img_dir, voc=None, split="", out=None, limit=None)
    options = CacheOptions(dtype="float32", codec="none")
    teacher, spec = prepare_teacher(checkpoint, cfg, found.data, options, torch.device("cpu"))
    _check_head(teacher, spec)
    weights = digest_tensors(teacher.model.state_dict())
    source = {"ckpt": str(ckpt.resolve()), "spec": spec.to_json(), "config": config, "trust": trust}
    online = OnlineTeacher(
        name=f"the teacher {ckpt}",
        spec=spec,
        identity={"teacher": {"weights": weights}, "data": found.data.digest()},
        source={"type": LiveTeacher.__name__, **source},
    )
    return online, found.data, None if ann_file else named_val(found.val)


@torch.no_grad()
def _check_head(teacher: Teacher, spec: CacheSpec) -> None:
    """Make sure that the head which answers for the student's RoIs says what the teacher's says.

    Raises:
        TeacherHeadError: It has layers that are not known, or says something else.
    """
    features = torch.rand(4, spec.channels, spec.roi_size, spec.roi_size, generator=torch.Generator().manual_seed(0))
    wanted, _ = teacher.model.roi_head.bbox_head(features)
    try:
        found = TeacherHead(teacher.head_state(), spec)(features).logits
        if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3):
            raise TeacherHeadError("The teacher's box head does more than its fully connected layers.")
    except TeacherHeadError as error:
        raise TeacherHeadError(f"{error} Such a teacher can be cached, for --cache with --rois teacher.") from error
