"""What a cache records of the teacher and the data that it was made of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from kdpipe.cache.errors import CacheError
from kdpipe.cache.identity import difference
from kdpipe.cache.read.reader import TeacherCache
from kdpipe.pipelines.data.class_matching import match_classes
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.find import cached_source
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.detectors.configs import config_from_file, find_config
from kdpipe.pipelines.detectors.mmdet2 import for_inference

__all__ = ["recorded_config", "recorded_data", "recorded_entry", "recorded_path"]


def recorded_entry(values: Mapping[str, Any], *names: str) -> Any:
    """An entry of nested mappings, such as `recorded_entry(cache.metadata, "teacher", "config")`; None where absent."""
    entry: Any = values
    for name in names:
        entry = entry.get(name) if isinstance(entry, Mapping) else None
    return entry


def recorded_path(values: Mapping[str, Any], *names: str) -> Path | None:
    """The same of an entry that is a path."""
    entry = recorded_entry(values, *names)
    return Path(entry) if isinstance(entry, str) else None


def recorded_config(cache: TeacherCache, config: str | None, *, trust: bool = False) -> Config:
    """The teacher's config: the one named, or the one that the cache records, read without executing it.

    Args:
        cache: The cache.
        config: A name of mmdet's zoo or a file.
        trust: Let the recorded one name anything.

    Raises:
        CacheError: there is none.
        ConfigError: it cannot be read, or the recorded one is more than plain values, or names what is not known as
            harmless.
    """
    if config:
        return for_inference(find_config(config))
    text = recorded_entry(cache.metadata, "teacher", "config")
    if not isinstance(text, str):
        raise CacheError(f"The cache {cache.location} does not record its teacher's config. Name it: --config.")
    return for_inference(config_from_file(text, f"the config that the cache {cache.location} records", trust=trust))


def recorded_data(cache: TeacherCache, moved: DataOptions) -> DetectionData:
    """The images and annotations that a cache was made of.

    Args:
        cache: The cache.
        moved: Where these moved since.

    Raises:
        KdpipeError: They are not where the cache says, or not the same.
    """
    if not any(isinstance(recorded_entry(cache.metadata, "data", name), str) for name in ("ann_file", "voc", "bdd")):
        raise CacheError(
            f"The cache {cache.location} does not record what it was made of, and cannot be compared with it."
        )
    source = cached_source(cache, moved)
    data = match_classes(source.load(), cache.spec.class_names, f"the cache {cache.location.title}")
    if lines := difference({"data": recorded_entry(cache.identity, "data")}, {"data": data.digest()}):
        raise CacheError(
            f"{data.ann_file} is not what the cache {cache.location} was made of: {lines[0]} (digests of images, "
            "classes and boxes). Name the annotations that were cached: --ann-file or --bdd, or --voc and --split."
        )
    return data
