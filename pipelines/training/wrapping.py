"""What kdpipe puts around the parts of a training config: targets beside images, losses around the detector, seeds."""

import copy
from collections.abc import Sequence

import torch
from mmengine.config import Config, ConfigDict

from kdpipe.cache.store.location import Location
from kdpipe.distill.detector import DistilledDetector
from kdpipe.distill.methods import LOSSES
from kdpipe.pipelines.data.checked_dataset import CheckedDataset
from kdpipe.pipelines.training.distill_options import ckd_queue_size
from kdpipe.pipelines.training.loading import complete_images
from kdpipe.pipelines.training.parcel import pack_batch
from kdpipe.pipelines.training.seeding import EpochSampler, SeededDataset, SeedStepHook
from kdpipe.pipelines.training.student_check import check_hooks
from kdpipe.pipelines.training.teachers import TrainingTeacher, training_pipelines
from kdpipe.pipelines.training.transform_types import check_named
from kdpipe.pipelines.training.workers import init_worker

__all__ = ["with_distillation", "with_seeds"]


def with_distillation(
    cfg: Config,
    teacher: TrainingTeacher,
    methods: Sequence[str],
    losses: Sequence[str],
    distill: ConfigDict,
    roi_source: str | None,
    missing_view: str,
    student_strides: Sequence[int] | None = None,
) -> Config:
    """A copy of a training config with the losses around its detector.

    Where the losses need what a cache holds of each image, its pipeline reads that.

    Args:
        cfg: As `training_config` gives it.
        teacher: Where targets come from.
        methods: Some of `METHODS`.
        losses: What these are for this student.
        distill: As `distill_options` gives them.
        roi_source: `teacher` or `student`: who chooses the RoIs; None where there are no losses.
        missing_view: `mirror` or `skip`, for flipped images whose flipped view is not cached.
        student_strides: Of the student's pyramid; None where these are not known.

    Raises:
        KdpipeError: Hooks or transforms of the config that the targets cannot follow.
    """
    check_hooks(cfg)
    cfg = copy.deepcopy(cfg)
    check_named(distill.transforms, training_pipelines(cfg))
    if roi_source is not None:
        sampling = {"roi_source": roi_source, "roi_sampling": distill.rois}
        targets = {"methods": list(losses), **sampling, "missing_view": missing_view}
        if student_strides is not None and any(LOSSES[loss].of_maps for loss in losses):
            targets["student_strides"] = list(student_strides)
        teacher.prepare_pipelines(cfg, targets, distill)
    size = distill.ckd.queue_size or ckd_queue_size(cfg, roi_source, distill.rois.num)
    cfg.model = {
        "type": DistilledDetector.__name__,
        "student": cfg.model,
        "spec": teacher.spec.to_json(),
        "methods": list(methods),
        "teacher": teacher.source(losses, roi_source, distill),
        "weights": distill.weights,
        "sgfi": distill.sgfi,
        "ckd": {**distill.ckd, "queue_size": size},
        "roi_sampling": distill.rois,
        "share_interval": distill.share_interval,
        "stagewise": distill.stagewise,
    }
    return cfg


def with_seeds(cfg: Config, cache: Location | None = None) -> Config:
    """A copy of a training config in which every random choice is a function of seed, epoch and image.

    Loader workers end with the training, and JPEGs that lack their last bytes are read. Nothing of this is in the
    recorded config, which stock mmdet reads without kdpipe.

    Args:
        cfg: As `training_config` gives it, or `with_distillation`.
        cache: Compare each image with the one that this cache was made from.
    """
    cfg = copy.deepcopy(cfg)
    cfg.train_dataloader.dataset = {
        "type": SeededDataset.__name__,
        "dataset": cfg.train_dataloader.dataset,
        "seed": cfg.randomness.seed,
        "cache": cache and cache.address,
    }
    cfg.train_dataloader.sampler = {"type": EpochSampler.__name__, "sampler": cfg.train_dataloader.sampler}
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), {"type": SeedStepHook.__name__}]
    for part in (cfg.train_dataloader, cfg.val_dataloader, cfg.custom_hooks):
        complete_images(part)
    if cfg.val_dataloader is not None:
        cfg.val_dataloader.dataset = {"type": CheckedDataset.__name__, "dataset": cfg.val_dataloader.dataset}
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        if loader is not None:
            loader.worker_init_fn = {"type": init_worker.__name__}
            if loader.num_workers:
                pin = bool(loader.get("pin_memory")) and torch.cuda.is_available()
                loader.collate_fn = {"type": pack_batch.__name__, "pin": pin}
    return cfg
