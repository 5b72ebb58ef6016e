"""The teacher's box head out of its parameters: what mmdet's own head says, and nothing else."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from kdpipe.distill.losses.numeric import LossInputError
from kdpipe.distill.teacher.heads.fc import TeacherHead, TeacherHeadError

if TYPE_CHECKING:
    from tests.distill.conftest import Pair


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"num_shared_fcs": 1}, {}),
        ({"num_cls_fcs": 1, "num_reg_fcs": 2}, {}),
        ({"with_avg_pool": True}, {}),
        ({"reg_class_agnostic": True}, {"class_agnostic": True}),
    ],
)
def test_says_what_mmdets_head_says(pair: "type[Pair]", options: dict[str, Any], changes: dict[str, Any]) -> None:
    mmdet_head = pair.head(**options)
    embeddings_seen: list[Tensor] = []
    mmdet_head.fc_cls.register_forward_pre_hook(lambda layer, inputs: embeddings_seen.append(inputs[0]))
    features = torch.randn(9, pair.channels, 7, 7)
    logits, deltas = mmdet_head(features)
    rebuilt = TeacherHead(
        {**pair.state(mmdet_head), "rpn_head.rpn_cls.weight": torch.zeros(1)}, replace(pair.spec, **changes)
    ).of_features(features)
    torch.testing.assert_close(rebuilt.embeddings, embeddings_seen[0])
    torch.testing.assert_close(rebuilt.logits, logits)
    torch.testing.assert_close(rebuilt.deltas, deltas.reshape(9, -1, 4))
    assert not rebuilt.logits.requires_grad


def test_full_precision_under_autocast_and_no_rois(pair: "type[Pair]") -> None:
    head = TeacherHead(pair.state(pair.head()), pair.spec)
    features = torch.randn(4, pair.channels, 7, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = head.of_features(features)
    torch.testing.assert_close(low.logits, head.of_features(features).logits, rtol=0, atol=0)
    empty = head.of_features(features[:0])
    assert (empty.embeddings.shape, empty.logits.shape) == ((0, pair.width), (0, pair.classes + 1))
    assert empty.deltas.shape == (0, pair.classes, 4)


def test_layers_that_it_does_not_know_are_named(pair: "type[Pair]") -> None:
    with pytest.raises(TeacherHeadError, match=r"shared_convs\.0\.conv\.weight"):
        TeacherHead(pair.state(pair.head(num_shared_convs=1, conv_out_channels=pair.channels)), pair.spec)


def test_no_box_head_at_all(pair: "type[Pair]") -> None:
    with pytest.raises(TeacherHeadError, match=r"neither roi_head\.bbox_head\.fc_cls"):
        TeacherHead({"rpn_head.rpn_cls.weight": torch.zeros(1)}, pair.spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 5}, "inputs of its first layer: found 294, expected 245"),
        ({"embedding_dim": 21}, "inputs of its classifier: found 20, expected 21"),
        ({"class_names": ("a", "b"), "category_ids": (1, 2)}, "class scores: found 4, expected 3"),
        ({"class_agnostic": True}, "box deltas: found 12, expected 4"),
    ],
)
def test_a_head_of_another_teacher_is_refused(pair: "type[Pair]", changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherHeadError, match=message):
        TeacherHead(pair.state(pair.head()), replace(pair.spec, **changes))


def test_features_of_another_shape_are_refused(pair: "type[Pair]") -> None:
    with pytest.raises(LossInputError, match=r"\[2, 6, 5, 5\].*expected \[2, 6, 7, 7\]"):
        TeacherHead(pair.state(pair.head()), pair.spec).of_features(torch.zeros(2, pair.channels, 5, 5))
