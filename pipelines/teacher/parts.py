"""From images to committed parts of a cache, one part after the other."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kdpipe.cache.plan import ImageInfo, raw_bytes
from kdpipe.cache.write.part_writer import PartWriter
from kdpipe.cache.write.writer import CacheWriter
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.data.decoding import Decoding
from kdpipe.pipelines.data.images import ImageError, Picture, load_picture
from kdpipe.pipelines.teacher.teacher import Teacher

__all__ = ["PartMaker"]

_READ_AHEAD = 4


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
            decoding = self.teacher.pixels.decoding
            for info, image in _read_ahead(images, self.data.img_dir, self.writer.spec.scale, decoding):
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

    def _add(self, part: PartWriter, info: ImageInfo, image: Picture) -> None:
        """Ask the teacher about an image in all views, and add the answers to a part."""
        spec = self.writer.spec
        boxes, labels = self.data.gt_boxes(info.image_id), self.data.gt_labels(info.image_id)
        ask = partial(self.teacher.record, image.pixels, boxes, labels, spec=spec)
        for view in spec.views:
            part.add(ask(image_id=info.image_id, file_name=info.file_name, view=view, file_digest=image.digest))


def _read_ahead(
    images: Sequence[ImageInfo], folder: Path, scale: tuple[int, int], decoding: Decoding
) -> Iterator[tuple[ImageInfo, Picture | ImageError]]:
    """Decode images on a thread, a few ahead of the teacher; an unreadable one is given as its error."""

    def read(info: ImageInfo) -> Picture | ImageError:
        try:
            return load_picture(folder / info.file_name, (info.height, info.width), scale, decoding)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdpipe-read") as pool:
        ahead: list[Future[Picture | ImageError]] = [pool.submit(read, x) for x in images[:_READ_AHEAD]]
        for i, info in enumerate(images):
            if i + _READ_AHEAD < len(images):
                ahead.append(pool.submit(read, images[i + _READ_AHEAD]))
            yield info, ahead.pop(0).result()
