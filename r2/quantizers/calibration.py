"""Calibration: every quantizer is initialised from the first batch, in one forward pass.

`best_clip` and `output_ratio` are what the methods' `initialise` share.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from r2.config import UserError
from r2.quantizers.layers import Operation, Quantizer, input_of


@torch.no_grad()
def calibrate(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any, frozen: bool = False) -> None:
    """Initialise every quantizer in one forward pass, so that a later layer sees quantized inputs.

    The pass draws no random number and leaves the model's mode and statistics as they were: a stage's result depends
    on the model and the batch alone. A layer that is called again is initialised again, over the inputs of all calls;
    what is kept for that is what training keeps of the same batch.

    Args:
        batch: what the model is called with.
        frozen: BatchNorm normalises by its running statistics, as in a training that keeps them, not by the batch.
    """
    check_weights(layers)
    seen: dict[nn.Module, list[Tensor]] = defaultdict(list)

    def initialise(layer: Any, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        seen[layer].append(input_of(inputs, named))
        layer.quantizer.initialise(seen[layer], layer.weight, layer.operation)

    hooks = [layer.register_forward_pre_hook(initialise, with_kwargs=True) for layer in layers.values()]
    try:
        with _calibrating(model, frozen):
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _calibrating(model: nn.Module, frozen: bool) -> Iterator[None]:
    """BatchNorm normalises as in training; dropout is off, and mode and statistics come back."""
    modes = {module: module.training for module in model.modules()}
    norms = [module for module in modes if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    model.eval()
    for norm in norms:
        norm.train(not frozen)
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
        for module, mode in modes.items():
            module.training = mode


def check_weights(layers: Mapping[str, nn.Module]) -> None:
    """
    Raises:
        UserError: a weight is not finite; every method would make something of it.
    """
    for name, layer in layers.items():
        if not torch.isfinite(layer.get_parameter("weight")).all():
            raise UserError(f"{name}: its weight is not finite and cannot be quantized; train with a lower recipe.lr")


def values(inputs: Sequence[Tensor]) -> Tensor:
    """All values of the inputs of a layer's calls in one tensor."""
    return inputs[0] if len(inputs) == 1 else torch.cat([x.flatten() for x in inputs])


def best_clip(x: Tensor, rounded: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """0-d: the clip with which `rounded(x, clip)` is nearest to x in square mean; 1 if x is zero everywhere.

    Of clips in steps of 12 % between half and 64 root mean squares, none above the largest |x|, so that each has a
    gradient from the start. 100,000 values decide at most.
    """
    x = x.detach().reshape(-1).to(torch.promote_types(x.dtype, torch.float32))
    size, largest = x.square().mean().sqrt(), x.abs().amax()
    some = x
    if len(x) > 100_000:  # drawn, for equal distances would meet the same features again and again
        some = x[torch.randint(len(x), (100_000,), generator=torch.Generator().manual_seed(0)).to(x.device)]
    clips = [torch.minimum(size * 2 ** (k / 6), largest) for k in range(-6, 37)]
    losses = torch.stack([(rounded(some, clip) - some).square().mean() for clip in clips])
    return torch.where(size > 0, torch.stack(clips)[losses.argmin()], torch.ones_like(size))


def output_ratio(quantizer: Quantizer, inputs: Sequence[Tensor], weight: Tensor, operation: Operation) -> Tensor:
    """mean|operation(x, weight)| over the same of the quantized ones: the scale that keeps the output's size."""
    outputs = [(operation(x, weight), operation(quantizer.act(x), quantizer.weight(weight))) for x in inputs]
    size, quantized = (torch.cat([y.flatten() for y in ys]).abs().mean() for ys in zip(*outputs, strict=True))
    return size / torch.where(quantized > 0, quantized, torch.ones_like(quantized))
