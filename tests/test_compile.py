"""`recipe.compile`: a compressed model is one graph, so that nothing in it falls back to Python between kernels."""

import pytest
import torch
from torch import nn

from r2 import palettize
from r2.clustering import passes
from r2.palettize import Palette
from r2.quantizers import ewgs, lsq, pact
from r2.quantizers.calibration import calibrate
from r2.quantizers.layers import quantizable, swap

QUANTIZERS = {
    "ewgs": lambda channels: ewgs.EWGS(2, 2, 1e-3),
    "lsq": lambda channels: lsq.LSQ(2, 2),
    "lsq by channel": lambda channels: lsq.LSQ(2, 2, channels),
    "pact": lambda channels: pact.PACT(2, 2),
    "pact at 1 bit": lambda channels: pact.PACT(1, 1),
    "dkm 2 1": lambda channels: Palette(2, 1, 0.05, True),
    "dkm 4 4": lambda channels: Palette(4, 4, 0.05, True),
}


def small_model():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", QUANTIZERS)
def test_one_graph_forwards_and_backwards(method, monkeypatch):
    for module in (passes, palettize):  # on a CPU, DKM looks whether it has settled, and has kernels of its own
        monkeypatch.setattr(module, "on_host", lambda x: False)
    torch.manual_seed(0)
    model, images = small_model(), torch.rand(4, 3, 12, 12)
    layers = quantizable(model)
    swap(layers, lambda name: QUANTIZERS[method](len(layers[name].weight)))
    calibrate(model, layers, images)
    found = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        logits = forward(images)
        logits.square().sum().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.load_state_dict(state)  # of DKM's centroids and BatchNorm
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
