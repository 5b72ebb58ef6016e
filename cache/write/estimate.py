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
from kdpipe.cache.plan import ImageInfo, raw_bytes
from kdpipe.cache.records import TeacherRecord
from kdpipe.cache.spec import FIELD_OF_ARRAY, CacheSpec
from kdpipe.cache.write.arrays import write_array
from kdpipe.cache.write.encode import encode_record


def disk_bytes(records: Sequence[TeacherRecord], images: Sequence[ImageInfo], spec: CacheSpec) -> dict[str, int]:
    """Bytes on disk of each field, index and metadata left out.

    How many elements the pyramids have is known of all images; of boxes and what belongs to them, the images are taken
    to have as many as the sampled ones have on average.

    Args:
        records: what the teacher said of some of the images, in one view.
        images: that are to be cached.
        spec: of the cache. Of proposals that are more than it takes, the best count.

    Raises:
        CacheError: a record does not fit the specification.
    """
    blocks: dict[str, list[Block]] = {}
    for record in records:
        encoded = encode_record(best_proposals(record, spec.proposals), spec)
        for name, values in encoded.rows.items():
            blocks.setdefault(name, []).append(values)
        if encoded.features is not None:
            blocks.setdefault("features", []).append(encoded.features)
        if encoded.scale is not None:
            blocks.setdefault("scale", []).append(encoded.scale[None])
    raw, stored, layout = Counter[str](), Counter[str](), part_layout(spec)
    for name, found in blocks.items():
        values, field = np.concatenate(found), FIELD_OF_ARRAY.get(name, name)
        raw[field] += values.nbytes
        stored[field] += stored_bytes(values, layout[name])
    of_images = len(images) * len(spec.views) / len(records)
    sizes = {field: round(stored[field] * of_images) for field in spec.fields}
    if "features" in sizes:
        sizes["features"] = round(raw_bytes(images, spec)["features"] * stored["features"] / raw["features"])
    return sizes


def best_proposals(record: TeacherRecord, count: int) -> TeacherRecord:
    """A record without the proposals that follow the first so many, which are the best."""
    if record.num_proposals <= count:
        return record
    rows = torch.cat([torch.arange(count), torch.arange(record.num_proposals, len(record.boxes))])

    def of(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows.to(values.device)]

    return replace(
        record,
        num_proposals=count,
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
