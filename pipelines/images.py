"""Images from disk, exactly as mmdet reads them, and never half of one."""

import io
from pathlib import Path

import cv2
import mmcv
import numpy as np
import numpy.typing as npt
from PIL import Image

from kdpipe.cache.errors import KdpipeError

__all__ = ["ImageError", "image_problem", "image_size", "read_image"]

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG", b"IEND\xaeB`\x82"
_EXIF_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)


class ImageError(KdpipeError):
    """An image is missing, unreadable, truncated, or of another size than its annotation says."""


def read_image(path: str | Path, expected: tuple[int, int] | None = None) -> npt.NDArray[np.uint8]:
    """Reads an image with the pixels that mmdet's LoadImageFromFile gives by default.

    Args:
        path: the file.
        expected: ``(height, width)`` in pixels that the annotation says, EXIF orientation applied.

    Returns:
        ``[H, W, 3]`` uint8, BGR.

    Raises:
        ImageError: names the file and what is wrong with it.
    """
    path = Path(path)
    data = _bytes(path)
    _check_whole(path, data)
    try:
        image: npt.NDArray[np.uint8] | None = mmcv.imfrombytes(data, flag="color", backend="cv2")
    except cv2.error as error:
        raise ImageError(f"image {path} cannot be decoded: {error}. Replace it.") from error
    if image is None:
        raise ImageError(
            f"image {path} ({len(data):,} bytes) cannot be decoded: it is damaged or no image. Replace it."
        )
    if expected is not None and image.shape[:2] != tuple(expected):
        raise ImageError(
            f"image {path} is {image.shape[1]} x {image.shape[0]} pixels (its EXIF orientation applied), but the "
            f"annotations say {expected[1]} x {expected[0]}: its boxes would be misplaced. Correct width and height in "
            "the annotation file, or put the image in place that was annotated."
        )
    return image


def image_problem(path: str | Path, width: int, height: int) -> str | None:
    """What is wrong with an image, or None."""
    try:
        read_image(path, (height, width))
    except ImageError as error:
        return str(error)
    return None


def image_size(path: str | Path) -> tuple[int, int]:
    """``(height, width)`` in pixels from the header of an image, EXIF orientation applied.

    Raises:
        ImageError: the file is missing or no image.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_EXIF_ORIENTATION) in _TRANSPOSED
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"the size of image {path} cannot be read: {error}. Replace it.") from error
    return (width, height) if turned else (height, width)


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise _missing(path) from error
    except OSError as error:
        raise ImageError(f"image {path} cannot be read: {error.strerror}.") from error
    if not data:
        raise ImageError(f"image {path} is empty. Replace it.")
    return data


def _missing(path: Path) -> ImageError:
    return ImageError(f"image {path} does not exist. Check the image folder, or take the image out of the annotations.")


def _check_whole(path: Path, data: bytes) -> None:
    """Refuses what OpenCV may decode in part only, without a word: files that were cut off."""
    tail = data[-64:].rstrip(b"\0\r\n")
    if data.startswith(_JPEG_START) and tail.endswith(_JPEG_END):
        return
    if data.startswith(_PNG_START) and _PNG_END in data[-64:]:
        return
    try:  # slower: other formats, and files with something behind their end
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {path} ({len(data):,} bytes) is truncated or damaged: {error}. Replace it.") from error
