import numpy as np
import pytest

from kdpipe.cache.codecs import crc32c, encode_chunk


def test_crc32c_check_value() -> None:
    assert int.from_bytes(crc32c(b"123456789"), "little") == 0xE3069283  # the check value of RFC 3720's CRC


@pytest.mark.parametrize("codec", ["zstd", "lz4", "none"])
def test_encoding_is_a_function_of_the_values(codec: str) -> None:
    block = np.random.default_rng(0).integers(-9, 9, 100_000).astype(np.int8)
    first = encode_chunk(block, codec)
    assert all(encode_chunk(block.copy(), codec) == first for _ in range(3))
    assert (len(first[0]) < block.nbytes) == (codec != "none")
    assert first[1] == crc32c(first[0])
