"""How many bytes a cache will take on disk, judged by a few of its images."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from zarr.storage import MemoryStore

from kdpipe.cache.format.layout import Block, part_layout
from kdpipe.cache.format.zarr_arrays import WrittenFiles
from kdpipe.cache.plan import ImageInfo, raw_bytes
from kdpipe.cache.records import TeacherRecord
from kdpipe.cache.spec import FIELD_OF_ARRAY, CacheSpec
from kdpipe.cache.write.arrays import write_array
from kdpipe.cache.write.encode import encode_record


def compression(records: Iterable[TeacherRecord], spec: CacheSpec) -> dict[str, float]:
    """Bytes on disk per raw byte of each field, scales of int8 included.

    Args:
        records: what the teacher said of some images.
        spec: of the cache.

    Raises:
        CacheError: a record does not fit the specification.
    """
    arrays: dict[str, list[Block]] = {}
    for record in records:
        encoded = encode_record(record, spec)
        found = dict(encoded.rows)
        if encoded.features is not None:
            found["features"] = encoded.features
        if encoded.scale is not None:
            found["scale"] = encoded.scale[None]
        for name, values in found.items():
            arrays.setdefault(name, []).append(values)
    raw, stored = Counter[str](), Counter[str]()
    layout = part_layout(spec)
    for name, blocks in arrays.items():
        values, files = np.concatenate(blocks), WrittenFiles(MemoryStore())
        write_array(files, name, layout[name], values)
        field = FIELD_OF_ARRAY.get(name, name)
        raw[field] += values.nbytes
        stored[field] += sum(size for file, (size, _) in files.files.items() if not file.endswith("zarr.json"))
    return {field: stored[field] / raw[field] if raw[field] else 1.0 for field in spec.fields}


def disk_bytes(images: Sequence[ImageInfo], spec: CacheSpec, ratios: Mapping[str, float]) -> dict[str, int]:
    """Bytes on disk of each field, index and metadata left out.

    Args:
        images: that are to be cached.
        spec: of the cache.
        ratios: by field, as `compression` gives them.
    """
    return {field: round(size * ratios[field]) for field, size in raw_bytes(images, spec).items()}
