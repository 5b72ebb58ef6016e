"""`kdpipe evaluate`: the AP of a checkpoint, as COCO and Pascal VOC measure it."""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.commands.options import EvaluateOptions
from kdpipe.pipelines.data.checked_dataset import CheckedDataset
from kdpipe.pipelines.data.class_matching import in_file_order, in_file_order_text, match_classes, telling_images
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.find import DataSource
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.data.picture_checks import usable_images
from kdpipe.pipelines.data.report import report_data
from kdpipe.pipelines.data.voc_ap import VOC_IOUS, VOC_MODES, voc_name
from kdpipe.pipelines.detectors.building import building
from kdpipe.pipelines.detectors.checkpoints import Checkpoint, class_names, load_checkpoint, load_strict
from kdpipe.pipelines.detectors.configs import config_from_checkpoint, find_config, set_num_classes
from kdpipe.pipelines.detectors.mmdet2 import dataset_paths, kept_ratio_scale, test_steps
from kdpipe.pipelines.runtime.console import silent_stdout
from kdpipe.pipelines.training.config import set_validation
from kdpipe.pipelines.training.loading import complete_images
from kdpipe.pipelines.training.progress import AP_NAMES, VOC_PREFIX, ProgressHook, ap_metrics, ap_text
from kdpipe.pipelines.training.reading import pipeline_decoding
from kdpipe.pipelines.training.runner import QuietRunner
from kdpipe.pipelines.training.voc_metric import with_voc_metric

__all__ = ["evaluate", "load_detector", "metrics_tables"]

# Classes are numbered as in the file if AP of so many images is so much above that by name.
_IMAGES, _LEAST_LEAD = 8, 0.05
_TITLES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")  # of AP_NAMES


def evaluate(options: EvaluateOptions, console: Console, *, outfile_prefix: Path | None = None) -> dict[str, float]:
    """AP of a checkpoint, by mmengine's Runner: COCO's by pycocotools, and Pascal VOC's where the images are of there.

    Args:
        options: What is measured, and how.
        console: Where progress is shown.
        outfile_prefix: Keep the detections as COCO has them, in a file of this name with `.bbox.json` behind it.

    Returns:
        As `ap_metrics` gives them.

    Raises:
        KdpipeError: Bad checkpoint, config or data.
    """
    checkpoint = load_checkpoint(options.ckpt, trust=options.trust)
    cfg = find_config(options.config) if options.config else config_from_checkpoint(checkpoint)
    if cfg is None:
        raise KdpipeError(f"{options.ckpt} carries no config. Name it: --config, a name of mmdet's zoo or a file.")
    data_of = options.data
    if data_of.voc is not None and data_of.split is None:
        raise KdpipeError("--voc needs --split here: which image set is AP measured on?")
    if data_of == DataOptions():
        paths = dataset_paths(cfg, "val")
        if paths is None or not paths[0].exists():
            raise KdpipeError(
                "Give --ann-file (or --bdd) and --img-dir, or --voc and --split: the config names no validation images "
                "that are here."
            )
        data_of = DataOptions(*paths)
    classes = class_names(checkpoint)
    model = None if classes is None else load_detector(cfg, checkpoint, len(classes))  # refused before data is read
    data = DataSource(data_of).load()
    order, whose = None if classes is None else in_file_order(data, classes), f"the checkpoint {options.ckpt.name}"
    if classes is not None:
        data = match_classes(data, classes, whose)
    report_data(data, console, trained=False, strict=options.strict_data)
    skip = options.skip_bad_images and not options.strict_data
    decoding = pipeline_decoding(test_steps(cfg))
    data = usable_images(data, console, scale=kept_ratio_scale(cfg, options.scale), decoding=decoding, skip=skip)
    if model is None:
        model = load_detector(cfg, checkpoint, len(data.class_names))
    if order is not None:
        data = _as_meant(
            data, order, partial(_test, model, cfg, options), f"the checkpoint {options.ckpt.name}", console
        )
    return ap_metrics(_test(model, cfg, options, data, ProgressHook(console, "evaluate"), outfile_prefix))


