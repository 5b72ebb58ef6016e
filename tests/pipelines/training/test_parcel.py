"""Batches that loader workers hand over in one piece."""

import pickle
import sys
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.structures import InstanceData
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdpipe.distill.teacher.targets import RoiTargets
from kdpipe.pipelines.training.parcel import pack_batch
from kdpipe.pipelines.training.workers import end_workers


class Samples(Dataset[dict[str, Any]]):
    """As the training pipeline makes them: several types, an empty tensor, a scalar, one that is not contiguous."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 3:
            raise ValueError("bad image 3")
        sample = DetDataSample(metainfo={"img_id": index, "homography_matrix": np.eye(3)})
        sample.gt_instances = InstanceData(bboxes=HorizontalBoxes(torch.ones(index, 4) * index))
        targets = RoiTargets(
            boxes=torch.arange(8.0).reshape(4, 2).T + index,
            labels=torch.tensor([1, 2]),
            num_positive=1,
            view="exact",
            logits=torch.full((2, 3), index, dtype=torch.float16),
            embeddings=torch.zeros(0, 5),
        )
        image = torch.full((3, 2, 2), index, dtype=torch.uint8)
        return {"inputs": image, "data_samples": sample, "targets": targets, "scalar": torch.tensor(7 + index)}


def unpacked(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def tensors(batch: dict[str, Any]) -> list[Tensor]:
    listed = [*batch["inputs"], *batch["scalar"]]
    listed += [sample.gt_instances.bboxes.tensor for sample in batch["data_samples"]]
    return listed + [x for t in batch["targets"] for x in (t.boxes, t.labels, t.logits, t.embeddings)]


def test_what_arrives_is_what_was_sent() -> None:
    samples = [Samples()[index] for index in range(3)]
    batch = unpacked(pack_batch(samples))
    sent = {name: [sample[name] for sample in samples] for name in samples[0]}
    for actual, expected in zip(tensors(batch), tensors(sent), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    assert [sample.img_id for sample in batch["data_samples"]] == [0, 1, 2]
    assert [(target.view, target.num_positive) for target in batch["targets"]] == [("exact", 1)] * 3


def test_a_batch_is_one_piece_of_memory() -> None:
    batch = unpacked(pack_batch([Samples()[1], Samples()[2]]))
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors(batch)}) == 1
    first, *others = tensors(batch)
    before = [other.clone() for other in others]
    first.fill_(99)
    assert all(torch.equal(other, old) for other, old in zip(others, before, strict=True)), "pieces do not overlap"


def test_a_batch_to_be_pinned_is_pinned_in_one_piece_and_its_shared_memory_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied: list[Tensor] = []

    def pin_memory(memory: Tensor) -> Tensor:
        copied.append(memory)
        return memory.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    samples = [Samples()[1], Samples()[2]]
    sent = ForkingPickler.dumps(pack_batch(samples, pin=True))  # as between processes, the memory shared
    batch = pickle.loads(sent).pin_memory()
    expected = tensors(unpacked(pack_batch(samples)))
    for actual, right in zip(tensors(batch), expected, strict=True):
        assert torch.equal(actual, right)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors(batch)}) == 1
    assert len(copied) == 1
    if sys.platform == "linux":
        assert not copied[0].any(), "pages that were freed read as zeros"


def test_errors_of_a_worker_arrive() -> None:
    workers: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "fork", "persistent_workers": True}
    loader = DataLoader(Samples(), batch_size=2, collate_fn=pack_batch, **workers)
    batches = iter(loader)
    assert next(batches)["inputs"][1].unique().tolist() == [1]
    with pytest.raises(ValueError, match="bad image 3"):
        next(batches)
    end_workers([loader])  # which the error, that pytest keeps, would keep alive
