"""A device that is not there: what a step leaves on the CPU, or asks of values, fails without a GPU.

Fake CUDA tensors go forwards; autograd takes none of them without a GPU, so that meta tensors go backwards. The fused
optimizers take neither.
"""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r2 import dist, kernels, models, regularizers
from r2.clustering import passes
from r2.config import UserError
from r2.palettize import Palette
from r2.quantizers import affine, ewgs, lsq, pact
from r2.quantizers.layers import quantizable, quantizer_parameters, swap
from r2.stages.graph import places

NETWORKS = {"resnet18": lambda: models.resnet18(10, 0.25), "mobilenet_v2": lambda: models.mobilenet_v2(10, 0.25)}
SIZES = [(1, 1), (2, 1), (4, 1), (2, 2), (4, 4)]
QUANTIZERS = {
    "fp32": None,
    "ewgs": lambda channels: ewgs.EWGS(2, 2, 1e-3),
    "lsq": lambda channels: lsq.LSQ(2, 2),
    "lsq by channel": lambda channels: lsq.LSQ(2, 2, channels),
    "pact": lambda channels: pact.PACT(2, 2),
    "pact at 1 bit": lambda channels: pact.PACT(1, 1),
    **{f"dkm {b} {d}": lambda channels, b=b, d=d: Palette(b, d, 0.05, True, iterations=2) for b, d in SIZES},
}
# DKM's passes are many operations: the network of fewer layers is enough
CASES = [(n, m) for n in NETWORKS for m in QUANTIZERS if n == "resnet18" or not m.startswith("dkm")]


class OnDevice(TorchDispatchMode):
    """Refuses a tensor on the CPU: PyTorch itself takes one without dimensions, and waits for its copy."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                raise RuntimeError(f"{function} on the CPU: {tuple(tensor.shape)}")
        return out


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No compiled kernels: their inside has no tensor of another device, and fake tensors cannot go through."""
    monkeypatch.setattr(kernels.fused, "__call__", lambda self, *arguments: self.plain(*arguments))
    monkeypatch.setattr(passes, "_triton", lambda: None)


def compressed(network, method):
    """The network in training mode, swapped, and its quantizers' parameters."""
    model = NETWORKS[network]().train()
    if (quantizer := QUANTIZERS[method]) is None:
        return model, []
    layers = quantizable(model)
    swap(layers, lambda name: quantizer(len(layers[name].weight)))
    return model, quantizer_parameters(layers)


def post_trained(network, stage):
    """The network as a post-training stage leaves it: without BatchNorm, weights and activations on affine grids."""
    model = NETWORKS[network]().eval()
    where = places(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(name, nn.Identity())
    layers = quantizable(model)
    swap(layers, lambda name: affine.Affine(4, len(layers[name].weight) if stage == "dfq" else 1))
    for layer in layers.values():
        layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))  # BatchNorm's
        if stage == "adaround":  # its rounding is not to the nearest
            layer.codes = layer.quantizer.encode(layer.weight)
    for name in where.inputs:
        affine.quantize_input(model.get_submodule(name), affine.Activation(8))
    for name in where.outputs:
        affine.quantize_output(model.get_submodule(name), affine.Activation(8))
    return model


def forwards_on_fake_cuda(model):
    with FakeTensorMode():
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda").requires_grad_(tensor.requires_grad)
            for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items()
        }
        images = torch.empty(4, 3, 64, 64, device="cuda")
        with OnDevice():
            logits = torch.func.functional_call(model, state, (images,))
    assert logits.device.type == "cuda" and logits.shape == (4, 10)
    return logits


@pytest.mark.parametrize("network, method", CASES)
def test_forwards_on_fake_cuda(network, method):
    model, _ = compressed(network, method)
    assert forwards_on_fake_cuda(model).requires_grad


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("stage", ["none", "dfq", "adaround"])
def test_a_post_training_stage_s_model_on_fake_cuda(network, stage):
    model = post_trained(network, stage)
    assert sum(isinstance(m, affine.Affine | affine.Activation) for m in model.modules()) > 50
    forwards_on_fake_cuda(model)


@pytest.mark.parametrize("network, method", CASES)
def test_backwards_on_meta(network, method):
    model, scales = compressed(network, method)
    model.to("meta")
    with OnDevice():
        model(torch.empty(4, 3, 64, 64, device="meta")).sum().backward()
        lsq.bound_gradients(scales)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["L2", "LInf", "Margin", "SoftMinMax", "Kurtosis"])
def test_a_regularizer_and_clipping_on_fake_cuda(kind):
    with FakeTensorMode():
        with torch.device("cuda"):
            model = NETWORKS["mobilenet_v2"]()
        regularizer = getattr(regularizers, kind)(model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with OnDevice():
            penalty = regularizer.add_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert penalty.device.type == "cuda"


def test_what_is_left_on_the_cpu_or_asked_of_values_fails():
    cases = [
        lambda x: x * torch.tensor(2.0),
        lambda x: x * torch.ones(3),
        lambda x: x[x > 0],
        lambda x: x if x.sum() > 0 else -x,
    ]
    for device in ("cuda", "meta"):
        for case in cases:
            with FakeTensorMode() if device == "cuda" else torch.no_grad():
                x = torch.empty(3, device=device)
                with pytest.raises((RuntimeError, NotImplementedError)), OnDevice():
                    case(x)


def test_gpus_that_torch_cannot_use_are_said_and_not_taken_for_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="GPUs cannot be used by torch"):
        dist.device_count("auto")


def test_a_task_of_slurm_that_sees_one_gpu_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    with pytest.raises(UserError, match="LOCAL_RANK=3: this machine has 1 GPUs"):
        dist._gpu_of(3)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert dist._gpu_of(3) == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert dist._gpu_of(3) == 3
