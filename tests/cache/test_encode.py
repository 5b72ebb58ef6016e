import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kdpipe.cache import CacheError, open_cache
from kdpipe.cache.quantize import dequantize, dequantize_rows, quantize, quantize4
from kdpipe.cache.records import TeacherRecord
from kdpipe.cache.write.encode import Encoding, encode_record, start_encoding
from kdpipe.cache.write.selection import choose_objects, merge_unlikely

if TYPE_CHECKING:
    from tests.cache.conftest import Kit


@pytest.mark.parametrize("dtype", ["int4", "int8", "float16", "float32"])
def test_rois_of_the_chosen_boxes_are_stored(kit: "type[Kit]", dtype: str) -> None:
    spec = kit.spec(tier="objects", dtype=dtype)
    image = kit.images()[3]
    record = kit.record(image, "identity", spec)
    rows = choose_objects(record.boxes, image.num_gt)
    assert image.num_gt == 3
    assert image.num_gt < len(rows) < len(record.boxes)
    encoded = encode_record(record, spec)
    assert encoded.features is encoded.scale is None
    assert {name: (array.shape[1:], str(array.dtype)) for name, array in encoded.rows.items()} == (
        spec.box_arrays() | spec.object_arrays()
    )
    assert encoded.rows["roi_rows"].tolist() == rows.tolist()
    assert record.roi_features is not None
    features, stored = record.roi_features[rows], torch.from_numpy(encoded.rows["roi_features"])
    if spec.is_quantized:
        scale = torch.from_numpy(encoded.rows["roi_scale"])
        quantized = (quantize4 if dtype == "int4" else quantize)(features, torch.float16)
        assert all(map(torch.equal, (stored, scale), quantized))
        error = (dequantize(stored, scale) - features).norm() / features.norm()
        assert error < (0.2 if dtype == "int4" else 0.01)
    else:
        assert torch.equal(stored, features.to(stored.dtype))
    assert record.embeddings is not None
    embeddings = torch.from_numpy(encoded.rows["embeddings"])
    scale_of_rows = torch.from_numpy(encoded.rows["embedding_scale"]) if spec.is_quantized else None
    error = (dequantize_rows(embeddings, scale_of_rows) - record.embeddings).abs().max()
    assert error <= {"float16": 2e-3, "float32": 0.0}.get(dtype, 0.02)


def test_levels_that_are_not_stored_take_no_room(kit: "type[Kit]") -> None:
    image = kit.images()[0]
    whole, part = kit.spec(dtype="int4"), kit.spec(dtype="int4", levels=(1, 2))
    record = kit.record(image, "identity", whole)
    every, some = encode_record(record, whole), encode_record(record, part)
    assert every.index == some.index
    sizes = [
        height * width * 3
        for height, width in zip(
            *([every.index[f"level{level}_{side}"] for level in range(4)] for side in ("height", "width")), strict=True
        )
    ]
    assert every.features is not None
    assert every.scale is not None
    assert some.scale is not None
    assert np.array_equal(some.features, every.features[sizes[0] : sum(sizes[:3])])  # type: ignore[arg-type]
    assert np.array_equal(some.scale[1:3], every.scale[1:3])
    assert not some.scale[[0, 3]].any()


def test_boxes_near_objects_are_counted_apart(tmp_path: Path, kit: "type[Kit]") -> None:
    spec = kit.spec(tier="objects", proposals=8, jittered=4)
    image = kit.images()[3]
    record = kit.record(image, "identity", kit.spec(tier="objects"))
    assert (record.num_proposals, record.num_gt) == (12, 3)
    record = dataclasses.replace(record, num_proposals=8, num_jittered=4)
    writer = kit.writer(tmp_path / "x.zarr", spec, [image])
    with writer.part(0) as part:
        part.add(record)
    cache = open_cache(writer.location)
    index, targets = cache.index(image.image_id), cache.targets(image.image_id, rows=[1, 7, 8, 11, 12])
    assert (index.num_proposals, index.num_jittered, index.num_rois) == (8, 4, 15)
    assert (targets.num_proposals, targets.num_jittered) == (2, 2)
    assert targets.roi_rows is not None
    assert {12, 13, 14} < set(targets.roi_rows.tolist())
    with pytest.raises(CacheError, match="has 5 jittered boxes"):
        encode_record(dataclasses.replace(record, num_jittered=5), spec)
    with pytest.raises(CacheError, match="has 12 proposals"):
        encode_record(dataclasses.replace(record, num_proposals=12), spec)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_unlikely_deltas_are_merged_in_small_types_only(kit: "type[Kit]", dtype: str) -> None:
    spec = kit.spec(tier="predictions", dtype=dtype, delta_floor=0.3)
    image = kit.images()[2]
    labels = torch.tensor([2, 0])
    record = dataclasses.replace(kit.record(image, "identity", spec), gt_labels=labels)
    assert record.deltas is not None
    assert record.logits is not None
    merged = merge_unlikely(record.deltas, record.logits, record.boxes, labels, 0.3)
    assert 0.2 < (merged != record.deltas).float().mean() < 0.9
    expected = merged if dtype == "int8" else record.deltas
    assert np.array_equal(encode_record(record, spec).rows["deltas"], expected.half().numpy())
    if dtype == "int8":
        for missing in (None, labels[:1]):
            with pytest.raises(CacheError, match="needs the labels of its 2 ground-truth boxes"):
                encode_record(dataclasses.replace(record, gt_labels=missing), spec)


