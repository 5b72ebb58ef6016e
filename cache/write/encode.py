"""What the teacher said of one image, checked and turned into the arrays that are stored."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdpipe.cache.errors import CacheError, present
from kdpipe.cache.format.index import row_fault
from kdpipe.cache.format.layout import Block
from kdpipe.cache.quantize import quantize, quantize4, quantize_rows
from kdpipe.cache.records import TeacherRecord
from kdpipe.cache.spec import FIELD_OF_ARRAY, VIEWS, CacheSpec
from kdpipe.cache.write.selection import choose_objects, merge_unlikely

_TORCH_DTYPE = {"float16": torch.float16, "float32": torch.float32}  # of the storage types that are not quantised
_QUANTIZE = {"int4": quantize4, "int8": quantize}


@dataclass(frozen=True)
class EncodedRecord:
    """Host arrays of one image in one view, independent of the tensors they came from.

    Attributes:
        index: row of the index by column; starts and stops are the writer's to fill in.
        file_name: utf-8.
        rows: per array with a row per box, [R, ...], or per box with RoI features, [P, ...].
        features: all stored levels one after the other, each (channel, y, x); None without features.
        scale: [L, C] float32, of int8 and int4 features.
    """

    index: dict[str, int]
    file_name: bytes
    rows: dict[str, Block]
    features: Block | None
    scale: npt.NDArray[np.float32] | None


@dataclass(frozen=True)
class Encoding:
    """A record that has been encoded on its own device; what comes from a GPU may still be on its way to the host.

    Attributes:
        index: as of `EncodedRecord`.
        file_name: the same.
        arrays: rows, features and scale, on the host; page-locked where they come from a GPU.
        finite: what to say of values that are not finite, and whether they are, Tensor[] bool on the host.
        copied: when all has come from the GPU; None where it is there.
    """

    index: dict[str, int]
    file_name: bytes
    arrays: dict[str, Tensor]
    finite: list[tuple[str, Tensor]]
    copied: torch.cuda.Event | None

    def check(self) -> None:
        """Refuse values that are not finite; of a record that has come.

        Raises:
            CacheError: a field holds some.
        """
        for message, is_finite in self.finite:
            if not is_finite:
                raise CacheError(message)

    def wait(self) -> EncodedRecord:
        """Wait for all of it; may be called on another thread.

        Raises:
            CacheError: as `check`.
        """
        arrays = self.arrays
        if self.copied is not None:
            self.copied.synchronize()
            arrays = {name: values.clone() for name, values in arrays.items()}  # page-locked memory is scarce
        self.check()
        rows = {name: values.numpy() for name, values in arrays.items()}
        return EncodedRecord(self.index, self.file_name, rows, rows.pop("features", None), rows.pop("scale", None))


def encode_record(record: TeacherRecord, spec: CacheSpec) -> EncodedRecord:
    """As `start_encoding`, and wait for it."""
    return start_encoding(record, spec).wait()


def start_encoding(record: TeacherRecord, spec: CacheSpec) -> Encoding:
    """Check a record against the specification, quantise it on its own device, and begin to copy it to the host.

    Args:
        record: from the teacher.
        spec: of the cache.

    Raises:
        CacheError: a field is missing, or has another shape than specified.
    """
    image = f"image {record.image_id} ({record.file_name}, view {record.view})"
    count = len(record.boxes)
    if not 0 <= record.num_proposals <= min(count - record.num_jittered, spec.proposals):
        raise CacheError(
            f"The record of {image} has {record.num_proposals} proposals among {count} boxes; the cache takes at most "
            f"{spec.proposals}."
        )
    if not 0 <= record.num_jittered <= spec.jittered:
        raise CacheError(
            f"The record of {image} has {record.num_jittered} jittered boxes; the cache takes at most {spec.jittered}."
        )
    host = _Host(image)
    if "features" in spec.fields:
        _encode_levels(host, record, spec)  # first: the others wait for the GPU, which has the box head to do meanwhile
    _encode_boxes(host, record, spec)
    if spec.object_arrays():
        _encode_objects(host, record, spec)
    index = {
        "image_id": record.image_id,
        "view": VIEWS.index(record.view),
        "height": record.original_size[0],
        "width": record.original_size[1],
        "input_height": record.input_size[0],
        "input_width": record.input_size[1],
        "num_proposals": record.num_proposals,
        "num_jittered": record.num_jittered,
        "file_digest": record.file_digest,
    }
    if "features" in spec.fields:
        for number, level in enumerate(record.features or ()):
            index |= {f"level{number}_height": int(level.shape[1]), f"level{number}_width": int(level.shape[2])}
    if fault := row_fault(index, spec):
        raise CacheError(f"The record of {image} is wrong: {fault}.")
    return Encoding(index, record.file_name.encode(), host.arrays, host.finite, host.copied())


class _Host:
    """Collects arrays on the host, whether they are finite, and when all has come.

    Args:
        image: what messages call it.
    """

    def __init__(self, image: str) -> None:
        self.image = image
        self.arrays: dict[str, Tensor] = {}
        self.finite: list[tuple[str, Tensor]] = []
        self._gpu: torch.device | None = None

    def add(self, name: str, stored: Tensor, source: Tensor | None = None) -> None:
        """Keep an array, in memory that is not that of `source`."""
        host = self._copied(stored.detach().contiguous())
        self.arrays[name] = host.clone() if source is not None and host.data_ptr() == source.data_ptr() else host

    def require_finite(self, field: str, values: Tensor, dtype: str) -> None:
        """Note whether values are finite, and what to say where they are not."""
        remedy = " (its largest value is 65,504); use --dtype float32" if dtype == "float16" else ""
        message = (
            f"The teacher's {field} for {self.image} are not finite as {dtype}{remedy}. Check the teacher's checkpoint "
            "and this image."
        )
        self.finite.append((message, self._copied(torch.isfinite(values).all())))

    def copied(self) -> torch.cuda.Event | None:
        """When what was added so far has come; None where nothing came from a GPU."""
        if self._gpu is None:
            return None
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._gpu))
        return event

    def _copied(self, values: Tensor) -> Tensor:
        if not values.is_cuda:
            return values
        self._gpu = values.device
        return values.to("cpu", non_blocking=True)  # into page-locked memory, which torch takes for this


def _encode_boxes(host: _Host, record: TeacherRecord, spec: CacheSpec) -> None:
    """The arrays that have a row per box."""
    for field, (shape, dtype) in spec.box_arrays().items():
        if field in FIELD_OF_ARRAY:  # comes with its field
            continue
        values = getattr(record, field)
        _check_shape(host.image, field, values, (len(record.boxes), *shape))
        if dtype == "int8":
            stored, scale = quantize_rows(values)
            host.require_finite(field, scale, dtype)
            host.add("embedding_scale", scale, values)
        else:
            if field == "deltas":
                values = _stored_deltas(host.image, record, spec)
            stored = values.detach().to(_TORCH_DTYPE[dtype])
            host.require_finite(field, stored, dtype)
        host.add(field, stored, values)


def _stored_deltas(image: str, record: TeacherRecord, spec: CacheSpec) -> Tensor:
    """The deltas, those of unlikely classes merged where the cache keeps no more."""
    deltas, logits, num_gt = present(record.deltas, "deltas"), present(record.logits, "logits"), record.num_gt
    if not spec.delta_floor or not spec.is_quantized or spec.class_agnostic:
        return deltas
    if record.gt_labels is None or len(record.gt_labels) != num_gt:
        labels = "none" if record.gt_labels is None else str(len(record.gt_labels))
        raise CacheError(f"The record of {image} needs the labels of its {num_gt} ground-truth boxes, found {labels}.")
    return merge_unlikely(deltas, logits, record.boxes.to(deltas.device), record.gt_labels, spec.delta_floor)


def _encode_objects(host: _Host, record: TeacherRecord, spec: CacheSpec) -> None:
    """The arrays that have a row per box with RoI features."""
    shape = (len(record.boxes), spec.channels, spec.roi_size, spec.roi_size)
    _check_shape(host.image, "roi_features", record.roi_features, shape)
    features = present(record.roi_features, "roi_features")
    rows = choose_objects(record.boxes, record.num_gt)
    object_features = features[rows.to(features.device)]
    host.add("roi_rows", rows.to(torch.int32), rows)
    if spec.is_quantized:
        stored, scale = _QUANTIZE[spec.dtype](object_features, torch.float16)
        host.require_finite("roi_features", scale, spec.dtype)
        host.add("roi_scale", scale, object_features)
    else:
        stored = object_features.detach().to(_TORCH_DTYPE[spec.dtype])
        host.require_finite("roi_features", stored, spec.dtype)
    host.add("roi_features", stored, features)


def _encode_levels(host: _Host, record: TeacherRecord, spec: CacheSpec) -> None:
    """The stored levels one after the other; and their scales, where they are quantised."""
    levels = record.features
    if levels is None or len(levels) != len(spec.strides):
        num_levels = "none" if levels is None else str(len(levels))
        raise CacheError(
            f"The record of {host.image} should have {len(spec.strides)} feature levels, found {num_levels}."
        )
    flat, scales = [], []
    for number, level in enumerate(levels):
        _check_shape(host.image, f"features[{number}]", level, (spec.channels, -1, -1))
        if number not in spec.levels:
            scales.append(level.new_zeros(spec.channels, dtype=torch.float32))
            continue
        if spec.is_quantized:
            stored, scale = _QUANTIZE[spec.dtype](level, torch.float32)
            scales.append(scale)
        else:
            stored = level.detach().to(_TORCH_DTYPE[spec.dtype])
        flat.append(stored.reshape(-1))
    packed = torch.cat(flat)  # always a copy
    host.add("features", packed)
    if spec.is_quantized:
        host.add("scale", torch.stack(scales))
    host.require_finite("features", torch.stack(scales) if spec.is_quantized else packed, spec.dtype)


def _check_shape(image: str, field: str, values: Tensor | None, shape: tuple[int, ...]) -> None:
    expected = tuple("any" if side < 0 else side for side in shape)
    if values is None:
        raise CacheError(f"The record of {image} lacks {field}, which this cache stores with shape {expected}.")
    fits = values.dim() == len(shape) and all(
        (a > 0 if b < 0 else a == b) for a, b in zip(values.shape, shape, strict=True)
    )
    if not fits or not values.is_floating_point():
        raise CacheError(
            f"The {field} of {image} should be a float tensor of shape {expected}, found {values.dtype} of shape "
            f"{tuple(values.shape)}: the teacher does not fit the specification of this cache."
        )
