"""Images from disk, exactly as mmdet reads them, and never half of one."""

import errno
import stat
from dataclasses import dataclass
from pathlib import Path

import cv2
import mmcv
import numpy as np
import numpy.typing as npt

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.identity import digest_file
from kdpipe.cache.views import ViewError, input_size
from kdpipe.pipelines.data.decoding import DEFAULT, Decoding
from kdpipe.pipelines.data.image_headers import read_header
from kdpipe.pipelines.data.truncation import IncompleteError, completed, lost_share

__all__ = [
    "ImageError",
    "Picture",
    "check_picture",
    "image_digest",
    "image_problem",
    "image_size",
    "load_picture",
    "read_image",
]

# What is wrong is said once, in our words.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# Errors of reading after which an image may be read well another time.
_OF_THE_DISK = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ENODEV", "ENXIO", "ENOMEM", "EMFILE", "ENFILE", "EINTR", "EAGAIN", "EBUSY", "EREMOTEIO"),
        *("ENOTCONN", "ECONNRESET", "ECONNABORTED", "ESHUTDOWN", "ETIMEDOUT", "ENOLINK"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
    )
    if hasattr(errno, name)
)
_MOST_LOST = 0.05  # of the pixels of a JPEG that was cut off


class ImageError(KdpipeError):
    """An image is missing, unreadable, truncated, or of another size than its annotation says."""


@dataclass(frozen=True)
class Picture:
    """An image file that was read.

    Attributes:
        pixels: ``[H, W, 3]`` uint8, BGR, as mmdet's LoadImageFromFile gives them of a file that has an end.
        digest: of the file's bytes, as the index of a cache keeps it.
        note: what is not as it should be, and does not keep it from being used; mostly empty.
    """

    pixels: npt.NDArray[np.uint8]
    digest: int
    note: str


def load_picture(
    path: str | Path,
    expected: tuple[int, int] | None = None,
    scale: tuple[int, int] | None = None,
    decoding: Decoding = DEFAULT,
) -> Picture:
    """Reads an image file once, and checks it.

    Args:
        path: the file.
        expected: ``(height, width)`` in pixels that the annotation says, of the image as it is decoded.
        scale: ``(width, height)`` of the resizing behind it, which keeps the ratio and must leave a pixel.
        decoding: options of mmdet's LoadImageFromFile; by default mmdet's.

    Raises:
        ImageError: names the file and what is wrong with it.
    """
    path = Path(path)
    data = _bytes(path)
    try:
        share = lost_share(data)
    except IncompleteError as error:
        raise ImageError(f"image {path} ({len(data):,} bytes) is truncated or damaged: {error}. Replace it.") from error
    if share is not None and share > _MOST_LOST:
        raise ImageError(
            f"image {path} ({len(data):,} bytes) is truncated: {100 * share:.0f} % of its pixels are lost. Replace it."
        )
    pixels = _decode(path, data if share is None else completed(data), decoding)
    height, width = pixels.shape[:2]
    _check_size(path, (height, width), expected, scale, decoding)
    note = "" if share is None else f"image {path} lacks its last bytes ({100 * share:.1f} % of its pixels are lost)"
    return Picture(pixels, digest_file(data), note)


def read_image(
    path: str | Path, expected: tuple[int, int] | None = None, decoding: Decoding = DEFAULT
) -> npt.NDArray[np.uint8]:
    """The pixels alone of `load_picture`.

    Args:
        path: The file.
        expected: (height, width) in pixels that it has to have.
        decoding: How mmdet reads it.
    """
    return load_picture(path, expected, decoding=decoding).pixels


def check_picture(
    path: str | Path,
    expected: tuple[int, int],
    scale: tuple[int, int] | None = None,
    decoding: Decoding = DEFAULT,
) -> str:
    """Checks a file by its header and its end, well under a millisecond; reads all of it where these leave doubts.

    Args:
        path: the file.
        expected: as `load_picture` takes it.
        scale: as `load_picture` takes it.
        decoding: as `load_picture` takes it.

    Returns:
        The note of `Picture`.

    Raises:
        ImageError: as `load_picture` does, but for damage between header and end.
    """
    path = Path(path)
    _check_file(path)
    try:
        header = read_header(path, decoding.turns)
    except OSError as error:
        raise _unreadable(path, error) from error
    if header is None or not header.whole:
        return load_picture(path, expected, scale, decoding).note
    _check_size(path, header.size, expected, scale, decoding)
    return ""


