"""Convolutions on maps smaller than their kernel: the values and gradients of PyTorch's own."""

import itertools
from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F

from r2 import models
from r2.training.small_maps import fast_on_small_maps, small_maps

CASES = [
    case
    for case in itertools.product((1, 2, 3, 4), (1, 3), (3, 5), (1, 2), (0, 1, 2, 3), (1, 6))
    if all(size + 2 * case[4] >= case[2] for size in case[:2])
] + [(1, 1, 2, 4, 2, 6)]  # no tap meets the map


@pytest.mark.parametrize(("height", "width", "kernel", "stride", "padding", "groups"), CASES)
def test_values_and_gradients(height, width, kernel, stride, padding, groups):
    torch.manual_seed(0)
    x = torch.randn(4, 6, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 6 // groups, kernel, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(12, dtype=torch.float64, requires_grad=True)
    inputs = (x, weight, bias)
    expected = F.conv2d(*inputs, (stride, stride), (padding, padding), (1, 1), groups)
    with small_maps():
        found = F.conv2d(*inputs, (stride, stride), (padding, padding), (1, 1), groups)
    torch.testing.assert_close(found, expected)
    up = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(found, inputs, up), torch.autograd.grad(expected, inputs, up), strict=True)
    for gradient, of_torch in pairs:
        torch.testing.assert_close(gradient, of_torch)


@pytest.mark.parametrize("build", [models.resnet18, models.mobilenet_v1, models.mobilenet_v2])
def test_a_network_trains_the_same(build):
    torch.manual_seed(0)
    model = build(10, 0.25).double()
    images, found = torch.randn(8, 3, 32, 32, dtype=torch.float64), []
    for forward in (lambda m: m, lambda m: fast_on_small_maps(m, torch.device("cpu"))):
        copy = deepcopy(model)
        torch.manual_seed(1)  # MobileNet-V2's dropout
        F.cross_entropy(forward(copy)(images), torch.arange(8)).backward()
        found.append([p.grad for p in copy.parameters()])
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 2, "dilation": 2}])
def test_other_convolutions_are_left_alone(options):
    """As nn.Conv2d calls them, on a map that is smaller than the kernel."""
    torch.manual_seed(0)
    x, layer = torch.randn(2, 4, 2, 2), torch.nn.Conv2d(4, 4, 3, groups=4, **options)
    expected = layer(x)
    with small_maps():
        assert torch.equal(layer(x), expected)


def test_other_ways_to_call_it_give_the_same():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 2, 2), torch.randn(4, 1, 3, 3, requires_grad=True)
    with small_maps():
        found = F.conv2d(input=x, weight=weight, padding=1, groups=4)
    assert F.conv2d is torch.conv2d  # it is put back
    assert torch.equal(found, F.conv2d(x, weight, padding=1, groups=4))
