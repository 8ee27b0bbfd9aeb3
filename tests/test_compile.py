"""`recipe.compile`: a compressed model is one graph, so that nothing in it falls back to Python between kernels."""

import pytest
import torch
from test_device import NETWORKS, post_trained
from torch import nn
from torch._dynamo.utils import counters

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


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    """On a CPU, DKM looks whether it has settled, and has kernels of its own."""
    for module in (passes, palettize):
        monkeypatch.setattr(module, "on_host", lambda x: False)
    # k-means, before the first step, takes longer than the steps
    monkeypatch.setattr(palettize, "initial_centroids", lambda v, k, seed: v[torch.linspace(0, len(v) - 1, k).long()])
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("method", QUANTIZERS)
def test_one_graph_forwards_and_backwards(method):
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


def assert_one_graph_for_two_steps(model):
    """The second step must not compile anew, for instance because a buffer has changed."""
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    counters.clear()
    for _ in range(2):
        compiled(torch.rand(4, 3, 32, 32)).square().sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


QUICK = [("resnet18", "lsq")]
SLOW = [(n, m) for n in NETWORKS for m in ("ewgs", "lsq", "pact", "dkm 2 1", "dkm 4 4") if (n, m) not in QUICK]


@pytest.mark.parametrize("network, method", [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_network_in_training_is_one_graph(network, method):
    torch.manual_seed(0)
    model = NETWORKS[network]().train()
    layers = quantizable(model)
    swap(layers, lambda name: QUANTIZERS[method](len(layers[name].weight)))
    calibrate(model, layers, torch.rand(4, 3, 32, 32))
    assert_one_graph_for_two_steps(model.train())


# weights at the nearest level, and from codes
@pytest.mark.parametrize("network, stage", [("resnet18", "none"), ("mobilenet_v2", "none"), ("resnet18", "adaround")])
def test_a_post_training_stage_s_network_is_one_graph(network, stage):
    assert_one_graph_for_two_steps(post_trained(network, stage))
