"""What the teacher said, on disk."""

from kdpipe.cache.errors import CacheError, KdpipeError
from kdpipe.cache.plan import ImageInfo, plan_parts, raw_bytes
from kdpipe.cache.reader import TeacherCache, open_cache
from kdpipe.cache.schema import CacheSpec
from kdpipe.cache.targets import TeacherRecord, TeacherTargets
from kdpipe.cache.writer import CacheWriter

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
