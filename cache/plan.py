"""Which image goes into which part, and how many bytes it takes, before anything runs. Pure functions."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdpipe.cache.errors import CacheError
from kdpipe.cache.identity import digest_json
from kdpipe.cache.spec import FIELD_OF_ARRAY, MAX_OBJECTS, CacheSpec
from kdpipe.cache.views import ViewError, input_size

# mmdet pads a network input to a multiple of this.
SIZE_DIVISOR = 32

# However small images are stored: a part is what is dealt to one process.
MAX_PART_IMAGES = 256


@dataclass(frozen=True)
class ImageInfo:
    """What the plan needs to know of an image.

    Attributes:
        image_id: id in the annotation file.
        file_name: path relative to the image folder.
        height: pixels.
        width: pixels.
        num_gt: number of usable ground-truth boxes.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    num_gt: int


def plan_parts(images: Sequence[ImageInfo], spec: CacheSpec, part_size: int) -> list[range]:
    """Divide the images, in their order, into parts of at most `part_size` raw bytes and 256 images.

    An image with all its views lies in one part; a part with a single image may be larger than `part_size`.

    Args:
        images: all images of the data set.
        spec: what is stored of each.
        part_size: bytes before compression.

    Returns:
        One range of indices into `images` per part; every index occurs once.

    Raises:
        CacheError: `part_size` is not positive, or an image id occurs twice.
    """
    if part_size <= 0:
        raise CacheError(f"The part size must be a positive number of bytes, found {part_size}.")
    ids, counts = np.unique(np.array([image.image_id for image in images], dtype=np.int64), return_counts=True)
    if len(ids) < len(images):
        raise CacheError(
            f"Image ids must be unique, but {ids[counts > 1][:5].tolist()} occur more than once: "
            "correct the annotation file."
        )
    sizes = sum(_bytes_per_image(images, spec).values())
    parts, start, filled = [], 0, 0
    for index, size in enumerate(sizes.tolist() if isinstance(sizes, np.ndarray) else []):
        if index > start and (filled + size > part_size or index - start == MAX_PART_IMAGES):
            parts.append(range(start, index))
            start, filled = index, 0
        filled += size
    if images:
        parts.append(range(start, len(images)))
    return parts


def raw_bytes(images: Sequence[ImageInfo], spec: CacheSpec) -> dict[str, int]:
    """Bytes of each field before compression, scales included.

    An upper bound: it takes `spec.proposals` proposals and all ground-truth boxes for every image and view, as many
    jittered boxes and boxes with RoI features as there may be, and network inputs padded to a multiple of 32.

    Args:
        images: all images of the data set.
        spec: what is stored of each.

    Returns:
        Bytes per field of `spec.fields`.
    """
    return {field: int(sizes.sum()) for field, sizes in _bytes_per_image(images, spec).items()}


def level_shapes(size: tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) of each pyramid level for a network input padded to a multiple of 32.

    Args:
        size: (height, width) of the network input without padding, pixels.
        strides: of the levels, pixels.
    """
    height, width = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in size)
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


def digest_images(images: Sequence[ImageInfo]) -> str:
    """sha256 of the ids, names, sizes and numbers of boxes of all images in their order."""
    return digest_json([list(dataclasses.astuple(image)) for image in images])


def _bytes_per_image(
    images: Sequence[ImageInfo], spec: CacheSpec
) -> dict[str, "np.ndarray[tuple[int], np.dtype[np.int64]]"]:
    """Raw bytes of each image, in all its views, by field."""
    truth = np.array([image.num_gt for image in images], dtype=np.int64)
    boxes = spec.proposals + truth + np.where(truth > 0, spec.jittered, 0)
    objects = np.minimum(boxes, np.maximum(truth, MAX_OBJECTS))
    sizes = dict.fromkeys(spec.fields, np.zeros_like(truth))
    for name, row in spec.row_bytes().items():
        rows = objects if name in spec.object_arrays() else boxes
        field = FIELD_OF_ARRAY.get(name, name)
        sizes[field] = sizes[field] + rows * row * len(spec.views)
    if "features" in spec.fields:
        by_size: dict[tuple[int, int], int] = {}
        for image in images:
            size = (image.height, image.width)
            if size not in by_size:
                by_size[size] = _pyramid_bytes(size, spec)
        features = np.array([by_size[image.height, image.width] for image in images], dtype=np.int64)
        sizes["features"] = features * len(spec.views)
    return sizes


def _pyramid_bytes(size: tuple[int, int], spec: CacheSpec) -> int:
    """Raw bytes of one image's pyramid in one view, given its original (height, width)."""
    try:
        shapes = level_shapes(input_size(size, spec.scale), spec.strides)
    except ViewError:
        return 0  # nothing is left of it: it can only be skipped
    elements = sum(spec.stored_elements(level, height * width) for level, (height, width) in enumerate(shapes))
    scale = 4 * spec.channels * len(spec.strides) if spec.is_quantized else 0
    return elements * np.dtype(spec.element_dtype).itemsize + scale
