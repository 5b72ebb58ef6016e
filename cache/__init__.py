"""What the teacher said, on disk."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdpipe.cache.errors import CacheError, KdpipeError
    from kdpipe.cache.plan import ImageInfo, plan_parts, raw_bytes
    from kdpipe.cache.read.reader import TeacherCache, open_cache
    from kdpipe.cache.records import TeacherRecord, TeacherTargets
    from kdpipe.cache.spec import CacheSpec
    from kdpipe.cache.write.writer import CacheWriter

__all__ = [
    "CacheError",
    "CacheSpec",
    "CacheWriter",
    "ImageInfo",
    "KdpipeError",
    "TeacherCache",
    "TeacherRecord",
    "TeacherTargets",
    "open_cache",
    "plan_parts",
    "raw_bytes",
]

_MODULES = {
    "errors": ("CacheError", "KdpipeError"),
    "plan": ("ImageInfo", "plan_parts", "raw_bytes"),
    "read.reader": ("TeacherCache", "open_cache"),
    "spec": ("CacheSpec",),
    "records": ("TeacherRecord", "TeacherTargets"),
    "write.writer": ("CacheWriter",),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: the command line needs some of them without torch and zarr."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"kdpipe.cache.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
