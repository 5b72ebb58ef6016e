"""How many bytes a cache will take on disk, judged by a few of its images."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from zarr.storage import MemoryStore

from kdpipe.cache.format.layout import ArrayLayout, Block, part_layout
from kdpipe.cache.format.zarr_arrays import WrittenFiles
from kdpipe.cache.plan import ImageInfo, level_shapes, raw_bytes
from kdpipe.cache.records import TeacherRecord
from kdpipe.cache.spec import FIELD_OF_ARRAY, CacheSpec
from kdpipe.cache.views import input_size
from kdpipe.cache.write.arrays import write_array
from kdpipe.cache.write.encode import encode_record


def disk_bytes(records: Sequence[TeacherRecord], images: Sequence[ImageInfo], spec: CacheSpec) -> dict[str, int]:
    """Bytes on disk of each field, index and metadata left out.

    How many elements the pyramids have is known of all images, but for what a teacher pads beyond a multiple of 32,
    which is taken from the sampled ones (`padding`); of boxes and what belongs to them, the images are taken to have as
    many as the sampled ones have on average.

    Args:
        records: what the teacher said of some of the images, in one view.
        images: that are to be cached.
        spec: of the cache. Of proposals and jittered boxes that are more than it takes, the first count.

    Raises:
        CacheError: a record does not fit the specification.
    """
    blocks: dict[str, list[Block]] = {}
    for record in records:
        encoded = encode_record(as_stored(record, spec), spec)
        for name, values in encoded.rows.items():
            blocks.setdefault(name, []).append(values)
        if encoded.features is not None:
            blocks.setdefault("features", []).append(encoded.features)
        if encoded.scale is not None:
            blocks.setdefault("scale", []).append(encoded.scale[None])
    raw, stored, layout = Counter[str](), Counter[str](), part_layout(spec)
    for name, field_blocks in blocks.items():
        values, field = np.concatenate(field_blocks), FIELD_OF_ARRAY.get(name, name)
        raw[field] += values.nbytes
        stored[field] += stored_bytes(values, layout[name])
    of_images = len(images) * len(spec.views) / len(records)
    sizes = {field: round(stored[field] * of_images) for field in spec.fields}
    if "features" in sizes:
        planned = raw_bytes(images, spec)["features"] * padding(records, spec)
        sizes["features"] = round(planned * stored["features"] / raw["features"])
    return sizes


def padding(records: Sequence[TeacherRecord], spec: CacheSpec) -> float:
    """How many times as large pyramids are as those of network inputs that are padded to a multiple of 32.

    Args:
        records: what the teacher said of some images.
        spec: of the cache.
    """
    sizes = [input_size(record.original_size, spec.scale) for record in records]
    planned = [_elements(level_shapes(size, spec.strides), spec) for size in sizes]
    found = [_elements([level.shape[-2:] for level in record.features or ()], spec) for record in records]
    return sum(found) / sum(planned) if sum(planned) else 1.0


def _elements(shapes: Sequence[Sequence[int]], spec: CacheSpec) -> int:
    return sum(spec.stored_elements(level, height * width) for level, (height, width) in enumerate(shapes))


def as_stored(record: TeacherRecord, spec: CacheSpec) -> TeacherRecord:
    """A record without the proposals and jittered boxes that are more than a cache takes; the first ones stay."""
    proposals, jittered = min(record.num_proposals, spec.proposals), min(record.num_jittered, spec.jittered)
    counts = record.num_proposals, record.num_jittered, record.num_gt
    every = torch.arange(len(record.boxes)).split(counts)
    rows = torch.cat([every[0][:proposals], every[1][:jittered], every[2]])

    def of(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows.to(values.device)]

    return replace(
        record,
        num_proposals=proposals,
        num_jittered=jittered,
        boxes=record.boxes[rows.to(record.boxes.device)],
        logits=of(record.logits),
        deltas=of(record.deltas),
        embeddings=of(record.embeddings),
        roi_features=of(record.roi_features),
    )


def stored_bytes(values: Block, layout: ArrayLayout) -> int:
    """Bytes on disk of an array, its metadata left out."""
    files = WrittenFiles(MemoryStore())
    write_array(files, "x", layout, values)
    return sum(size for file, (size, _) in files.files.items() if not file.endswith("zarr.json"))
