"""How many bytes a cache will take on disk, judged by a few of its images."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from kdpipe.cache.codecs import Block, encode_chunk
from kdpipe.cache.plan import ImageInfo, raw_bytes
from kdpipe.cache.records import TeacherRecord
from kdpipe.cache.spec import FIELD_OF_ARRAY, CacheSpec
from kdpipe.cache.write.encode import encode_record
from kdpipe.cache.write.part_writer import array_layout


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
    layout = array_layout(spec)
    for name, blocks in arrays.items():
        values, rows = np.concatenate(blocks), layout[name][2]
        field = FIELD_OF_ARRAY.get(name, name)
        raw[field] += values.nbytes
        stored[field] += sum(
            len(encode_chunk(values[start : start + rows], spec.codec)[0]) for start in range(0, len(values), rows)
        )
    return {field: stored[field] / raw[field] if raw[field] else 1.0 for field in spec.fields}


def disk_bytes(images: Sequence[ImageInfo], spec: CacheSpec, ratios: Mapping[str, float]) -> dict[str, int]:
    """Bytes on disk of each field, index and metadata left out.

    Args:
        images: that are to be cached.
        spec: of the cache.
        ratios: by field, as `compression` gives them.
    """
    return {field: round(size * ratios[field]) for field, size in raw_bytes(images, spec).items()}
