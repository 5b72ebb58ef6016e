"""Writes one part: in plan order, on a thread of its own, published in one atomic act."""

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from zarr.storage import LocalStore

from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.layout import PER, index_columns, part_layout
from kdpipe.cache.format.record import is_whole, read_part_record, write_record
from kdpipe.cache.format.zarr_arrays import WrittenFiles
from kdpipe.cache.plan import ImageInfo
from kdpipe.cache.records import TeacherRecord
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.store.location import Location, part_key
from kdpipe.cache.write.arrays import ArrayWriter, encoding_threads
from kdpipe.cache.write.encode import EncodedRecord, Encoding, start_encoding

_QUEUE_SIZE = 4


class PartWriter:
    """Context manager that writes one part. A clean exit commits it; an exception discards it.

    Records may come in any order; they are stored in that of the plan (images, then views), so that a part has the same
    bytes however it was made. Those that come early are held in memory until it is their turn. A thread writes,
    behind a short queue; its errors surface in the next `add`, or on exit.

    Args:
        location: of the cache.
        index: number of the part.
        span: indices of the part's images in the plan.
        images: the part's images.
        spec: of the cache.
        root: digest of the cache's root.
    """

    def __init__(
        self, location: Location, index: int, span: range, images: Sequence[ImageInfo], spec: CacheSpec, root: str
    ) -> None:
        self._location, self._index, self._span, self._spec, self._root = location, index, span, spec, root
        self._order = [(image.image_id, view) for image in images for view in spec.views]
        self._names = {image.image_id: image.file_name for image in images}
        self._claimed: set[tuple[int, str]] = set()
        self._early: dict[tuple[int, str], Encoding | None] = {}
        self._next = 0
        self._skipped: dict[int, dict[str, Any]] = {}
        # Not `queue.Queue`: Ctrl-C within its `put` may leave the thread asleep. `_room` holds its free places.
        self._queue: queue.SimpleQueue[Encoding | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(_QUEUE_SIZE):
            self._room.put(None)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "PartWriter":
        self._stack = contextlib.ExitStack()
        with self._location.explained(f"Writing part {self._index}"):
            self._folder = self._stack.enter_context(self._location.staging(part_key(self._index)))
            threads = self._stack.enter_context(encoding_threads())
            self._files = _PartFiles(self._folder / "new", self._spec, threads)
        self._thread = threading.Thread(target=self._work, name=f"kdpipe-part-{self._index}", daemon=True)
        self._thread.start()
        return self

    def add(self, record: TeacherRecord) -> None:
        """Add one image in one view.

        Raises:
            CacheError: the image is not of this part or was given before, the record does not fit the specification, or
                writing an earlier record failed, or one from a GPU was not finite.
        """
        key = (record.image_id, record.view)
        self._claim([key])
        encoding = start_encoding(record, self._spec)
        if encoding.copied is None:
            encoding.check()  # the thread looks at what is still coming from a GPU
        self._put(key, encoding)

    def skip(self, image_id: int, file_name: str, reason: str) -> None:
        """Record that an image, in all its views, could not be read.

        Args:
            image_id: of the image.
            file_name: path relative to the image folder.
            reason: one line for people, the same whenever the same image fails.
        """
        keys = [(image_id, view) for view in self._spec.views]
        self._claim(keys)
        self._skipped[image_id] = {"image_id": image_id, "file_name": file_name, "reason": reason}
        for key in keys:
            self._put(key, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stop(kind is not None)
            if kind is None:
                self._raise_error()
                missing = [key for key in self._order if key not in self._claimed]
                if missing:
                    raise CacheError(
                        f"Part {self._index} ended with {len(missing)} of {len(self._order)} records missing, first "
                        f"image {missing[0][0]} in view {missing[0][1]}: add or skip every image of the part."
                    )
                with self._location.explained(f"Writing part {self._index}"):
                    self._commit()
        finally:
            self._stack.close()

    def _claim(self, keys: list[tuple[int, str]]) -> None:
        """Check that the records are expected, and note that they came."""
        self._raise_error()
        for key in keys:
            image_id, view = key
            if image_id not in self._names or view not in self._spec.views:
                raise CacheError(
                    f"Image {image_id} in view {view!r} does not belong to part {self._index}, which has "
                    f"{len(self._names)} images in the views {', '.join(self._spec.views)}."
                )
            if key in self._claimed:
                raise CacheError(f"Image {image_id} in view {view!r} was given to part {self._index} twice.")
        self._claimed.update(keys)

    def _put(self, key: tuple[int, str], encoding: Encoding | None) -> None:
        """Hand over the record, and those that waited for it, in plan order."""
        self._early[key] = encoding
        while self._next < len(self._order) and self._order[self._next] in self._early:
            ready = self._early.pop(self._order[self._next])
            self._next += 1
            if ready is not None:
                self._room.get()
                self._queue.put(ready)

    def _work(self) -> None:
        """The thread: writes until told to stop; after an error it only empties the queue."""
        while (encoding := self._queue.get()) is not None:
            self._room.put(None)
            if self._error is None:
                try:
                    self._files.append(encoding.wait())
                except BaseException as error:
                    self._error = error

    def _stop(self, aborted: bool) -> None:
        if aborted and self._error is None:
            self._error = CacheError(f"Part {self._index} was given up.")
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            with self._location.explained(f"Writing part {self._index}"):
                raise self._error

    def _commit(self) -> None:
        files = self._files.close()
        skipped = [self._skipped[image_id] for image_id in self._names if image_id in self._skipped]
        content = {
            "part": self._index,
            "images": [self._span.start, self._span.stop],
            "rows": self._files.rows,
            "skipped": skipped,
            "root": self._root,
        }
        write_record(self._folder, content, files)
        key = part_key(self._index)
        while not self._location.publish(self._folder, key):
            record = read_part_record(self._location, self._index, self._span, self._root)
            if record is not None and is_whole(self._location, key, record):
                return  # another process committed the same part first
            self._location.discard(key)


class _PartFiles:
    """The arrays of a part in the making."""

    def __init__(self, folder: Path, spec: CacheSpec, threads: Executor) -> None:
        self._files = WrittenFiles(LocalStore(folder))
        self._layout = part_layout(spec)
        self._columns = index_columns(spec)
        self._arrays = {name: ArrayWriter(self._files, name, layout, threads) for name, layout in self._layout.items()}
        self._counts: Counter[str] = Counter()

    @property
    def rows(self) -> dict[str, int]:
        """How many views, boxes, objects, elements and bytes there are: the rows of the arrays."""
        return {per: self._counts[per] for per in PER}

    def append(self, encoded: EncodedRecord) -> None:
        """Write one record."""
        blocks = dict(encoded.rows)
        if encoded.features is not None:
            blocks["features"] = encoded.features
        if encoded.scale is not None:
            blocks["scale"] = encoded.scale[None]
        blocks["file_names"] = np.frombuffer(encoded.file_name, dtype=np.uint8)
        counts = Counter({self._layout[name].per: len(block) for name, block in blocks.items()} | {"view": 1})
        entries = dict(encoded.index)
        for per, start, stop in (("box", "box_start", "box_stop"), ("object", "object_start", "object_stop")):
            entries |= {start: self._counts[per], stop: self._counts[per] + counts[per]}
        entries |= {"element_start": self._counts["element"], "name_start": self._counts["byte"]}
        entries["name_stop"] = self._counts["byte"] + counts["byte"]
        blocks["index"] = np.array([[entries[column] for column in self._columns]], dtype=np.int64)
        for name, block in blocks.items():
            self._arrays[name].append(block)
        self._counts += counts

    def close(self) -> dict[str, tuple[int, str]]:
        """Finish all arrays; size and digest of each file."""
        for array in self._arrays.values():
            array.close()
        return self._files.files
