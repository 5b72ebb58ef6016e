"""Whether image files are still those that the teacher saw when a cache was made."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.read.reader import TeacherCache, open_cache
from kdpipe.cache.store.location import Location
from kdpipe.pipelines.data.images import ImageError, image_digest
from kdpipe.pipelines.runtime.console import ProgressBar, plain

__all__ = ["compare_picture", "verify_pictures"]

_THREADS = 8
_BATCH = 256


def compare_picture(cache: TeacherCache, image_id: int, path: Path) -> None:
    """Compare a file's bytes with those that the teacher saw.

    Args:
        cache: Records the digests.
        image_id: Of the image.
        path: Its file.

    Raises:
        ImageError: they are others, or the file cannot be read.
    """
    cached_digest = cache.index(image_id, cache.spec.views[0]).file_digest
    if cached_digest and image_digest(path) != cached_digest:
        raise ImageError(
            f"image {path} is another picture than the one that the teacher saw: the bytes of the file have changed. "
            "Put back the picture that was cached, or cache the teacher again."
        )


def verify_pictures(location: Location, *, img_dir: Path | None, voc: Path | None, console: Console) -> bool:
    """Compare all images of a sound cache with those that the teacher saw, and print what differs.

    Args:
        location: Of the cache.
        img_dir: Where the images moved.
        voc: Where the VOC folder moved that they are of.
        console: Where all is shown.

    Returns:
        False where an image differs or is missing. True also where none is at hand, which is said.

    Raises:
        KdpipeError: The folder that was named does not exist.
    """
    cache = open_cache(location)
    named_folder = img_dir or (voc and voc / "JPEGImages")
    folder = named_folder or _recorded_folder(cache)
    if folder is None or not folder.is_dir():
        if named_folder is not None:
            raise KdpipeError(f"image folder {named_folder} does not exist. Say where the images of {location} are.")
        where = f" is not there: {folder}" if folder else " is not recorded"
        console.print(
            plain(f"The images were not compared: their folder{where}. Say where they are: --img-dir."), markup=False
        )
        return True
    image_ids = [
        image_id for image_id in cache.image_ids.tolist() if cache.index(image_id, cache.spec.views[0]).file_digest
    ]
    if not image_ids:
        console.print("The images were not compared: the cache does not record their digests.")
        return True
    problems = _differences(cache, image_ids, folder, console)
    if problems:
        console.print(
            plain(
                f"{len(problems)} of {len(image_ids)} images are not as the teacher saw them, the first: {problems[0]}"
            ),
            markup=False,
        )
    else:
        console.print(plain(f"The {len(image_ids)} images in {folder} are those that the teacher saw."), markup=False)
    return not problems


def _recorded_folder(cache: TeacherCache) -> Path | None:
    data = cache.metadata.get("data")
    if not isinstance(data, dict):
        return None
    if isinstance(data.get("img_dir"), str):
        return Path(data["img_dir"])
    return Path(data["voc"]) / "JPEGImages" if isinstance(data.get("voc"), str) else None


def _differences(cache: TeacherCache, ids: Sequence[int], folder: Path, console: Console) -> list[str]:
    def compare(image_id: int) -> str | None:
        name = cache.index(image_id, cache.spec.views[0]).file_name
        try:
            compare_picture(cache, image_id, folder / name)
        except ImageError as error:
            return str(error)
        return None

    problems: list[str] = []
    start = time.perf_counter()
    with ProgressBar(console, "compare images", len(ids)) as progress, ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(ids), _BATCH):
            batch = ids[first : first + _BATCH]
            problems += [problem for problem in pool.map(compare, batch) if problem]
            done = first + len(batch)
            progress.update(done, f"{done / (time.perf_counter() - start):.0f} images/s")
    return problems
