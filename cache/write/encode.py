"""What the teacher said of one image, checked and turned into the arrays that are stored."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdpipe.cache.errors import CacheError, present
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


def encode_record(record: TeacherRecord, spec: CacheSpec) -> EncodedRecord:
    """Check a record against the specification, quantise it on its own device, and copy it to the host.

    Args:
        record: from the teacher.
        spec: of the cache.

    Raises:
        CacheError: a field is missing, has another shape than specified, or holds values that are not finite in the
            storage type.
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
    rows = _encode_boxes(image, record, spec)
    if spec.object_arrays():
        rows |= _encode_objects(image, record, spec)
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
    features = scale_of_levels = None
    if "features" in spec.fields:
        features, scale_of_levels, shapes = _encode_levels(image, record, spec)
        for level, (height, width) in enumerate(shapes):
            index |= {f"level{level}_height": height, f"level{level}_width": width}
    return EncodedRecord(index, record.file_name.encode(), rows, features, scale_of_levels)


def _encode_boxes(image: str, record: TeacherRecord, spec: CacheSpec) -> dict[str, Block]:
    """The arrays that have a row per box."""
    rows: dict[str, Block] = {}
    for field, (shape, dtype) in spec.box_arrays().items():
        if field in FIELD_OF_ARRAY:  # comes with its field
            continue
        values = getattr(record, field)
        _check_shape(image, field, values, (len(record.boxes), *shape))
        if dtype == "int8":
            stored, scale = quantize_rows(values)
            _check_finite(image, field, scale, dtype)
            rows["embedding_scale"] = _to_host(scale, values)
        else:
            if field == "deltas":
                values = _stored_deltas(image, record, spec)
            stored = values.detach().to(_TORCH_DTYPE[dtype])
            _check_finite(image, field, stored, dtype)
        rows[field] = _to_host(stored, values)
    return rows


def _stored_deltas(image: str, record: TeacherRecord, spec: CacheSpec) -> Tensor:
    """The deltas, those of unlikely classes merged where the cache keeps no more."""
    deltas, logits, num_gt = present(record.deltas, "deltas"), present(record.logits, "logits"), record.num_gt
    if not spec.delta_floor or not spec.is_quantized or spec.class_agnostic:
        return deltas
    if record.gt_labels is None or len(record.gt_labels) != num_gt:
        labels = "none" if record.gt_labels is None else str(len(record.gt_labels))
        raise CacheError(f"The record of {image} needs the labels of its {num_gt} ground-truth boxes, found {labels}.")
    return merge_unlikely(deltas, logits, record.boxes.to(deltas.device), record.gt_labels, spec.delta_floor)


def _encode_objects(image: str, record: TeacherRecord, spec: CacheSpec) -> dict[str, Block]:
    """The arrays that have a row per box with RoI features."""
    shape = (len(record.boxes), spec.channels, spec.roi_size, spec.roi_size)
    _check_shape(image, "roi_features", record.roi_features, shape)
    features = present(record.roi_features, "roi_features")
    rows = choose_objects(record.boxes, record.num_gt)
    object_features = features[rows.to(features.device)]
    arrays = {"roi_rows": _to_host(rows.to(torch.int32), rows)}
    if spec.is_quantized:
        stored, scale = _QUANTIZE[spec.dtype](object_features, torch.float16)
        _check_finite(image, "roi_features", scale, spec.dtype)
        arrays["roi_scale"] = _to_host(scale, object_features)
    else:
        stored = object_features.detach().to(_TORCH_DTYPE[spec.dtype])
        _check_finite(image, "roi_features", stored, spec.dtype)
    return {**arrays, "roi_features": _to_host(stored, features)}


def _encode_levels(
    image: str, record: TeacherRecord, spec: CacheSpec
) -> tuple[Block, npt.NDArray[np.float32] | None, list[tuple[int, int]]]:
    """Packed levels, their scales where the type is int8, and the (height, width) of each."""
    levels = record.features
    if levels is None or len(levels) != len(spec.strides):
        num_levels = "none" if levels is None else str(len(levels))
        raise CacheError(f"The record of {image} should have {len(spec.strides)} feature levels, found {num_levels}.")
    flat, scales = [], []
    for number, level in enumerate(levels):
        _check_shape(image, f"features[{number}]", level, (spec.channels, -1, -1))
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
    scale_of_levels = torch.stack(scales) if spec.is_quantized else None
    _check_finite(image, "features", packed if scale_of_levels is None else scale_of_levels, spec.dtype)
    shapes = [(int(level.shape[1]), int(level.shape[2])) for level in levels]
    return packed.cpu().numpy(), None if scale_of_levels is None else scale_of_levels.cpu().numpy(), shapes


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


def _check_finite(image: str, field: str, values: Tensor, dtype: str) -> None:
    if not bool(torch.isfinite(values).all()):
        remedy = " (its largest value is 65,504); use --dtype float32" if dtype == "float16" else ""
        raise CacheError(
            f"The teacher's {field} for {image} are not finite as {dtype}{remedy}. Check the teacher's checkpoint and "
            "this image."
        )


def _to_host(stored: Tensor, source: Tensor) -> Block:
    """A contiguous host array that shares no memory with `source`."""
    host = stored.detach().cpu().contiguous()
    result: Block = (host.clone() if host.data_ptr() == source.data_ptr() else host).numpy()
    return result
