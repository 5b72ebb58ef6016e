"""Convolutions of RoI features are torch's, on every device."""

from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional

from kdpipe.distill.rois.convolution import RoIConv2d, convolve_rois

if TYPE_CHECKING:
    from tests.distill.conftest import OtherDevices


@pytest.mark.parametrize(("side", "stride", "padding"), [(1, 1, 0), (3, 2, 0), (3, 1, 1), (5, 2, 1), (1, 2, 0)])
@pytest.mark.parametrize("count", [0, 5])
@pytest.mark.parametrize("way", ["cpu", "other"])
def test_values_and_gradients_are_those_of_torch(
    way: str, count: int, side: int, stride: int, padding: int, other_devices: "OtherDevices"
) -> None:
    torch.manual_seed(0)
    shapes = (count, 4, 7, 7), (6, 4, side, side), (6,)
    x, weight, bias = inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = functional.conv2d(x, weight, bias, stride, padding)
    if way == "other":
        with other_devices.ways():
            found = convolve_rois(x, weight, bias, stride, padding)
    else:
        found = convolve_rois(x, weight, bias, stride, padding)
    torch.testing.assert_close(found, expected)
    slope = torch.randn_like(expected)
    gradients = [torch.autograd.grad(values, inputs, slope) for values in (found, expected)]
    for actual, right in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, right)


def test_the_layer_is_a_convolution_of_torch(other_devices: "OtherDevices") -> None:
    layer = RoIConv2d(4, 6, 3, stride=2, padding=1)
    x = torch.randn(2, 4, 7, 7)
    with other_devices.ways():
        torch.testing.assert_close(layer(x), torch.nn.Conv2d.forward(layer, x))
