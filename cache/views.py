"""Pure geometry between an image's original pixels and the views that networks see of it.

A view is a 3 x 3 matrix that takes original pixel coordinates to those of a network input: scale, translation (crop,
padding) and horizontal flip. Pixel coordinates are continuous, as in mmdet: an image of width w spans [0, w], and its
mirror image maps x to w - x. Boxes are (x1, y1, x2, y2). Sizes are (height, width).
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdpipe.cache.errors import KdpipeError

Matrix = npt.NDArray[np.float64]
Size = tuple[int, int]

# mmdet records its matrices in float32: an exact zero can come out as a rounding error of products of such matrices.
_TOLERANCE = 1e-6


class ViewError(KdpipeError):
    """A view, a size or a box cannot be handled."""


def view_matrix(original_size: Size, input_size: Size, flip: bool) -> Matrix:
    """Matrix from original pixels to a network input: resized, then mirrored left to right if `flip`.

    Args:
        original_size: (height, width) of the image file, pixels.
        input_size: (height, width) of the network input without padding, pixels.
        flip: whether the resized image is mirrored; x' = w_in - sx * x.

    Returns:
        [3, 3] float64.

    Raises:
        ViewError: a size is not positive.
    """
    for name, size in (("original size", original_size), ("input size", input_size)):
        if min(size) <= 0:
            raise ViewError(f"The {name} of an image must be positive, found (height, width) = {tuple(size)}.")
    (height, width), (input_height, input_width) = original_size, input_size
    scale_x, scale_y = input_width / width, input_height / height
    x_row = [-scale_x, 0.0, float(input_width)] if flip else [scale_x, 0.0, 0.0]
    return np.array([x_row, [0.0, scale_y, 0.0], [0.0, 0.0, 1.0]])


def input_size(original_size: Size, scale: tuple[int, int]) -> Size:
    """Size that mmdet's `Resize(scale, keep_ratio=True)` gives an image: as large as fits within `scale`.

    The arithmetic is that of `mmcv.rescale_size`, rounding included. Which of the two numbers of `scale` comes first
    does not matter: the longer bounds the longer side of the image.

    Args:
        original_size: (height, width), pixels.
        scale: (width, height) as mmdet writes it, pixels.

    Returns:
        (height, width), pixels.

    Raises:
        ViewError: a size is not positive, or the image is so narrow that a side would vanish.
    """
    height, width = original_size
    if min(original_size) <= 0 or min(scale) <= 0:
        raise ViewError(
            f"Sizes must be positive, found (height, width) = {tuple(original_size)} and scale {tuple(scale)}."
        )
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    resized = int(height * factor + 0.5), int(width * factor + 0.5)
    if min(resized) == 0:
        raise ViewError(
            f"An image of (height, width) = {tuple(original_size)} resized into {tuple(scale)} has a side of less than "
            f"a pixel, {resized}: leave this image out, or use a larger scale."
        )
    return resized


def check_axis_aligned(matrix: npt.ArrayLike) -> None:
    """Refuse a view under which a box does not stay an upright box with the image the right way up.

    Args:
        matrix: [3, 3] original pixels -> network input.

    Raises:
        ViewError: not 3 x 3 and finite, perspective, shear, rotation, vertical flip, or a scale of zero.
    """
    m = np.asarray(matrix, dtype=np.float64)
    if m.shape != (3, 3) or not np.isfinite(m).all():
        raise ViewError(f"A view is a finite 3 x 3 matrix, found shape {m.shape}: {m.tolist()}.")
    wrong = None
    if np.abs(m[2] - [0.0, 0.0, 1.0]).max() > _TOLERANCE:
        wrong = "a perspective transform"
    elif max(abs(m[0, 1]), abs(m[1, 0])) > _TOLERANCE * np.abs(m[:2, :2]).max():
        wrong = "a rotation or shear"
    elif m[1, 1] < 0:
        wrong = "a vertical flip"
    elif m[0, 0] == 0 or m[1, 1] == 0:
        wrong = "a scale of zero"
    if wrong is not None:
        raise ViewError(
            f"The view {m.tolist()} is {wrong}; cached targets follow scale, crop, padding and horizontal flip only. "
            "Remove that augmentation from the student's training pipeline."
        )


def is_flipped(matrix: npt.ArrayLike) -> bool:
    """Whether a view shows the image mirrored left to right.

    Raises:
        ViewError: as `check_axis_aligned`.
    """
    check_axis_aligned(matrix)
    return bool(np.asarray(matrix)[0, 0] < 0)


def relative_matrix(from_matrix: npt.ArrayLike, to_matrix: npt.ArrayLike) -> Matrix:
    """Matrix that takes pixels of one view to pixels of another view of the same image.

    Args:
        from_matrix: [3, 3] original pixels -> first view.
        to_matrix: [3, 3] original pixels -> second view.

    Returns:
        [3, 3] float64, `to_matrix @ inverse(from_matrix)`.

    Raises:
        ViewError: as `check_axis_aligned`, for either.
    """
    check_axis_aligned(from_matrix)
    check_axis_aligned(to_matrix)
    relative: Matrix = np.asarray(to_matrix, np.float64) @ np.linalg.inv(np.asarray(from_matrix, np.float64))
    return relative


def map_boxes(boxes: Tensor, matrix: npt.ArrayLike) -> Tensor:
    """Boxes seen through a view, corners in order again after a flip. Computed in float64, rounded once.

    Args:
        boxes: Tensor[..., 4] floating point, (x1, y1, x2, y2) pixels.
        matrix: [3, 3], for instance from `view_matrix` or `relative_matrix`.

    Returns:
        Tensor[..., 4] of the same dtype and device, (x1, y1, x2, y2) pixels, not clipped.

    Raises:
        ViewError: as `check_axis_aligned`, or `boxes` is not floating point with 4 columns.
    """
    check_axis_aligned(matrix)
    if boxes.shape[-1:] != (4,) or not boxes.is_floating_point():
        raise ViewError(f"Boxes must be floating point [..., 4], found {boxes.dtype} {list(boxes.shape)}.")
    m = np.asarray(matrix, dtype=np.float64)
    table = torch.tensor([[m[0, 0], m[1, 1]] * 2, [m[0, 2], m[1, 2]] * 2], dtype=torch.float64)
    scale, shift = table.to(boxes.device, non_blocking=True).unbind()  # without waiting for a GPU
    mapped = boxes.double() * scale + shift
    if m[0, 0] < 0:
        x1, y1, x2, y2 = mapped.unbind(-1)
        mapped = torch.stack([x2, y1, x1, y2], dim=-1)
    return mapped.to(boxes.dtype)


def mirror_features(features: Tensor) -> Tensor:
    """Features mirrored left to right.

    Right for RoI features, whose cells span the box. A whole level of a pyramid is mirrored about its own width, which
    is that of the image only when the network input needed no padding.

    Args:
        features: Tensor[..., H, W].

    Returns:
        Tensor[..., H, W] of the same dtype.
    """
    return features.flip(-1)


def mirror_deltas(deltas: Tensor) -> Tensor:
    """Box regression of the mirrored box: dx changes sign, dy, dw and dh stay.

    Holds for deltas that are normalised with a mean of 0 for dx, as every box coder of mmdet's models has.

    Args:
        deltas: Tensor[..., 4] (dx, dy, dw, dh).

    Returns:
        Tensor[..., 4] of the same dtype.

    Raises:
        ViewError: the last dimension is not 4.
    """
    if deltas.shape[-1:] != (4,):
        raise ViewError(f"Deltas must be [..., 4], found {list(deltas.shape)}.")
    dx, others = deltas.split([1, 3], dim=-1)
    return torch.cat([-dx, others], dim=-1)


def visible_boxes(boxes: Tensor, size: Size, min_visible: float = 0.5) -> Tensor:
    """Which boxes a view still shows: those of whose area at least `min_visible` lies inside it.

    Args:
        boxes: Tensor[N, 4] (x1, y1, x2, y2), pixels of the view, not clipped.
        size: (height, width) of the view without padding, pixels.
        min_visible: fraction of the area, in [0, 1]. At 0 every box with anything inside is kept.

    Returns:
        Tensor[N] bool. A box without area is not visible.
    """
    height, width = size
    x1, y1, x2, y2 = boxes.double().unbind(-1)
    inside = (x2.clamp(0, width) - x1.clamp(0, width)) * (y2.clamp(0, height) - y1.clamp(0, height))  # [N]
    area = (x2 - x1) * (y2 - y1)
    return (x2 > x1) & (y2 > y1) & (inside > 0) & (inside >= min_visible * area)
