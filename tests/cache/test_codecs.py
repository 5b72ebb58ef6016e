import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.cache.codecs import crc32c, encode_chunk
from kdpipe.cache.quantize import dequantize, quantize


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


def test_quantisation_stays_on_the_device_of_the_values() -> None:
    for result in quantize(torch.empty(2, 3, 4, 4, dtype=torch.float16, device="meta")):
        assert result.device.type == "meta"


def test_negative_zeros_leave_no_trace() -> None:
    q, scale = quantize(torch.tensor([[[-0.0, 0.0]], [[-0.0, -0.0]]]))
    assert scale.numpy().tobytes() == bytes(8)
    assert q.tolist() == [[[0, 0]], [[0, 0]]]


def test_the_largest_value_stays_within_the_type() -> None:
    x = torch.tensor([[[190 * 2.0**-149]], [[2.0**-149]], [[-3.4e38]]])  # the scale of the first has one bit
    q, _ = quantize(x)
    assert q.flatten().tolist() == [127, 0, -127]


def test_crc32c_check_value() -> None:
    assert int.from_bytes(crc32c(b"123456789"), "little") == 0xE3069283  # the check value of RFC 3720's CRC


@pytest.mark.parametrize("codec", ["zstd", "lz4", "none"])
def test_encoding_is_a_function_of_the_values(codec: str) -> None:
    block = np.random.default_rng(0).integers(-9, 9, 100_000).astype(np.int8)
    first = encode_chunk(block, codec)
    assert all(encode_chunk(block.copy(), codec) == first for _ in range(3))
    assert (len(first[0]) < block.nbytes) == (codec != "none")
    assert first[1] == crc32c(first[0])
