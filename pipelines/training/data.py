"""The training data of a config: wrappers, filter, sampler and pipeline, around the images that kdpipe trains on."""

import copy
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from mmdet.datasets import MultiImageMixDataset
from mmdet.datasets.samplers import GroupMultiSourceSampler, MultiSourceSampler, TrackImgSampler
from mmdet.registry import DATA_SAMPLERS, DATASETS
from mmengine.config import Config
from mmengine.dataset import ClassBalancedDataset, ConcatDataset, InfiniteSampler, RepeatDataset

from kdpipe.cache.errors import present
from kdpipe.pipelines.data.coco_entries import DataError
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.detectors.config_types import resolve_type, type_name
from kdpipe.pipelines.detectors.mmdet2 import dictionaries
from kdpipe.pipelines.training.transforms import set_scale

__all__ = [
    "annotation_copy",
    "coco_dataset",
    "dataset_kinds",
    "dropped_keys",
    "innermost",
    "left_out_by",
    "pipeline_of",
    "training_dataset",
    "training_samplers",
    "with_filter",
]

_REPEATING = (RepeatDataset, ClassBalancedDataset)
_OF_OTHER_BATCHES = (MultiSourceSampler, GroupMultiSourceSampler, TrackImgSampler)
_FILTER = {"filter_empty_gt": True, "min_size": 0}
# What is said of one data set, and stays true of another.
_KEPT = ("filter_cfg", "indices", "max_refetch", "serialize_data", "return_classes")
# What is replaced by the images and annotations of the command, or by how it reads them.
_REPLACED = (
    *("type", "ann_file", "data_root", "data_prefix", "img_prefix", "sub_data_root", "metainfo", "pipeline"),
    *("test_mode", "lazy_init", "backend_args", "file_client_args", "_scope_"),
)


def annotation_copy(data: DetectionData) -> Path:
    """The file that mmdet and pycocotools are handed, never the user's own."""
    return present(data.coco_file, f"the place of the copy of {data.ann_file}").resolve()


def coco_dataset(data: DetectionData) -> dict[str, Any]:
    """Config of mmdet's data set for some images."""
    return {
        "type": "CocoDataset",
        "ann_file": str(annotation_copy(data)),
        "data_prefix": {"img": f"{data.img_dir.resolve()}/"},
        "metainfo": {"classes": data.class_names},
    }


def training_dataset(
    cfg: Config, data: DetectionData, scale: tuple[int, int] | None, ratio_range: tuple[float, float] | None
) -> dict[str, Any]:
    """The training data set of a config, with other images.

    Data sets that repeat images or mix them stay, as do the pipelines, and what filters images.

    Args:
        cfg: Of either a bare data set or a wrapped one; several that are read alike count as one.
        data: The images.
        scale: `(w, h)` that replaces the resizing; None keeps it.
        ratio_range: As `set_scale` takes it.

    Raises:
        DataError: The config has no training pipeline, or its data set is of a kind that is not kept.
    """
    dataset = (cfg.get("train_dataloader") or {}).get("dataset") or {}
    return _with_images(dataset, data, scale, ratio_range)


def _with_images(
    dataset: Mapping[str, Any],
    data: DetectionData,
    scale: tuple[int, int] | None,
    ratio_range: tuple[float, float] | None,
) -> dict[str, Any]:
    kind = _kind(dataset)
    if _is(kind, ConcatDataset):
        return _with_images(_only_one(dataset), data, scale, ratio_range)
    if _is(kind, MultiImageMixDataset):
        result = copy.deepcopy(dict(dataset))
        if scale is not None and any(type_name(step["type"]).endswith("Resize") for step in result["pipeline"]):
            result["pipeline"], scale = set_scale(result["pipeline"], scale, ratio_range), None
        return {**result, "dataset": _with_images(dataset["dataset"], data, scale, ratio_range)}
    if _is(kind, *_REPEATING):
        return {**copy.deepcopy(dict(dataset)), "dataset": _with_images(dataset["dataset"], data, scale, ratio_range)}
    if "dataset" in dataset or "datasets" in dataset:
        raise DataError(
            f"The config's training data set is a {type_name(dataset.get('type'))} around others, which kdpipe cannot "
            "put other images into. Kept are RepeatDataset, ClassBalancedDataset and MultiImageMixDataset; name one "
            "data set at train_dataloader.dataset of the config."
        )
    pipeline = pipeline_of(dataset, "train_dataloader.dataset.pipeline")
    if scale is not None:
        pipeline = set_scale(pipeline, scale, ratio_range)
    options = {key: copy.deepcopy(dataset[key]) for key in _KEPT if key in dataset}
    options.setdefault("filter_cfg", dict(_FILTER))
    return {**coco_dataset(data), **options, "pipeline": pipeline}


def _only_one(dataset: Mapping[str, Any]) -> Mapping[str, Any]:
    """One of several data sets that differ in their images only."""
    first, *others = dataset["datasets"]

    def reading(each: Mapping[str, Any]) -> dict[str, Any]:
        return {key: each.get(key) for key in ("type", "pipeline", "dataset", "times", *_KEPT)}

    if any(reading(each) != reading(first) for each in others):
        raise DataError(
            f"The config trains on {len(others) + 1} data sets at once (ConcatDataset), which read their images "
            "differently; kdpipe trains on the images of one annotation file. Merge the annotation files, and name one "
            "data set, with one pipeline, at train_dataloader.dataset of the config."
        )
    return first  # type: ignore[no-any-return]


