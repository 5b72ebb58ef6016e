"""Makes the root of a cache."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from zarr.storage import LocalStore

from kdpipe.cache.format.record import write_record
from kdpipe.cache.format.root import PLAN, PLAN_LAYOUT, describe_plan
from kdpipe.cache.format.zarr_arrays import WrittenFiles
from kdpipe.cache.plan import ImageInfo
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.store.location import Location
from kdpipe.cache.write.arrays import write_array


def create_root(
    location: Location,
    spec: CacheSpec,
    images: Sequence[ImageInfo],
    parts: Sequence[range],
    part_size: int,
    identity: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> bool:
    """Make an empty cache where none is, in one atomic act.

    Args:
        location: of the cache.
        spec: what is stored.
        images: all images of the data set.
        parts: positions in `images` of those of each part.
        part_size: raw bytes per part.
        identity: what the targets depend on, as JSON values.
        metadata: what else is recorded, as JSON values.

    Returns:
        False where another process was first.
    """
    content = {
        **{"spec": spec.to_json(), "identity": identity, "metadata": metadata},
        "plan": describe_plan(images, parts, part_size),
    }
    with location.staging("") as folder:
        files = WrittenFiles(LocalStore(folder / PLAN / "new"))
        ids = np.array([image.image_id for image in images], dtype=np.int64)
        write_array(files, "image_ids", PLAN_LAYOUT, ids)
        write_array(files, "part_starts", PLAN_LAYOUT, np.array([0, *(part.stop for part in parts)], dtype=np.int64))
        write_record(folder, content, files.files, within=PLAN)
        return location.publish(folder, "")
