"""Calibration: by the model and the batch alone, over every call of a layer, without a trace."""

import copy

import pytest
import torch
from torch import nn

from r2 import models
from r2.quantizers.calibration import calibrate
from r2.quantizers.ewgs import EWGS
from r2.quantizers.layers import quantizable, swap
from r2.quantizers.lsq import LSQ
from r2.quantizers.pact import PACT

METHODS = (EWGS, LSQ, PACT)


@pytest.mark.parametrize("method", METHODS)
def test_it_draws_nothing_and_leaves_no_trace(method):
    """MobileNet-V2 has dropout, from a generator that who pretrained in the same process has moved."""
    torch.manual_seed(0)
    model, x = models.mobilenet_v2(10, 0.25), torch.randn(16, 3, 32, 32)
    model.train()
    model.features[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    found = []
    for seed in (1, 2):
        net = copy.deepcopy(model)
        layers = quantizable(net)
        swap(layers, lambda _: method(2, 2))
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        calibrate(net, layers, x)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(net.state_dict())
        assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
        assert all(module.training == modes[name] for name, module in net.named_modules() if name in modes)
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in found), strict=True))


class Pyramid(nn.Module):
    """One head on two inputs: the second a tenth of the first, and of another sign and size."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        a = self.stem(x)
        return self.head(a), self.head(a[:, :, ::2].relu() * 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_called_twice_is_calibrated_over_both_calls(method):
    torch.manual_seed(0)
    model, x = Pyramid().eval(), torch.randn(2, 3, 8, 8)
    y = model(x)[0]
    swap(quantizable(model), lambda _: method(8, 8))
    calibrate(model, quantizable(model), x)
    noise = model.eval()(x)[0] - y
    assert 10 * torch.log10(y.square().sum() / noise.square().sum()) > 20
    assert model.head.quantizer.signed


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frozen, size", [(False, 1.0), (True, 0.1)])
def test_inputs_are_normalised_as_in_the_training_that_follows(method, frozen, size):
    """By running statistics that are ten times the batch's, a layer's inputs are a tenth."""
    torch.manual_seed(0)
    norm, x = nn.BatchNorm2d(3).eval(), torch.randn(64, 3, 8, 8)
    norm.running_var.fill_(100.0)
    model = nn.Sequential(norm, nn.Conv2d(3, 4, 3))
    swap(quantizable(model), lambda _: method(8, 8))
    calibrate(model, quantizable(model), x, frozen)
    alone = nn.Sequential(nn.Conv2d(3, 4, 3))
    alone[0].load_state_dict({k: v for k, v in model[1].state_dict().items() if "quantizer" not in k})
    swap(quantizable(alone), lambda _: method(8, 8))
    calibrate(alone, quantizable(alone), size * nn.BatchNorm2d(3)(x))
    ours, theirs = model[1].quantizer.activation_grid(), alone[0].quantizer.activation_grid()
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=0.02, atol=0)
