"""Writes one part: in plan order, on a thread of its own, published in one atomic act."""

import os
import queue
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.record import check_sizes, part_folder, read_part_record, write_record
from kdpipe.cache.plan import ImageInfo, level_shapes
from kdpipe.cache.records import TeacherRecord
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.store.files import FileRecord, discard, explained, publish, temporary_folder
from kdpipe.cache.write.arrays import ArrayWriter, rows_per_chunk
from kdpipe.cache.write.encode import EncodedRecord, encode_record, index_columns

# Elements per chunk of features: at most and at least, and so many chunks per image in between.
_MOST_ELEMENTS, _FEWEST_ELEMENTS, _CHUNKS_PER_IMAGE = 1 << 20, 1 << 14, 8
# Raw bytes per chunk: rows of an image are read together, rows of roi_features also by selection.
_ROW_CHUNK_BYTES = 128 << 10
_ROI_CHUNK_BYTES = 64 << 10
_QUEUE_SIZE = 4
_ATTRIBUTES: dict[str, dict[str, Any]] = {"file_names": {"encoding": "utf-8"}}
_ENCODERS = min(8, os.cpu_count() or 1)


class PartWriter:
    """Context manager that writes one part. A clean exit commits it; an exception discards it.

    Records may come in any order; they are stored in that of the plan (images, then views), so that a part has the same
    bytes however it was made. Those that come early are held in memory until it is their turn. A thread writes,
    behind a short queue, and others compress for it; their errors surface in the next `add`, or on exit.

    Args:
        cache: path of the cache.
        index: number of the part.
        span: indices of the part's images in the plan.
        images: the part's images.
        spec: of the cache.
        root: digest of the cache's root.
    """

    def __init__(
        self, cache: Path, index: int, span: range, images: Sequence[ImageInfo], spec: CacheSpec, root: str
    ) -> None:
        self._cache, self._index, self._span, self._spec, self._root = cache, index, span, spec, root
        self._final = part_folder(cache, index)
        self._order = [(image.image_id, view) for image in images for view in spec.views]
        self._names = {image.image_id: image.file_name for image in images}
        self._seen: set[tuple[int, str]] = set()
        self._early: dict[tuple[int, str], EncodedRecord | None] = {}
        self._next = 0
        self._skipped: dict[int, dict[str, Any]] = {}
        self._queue: queue.Queue[EncodedRecord | None] = queue.Queue(_QUEUE_SIZE)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "PartWriter":
        with explained(f"Writing part {self._index}", self._cache):
            self._folder = temporary_folder(self._final)
            self._pool = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="kdpipe-encode")
            try:
                self._files = _PartFiles(self._folder, self._spec, self._pool)
            except BaseException:
                shutil.rmtree(self._folder, ignore_errors=True)
                raise
        self._thread = threading.Thread(target=self._work, name=f"kdpipe-part-{self._index}", daemon=True)
        self._thread.start()
        return self

    def add(self, record: TeacherRecord) -> None:
        """Add one image in one view.

        Raises:
            CacheError: the image is not of this part or was given before, the record does not fit the specification, or
                writing an earlier record failed.
        """
        key = (record.image_id, record.view)
        self._claim([key])
        self._put(key, encode_record(record, self._spec))

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
                missing = [key for key in self._order if key not in self._seen]
                if missing:
                    raise CacheError(
                        f"Part {self._index} ended with {len(missing)} of {len(self._order)} records missing, first "
                        f"image {missing[0][0]} in view {missing[0][1]}: add or skip every image of the part."
                    )
                with explained(f"Writing part {self._index}", self._cache):
                    self._commit()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._files.abort()
            shutil.rmtree(self._folder, ignore_errors=True)

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
            if key in self._seen:
                raise CacheError(f"Image {image_id} in view {view!r} was given to part {self._index} twice.")
        self._seen.update(keys)

    def _put(self, key: tuple[int, str], encoded: EncodedRecord | None) -> None:
        """Hand over the record, and those that waited for it, in plan order."""
        self._early[key] = encoded
        while self._next < len(self._order) and self._order[self._next] in self._early:
            ready = self._early.pop(self._order[self._next])
            self._next += 1
            if ready is not None:
                self._queue.put(ready)

    def _work(self) -> None:
        """The thread: writes until told to stop; after an error it only empties the queue."""
        while (encoded := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._files.append(encoded)
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
            with explained(f"Writing part {self._index}", self._cache):
                raise self._error

    def _commit(self) -> None:
        files = self._files.close()
        skipped = [self._skipped[image_id] for image_id in self._names if image_id in self._skipped]
        content = {
            "part": self._index,
            "images": [self._span.start, self._span.stop],
            "rows": self._files.rows,
            "rois": self._files.rois,
            "skipped": skipped,
            "root": self._root,
        }
        write_record(self._folder, content, files)
        while not publish(self._folder, self._final):
            record = read_part_record(self._cache, self._index, self._span, self._root)
            if record is not None and not check_sizes(self._final, record):
                return  # another process committed the same part first
            discard(self._final)


def array_layout(spec: CacheSpec) -> dict[str, tuple[tuple[int, ...], str, int]]:
    """Shape of one row, storage type, and rows per chunk of each array of a part."""
    layout: dict[str, tuple[tuple[int, ...], str, int]] = {}
    if "features" in spec.fields:
        layout["features"] = ((), spec.dtype, feature_chunk(spec))
        if spec.dtype == "int8":
            levels = (len(spec.strides), spec.channels)
            layout["scale"] = (levels, "float32", rows_per_chunk(levels, "float32", _ROW_CHUNK_BYTES))
    for name, (shape, dtype) in spec.box_arrays().items():
        target = _ROI_CHUNK_BYTES if name == "roi_features" else _ROW_CHUNK_BYTES
        layout[name] = (shape, dtype, rows_per_chunk(shape, dtype, target))
    layout["index"] = ((len(index_columns(spec)),), "int64", 1024)
    layout["file_names"] = ((), "uint8", 1 << 16)
    return layout


def feature_chunk(spec: CacheSpec) -> int:
    """Elements per chunk of features, a power of two. Images are read one by one: small ones want small chunks."""
    cells = sum(height * width for height, width in level_shapes(spec.scale, spec.strides))
    share = max(1, spec.channels * cells // _CHUNKS_PER_IMAGE)
    return min(_MOST_ELEMENTS, max(_FEWEST_ELEMENTS, 1 << (share.bit_length() - 1)))


class _PartFiles:
    """The arrays of a part in the making."""

    def __init__(self, folder: Path, spec: CacheSpec, pool: Executor) -> None:
        self.rows = self.rois = 0
        self._columns = index_columns(spec)
        self._elements = self._name_bytes = 0
        self._arrays: dict[str, ArrayWriter] = {}

        for name, (shape, dtype, chunk_rows) in array_layout(spec).items():
            attributes = _ATTRIBUTES.get(name, {}) | ({"columns": self._columns} if name == "index" else {})
            self._arrays[name] = ArrayWriter(folder / name, shape, dtype, chunk_rows, spec.codec, pool, attributes)

    def append(self, encoded: EncodedRecord) -> None:
        """Write one record."""
        elements = 0 if encoded.features is None else encoded.features.size
        rois = len(encoded.rows["boxes"])
        place = {"row_start": self.rois, "row_stop": self.rois + rois, "element_start": self._elements}
        place |= {"name_start": self._name_bytes, "name_stop": self._name_bytes + len(encoded.file_name)}
        entries = encoded.index | place
        for name, rows in encoded.rows.items():
            self._arrays[name].append(rows)
        if encoded.features is not None:
            self._arrays["features"].append(encoded.features)
        if encoded.scale is not None:
            self._arrays["scale"].append(encoded.scale[None])
        self._arrays["index"].append(np.array([[entries[column] for column in self._columns]], dtype=np.int64))
        self._arrays["file_names"].append(np.frombuffer(encoded.file_name, dtype=np.uint8))
        self.rows += 1
        self.rois += rois
        self._elements += elements
        self._name_bytes += len(encoded.file_name)

    def close(self) -> dict[str, FileRecord]:
        """Finish all arrays; size and digest of each file."""
        return {
            f"{name}/{file}": entry for name, array in self._arrays.items() for file, entry in array.close().items()
        }

    def abort(self) -> None:
        """Let go of all open files."""
        for array in self._arrays.values():
            array.abort()
