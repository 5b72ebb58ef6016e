"""Shares of the losses in the gradient at the pyramid."""

import pytest
import torch
from mmengine.model import BaseModel

from kdpipe.distill.losses.shares import gradient_shares


def test_shares_are_norms_of_gradients_over_their_sum() -> None:
    levels = [torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weight = torch.randn((), dtype=torch.float64, requires_grad=True)
    pyramid = [level * weight for level in levels]  # not leaves, as a neck gives it
    first = (pyramid[0] * 3).sum()
    losses = {
        "loss_a": first,
        "loss_rpn_b": [pyramid[0].square().sum(), (pyramid[1] * 2).sum()],
        "accuracy": pyramid[0].sum(),
    }
    shares = gradient_shares(losses, pyramid)
    a = 3 * (2 * 3 * 16) ** 0.5
    b = ((2 * pyramid[0]).square().sum() + 4 * 2 * 3 * 16).sqrt().item()
    assert shares.keys() == {"share_a", "share_rpn_b"}
    assert shares["share_a"].item() == pytest.approx(a / (a + b), rel=1e-6)
    assert shares["share_rpn_b"].item() == pytest.approx(b / (a + b), rel=1e-6)
    assert weight.grad is None
    first.backward()  # the graph is still there
    assert weight.grad is not None


def test_no_share_has_a_name_that_mmengine_adds_to_the_loss() -> None:
    """Of a cascade (`s0.loss_cls`), of DETR (`d0.loss_bbox`), and of heads of a user's own."""
    level = torch.randn(3, requires_grad=True)
    losses = dict.fromkeys(("s0.loss_cls", "s1.loss_cls", "d0.loss_bbox", "mask_loss"), level.sum())
    shares = gradient_shares(losses, [level])
    assert shares.keys() == {"share_s0.cls", "share_s1.cls", "share_d0.bbox", "share_mask"}
    total, logged = BaseModel.parse_losses(None, {**losses, **dict.fromkeys(shares, torch.tensor(float("nan")))})
    assert total.item() == pytest.approx(4 * level.sum().item(), rel=1e-6)
    assert logged["loss"].item() == total.item()


def test_losses_that_do_not_reach_the_pyramid_have_no_share() -> None:
    level, other = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    shares = gradient_shares({"loss_a": other.sum(), "loss_b": level.sum(), "loss_c": torch.ones(())}, [level])
    assert {name: share.item() for name, share in shares.items()} == {"share_a": 0.0, "share_b": 1.0}
    assert gradient_shares({"loss_a": other.sum()}, [level]) == {"share_a": torch.zeros(())}


def test_a_frozen_pyramid_has_no_shares() -> None:
    head = torch.randn(3, requires_grad=True)
    assert gradient_shares({"loss_a": (torch.ones(3) * head).sum()}, [torch.ones(3)]) == {}


def test_small_gradients_of_a_half_precision_pyramid_count() -> None:
    level = torch.ones(8, dtype=torch.float16, requires_grad=True)
    losses = {"loss_a": (level.float() * 2e-8).sum(), "loss_b": (level.float() * 6e-8).sum()}
    shares = gradient_shares(losses, [level])
    assert shares["share_a"].item() == pytest.approx(0.25, rel=0.01)
