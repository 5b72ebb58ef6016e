"""The teacher's feature maps in the student's view, against bilinear interpolation in loops."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.quantize import dequantize, quantize
from kdpipe.distill.teacher.maps import StoredMaps, WarpedMaps, warp_map

if TYPE_CHECKING:
    from tests.distill.conftest import Pair

STRIDE, SHAPE, SIZE = 8, (6, 9), (44, 70)  # the input is padded to 48 x 72


def features(seed: int = 0) -> Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed))


def naive(
    level: Tensor, matrix: npt.NDArray[np.float64], size: tuple[int, int], shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    values, inside = torch.zeros(len(level), *shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    for i in range(shape[0]):
        for j in range(shape[1]):
            x, y, _ = matrix @ [(j + 0.5) * STRIDE, (i + 0.5) * STRIDE, 1.0]
            is_padding = (j + 0.5) * STRIDE >= size[1] or (i + 0.5) * STRIDE >= size[0]
            inside[i, j] = bool(0 < x < SIZE[1] and 0 < y < SIZE[0]) and not is_padding
            column = min(max(x / STRIDE - 0.5, 0.0), level.shape[2] - 1.0)
            row = min(max(y / STRIDE - 0.5, 0.0), level.shape[1] - 1.0)
            left, top = min(math.floor(column), level.shape[2] - 2), min(math.floor(row), level.shape[1] - 2)
            for u, v in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = (1 - abs(row - top - u)) * (1 - abs(column - left - v))
                values[:, i, j] += weight * level[:, top + u, left + v]
    return values, inside


@pytest.mark.parametrize(
    "matrix",
    [
        np.eye(3),
        np.array([[-1.0, 0, 70], [0, 1, 0], [0, 0, 1]]),  # mirrored
        np.array([[1.0, 0, 13], [0, 1, -9], [0, 0, 1]]),  # a crop, and beyond the image
        np.array([[0.6, 0, 5], [0, 0.7, 3], [0, 0, 1]]),  # seen larger
        np.array([[-2.1, 0, 80], [0, 1.9, -4], [0, 0, 1]]),  # smaller and mirrored
    ],
)
@pytest.mark.parametrize("shape", [SHAPE, (4, 12)])
@pytest.mark.parametrize("size", [(48, 96), (20, 28)])  # of the student's image; the rest of the shape is padding
def test_a_map_is_where_the_view_has_it(
    matrix: npt.NDArray[np.float64], size: tuple[int, int], shape: tuple[int, int]
) -> None:
    level = features()
    values, inside = warp_map(level, STRIDE, matrix, SIZE, size, shape)
    expected, expected_inside = naive(level, matrix, size, shape)
    assert torch.equal(inside, expected_inside)
    assert inside.any()
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-4)


def test_in_the_same_view_it_is_the_level_itself() -> None:
    values, inside = warp_map(features(), STRIDE, np.eye(3), (48, 72), (48, 72), SHAPE)
    torch.testing.assert_close(values, features(), rtol=1e-5, atol=1e-5)
    assert inside.all()
    mirrored, _ = warp_map(
        features(), STRIDE, np.array([[-1.0, 0, 72], [0, 1, 0], [0, 0, 1]]), (48, 72), (48, 72), SHAPE
    )
    torch.testing.assert_close(mirrored, features().flip(-1), rtol=1e-5, atol=1e-5)


def test_a_batch_of_stored_maps(pair: "type[Pair]") -> None:
    """Whole numbers with a scale beside floats, images of other sizes, and one that is left out."""
    g = torch.Generator().manual_seed(3)
    levels = [torch.randn(pair.channels, 8, 8, generator=g), torch.randn(pair.channels, 6, 8, generator=g)]
    whole, scale = quantize(levels[1])
    scales = torch.zeros(5, pair.channels)
    scales[1] = scale
    images = [
        StoredMaps(np.eye(3), (None, levels[0].half(), None, None, None), None, (64, 64)),
        None,
        StoredMaps(np.eye(3), (None, whole, None), scales, (48, 64)),
    ]
    student = {stride: torch.zeros(3, 5, 64 // stride, 64 // stride) for stride in (8, 16, 32, 64)}
    warped = WarpedMaps(images, replace(pair.spec, levels=(1, 2)), student, [(64, 64)] * 3)
    made = warped[8]
    assert warped[8] is made  # once
    assert made.values.shape == (3, pair.channels, 8, 8)
    torch.testing.assert_close(made.values[0], levels[0].half().float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.values[2, :, :6], dequantize(whole, scale), rtol=1e-4, atol=1e-4)
    assert not made.values[1].any()
    assert made.inside.sum(dim=(1, 2)).tolist() == [64, 0, 48]
    assert made.inside[2].sum(dim=1).tolist() == [8] * 6 + [0] * 2
    assert sorted(warped) == [8, 16, 32, 64]
    with pytest.raises(KdpipeError, match="stride 16"):
        warped[16]