def _as_meant(
    data: DetectionData,
    order: Sequence[str],
    test: Callable[[DetectionData], Mapping[str, float]],
    whose: str,
    console: Console,
) -> DetectionData:
    """A data set whose classes are matched with a checkpoint's by name; or as the file numbers them, if it means that.

    Args:
        data: The data set, matched by name.
        order: The checkpoint's classes in the order of the file.
        test: Gives the metrics of mmdet on images.
        whose: The checkpoint's, for messages.
        console: Where it is said.
    """
    by_file = match_classes(data, order, whose)
    few = telling_images((data, by_file), _IMAGES)
    if not few:
        return data
    named, filed = (ap_metrics(test(each.only(few)))["bbox_mAP"] for each in (data, by_file))
    if filed < named + _LEAST_LEAD:
        return data
    text = f"{in_file_order_text(order, data, whose)}: AP of {len(few)} images is {filed:.3f} so, {named:.3f} by names."
    console.print(text, markup=False, highlight=False)
    return by_file


def _test(
    model: Any,
    cfg: Config,
    options: EvaluateOptions,
    data: DetectionData,
    progress: ProgressHook | None = None,
    outfile_prefix: Path | None = None,
) -> dict[str, float]:
    """Metrics of a detector, as mmdet names them.

    Args:
        model: The detector.
        cfg: Its config.
        options: What is measured, and how.
        data: Images and annotations.
        progress: Shows how far it is, and is closed; None shows nothing.
        outfile_prefix: As of `evaluate`.
    """
    cfg = copy.deepcopy(cfg)
    loader = {"num_workers": 0, "pin_memory": torch.cuda.is_available()}
    with tempfile.TemporaryDirectory() as folder, silent_stdout():
        data = data.copied_to(Path(folder) / "annotations.json")
        data.write_copy()
        if cfg.get("test_dataloader"):  # what teachers are cached with; the one for validation may be another
            cfg.val_dataloader = cfg.test_dataloader
        set_validation(cfg, data, options.scale, options.batch_size, loader)
        if outfile_prefix is not None:
            cfg.test_evaluator.outfile_prefix = str(outfile_prefix)
        complete_images(cfg.test_dataloader)
        cfg.test_dataloader.dataset = {"type": CheckedDataset.__name__, "dataset": cfg.test_dataloader.dataset}
        runner = QuietRunner(
            model=model,
            work_dir=folder,
            test_dataloader=cfg.test_dataloader,
            test_evaluator=with_voc_metric(cfg.test_evaluator, data),
            test_cfg=cfg.test_cfg,
            default_scope="mmdet",
            experiment_name="evaluate",
        )
        if progress is not None:
            runner.register_hook(progress)
        try:
            metrics: dict[str, float] = runner.test()
        finally:
            if progress is not None:
                progress.close()
    return metrics


def load_detector(cfg: Config, checkpoint: Checkpoint, num_classes: int) -> Any:
    """A detector with its weights.

    Args:
        cfg: mmdet config; its number of classes is set.
        checkpoint: With the weights.
        num_classes: Of the detector.

    Raises:
        KdpipeError: It cannot be built, or the weights are not its.
    """
    register_all_modules(init_default_scope=True)
    set_num_classes(cfg.model, num_classes)
    with building("The detector"):
        model = MODELS.build(cfg.model)
    load_strict(model, checkpoint.state_dict, path=checkpoint.path)
    return model


def metrics_tables(metrics: Mapping[str, float]) -> list[Table]:
    """COCO's AP over IoU and over object sizes; and Pascal VOC's, where it was measured."""
    table = Table(*_TITLES)
    table.add_row(*(ap_text(metrics[name]) for name in AP_NAMES))
    if VOC_PREFIX + voc_name(VOC_IOUS[0], VOC_MODES[0]) not in metrics:
        return [table]
    voc = Table("Pascal VOC", *(f"AP@{iou}" for iou in VOC_IOUS))
    for mode, title in zip(VOC_MODES, ("11-point (VOC2007)", "area (VOC2010 and later)"), strict=True):
        voc.add_row(title, *(f"{metrics[VOC_PREFIX + voc_name(iou, mode)]:.3f}" for iou in VOC_IOUS))
    return [table, voc]
