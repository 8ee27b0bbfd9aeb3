"""What a step gives a device to do, with its compiled kernels: on a GPU, about what it launches."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from r2 import kernels, models, regularizers
from r2.quantizers.calibration import calibrate
from r2.quantizers.ewgs import EWGS
from r2.quantizers.layers import quantizable, swap
from r2.quantizers.lsq import LSQ
from r2.quantizers.pact import PACT


class Launches(TorchDispatchMode):
    """Operations that compute something, and calls of compiled kernels, each of one to three passes."""

    def __init__(self):
        super().__init__()
        self.operations = self.kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Counts a kernel's call instead of what it is compiled from, whatever its size: as on a GPU."""
    found = Launches()

    def call(self, *arguments):
        found.kernels += 1
        with _disable_current_modes():
            return self.plain(*arguments)

    monkeypatch.setattr(kernels.fused, "__call__", call)
    return found


def network():
    torch.manual_seed(0)
    return models.mobilenet_v2(10, 0.25).train(), torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])


def step(model, images, labels):
    F.cross_entropy(model(images), labels).backward()


def plain_step():
    model, images, labels = network()
    with Launches() as counted:
        step(model, images, labels)
    return counted.operations


KINDS = (regularizers.LInf, regularizers.Margin, regularizers.Kurtosis, regularizers.SoftMinMax)


@pytest.mark.parametrize("kind", KINDS)
def test_a_regularizer_adds_a_kernel_or_two_for_each_layer(launches, kind):
    model, images, labels = network()
    reg = kind(model)
    step(model, images, labels)
    with launches:
        reg.add_gradients()
    assert launches.kernels in (53, 2 * 53 + 1)  # 53 layers; what stands between two kernels is of all at once
    assert launches.operations + launches.kernels < 0.3 * plain_step()


@pytest.mark.parametrize("kind", [EWGS, LSQ, PACT])
def test_a_quantizer_adds_four_kernels_for_each_layer(launches, kind):
    model, images, labels = network()
    layers = quantizable(model)
    swap(layers, lambda name: kind(2, 2))
    calibrate(model, layers, images)
    launches.kernels = 0
    with launches:
        step(model, images, labels)
    plain = plain_step()
    assert launches.kernels == 4 * 53  # weight and input, forwards and backwards
    assert launches.operations + launches.kernels < 2 * plain