def dataset_kinds(dataset: Mapping[str, Any]) -> list[str]:
    """The types of a data set of a config and of those inside it, from the outside in; of several, of the first."""
    kinds = []
    while dataset:
        inner = dataset.get("dataset") or dataset.get("datasets") or {}
        kinds.append(type_name(dataset.get("type", "no data set")))
        if isinstance(inner, list | tuple):
            kinds[-1] += f" of {len(inner)}"
            inner = inner[0]
        dataset = inner
    return kinds


def dropped_keys(dataset: Mapping[str, Any]) -> list[str]:
    """What a data set of a config says of itself that is not said of other images."""
    return [key for key, value in _read_from(dataset).items() if key not in (*_KEPT, *_REPLACED) and value is not None]


def _kind(dataset: Mapping[str, Any]) -> Any:
    return resolve_type(dataset.get("type"), DATASETS)


def _is(kind: Any, *classes: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, classes)


def with_filter(config: Config) -> Config:
    """A copy of a config whose training data set says which images are left out, as kdpipe does where it does not."""
    config = copy.deepcopy(config)
    for dataset in dictionaries((config.get("train_dataloader") or {}).get("dataset")):
        if "pipeline" in dataset and not _inner(dataset):
            dataset.setdefault("filter_cfg", dict(_FILTER))
    return config


def left_out_by(config: Config) -> dict[str, Any]:
    """Which images the training data set of a config leaves out, as mmdet's `filter_cfg`."""
    dataset = (config.get("train_dataloader") or {}).get("dataset") or {}
    filter_cfg = _read_from(dataset).get("filter_cfg", _FILTER) or {}
    return {"filter_empty_gt": filter_cfg.get("filter_empty_gt", False), "min_size": filter_cfg.get("min_size", 0)}


def _inner(dataset: Mapping[str, Any]) -> Any:
    """The data set inside one, or the first of several; None where there is none."""
    inner = dataset.get("dataset") or dataset.get("datasets")
    return inner[0] if isinstance(inner, list | tuple) else inner


def _read_from(dataset: Mapping[str, Any]) -> Mapping[str, Any]:
    """The data set that reads images: the one inside all wrappers, of several the first."""
    while inner := _inner(dataset):
        dataset = inner
    return dataset


def pipeline_of(dataset: Mapping[str, Any], place: str) -> list[Any]:
    """The pipeline of a data set that reads images, or of the one inside it.

    Raises:
        DataError: There is none.
    """
    dataset = _read_from(dataset)
    if "pipeline" not in dataset:
        raise DataError(
            f"The config has no pipeline at {place}. Expected an mmdet 3.x detector config; name or start from one of "
            "mmdet's own, such as faster-rcnn_r50_fpn_1x_coco."
        )
    return list(dataset["pipeline"])


def innermost(dataset: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The data set inside those that repeat images, whose pipeline sees one image after the other.

    Raises:
        DataError: Images are mixed with others.
    """
    while "dataset" in dataset:
        if _is(_kind(dataset), MultiImageMixDataset):
            names = ", ".join(type_name(step["type"]) for step in dataset["pipeline"])
            raise DataError(
                f"The config's training data set is a MultiImageMixDataset, which mixes several images into one "
                f"({names}); cached targets belong to one image. Name its inner data set at train_dataloader.dataset "
                "of the student's config, with a pipeline that changes each image by itself."
            )
        dataset = dataset["dataset"]
    return dataset


def training_samplers(cfg: Config) -> dict[str, Any]:
    """`sampler` and `batch_sampler` of the training loader.

    The config's are kept, but a sampler without end: that one belongs to a schedule that counts steps.

    Raises:
        DataError: The sampler picks images out of several data sets, or out of videos.
    """
    loader = cfg.get("train_dataloader") or {}
    sampler = copy.deepcopy(loader.get("sampler") or {"type": "DefaultSampler", "shuffle": True})
    kind = resolve_type(sampler["type"], DATA_SAMPLERS)
    if _is(kind, *_OF_OTHER_BATCHES):
        raise DataError(
            f"The config's sampler is {type_name(sampler['type'])}, which picks images out of several data sets or out "
            "of videos. Leave it out of the config, or replace it: "
            "-o train_dataloader.sampler=\"{'type': 'DefaultSampler', 'shuffle': True}\""
        )
    if _is(kind, InfiniteSampler):
        sampler = {"type": "DefaultSampler", "shuffle": sampler.get("shuffle", True)}
    batches = copy.deepcopy(loader.get("batch_sampler", {"type": "AspectRatioBatchSampler"}))
    if batches is None:
        return {"sampler": sampler, "batch_sampler": None, "drop_last": loader.get("drop_last", False)}
    if "drop_last" in loader:
        batches.setdefault("drop_last", loader["drop_last"])
    return {"sampler": sampler, "batch_sampler": batches}
