"""Image files that do not end as their format says: how much is missing, and what can be decoded of the rest."""

import contextlib
import io
import re
import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from kdpipe.pipelines.data.image_headers import JPEG_END, PNG_END

__all__ = ["IncompleteError", "completed", "lost_share"]

_JPEG_START, _PNG_START = b"\xff\xd8", b"\x89PNG"
_START_OF_SCAN, _RESTART_INTERVAL = 0xDA, 0xDD
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # in coded data: the end of a scan
_PADDING = b"\0\xff"
_FILLER = b"\x5a"  # coded data in place of what is missing: any that is not flat


class IncompleteError(Exception):
    """Too little is there to be decoded; the message says why."""


def lost_share(data: bytes) -> float | None:
    """The share of the pixels that are lost of an image file; None where it ends as it should.

    Of a JPEG whose end is missing, what follows from the bytes that are there is decoded twice with other bytes behind
    them: pixels that differ are lost. Where coded data restarts at intervals, those bytes would not be taken for data,
    and the flat area at the lower end, with which a decoder fills up, is counted instead.

    Args:
        data: all bytes of the file.

    Returns:
        In [0, 1].

    Raises:
        IncompleteError: the image of another format is cut off or damaged.
    """
    if data.startswith(_JPEG_START):
        return None if _ends(data) else _lost_jpeg(data.rstrip(_PADDING))
    if data.startswith(_PNG_START):
        if PNG_END not in data:  # OpenCV 5 does not decode it, whatever is missing
            raise IncompleteError("its end is missing")
        return None
    with contextlib.suppress(UnidentifiedImageError), _explained(), Image.open(io.BytesIO(data)) as image:
        image.load()
    return None  # a format that Pillow does not know is OpenCV's to judge


def completed(data: bytes) -> bytes:
    """An image file with an end, where it is a JPEG that lacks its last bytes; others as they are.

    OpenCV 5 decodes a JPEG without an end from a file, and mostly not from memory; with one, both are the same: what is
    missing is grey.

    Args:
        data: all bytes of the file.
    """
    if not data.startswith(_JPEG_START) or _ends(data):
        return data
    rest = data.rstrip(_PADDING)
    return data if _walk(rest)[0] else rest + JPEG_END


def _ends(data: bytes) -> bool:
    return data[-64:].rstrip(b"\0\r\n").endswith(JPEG_END)


def _lost_jpeg(data: bytes) -> float | None:
    whole, restarts = _walk(data)
    if whole:
        return None
    filled = _decode(data + JPEG_END)  # [H, W, 3]
    if restarts:
        flat = (filled == filled[-1, -1]).all(axis=(1, 2))  # [H]
        return float(len(flat) if flat.all() else np.argmin(flat[::-1])) / len(flat)
    other = _decode(data + _FILLER * (filled.shape[0] * filled.shape[1]) + JPEG_END)
    return float((filled != other).any(axis=2).mean())


def _walk(data: bytes) -> tuple[bool, bool]:
    """Whether a JPEG has its end somewhere, with other data behind it, and whether its coded data restarts."""
    place, restarts = len(_JPEG_START), False
    while place + 4 <= len(data) and data[place] == 0xFF:
        kind = data[place + 1]
        if kind == JPEG_END[1]:
            return True, restarts
        if kind == 0xFF:  # padding
            place += 1
            continue
        restarts = restarts or (kind == _RESTART_INTERVAL and data[place + 4 : place + 6] != b"\0\0")
        (length,) = struct.unpack(">H", data[place + 2 : place + 4])
        place += 2 + length
        if kind == _START_OF_SCAN:
            marker = _MARKER.search(data, place)
            place = marker.start() if marker else len(data)
    return data[place : place + 2] == JPEG_END, restarts


def _decode(data: bytes) -> npt.NDArray[np.uint8]:
    """Pixels of a JPEG by Pillow, which prints nothing: ``[H, W, 3]``."""
    with _explained(), Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What Pillow raises on bytes that it cannot decode, as one error."""
    try:
        yield
    except UnidentifiedImageError:
        raise
    except (OSError, ValueError, SyntaxError, TypeError, LookupError, struct.error) as error:
        raise IncompleteError(str(error)) from error
