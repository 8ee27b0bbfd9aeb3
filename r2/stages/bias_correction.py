"""Bias correction of a quantized network (Nagel et al. 2019, section 4.2): keeps the means of layer outputs.

Quantization shifts the mean of a layer's output. The empirical method measures the shift over calibration images. The
analytic method computes it from the weight error and the mean input, which follows from BatchNorm's beta and gamma.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from r2.models import Add
from r2.quantizers.layers import compressed
from r2.stages.graph import PASSING, run_by_module, trace


@torch.no_grad()
def correct(
    net: nn.Module, quantized: nn.Module, batches: list[Tensor], expected: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Give each compressed layer of `quantized`, in order, the bias that removes the shift of its mean output.

    Args:
        net: the unquantized network, its BatchNorms folded.
        quantized: of the same module names; its biases are changed.
        batches: images (n, 3, h, w).
        expected: mean input per channel of the layers to correct analytically; the others are measured.

    Returns:
        the new biases by layer name.
    """
    graph, layers, expected = trace(net), compressed(quantized), expected or {}
    measured = {name: net.get_submodule(name) for name in layers if name not in expected}
    wanted = output_means(net, measured, batches)
    biases: dict[str, Tensor] = {}

    def fix(name: str, arguments: list[tuple]) -> None:
        if name not in layers:
            return
        layer = layers[name]
        if name in expected:
            error = layer.weight - net.get_parameter(f"{name}.weight")
            shift = weight_shift(layer, error, expected[name], arguments[0][0].shape)
        else:
            shift = _output_mean(layer, arguments) - wanted[name]
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(shift, dtype=layer.weight.dtype))
        layer.bias -= shift.to(layer.bias.dtype)
        biases[name] = layer.bias.detach().clone()

    run_by_module(graph, quantized, batches, fix)
    return biases


def weight_shift(layer: Any, error: Tensor, mean: Tensor, size: torch.Size) -> Tensor:
    """Mean output (o,) of the weight error at the mean input (i,), over a whole input of `size` (n, i, h, w) or (n, i).

    The zeros around an image count, which the paper leaves out: at the small sizes of deep layers they are most of it.
    """
    constant = mean.to(error.dtype).view(1, -1, *[1] * (len(size) - 2)).expand(1, *size[1:])
    found = _Mean()
    found.add(layer, (), layer.operation(constant, error))
    return found.value()


@torch.no_grad()
def output_means(model: nn.Module, layers: Mapping[str, nn.Module], batches: list[Tensor]) -> dict[str, Tensor]:
    """Mean output per channel of the `layers` of `model`, before a quantizer of that output."""
    sums = {name: _Mean() for name in layers}
    hooks = [layer.register_forward_hook(sums[name].add, prepend=True) for name, layer in layers.items()]
    for batch in batches if layers else []:
        model(batch)
    for hook in hooks:
        hook.remove()
    return {name: found.value() for name, found in sums.items()}


def _output_mean(layer: nn.Module, arguments: list[tuple]) -> Tensor:
    found = _Mean()
    hook = layer.register_forward_hook(found.add, prepend=True)
    for argument in arguments:
        layer(*argument)
    hook.remove()
    return found.value()


class _Mean:
    """Mean over all but the channels, of what a hook sees."""

    def __init__(self) -> None:
        self.sum, self.count = torch.zeros(()), 0

    def add(self, _: nn.Module, inputs: tuple, output: Tensor) -> None:
        rows = output.flatten(2).sum(2, dtype=torch.float64) if output.dim() > 2 else output.double()
        self.sum = self.sum.to(output.device) + rows.sum(0)
        self.count += output.numel() // output.shape[1]

    def value(self) -> Tensor:
        return self.sum / self.count


def expected_inputs(net: nn.Module, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Mean input per channel of every layer where BatchNorm tells it.

    Args:
        net: BatchNorms folded.
        statistics: mean and standard deviation per channel of a layer's output: beta and |gamma|.
    """
    means: dict[fx.Node, Tensor | None] = {}
    normal: dict[fx.Node, tuple[Tensor, Tensor] | None] = {}
    found: dict[str, Tensor] = {}
    for node in trace(net).nodes:
        inputs = node.all_input_nodes
        mean, spread = (means[inputs[0]], normal[inputs[0]]) if inputs else (None, None)
        if node.op == "call_module":
            module = net.get_submodule(node.target)
            if isinstance(module, nn.Conv2d | nn.Linear):
                width = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
                if mean is not None and mean.numel() == width:
                    found[node.target] = mean
                spread = statistics.get(node.target)
                mean = spread[0] if spread else None
            elif isinstance(module, nn.ReLU):
                mean, spread = mean_after_relu(*spread) if spread else None, None
            elif isinstance(module, Add):
                parts = [part for part in (means[i] for i in inputs) if part is not None]
                mean, spread = torch.stack(parts).sum(0) if len(parts) == 2 else None, None
            elif isinstance(module, nn.AdaptiveAvgPool2d):
                spread = None
            elif not isinstance(module, PASSING):
                mean, spread = None, None
        means[node], normal[node] = mean, spread
    return found


def mean_after_relu(mean: Tensor, std: Tensor) -> Tensor:
    """E[max(0, x)] of a normal x: std phi(mean / std) + mean Phi(mean / std)."""
    z = mean.double() / std.double().clamp(min=1e-12)
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return std.double() * density + mean.double() * torch.special.ndtr(z)
