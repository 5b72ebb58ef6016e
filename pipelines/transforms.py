"""mmdet pipelines: their scale, and the transform that puts cached targets beside an image."""

import copy
from collections.abc import Sequence
from typing import Any

from kdpipe.cache.errors import KdpipeError

__all__ = ["set_scale"]

_RESIZES = ("Resize", "RandomResize", "RandomChoiceResize", "FixScaleResize")


def set_scale(
    pipeline: Sequence[Any], scale: tuple[int, int], ratio_range: tuple[float, float] | None = None
) -> list[Any]:
    """The same pipeline with its resizing replaced by `Resize(scale, keep_ratio=True)`, or `RandomResize`.

    Args:
        pipeline: Transforms of an mmdet data set.
        scale: `(w, h)`: the longest edge of the result fits the larger, the shortest the smaller number.
        ratio_range: Multiply the scale by a random factor of this range, per image.

    Raises:
        KdpipeError: The pipeline has not exactly one resizing transform.
    """
    places = [i for i, step in enumerate(pipeline) if step["type"] in _RESIZES]
    if len(places) != 1:
        raise KdpipeError(
            f"A scale was given, but the pipeline of the config has {len(places)} resizing transforms "
            f"({', '.join(step['type'] for step in pipeline)}). Expected exactly one; set it in the config itself."
        )
    resize: dict[str, Any] = {"type": "Resize", "scale": tuple(scale), "keep_ratio": True}
    if ratio_range is not None:
        resize = {**resize, "type": "RandomResize", "ratio_range": ratio_range}
    result = copy.deepcopy(list(pipeline))
    result[places[0]] = resize
    return result
