"""A network with a dead channel keeps its accuracy through every method of post-training quantization."""

import pytest
import torch
from test_ptq import compress  # noqa: F401  # a fixture
from torch import nn
from torch.nn import functional as F

from r2.quantizers.layers import compressed
from r2.stages.ptq import DFQ, AdaRound, Nearest


def quadrants(count, seed):
    """Noise with a brighter quadrant, and which one it is."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 3, 32, 32, generator=generator), torch.randint(4, (count,), generator=generator)
    for i, place in enumerate(y.tolist()):
        row, column = 16 * (place // 2), 16 * (place % 2)
        x[i, :, row : row + 16, column : column + 16] += 1
    return x, y


@pytest.fixture(scope="module")
def trained():
    """A small separable network that tells quadrants apart, with a dead depthwise channel."""
    torch.manual_seed(0)

    def block(inputs, outputs, kernel, **options):
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
        return conv, nn.BatchNorm2d(outputs), nn.ReLU()

    model = nn.Sequential(
        *block(3, 8, 3, stride=2), *block(8, 8, 3, groups=8), *block(8, 16, 1), *block(16, 16, 3, stride=2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, y = quadrants(512, 1)
    for step in range(48):
        rows = slice(64 * (step % 8), 64 * (step % 8) + 64)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        with torch.no_grad():
            model[3].weight[2] = 1e-22  # as weight decay leaves it
        optimizer.step()
    with torch.no_grad():
        # It reads a channel of its own, alive, and its kernel is what a dead input leaves: as it was.
        model[0].weight[2], model[1].bias[2], model[1].weight[2] = 0, -1, 1
        model[1].running_mean[2], model[1].running_var[2] = 0, 0
        model[3].weight[2] = 0.3
        model[4].running_mean[2], model[4].running_var[2], model[4].weight[2] = 0, 0, 1
    return model.eval()


def top1(model):
    x, y = quadrants(512, 2)
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


@pytest.mark.parametrize("stage, settings", [
    (Nearest, {}), (Nearest, {"scheme": "min_max"}), (DFQ, {}), (AdaRound, {"iterations": 200}),
])  # fmt: skip
def test_a_dead_channel_costs_no_accuracy(compress, trained, stage, settings, monkeypatch):  # noqa: F811
    monkeypatch.setattr("test_ptq.images", lambda: list(quadrants(96, 3)[0].split(32)))
    assert top1(trained) > 0.98
    done, _ = compress(stage, trained, **settings)
    assert done["details"]["constant_channels"] == ["1:2", "4:2"]
    assert top1(done["model"]) > top1(trained) - 0.02
    assert done["details"]["weight_sqnr_db"]["3"] > 10
    for name in ("0", "3"):
        assert not compressed(done["model"])[name].weight[2].any()
    theirs, _ = compress(stage, trained, fold_constant=False, **settings)
    assert theirs["details"]["constant_channels"] is None
    assert top1(theirs["model"]) < 0.5