def image_problem(path: str | Path, width: int, height: int) -> str | None:
    """What is wrong with an image, or None.

    Args:
        path: The file.
        width: Pixels that it has to have.
        height: Pixels that it has to have.
    """
    try:
        load_picture(path, (height, width))
    except ImageError as error:
        return str(error)
    return None


def image_digest(path: str | Path) -> int:
    """Digest of a file's bytes, as the index of a cache keeps it.

    Raises:
        ImageError: the file is missing, empty or cannot be read.
    """
    return digest_file(_bytes(Path(path)))


def image_size(path: str | Path) -> tuple[int, int]:
    """``(height, width)`` in pixels from the header of an image, EXIF orientation applied.

    Raises:
        ImageError: the file is missing or no image.
    """
    path = Path(path)
    _check_file(path)
    try:
        header = read_header(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if header is not None:
        return header.size
    height, width = load_picture(path).pixels.shape[:2]
    return height, width


def _decode(path: Path, data: bytes, decoding: Decoding) -> npt.NDArray[np.uint8]:
    reason = ""
    try:
        image: npt.NDArray[np.uint8] | None = mmcv.imfrombytes(
            data, flag=decoding.color_type, backend=decoding.imdecode_backend
        )
    except cv2.error as error:
        image, reason = None, f" ({error.err})"
    except (OSError, ValueError, SyntaxError) as error:  # of Pillow
        image, reason = None, f" ({error})"
    if image is None:
        raise ImageError(
            f"image {path} ({len(data):,} bytes) cannot be decoded{reason}: it is truncated, damaged or no image. "
            "Replace it."
        )
    return image


def _check_size(
    path: Path,
    size: tuple[int, int],
    expected: tuple[int, int] | None,
    scale: tuple[int, int] | None,
    decoding: Decoding,
) -> None:
    """Both sizes are ``(height, width)``."""
    if expected is not None and size != tuple(expected):
        raise ImageError(
            f"image {path} is {size[1]} x {size[0]} pixels (its EXIF orientation "
            f"{'applied' if decoding.turns else 'ignored, as the config says'}), but the annotations say "
            f"{expected[1]} x {expected[0]}: its boxes would be misplaced. Correct width and height in "
            "the annotation file, or put the image in place that was annotated."
        )
    if scale is None:
        return
    try:
        input_size(size, scale)
    except ViewError as error:
        raise ImageError(
            f"image {path} is {size[1]} x {size[0]} pixels: resized into {scale[0]} x {scale[1]}, nothing is left of "
            "it. Take it out of the annotations, or choose a larger --scale."
        ) from error


def _bytes(path: Path) -> bytes:
    _check_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    return data


def _check_file(path: Path) -> None:
    """Refuses what has no bytes to read: nothing, folders, pipes, empty files."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise ImageError(
            f"image {path} does not exist. Check the image folder, or take the image out of the annotations."
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:  # a NUL in the name
        raise ImageError(f"image {str(path)!r} cannot be read: {error}. Correct its file_name.") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise ImageError(f"image {path} is {kind}. Check the image folder and the file_name in the annotations.")
    if not status.st_size:
        raise ImageError(f"image {path} is empty. Replace it.")


def _unreadable(path: Path, error: OSError) -> KdpipeError:
    """An `ImageError`, or what is said of a disk that failed, which no image is left out for."""
    reason = error.strerror or error
    if error.errno in _OF_THE_DISK:
        return KdpipeError(
            f"image {path} cannot be read ({reason}): that says nothing of the image, but of the disk, network or "
            "machine. Run the same command again when these are sound; what is written is kept."
        )
    return ImageError(f"image {path} cannot be read: {reason}.")
