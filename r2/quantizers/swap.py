"""Turn the layers of a trained model into their quantized twins, in place: same parameters, same names."""

from collections.abc import Callable

import torch
from torch import nn

from r2.config import UserError


def quantizable(model: nn.Module, skip_first_last: bool = False) -> dict[str, nn.Module]:
    """Convolution and linear layers by name, in the model's order."""
    layers: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    if skip_first_last:
        names = list(layers)
        layers = {n: layers[n] for n in names[1:-1]}
    if not layers:
        raise UserError("the model has no convolution or linear layer to quantize")
    return layers


def swap(
    layers: dict[str, nn.Module],
    twins: dict[type, type],
    quantizer: Callable[[str], nn.Module],
) -> None:
    """Give each layer its twin's class and a `quantizer` of its own."""
    for name, layer in layers.items():
        layer.__class__ = twins[type(layer)]
        layer.quantizer = quantizer(name).to(layer.weight.device)  # type: ignore[operator,union-attr,arg-type]


@torch.no_grad()
def calibrate(model: nn.Module, layers: dict[str, nn.Module], images: torch.Tensor) -> None:
    """Initialise every quantizer in one forward pass in training mode, so a later layer sees quantized inputs."""
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs: module.initialise(inputs[0]))
        for layer in layers.values()
    ]
    model.train()
    model(images)
    for hook in hooks:
        hook.remove()


def quantizer_parameters(layers: dict[str, nn.Module]) -> list[nn.Parameter]:
    return [p for layer in layers.values() for p in layer.quantizer.parameters() if p.requires_grad]  # type: ignore[union-attr]
