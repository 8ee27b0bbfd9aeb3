"""Weights, images and folders as they should not be: a finite result, or one line that names what is wrong."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from r2.config import UserError
from r2.palettize import Palette
from r2.quantizers.affine import Activation, Affine
from r2.quantizers.ewgs import EWGS
from r2.quantizers.layers import calibrate, quantizable, signal_to_noise, swap
from r2.quantizers.lsq import LSQ
from r2.quantizers.pact import PACT

# Weights

NORMAL = 0.1 * torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
CHANNEL = torch.arange(8).view(8, 1, 1, 1)
WEIGHTS = {
    "constant": torch.full_like(NORMAL, -0.3),
    "zero": torch.zeros_like(NORMAL),
    "zero channel": NORMAL * (CHANNEL != 2),
    "constant channel": torch.where(CHANNEL == 2, 0.3, NORMAL),
    "outlier": torch.where(torch.arange(288).view_as(NORMAL) == 77, 1e6, NORMAL),
    "three values": 0.1 * (torch.arange(288.0) % 3).view_as(NORMAL),
    "vanishing": 1e-30 * NORMAL,
    "one": torch.full((1, 1, 1, 1), 0.5),
    "one, zero": torch.zeros(1, 1, 1, 1),
}
METHODS = {
    "ewgs": lambda bits: EWGS(bits, bits, delta=0.1),
    "lsq": lambda bits: LSQ(bits, bits),
    "pact": lambda bits: PACT(bits, bits),
    "dkm": lambda bits: Palette(bits),
    "dkm over vectors": lambda bits: Palette(bits, dim=2),
}


def layer(weight, method, bits, dtype=torch.float32):
    """A calibrated layer, and its input."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
    with torch.no_grad():
        conv.weight.copy_(weight)
    conv, x = conv.to(dtype), torch.rand(2, weight.shape[1], 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    layers = quantizable(conv)
    swap(layers, lambda name: METHODS[method](bits))
    calibrate(conv, layers, x)
    return conv, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_odd_weights_are_quantized_and_trained_without_a_division_by_zero(method, bits, dtype):
    if (method, bits) == ("lsq", 1):
        pytest.skip("refused: test_lsq_at_one_bit_signed_is_refused_with_the_reason")
    for name, weight in WEIGHTS.items():
        conv, x = layer(weight, method, bits, dtype)
        y = conv(x)
        y.float().sum().backward()
        gradients = [p.grad for p in conv.parameters() if p.requires_grad]
        assert all(g is not None and torch.isfinite(g).all() for g in gradients), name
        assert torch.isfinite(y).all() and torch.isfinite(conv.eval()(x)).all(), name
        quantized = conv.quantizer.weight(conv.weight)
        assert torch.equal(conv.quantizer.decode(conv.quantizer.encode(conv.weight), conv.weight), quantized), name
        numbers = 2**bits * (2 if method == "dkm over vectors" else 1)
        tail = int(weight.numel() == 1)  # a vector's layer of one channel stays as it is
        assert len(quantized.unique()) <= numbers + tail, name
        assert all(np.isfinite(list(signal_to_noise(conv, x).values()))), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_is_not_finite_is_named(method, value):
    with pytest.raises(UserError, match="its weight is not finite and cannot be quantized"):
        layer(torch.where(CHANNEL == 2, value, NORMAL), method, 2)


def test_an_affine_grid_of_any_range_is_finite():
    for weight in WEIGHTS.values():
        for bits in (1, 4):
            grid = Affine(bits, len(weight))
            low, high = weight.flatten(1).aminmax(dim=1)
            grid.scale.copy_((high - low).clamp(min=1e-8) / (2**bits - 1))  # as AIMET, which has a smallest range
            grid.zero_point.copy_((-low / grid.scale).round())
            values = grid.weight(weight)
            assert torch.isfinite(values).all()
            assert all(len(row.unique()) <= 2**bits for row in values)
            assert torch.isfinite(Activation(bits, grid.scale[0].item(), grid.zero_point[0].item())(weight)).all()
