"""Head transfer: the teacher's heads in the student, untouched by training."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor

from kdpipe.distill.detector import DistilledDetector
from kdpipe.distill.methods import ContractError
from kdpipe.distill.students.head_transfer import HeadTransferError
from kdpipe.pipelines.detectors.configs import find_config

if TYPE_CHECKING:
    from tests.distill.conftest import Pair


def heads_of(config: Any) -> dict[str, Tensor]:
    """RPN and box head of a detector with other weights than any student begins with."""
    torch.manual_seed(7)
    model = MODELS.build(config)
    state = {name: value for name, value in model.state_dict().items() if name.startswith(("rpn_head.", "roi_head."))}
    return {
        name: torch.rand_like(value) * 0.1 if value.is_floating_point() else value
        for name, value in state.items()
        if "mask" not in name
    }


def with_norms(config: Any) -> Any:
    config.roi_head.bbox_head.update(
        type="ConvFCBBoxHead", num_shared_convs=1, num_shared_fcs=1, conv_out_channels=8, norm_cfg={"type": "BN"}
    )
    return config


def with_heads(pair: "type[Pair]", norms: bool, method: str) -> tuple[DistilledDetector, dict[str, Tensor]]:
    """A student that has begun with the heads of a teacher, and these."""
    config = with_norms(pair.student()) if norms else pair.student()
    heads = heads_of(config)
    model = DistilledDetector(config, pair.spec.to_json(), (method,), pair.source(heads))
    model.init_weights()
    return model, heads


def train(pair: "type[Pair]", model: DistilledDetector, steps: int = 3) -> torch.optim.SGD:
    """Some steps with momentum and a weight decay that nothing survives unchanged."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.5)
    model.train()
    for _ in range(steps):
        losses = model(**model.data_preprocessor(pair.batch(2), True), mode="loss")
        total, _ = model.parse_losses(losses)
        assert torch.isfinite(total)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("norms", [False, True])
def test_heads_are_the_teachers_from_first_to_last_step(pair: "type[Pair]", norms: bool) -> None:
    model, heads = with_heads(pair, norms, "ht")
    before = {name: value.clone() for name, value in model.student.state_dict().items()}
    optimizer = train(pair, model)
    after = model.student.state_dict()
    assert any("running_mean" in name for name in heads) == norms
    for name, value in heads.items():
        assert torch.equal(after[name], value), name
    trained = [name for name in before if not torch.equal(before[name], after[name])]
    assert {name.split(".")[0] for name in trained} == {"backbone", "neck"}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"student.{name}" for name, _ in model.student.named_parameters() if name in heads}
    parameters = dict(model.named_parameters())
    assert all(parameters[name].grad is None and parameters[name] not in optimizer.state for name in frozen)


@pytest.mark.parametrize("norms", [False, True])
def test_inherited_heads_begin_as_the_teachers_and_learn(pair: "type[Pair]", norms: bool) -> None:
    model, heads = with_heads(pair, norms, "inherit")
    assert all(torch.equal(model.student.state_dict()[name], value) for name, value in heads.items())
    train(pair, model)
    after = model.student.state_dict()
    unchanged = [name for name, value in heads.items() if torch.equal(after[name], value)]
    assert unchanged == []
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ContractError, match=r"\(ht\) or learn on \(inherit\)"):
        DistilledDetector(pair.student(), pair.spec.to_json(), ("ht", "inherit"), pair.source(heads))


def test_a_mask_branch_is_trained_as_always(pair: "type[Pair]") -> None:
    pair.student()
    model = find_config("mask-rcnn_r50_fpn_1x_coco").model
    model.backbone.init_cfg = None
    student = DistilledDetector(model, pair.spec.to_json() | _eighty(), ("ht",), pair.source(heads_of(model)))
    learning = {name.split(".")[2] for name, p in student.named_parameters() if p.requires_grad and "roi_head" in name}
    assert learning == {"mask_head"}


def _eighty() -> dict[str, Any]:
    return {"class_names": [str(i) for i in range(80)], "category_ids": list(range(80))}


def test_what_does_not_fit_is_named_with_both_shapes(pair: "type[Pair]") -> None:
    heads = heads_of(pair.student())
    config = pair.student()
    config.roi_head.bbox_head.fc_out_channels = 12
    with pytest.raises(HeadTransferError) as caught:
        DistilledDetector(config, pair.spec.to_json(), ("ht",), pair.source(heads))
    message = str(caught.value)
    assert "roi_head.bbox_head.fc_cls.weight: [4, 16] in the teacher, [4, 12] in the student" in message
    assert "and 2 more" in message
    assert "rpn_head" not in message
    assert "leave it out of --methods" in message


def test_layers_that_one_side_lacks_are_named(pair: "type[Pair]") -> None:
    heads = heads_of(pair.student())
    missing = {name: value for name, value in heads.items() if "rpn_reg.bias" not in name}
    with pytest.raises(HeadTransferError, match=r"rpn_reg\.bias: absent in the teacher, \[12\] in the student"):
        DistilledDetector(pair.student(), pair.spec.to_json(), ("ht",), pair.source(missing))
    more = {**heads, "roi_head.semantic_head.conv.weight": torch.zeros(2)}
    with pytest.raises(HeadTransferError, match=r"semantic_head.*: \[2\] in the teacher, absent in the student"):
        DistilledDetector(pair.student(), pair.spec.to_json(), ("ht",), pair.source(more))
