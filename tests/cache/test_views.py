"""Geometry between views: closed forms, round trips, agreement with mmdet's own transforms."""

import math

import mmcv
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align

from kdpipe.cache.views import (
    ViewError,
    check_axis_aligned,
    input_size,
    is_flipped,
    map_boxes,
    mirror_deltas,
    mirror_features,
    relative_matrix,
    view_matrix,
    visible_boxes,
)

sides = st.integers(1, 4000)
sizes = st.tuples(sides, sides)
fractions = st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4)


def some_boxes(size: tuple[int, int], fractions: list[float]) -> Tensor:
    (height, width), (a, b, c, d) = size, fractions
    xs, ys = sorted([a * width, b * width]), sorted([c * height, d * height])
    return torch.tensor([[xs[0], ys[0], xs[1], ys[1]]], dtype=torch.float32)


def test_a_resized_view_by_hand() -> None:
    boxes = torch.tensor([[1.0, 2.0, 5.0, 8.0]])
    matrix = view_matrix((10, 20), (30, 40), flip=False)
    assert map_boxes(boxes, matrix).tolist() == [[2.0, 6.0, 10.0, 24.0]]


def test_a_mirrored_view_by_hand() -> None:
    boxes = torch.tensor([[1.0, 2.0, 5.0, 8.0]])
    matrix = view_matrix((10, 20), (30, 40), flip=True)
    assert map_boxes(boxes, matrix).tolist() == [[30.0, 6.0, 38.0, 24.0]]
    assert is_flipped(matrix)
    assert not is_flipped(view_matrix((10, 20), (30, 40), flip=False))


def test_a_cropped_view_by_hand() -> None:
    crop = np.array([[1, 0, -3], [0, 1, 4], [0, 0, 1]])
    assert map_boxes(torch.tensor([[1.0, 2.0, 5.0, 8.0]]), crop).tolist() == [[-2.0, 6.0, 2.0, 12.0]]


@given(size=sizes, view=sizes, flip=st.booleans(), fractions=fractions)
def test_there_and_back_to_sub_pixel_accuracy(
    size: tuple[int, int], view: tuple[int, int], flip: bool, fractions: list[float]
) -> None:
    boxes = some_boxes(size, fractions)
    matrix = view_matrix(size, view, flip)
    mapped = map_boxes(boxes, matrix)
    assert (mapped[:, 2:] >= mapped[:, :2]).all()
    back = map_boxes(mapped, np.linalg.inv(matrix))
    pixel = max(1.0, size[0] / view[0], size[1] / view[1])  # float32 rounds in the view, whose pixels may be larger
    assert (back - boxes).abs().max() <= 1e-3 * pixel


@given(size=sizes, first=sizes, second=sizes, flips=st.tuples(st.booleans(), st.booleans()), fractions=fractions)
def test_a_relative_matrix_is_the_way_over_the_original(
    size: tuple[int, int],
    first: tuple[int, int],
    second: tuple[int, int],
    flips: tuple[bool, bool],
    fractions: list[float],
) -> None:
    boxes = some_boxes(size, fractions).double()
    one, two = view_matrix(size, first, flips[0]), view_matrix(size, second, flips[1])
    relative = relative_matrix(one, two)
    assert is_flipped(relative) == (flips[0] != flips[1])
    torch.testing.assert_close(map_boxes(map_boxes(boxes, one), relative), map_boxes(boxes, two), rtol=1e-9, atol=1e-6)