def test_one_regression_for_all_classes_is_kept(kit: "type[Kit]") -> None:
    spec = kit.spec(tier="predictions", class_agnostic=True, delta_floor=0.9)
    record = kit.record(kit.images()[0], "identity", spec)
    assert (encode_record(record, spec).rows["deltas"] != 0).all()


class Copying:
    """Stands for the event behind the copies from a GPU: values are there once it was waited for."""

    def __init__(self, encoding: Encoding) -> None:
        self._arrays = encoding.arrays
        self._values = {name: values.clone() for name, values in encoding.arrays.items()}
        for values in encoding.arrays.values():
            values.zero_()

    def synchronize(self) -> None:
        for name, values in self._arrays.items():
            values.copy_(self._values[name])


def test_what_comes_from_a_gpu_is_waited_for_and_leaves_its_memory(kit: "type[Kit]") -> None:
    spec = kit.spec(tier="pyramid", dtype="int8")
    record = kit.record(kit.images()[3], "identity", spec)
    encoding = start_encoding(record, spec)
    copying = Copying(encoding)
    encoded = dataclasses.replace(encoding, copied=copying).wait()  # type: ignore[arg-type]
    for values in encoding.arrays.values():
        values.zero_()  # as the next record that is given this memory
    expected = encode_record(record, spec)
    assert encoded.index == expected.index
    assert encoded.rows.keys() == expected.rows.keys()
    assert all(np.array_equal(encoded.rows[name], array) for name, array in expected.rows.items())
    for name in ("features", "scale"):
        assert np.array_equal(getattr(encoded, name), getattr(expected, name))


@pytest.mark.cuda
@pytest.mark.parametrize("tier", ["objects", "pyramid"])
@pytest.mark.parametrize("dtype", ["int4", "int8", "float16", "float32"])
def test_from_a_gpu(kit: "type[Kit]", tier: str, dtype: str) -> None:
    """As from the CPU, whatever happens to the memory behind it."""
    spec = kit.spec(tier=tier, dtype=dtype)
    record = kit.record(kit.images()[3], "identity", spec)
    expected = encode_record(record, spec)
    moved = on_gpu(record)
    encoding = start_encoding(moved, spec)
    for values in vars(moved).values():
        for tensor in values if isinstance(values, tuple) else (values,):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                tensor.zero_()
    encoded = encoding.wait()
    arrays = {"features": (encoded.features, expected.features), "scale": (encoded.scale, expected.scale)}
    arrays |= {name: (encoded.rows[name], array) for name, array in expected.rows.items()}
    assert encoded.index == expected.index
    for name, (found, wanted) in arrays.items():
        if found is None or wanted is None:
            assert found is wanted, name
            continue
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        if found.dtype == np.uint8:
            assert (found == wanted).mean() > 0.9, name
        elif found.dtype == np.int8:
            assert np.abs(found.astype(int) - wanted).max(initial=0) <= 1, name
        else:
            np.testing.assert_allclose(found.astype(float), wanted.astype(float), rtol=2e-3, atol=1e-5, err_msg=name)


@pytest.mark.cuda
def test_what_is_not_finite_on_a_gpu(kit: "type[Kit]", tmp_path: Path) -> None:
    spec = kit.spec()
    writer = kit.writer(tmp_path / "x.zarr", spec, kit.images(1), part_size=1 << 30)
    record = on_gpu(kit.record(writer.images[0], "identity", spec))
    assert record.logits is not None
    record.logits[0, 0] = torch.nan
    with pytest.raises(CacheError, match=r"logits for image .* are not finite"), writer.part(0) as part:
        part.add(record)
    assert writer.pending() == [0]


def on_gpu(record: TeacherRecord) -> TeacherRecord:
    moved: dict[str, Any] = dict(vars(record))
    for name, values in moved.items():
        if isinstance(values, torch.Tensor) and values.is_floating_point():
            moved[name] = values.cuda()
    if record.features is not None:
        moved["features"] = tuple(level.cuda() for level in record.features)
    return TeacherRecord(**moved)
