from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdpipe.cache.quantize import dequantize, dequantize_rows, quantize, quantize4, quantize_rows


@settings(max_examples=50)
@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 6), st.floats(1e-20, 1e20), st.integers(0, 1000))
def test_quantisation_is_within_half_a_step(rois: int, channels: int, side: int, size: float, seed: int) -> None:
    x = torch.randn(rois, channels, side, side, generator=torch.Generator().manual_seed(seed)) * size
    q, scale = quantize(x)
    assert q.dtype == torch.int8
    assert scale.shape == (rois, channels)
    step = scale[..., None, None]
    assert ((dequantize(q, scale) - x).abs() <= 0.5 * step * (1 + 1e-5)).all()
    torch.testing.assert_close(scale, x.abs().amax((-2, -1)) / 127)


def test_quantisation_by_hand() -> None:
    x = torch.tensor([[[-254.0, 127.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    q, scale = quantize(x)
    assert scale.tolist() == [2.0, 0.0]
    assert q.tolist() == [[[-127, 64], [0, 0]], [[0, 0], [0, 0]]]  # halves round to even
    assert dequantize(q, scale, torch.float16).dtype == torch.float16


def test_what_is_not_finite_shows_in_the_scale() -> None:
    x = torch.zeros(3, 2, 2)
    x[1, 0, 0], x[2, 1, 1] = float("nan"), float("inf")
    assert torch.isfinite(quantize(x)[1]).tolist() == [True, False, False]
    assert torch.isfinite(quantize4(x)[1]).tolist() == [True, False, False]
    x[1:] = 0
    x[1, 0, 0] = 65504.0 * 127 * 1.1  # beyond the largest scale
    assert torch.isfinite(quantize(x, torch.float16)[1]).tolist() == [True, False, True]


@pytest.mark.parametrize("function", [quantize, quantize4])
def test_quantisation_stays_on_the_device_of_the_values(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    for result in function(torch.empty(2, 3, 4, 4, dtype=torch.float16, device="meta")):
        assert result.device.type == "meta"


def test_negative_zeros_leave_no_trace() -> None:
    q, scale = quantize(torch.tensor([[[-0.0, 0.0]], [[-0.0, -0.0]]]))
    assert scale.numpy().tobytes() == bytes(8)
    assert q.tolist() == [[[0, 0]], [[0, 0]]]


def test_the_largest_value_stays_within_the_type() -> None:
    x = torch.tensor([[[190 * 2.0**-149]], [[2.0**-149]], [[-3.4e38]]])  # the scale of the first has one bit
    q, _ = quantize(x)
    assert q.flatten().tolist() == [127, 0, -127]


def test_scales_may_be_rounded_and_the_values_are_steps_of_what_is_left() -> None:
    x = torch.randn(40, 3, 7, 7, generator=torch.Generator().manual_seed(0)) * 3.7
    q, scale = quantize(x, torch.float16)
    assert scale.dtype == torch.float16
    assert ((dequantize(q, scale) - x).abs() <= 0.6 * scale[..., None, None].float()).all()
    tiny, scale = quantize(torch.full((1, 1, 1), 1e-7), torch.float16)
    assert (tiny.item(), scale.item()) == (0, 0)


def codes(packed: Tensor, channels: int) -> list[int]:
    """Values of one cell of each channel, byte by byte, by the rule in the docstring of `quantize4`."""
    zigzag = [0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, 7]
    flat = packed.flatten().tolist()
    return [zigzag[byte % 16] for byte in flat] + [zigzag[byte // 16] for byte in flat][: channels - len(flat)]


def test_int4_by_hand() -> None:
    cells = [-7.0, 7.0, 2.4, -1.6, 0.0]
    x = torch.tensor(cells)[:, None, None] * torch.tensor([1.0, 1.0])  # two equal cells per channel
    packed, scale = quantize4(x)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 1, 2)
    # with one magnitude in a channel, clipping serves nobody: each value is seven of its own steps
    torch.testing.assert_close(scale, torch.tensor([1.0, 1.0, 2.4 / 7, 1.6 / 7, 0.0]))
    assert codes(packed[..., 0], 5) == codes(packed[..., 1], 5) == [-7, 7, 7, -7, 0]
    assert packed[..., 0].flatten().tolist() == [13 | 13 << 4, 14, 14]
    assert dequantize(packed, scale, torch.float16).dtype == torch.float16
    torch.testing.assert_close(dequantize(packed, scale), x)


@settings(max_examples=60)
@given(st.integers(0, 2), st.integers(1, 5), st.integers(1, 6), st.floats(1e-20, 1e20), st.integers(0, 1000))
def test_int4_is_within_half_a_step_or_clipped(images: int, channels: int, side: int, size: float, seed: int) -> None:
    x = torch.randn(images, channels, side, side, generator=torch.Generator().manual_seed(seed)) ** 3 * size
    packed, scale = quantize4(x)
    assert packed.shape == (images, -(-channels // 2), side, side)
    assert scale.shape == (images, channels)
    restored, step = dequantize(packed, scale), scale[..., None, None]
    assert restored.shape == x.shape
    inside = x.abs() <= 7 * step
    assert ((restored - x).abs() <= 0.5 * step * (1 + 1e-5))[inside].all()
    torch.testing.assert_close(restored[~inside], (x.sign() * 7 * step)[~inside])
    # never worse than no clipping at all
    largest = x.abs().amax((-2, -1), keepdim=True) / 7
    whole = torch.where(largest > 0, (x / largest).round() * largest, 0)
    error, unclipped = ((y - x).double().square().sum((-2, -1)) for y in (restored, whole))
    assert (error <= unclipped * (1 + 1e-5) + 1e-37).all()


def test_int4_clips_what_is_rare() -> None:
    x = torch.randn(2, 300, 30, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = 30.0
    packed, scale = quantize4(x)
    assert scale[0] < 30 / 7 * 0.5
    restored = dequantize(packed, scale)
    assert (restored - x)[1].norm() < 0.13 * x[1].norm()


@pytest.mark.parametrize(("height", "width"), [(200, 336), (256, 512), (256, 256), (128, 256), (150, 300)])
@pytest.mark.parametrize("object_width", [5, 8, 12])
def test_int4_looks_at_every_column(
    height: int, width: int, object_width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small object in a quiet channel is not clipped away, wherever it is: as where all cells are looked at."""
    g = torch.Generator().manual_seed(0)
    x = 0.05 * torch.randn(12, height, width, generator=g)
    for channel in range(len(x)):
        top, left = 20 + 7 * channel, 1 + 9 * channel
        x[channel, top : top + 8, left : left + object_width] = 5 + torch.rand(8, object_width, generator=g)
    actual = (dequantize(*quantize4(x)) - x).square().sum((1, 2))
    monkeypatch.setattr("kdpipe.cache.quantize._CELLS", height * width)
    assert (actual < 1.3 * (dequantize(*quantize4(x)) - x).square().sum((1, 2))).all()


def test_int4_of_equal_values_is_equal_bytes() -> None:
    x = torch.randn(5, 9, 70, generator=torch.Generator().manual_seed(0))
    first, second = quantize4(x), quantize4(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert all(map(torch.equal, first, second))
    zeros, scale = quantize4(torch.tensor([[[-0.0, 0.0]], [[-0.0, -0.0]], [[0.0, 0.0]]]))
    assert zeros.numpy().tobytes() + scale.numpy().tobytes() == bytes(4 + 12)
    values = dequantize(*first)
    again = dequantize(*quantize4(values))
    assert (again - values).abs().max() <= 0.5 * first[1].max()


def test_levels_of_several_images_are_dequantised_together() -> None:
    x = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    packed, scale = quantize4(x)
    together = dequantize(packed.contiguous(memory_format=torch.channels_last), scale)
    assert torch.equal(together, torch.stack([dequantize(*quantize4(image)) for image in x]))


def test_rows_have_a_scale_each() -> None:
    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [9.0], [0.0], [0.1]])
    steps, scale = quantize_rows(x)
    assert steps.dtype == torch.int8
    torch.testing.assert_close(scale, x.abs().amax(1) / 127)
    assert ((dequantize_rows(steps, scale) - x).abs() <= 0.5 * scale[:, None] * (1 + 1e-5)).all()
    assert dequantize_rows(x.half(), None).dtype == torch.float32
    assert [part.shape for part in quantize_rows(x[:0])] == [(0, 33), (0,)]


def test_floats_have_no_scale() -> None:
    values = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).half()
    restored = dequantize(values, None)
    assert restored.dtype == torch.float32
    assert torch.equal(restored.half(), values)
