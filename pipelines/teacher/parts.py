"""From images to committed parts of a cache, one part after the other."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from kdpipe.cache.plan import ImageInfo, raw_bytes
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.write.part_writer import PartWriter
from kdpipe.cache.write.writer import CacheWriter
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.images import ImageError, load_picture
from kdpipe.pipelines.teacher.pixel_pipeline import NetworkInput
from kdpipe.pipelines.teacher.teacher import Teacher

__all__ = ["PartMaker"]

_READERS = {"cpu": 1, "cuda": 4}  # threads; a GPU asks for images much faster
_READ_AHEAD = 4  # images per thread


@dataclass(frozen=True)
class _Seen:
    """An image as the teacher sees it in each view, and digest and note of its `Picture`."""

    views: dict[str, NetworkInput]
    digest: int
    note: str


@dataclass(frozen=True)
class PartMaker:
    """A teacher, its data and the cache that it fills.

    Attributes:
        teacher: Runs on its device.
        data: Images and annotations, in the teacher's labels.
        writer: Of the cache.
        missing: Parts that were not committed when it was made; empty where another process knows them.
        skip_bad_images: Go on past unreadable images, and record them.
    """

    teacher: Teacher
    data: DetectionData
    writer: CacheWriter
    missing: Sequence[int]
    skip_bad_images: bool

    def fill(self, index: int, say: Callable[[str], None], show: Callable[[int, int], None]) -> ExitStack:
        """Ask the teacher about all images of a part.

        Args:
            index: Of the part.
            say: Is given a line for people about an image.
            show: Is called after each image, with 1 and its raw bytes; may raise to end the work.

        Returns:
            Holds the part, which is committed when it is closed.

        Raises:
            KdpipeError: An image is bad, or the part cannot be written.
        """
        with ExitStack() as stack:
            part = stack.enter_context(self.writer.part(index))
            images = [self.data.images[i] for i in self.writer.parts[index]]
            for info, image in _read_ahead(self.teacher, images, self.data.img_dir, self.writer.spec):
                if not isinstance(image, ImageError):
                    if image.note and self.skip_bad_images:
                        say(f"Warning: used as decoded: {image.note}")
                    self._add(part, info, image)
                    show(1, sum(raw_bytes([info], self.writer.spec).values()))
                elif self.skip_bad_images:
                    say(f"skipped: {image}")
                    part.skip(info.image_id, info.file_name, str(image))
                    show(1, 0)
                else:
                    raise image
            return stack.pop_all()

    def _add(self, part: PartWriter, info: ImageInfo, image: _Seen) -> None:
        """Ask the teacher about an image in all views, and add the answers to a part."""
        spec = self.writer.spec
        boxes, labels = self.data.gt_boxes(info.image_id), self.data.gt_labels(info.image_id)
        ask = partial(self.teacher.record, spec=spec, image_id=info.image_id, file_name=info.file_name)
        for view, pixels in image.views.items():
            part.add(ask(pixels, boxes, labels, view=view, file_digest=image.digest))


def _read_ahead(
    teacher: Teacher, images: Sequence[ImageInfo], folder: Path, spec: CacheSpec
) -> Iterator[tuple[ImageInfo, _Seen | ImageError]]:
    """Decode and resize images on threads, a few ahead of the teacher; an unreadable one is given as its error."""

    def read(info: ImageInfo) -> _Seen | ImageError:
        try:
            size = (info.height, info.width)
            picture = load_picture(folder / info.file_name, size, spec.scale, teacher.pixels.decoding)
        except ImageError as error:
            return error
        views = {view: teacher.network_input(picture.pixels, spec.scale, view == "hflip") for view in spec.views}
        return _Seen(views, picture.digest, picture.note)

    threads = _READERS[teacher.device.type]
    with ThreadPoolExecutor(threads, thread_name_prefix="kdpipe-read") as pool:
        ahead: deque[Future[_Seen | ImageError]] = deque()
        waiting = iter(images)
        for info in images:
            ahead.extend(pool.submit(read, x) for x in islice(waiting, _READ_AHEAD * threads - len(ahead)))
            yield info, ahead.popleft().result()
