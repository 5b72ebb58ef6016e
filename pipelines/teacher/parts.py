"""From images to committed parts of a cache, one part after the other."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from kdpipe.cache.errors import KdpipeError
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

    def reader(self) -> "ReadAhead":
        """What reads images for `fill`."""
        return ReadAhead(self.teacher, self.data.img_dir, self.writer.spec)

    def fill(
        self,
        index: int,
        reader: "ReadAhead",
        say: Callable[[str], None],
        show: Callable[[int, int], None],
        following: int | None = None,
    ) -> ExitStack:
        """Ask the teacher about all images of a part.

        Args:
            index: Of the part.
            reader: Of its images.
            say: Is given a line for people about an image.
            show: Is called after each image, with 1 and its raw bytes; may raise to end the work.
            following: The part that is likely filled next: its first images are read while the last of this one are
                with the teacher.

        Returns:
            Holds the part, which is committed when it is closed.

        Raises:
            KdpipeError: An image is bad, or the part cannot be written.
        """
        with ExitStack() as stack:
            part = stack.enter_context(self.writer.part(index))
            later = [] if following is None else self._images(following)
            for info, image in reader.read(self._images(index), later):
                if not isinstance(image, ImageError):
                    if image.note and self.skip_bad_images:
                        say(f"Warning: used as decoded: {image.note}")
                    self._add(part, info, image)
                    show(1, sum(raw_bytes([info], self.writer.spec).values()))
                elif self.skip_bad_images:
                    self._check_folder()
                    say(f"skipped: {image}")
                    part.skip(info.image_id, info.file_name, str(image))
                    show(1, 0)
                else:
                    raise image
            return stack.pop_all()

    def _check_folder(self) -> None:
        """Make sure that images are left out one by one, and not because their folder is wrong, or gone.

        Raises:
            KdpipeError: None of the images is there.
        """
        folder, images = self.data.img_dir, self.data.images
        if not any((folder / image.file_name).is_file() for image in images):  # mostly the first is
            raise KdpipeError(
                f"None of the {len(images)} images of {self.data.ann_file} is in {folder}: is it the right folder "
                "(--img-dir), and is its disk there? What is written already is kept."
            )

    def _images(self, index: int) -> list[ImageInfo]:
        """Those of a part."""
        return [self.data.images[i] for i in self.writer.parts[index]]

    def _add(self, part: PartWriter, info: ImageInfo, image: _Seen) -> None:
        """Ask the teacher about an image in all views, and add the answers to a part."""
        spec = self.writer.spec
        boxes, labels = self.data.gt_boxes(info.image_id), self.data.gt_labels(info.image_id)
        ask = partial(self.teacher.record, spec=spec, image_id=info.image_id, file_name=info.file_name)
        for view, pixels in image.views.items():
            part.add(ask(pixels, boxes, labels, view=view, file_digest=image.digest))


class ReadAhead:
    """Decodes and resizes images on threads, a few ahead of the teacher; a context manager.

    Args:
        teacher: What it sees is made.
        folder: Of the images.
        spec: Of the cache: scale and views.
    """

    def __init__(self, teacher: Teacher, folder: Path, spec: CacheSpec) -> None:
        self._teacher, self._folder, self._spec = teacher, folder, spec
        threads = _READERS[teacher.device.type]
        self._most = _READ_AHEAD * threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kdpipe-read")
        self._ahead: dict[int, Future[_Seen | ImageError]] = {}  # by image id

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(
        self, images: Sequence[ImageInfo], following: Sequence[ImageInfo]
    ) -> Iterator[tuple[ImageInfo, _Seen | ImageError]]:
        """Images as the teacher sees them; an unreadable one is given as its error.

        Args:
            images: Which.
            following: Asked for next, as far as is known: these are begun at the end.
        """
        wanted = {image.image_id for image in images}
        self._ahead = {image_id: begun for image_id, begun in self._ahead.items() if image_id in wanted}
        waiting = iter([image for image in (*images, *following) if image.image_id not in self._ahead])
        for image in images:
            for more in islice(waiting, self._most - len(self._ahead)):
                self._ahead[more.image_id] = self._pool.submit(self._read, more)
            yield image, self._next(image)

    def _next(self, image: ImageInfo) -> _Seen | ImageError:
        return self._ahead.pop(image.image_id).result()

    def _read(self, image: ImageInfo) -> _Seen | ImageError:
        spec, teacher = self._spec, self._teacher
        try:
            size = (image.height, image.width)
            picture = load_picture(self._folder / image.file_name, size, spec.scale, teacher.pixels.decoding)
        except ImageError as error:
            return error
        views = {view: teacher.network_input(picture.pixels, spec.scale, view == "hflip") for view in spec.views}
        return _Seen(views, picture.digest, picture.note)
