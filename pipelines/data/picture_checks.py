"""All images of a data set, checked before anything is computed from them; bad ones are refused, or left out."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from kdpipe.cache.plan import ImageInfo
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.decoding import DEFAULT, Decoding
from kdpipe.pipelines.data.images import ImageError, check_picture, load_picture
from kdpipe.pipelines.runtime.console import ProgressBar, plain

__all__ = ["usable_images"]

_THREADS = 8  # a network disk answers many at a time
_BATCH = 256
_NAMED = 20  # incomplete images in one warning


@dataclass(frozen=True)
class _Checks:
    """What was found, in the order of the images.

    Attributes:
        problems: image -> what is wrong with it.
        notes: what is noteworthy of the images that can be used.
    """

    problems: dict[ImageInfo, str]
    notes: list[str]


def usable_images(
    data: DetectionData,
    console: Console,
    *,
    scale: tuple[int, int] | None = None,
    decoding: Decoding = DEFAULT,
    skip: bool = False,
) -> DetectionData:
    """Check that all images exist, are images, are whole, and have the size that is annotated.

    By their headers and ends; where bad ones may be left out, every image is decoded once, so that none is found bad
    later.

    Args:
        data: The data set.
        console: Where progress and notes are shown.
        scale: `(w, h)` that they will be resized into, ratio kept, where that is known.
        decoding: How they will be decoded.
        skip: Leave bad images out, and say so.

    Returns:
        The data set without its bad images.

    Raises:
        ImageError: There is a bad image; where they may be left out, there are only bad ones.
    """
    check = _decode if skip else check_picture

    def check_image(image: ImageInfo) -> str:
        return check(data.img_dir / image.file_name, (image.height, image.width), scale, decoding)

    result = _check_all(data.images, check_image, console)
    if result.notes:
        lines = [f"Warning: {_count(len(result.notes), data)} incomplete and used as decoded:", *result.notes[:_NAMED]]
        if len(result.notes) > _NAMED:
            lines.append(f"and {len(result.notes) - _NAMED} more")
        console.print("\n  ".join(map(plain, lines)), markup=False)
    if not result.problems:
        return data
    first, count = next(iter(result.problems.values())), len(result.problems)
    if not skip:
        more = f" It is the first of {count} bad images of {len(data.images)}." if count > 1 else ""
        raise ImageError(f"{first}{more} Or leave bad images out: --skip-bad-images.")
    if count == len(data.images):
        raise ImageError(f"All {count} images of {data.ann_file} are bad, the first: {first}")
    console.print(plain(f"{_count(count, data)} bad and left out, the first: {first}"), markup=False)
    return data.only([image.image_id for image in data.images if image not in result.problems])


def _decode(path: Path, expected: tuple[int, int], scale: tuple[int, int] | None, decoding: Decoding) -> str:
    return load_picture(path, expected, scale, decoding).note


def _check_all(images: Sequence[ImageInfo], check: Callable[[ImageInfo], str], console: Console) -> _Checks:
    problems: dict[ImageInfo, str] = {}
    notes: list[str] = []

    def run(image: ImageInfo) -> str | ImageError:
        try:
            return check(image)
        except ImageError as error:
            return error

    start = time.perf_counter()
    threads = min(_THREADS, 4 * (os.cpu_count() or 1))
    with ProgressBar(console, "check images", len(images)) as progress, ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(images), _BATCH):
            batch = images[first : first + _BATCH]
            for image, result in zip(batch, pool.map(run, batch), strict=True):
                if isinstance(result, ImageError):
                    problems[image] = str(result)
                elif result:
                    notes.append(result)
            done = first + len(batch)
            progress.update(done, f"{done / (time.perf_counter() - start):.0f} images/s")
    return _Checks(problems, notes)


def _count(count: int, data: DetectionData) -> str:
    return f"{count} of the {len(data.images)} images of {data.ann_file.name} {'is' if count == 1 else 'are'}"
