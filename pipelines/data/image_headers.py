"""What the header and the end of an image file say, without decoding it."""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

__all__ = ["JPEG_END", "PNG_END", "Header", "read_header"]

JPEG_END, PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"
_JPEG = ("JPEG", "MPO")  # several JPEGs in one file, as telephones write them
_EXIF_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)
_STRIPS, _TILES = (273, 279), (324, 325)  # TIFF tags: offsets and bytes of the pieces of an image

Image.MAX_IMAGE_PIXELS = None  # Pillow reads headers here; OpenCV, which decodes, has a limit of its own


@dataclass(frozen=True)
class Header:
    """What is known of an image before it is decoded.

    Attributes:
        size: ``(height, width)`` in pixels as OpenCV decodes it.
        whole: whether the file ends where its format says that it ends; otherwise it may be truncated.
    """

    size: tuple[int, int]
    whole: bool


def read_header(path: Path, turn: bool = True) -> Header | None:
    """The header of an image; None where only decoding can tell its size, and where it is no image.

    OpenCV turns JPEG, PNG, WebP and TIFF by their EXIF orientation, and older versions not all of them: where it is
    another format than JPEG that lies on its side, OpenCV itself has to be asked.

    Args:
        path: the file.
        turn: apply the EXIF orientation.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        try:
            image = Image.open(file)
            turned = _orientation(image) in _TRANSPOSED
        except OSError as error:
            if error.errno is not None:
                raise
            return None  # Pillow's own: no image, or none that it knows
        except (ValueError, SyntaxError, TypeError, LookupError, struct.error):
            return None
        kind = image.format or ""
        if turned and kind not in _JPEG:
            return None
        width, height = image.size
        return Header((width, height) if turned and turn else (height, width), _ends(kind, image, file))


def _orientation(image: Any) -> object:
    if image.format == "TIFF":
        return image.tag_v2.get(_EXIF_ORIENTATION)
    if not image.info.get("exif"):
        return None
    exif = Image.Exif()
    exif.load(image.info["exif"])
    return exif.get(_EXIF_ORIENTATION)


def _ends(kind: str, image: Any, file: BinaryIO) -> bool:
    """Whether a file has the end of its format; False also where that is not known."""
    size = os.fstat(file.fileno()).st_size
    if kind == "TIFF":
        pieces = [
            offset + count
            for offsets, counts in (_STRIPS, _TILES)
            for offset, count in zip(image.tag_v2.get(offsets, ()), image.tag_v2.get(counts, ()), strict=False)
        ]
        return bool(pieces) and max(pieces) <= size
    file.seek(0)
    start = file.read(8)
    if kind == "WEBP":
        return int.from_bytes(start[4:8], "little") + 8 <= size
    if kind == "BMP":
        return 0 < int.from_bytes(start[2:6], "little") <= size
    file.seek(max(0, size - 64))
    end = file.read()
    if kind in _JPEG:
        return end.rstrip(b"\0\r\n").endswith(JPEG_END)
    return kind == "PNG" and PNG_END in end