@given(size=sizes, scale=st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
def test_the_input_size_is_that_of_mmcv(size: tuple[int, int], scale: tuple[int, int]) -> None:
    height, width = size
    new_width, new_height = mmcv.rescale_size((width, height), scale)
    if min(new_width, new_height) == 0:
        with pytest.raises(ViewError, match="less than a pixel"):
            input_size(size, scale)
    else:
        assert input_size(size, scale) == (new_height, new_width)


@pytest.mark.parametrize("size", [(37, 53), (480, 640), (33, 97), (97, 33)])
@pytest.mark.parametrize("scale", [(133, 80), (80, 133), (640, 640)])
@pytest.mark.parametrize("flip", [False, True])
def test_matrix_and_boxes_are_those_of_mmdet(size: tuple[int, int], scale: tuple[int, int], flip: bool) -> None:
    from mmdet.datasets.transforms import RandomFlip, Resize
    from mmdet.structures.bbox import HorizontalBoxes

    import kdpipe.pipelines  # noqa: F401  (makes mmdet importable without a compiled mmcv)

    height, width = size
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (9, 2, 2)), axis=1) * [width, height]
    boxes = torch.from_numpy(corners.reshape(9, 4)).float()
    results = {
        "img": np.zeros((height, width, 3), np.uint8),
        "img_shape": size,
        "gt_bboxes": HorizontalBoxes(boxes.clone()),
    }
    results = Resize(scale, keep_ratio=True)(results)
    results = RandomFlip(prob=1.0 if flip else 0.0)(results)
    input_shape = input_size(size, scale)
    assert input_shape == results["img"].shape[:2]
    matrix = view_matrix(size, input_shape, flip)
    np.testing.assert_allclose(matrix, results["homography_matrix"], rtol=1e-6)
    torch.testing.assert_close(map_boxes(boxes, matrix), results["gt_bboxes"].tensor, rtol=0, atol=1e-3)
    torch.testing.assert_close(
        map_boxes(boxes, results["homography_matrix"]), results["gt_bboxes"].tensor, rtol=0, atol=1e-3
    )


def rotation(degrees: float) -> list[list[float]]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [[c, -s, 0], [s, c, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (rotation(1), "rotation or shear"),
        (rotation(90), "rotation or shear"),
        (rotation(180), "vertical flip"),
        ([[1, 0.01, 0], [0, 1, 0], [0, 0, 1]], "rotation or shear"),
        ([[1, 0, 0], [0.01, 1, 0], [0, 0, 1]], "rotation or shear"),
        ([[1, 0, 0], [0, -1, 9], [0, 0, 1]], "vertical flip"),
        ([[1, 0, 0], [0, 1, 0], [0.001, 0, 1]], "perspective"),
        ([[0, 0, 0], [0, 1, 0], [0, 0, 1]], "scale of zero"),
        ([[1, 0, math.nan], [0, 1, 0], [0, 0, 1]], "finite 3 x 3"),
        ([[1, 0, 0], [0, 1, 0]], "finite 3 x 3"),
    ],
)
def test_other_transforms_are_refused(matrix: list[list[float]], message: str) -> None:
    for use in (
        lambda: check_axis_aligned(matrix),
        lambda: is_flipped(matrix),
        lambda: map_boxes(torch.zeros(1, 4), matrix),
        lambda: relative_matrix(np.eye(3), matrix),
        lambda: relative_matrix(matrix, np.eye(3)),
    ):
        with pytest.raises(ViewError, match=message):
            use()


def test_rounding_of_a_float32_matrix_is_no_shear() -> None:
    check_axis_aligned(np.array([[1.7, 1e-8, 0], [1e-8, 1.7, 0], [0, 0, 1]], dtype=np.float32))


