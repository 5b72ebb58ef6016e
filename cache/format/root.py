"""The root of a cache: specification, identity and plan, written once and before anything else."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdpipe.cache.format.layout import array_layout
from kdpipe.cache.identity import digest_json
from kdpipe.cache.plan import MAX_PART_IMAGES, ImageInfo, digest_images
from kdpipe.cache.spec import CacheSpec

# Key of the plan's arrays, `image_ids` and `part_starts`.
PLAN = "plan"
PLAN_LAYOUT = array_layout("", (), "int64", "zstd", 1 << 16)


@dataclass(frozen=True)
class Root:
    """What the root of a cache says.

    Attributes:
        spec: what is stored.
        identity: of teacher, data and options, as given by the writer's caller.
        metadata: free-form, as given by the writer's caller.
        plan: number of images and parts, part size, digest of the images.
        image_ids: [N] int64, of all images in the order of the plan.
        part_starts: [P + 1] int64; part p has the images [part_starts[p], part_starts[p + 1]).
    """

    spec: CacheSpec
    identity: dict[str, Any]
    metadata: dict[str, Any]
    plan: dict[str, Any]
    image_ids: npt.NDArray[np.int64]
    part_starts: npt.NDArray[np.int64]

    @property
    def parts(self) -> list[range]:
        """Indices into `image_ids` of each part."""
        starts = self.part_starts.tolist()
        return [range(start, stop) for start, stop in itertools.pairwise(starts)]

    @property
    def digest(self) -> str:
        """Says of parts and head which cache they were made for: `digest_root`."""
        return digest_root(self.spec, self.identity, self.plan)


def digest_root(spec: CacheSpec, identity: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """sha256 of all that decides the content of a cache.

    Args:
        spec: what is stored.
        identity: what the targets depend on, as JSON values.
        plan: as `describe_plan` gives it.
    """
    return digest_json({"spec": spec.to_json(), "identity": identity, "plan": plan})


def starts_fault(part_starts: npt.NDArray[np.int64], images: int) -> str | None:
    """What is wrong with where the parts of so many images start; None where nothing is."""
    if part_starts[0] != 0 or part_starts[-1] != images:
        return f"the parts should have the images 0 to {images}, found {part_starts[0]} to {part_starts[-1]}"
    if (part_starts < 0).any() or (part_starts > images).any():
        return "a part has images that there are not"
    sizes = np.diff(part_starts)
    if (sizes < 1).any() or (sizes > MAX_PART_IMAGES).any():
        return f"a part has no image, or more than {MAX_PART_IMAGES}"
    return None


def describe_plan(images: Sequence[ImageInfo], parts: Sequence[range], part_size: int) -> dict[str, Any]:
    """The plan as JSON values, as far as two plans are compared.

    Args:
        images: all images of the data set.
        parts: positions in `images` of those of each part.
        part_size: raw bytes per part.
    """
    return {"images": len(images), "parts": len(parts), "part_size": part_size, "digest": digest_images(images)}
