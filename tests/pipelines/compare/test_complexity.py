"""Parameters and GFLOPs, against a count by hand."""

from typing import TYPE_CHECKING, Any

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.compare.complexity import complexity

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


@MODELS.register_module()
class TwoLayers(nn.Module):
    """3 -> 5 channels by 3 x 3 of stride 2, and a classifier of 7 classes on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Linear(5, 7)

    def forward(self, inputs: torch.Tensor, data_samples: Any, mode: str) -> torch.Tensor:
        assert mode == "tensor"
        assert data_samples[0].batch_input_shape == tuple(inputs.shape[-2:])
        logits: torch.Tensor = self.fc(self.conv(inputs).mean((2, 3)))
        return logits


def test_counted_by_hand() -> None:
    found = complexity(Config({"model": {"type": "TwoLayers"}}), (100, 64))
    assert found.size == (128, 64)
    assert found.parameters == 3 * 5 * 9 + 5 + 5 * 7 + 7
    assert found.gflops == pytest.approx((64 * 32 * 5 * 3 * 9 + 5 * 7) / 1e9)


def test_a_detector(kit: "Kit") -> None:
    state = torch.get_rng_state()
    config = kit.config(channels=8, fc=24)
    narrow, wide = complexity(config, (128, 96)), complexity(kit.config(channels=16, fc=24), (128, 96))
    assert narrow.gflops < wide.gflops
    assert narrow.parameters == sum(parameter.numel() for parameter in MODELS.build(config.model).parameters())
    assert complexity(config, (256, 96)).gflops > 1.5 * narrow.gflops
    torch.set_rng_state(state)


def test_random_numbers_go_on_as_if_undisturbed() -> None:
    before = torch.get_rng_state()
    complexity(Config({"model": {"type": "TwoLayers"}}), (32, 32))
    assert torch.equal(before, torch.get_rng_state())


def test_one_that_cannot_be_built() -> None:
    with pytest.raises(KdpipeError, match="The student cannot be built"):
        complexity(Config({"model": {"type": "NoSuchDetector"}}), (32, 32))