@pytest.mark.parametrize("boxes", [torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.int64)])
def test_what_is_no_box_is_refused(boxes: Tensor) -> None:
    with pytest.raises(ViewError, match="floating point"):
        map_boxes(boxes, np.eye(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_type_of_boxes_is_kept_and_they_are_not_changed(dtype: torch.dtype) -> None:
    boxes = torch.tensor([[1, 2, 3, 4]], dtype=dtype)
    mapped = map_boxes(boxes, view_matrix((8, 8), (16, 16), flip=True))
    assert mapped.dtype == dtype
    assert boxes.tolist() == [[1, 2, 3, 4]]
    assert map_boxes(torch.zeros(0, 4, dtype=dtype), np.eye(3)).shape == (0, 4)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ViewError, match="original size"):
        view_matrix((0, 5), (5, 5), flip=False)
    with pytest.raises(ViewError, match="input size"):
        view_matrix((5, 5), (5, -1), flip=False)
    with pytest.raises(ViewError, match="positive"):
        input_size((5, 0), (10, 10))
    with pytest.raises(ViewError, match="positive"):
        input_size((5, 5), (0, 10))


def test_the_roi_feature_of_the_mirrored_map_is_the_mirrored_roi_feature() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 3, 16, 24, dtype=torch.float64)
    boxes = torch.tensor([[3.2, 2.1, 50.7, 40.3], [10.0, 5.0, 90.0, 60.0]], dtype=torch.float64)
    mirrored = map_boxes(boxes, view_matrix((64, 96), (64, 96), flip=True))
    index = torch.zeros(2, 1, dtype=torch.float64)
    straight = roi_align(features, torch.cat([index, boxes], 1), 7, 0.25, 2, True)
    flipped = roi_align(features.flip(-1), torch.cat([index, mirrored], 1), 7, 0.25, 2, True)
    torch.testing.assert_close(mirror_features(straight), flipped)


def decode(box: list[float], delta: list[float]) -> list[float]:
    width, height = box[2] - box[0], box[3] - box[1]
    x, y = (box[0] + box[2]) / 2 + delta[0] * width, (box[1] + box[3]) / 2 + delta[1] * height
    w, h = width * math.exp(delta[2]), height * math.exp(delta[3])
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


@given(
    size=sizes,
    view=sizes,
    fractions=fractions,
    delta=st.lists(st.floats(-1, 1), min_size=4, max_size=4),
)
def test_mirrored_deltas_move_the_mirrored_box_to_the_mirrored_place(
    size: tuple[int, int], view: tuple[int, int], fractions: list[float], delta: list[float]
) -> None:
    box = some_boxes(size, fractions).double()
    matrix = view_matrix(size, view, flip=True)
    target = torch.tensor([decode(box[0].tolist(), delta)], dtype=torch.float64)
    mirrored = mirror_deltas(torch.tensor([delta], dtype=torch.float64))
    decoded = decode(map_boxes(box, matrix)[0].tolist(), mirrored[0].tolist())
    torch.testing.assert_close(
        torch.tensor([decoded], dtype=torch.float64), map_boxes(target, matrix), rtol=0, atol=1e-6
    )


def test_mirroring_twice_changes_nothing() -> None:
    deltas, features = torch.randn(5, 3, 4), torch.randn(2, 3, 7, 7)
    assert torch.equal(mirror_deltas(mirror_deltas(deltas)), deltas)
    assert torch.equal(mirror_features(mirror_features(features)), features)
    with pytest.raises(ViewError, match="Deltas"):
        mirror_deltas(torch.zeros(3, 5))


def test_which_boxes_a_crop_leaves() -> None:
    boxes = torch.tensor(
        [
            [0.0, 0.0, 20.0, 10.0],  # all of the view
            [-10.0, 0.0, 10.0, 10.0],  # half inside
            [-11.0, 0.0, 9.0, 10.0],  # less than half
            [15.0, 5.0, 25.0, 15.0],  # a quarter
            [30.0, 0.0, 40.0, 10.0],  # outside
            [5.0, 5.0, 5.0, 8.0],  # no area
            [-5.0, -5.0, 25.0, 15.0],  # larger than the view: a third of it is seen
        ]
    )
    assert visible_boxes(boxes, (10, 20)).tolist() == [True, True, False, False, False, False, False]
    assert visible_boxes(boxes, (10, 20), min_visible=0.25).tolist() == [True, True, True, True, False, False, True]
    assert visible_boxes(boxes, (10, 20), min_visible=0.0).tolist() == [True, True, True, True, False, False, True]
    assert visible_boxes(torch.zeros(0, 4), (10, 20)).shape == (0,)
