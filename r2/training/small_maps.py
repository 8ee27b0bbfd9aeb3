"""Fast weight gradients of convolutions on maps smaller than their kernel, on a CPU.

There PyTorch falls back to plain code: on the 1x1 and 2x2 maps in which networks made for ImageNet end at 32x32, the
weight gradient of a depthwise convolution takes many times its forward pass (scripts/bench/step.py --size 32).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def fast_on_small_maps(model: nn.Module, device: torch.device) -> Callable[[Any], Tensor]:
    """The forward pass of `model`, on a CPU with `SmallMaps` in force."""
    if device.type != "cpu":
        return model

    def forward(inputs: Any) -> Tensor:
        with SmallMaps():
            return model(inputs)

    return forward


class SmallMaps(TorchFunctionMode):
    """While it is in force, a convolution leaves out the taps of its kernel that never meet the map, only its padding.

    Results and gradients stay what they are, up to the order in which a sum is taken.
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.conv2d and len(args) == 7 and torch.is_grad_enabled():
            x, weight, _, _, padding, dilation, _ = args
            larger = all(k > size for k, size in zip(weight.shape[2:], x.shape[-2:], strict=True))
            if larger and isinstance(padding, tuple) and dilation == (1, 1):
                return _convolve(*args)
        return function(*args, **(kwargs or {}))


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple, padding: tuple, dilation: tuple, groups: int
) -> Tensor:
    seen = [_seen(*sizes) for sizes in zip(x.shape[-2:], weight.shape[2:], stride, padding, strict=True)]
    (top, rows, above, below), (first, columns, left, right) = seen
    if groups == 1 and (rows, columns) == tuple(weight.shape[2:]):
        return F.conv2d(x, weight, bias, stride, padding, dilation)
    # Zeros that are part of the input keep PyTorch on its fast code; padding larger than the map does not.
    x = F.pad(x, (left, right, above, below)) if any((left, right, above, below)) else x
    weight = weight[:, :, top : top + rows, first : first + columns]
    return F.conv2d(x, weight, bias, stride, 0, dilation, groups)


@cache
def _seen(size: int, kernel: int, stride: int, padding: int) -> tuple[int, int, int, int]:
    """Of one dimension: the first tap that meets the map, how many do, and the zeros they need before and after it."""
    positions = range(-padding, size + padding - kernel + 1, stride)
    taps = [tap for tap in range(kernel) if any(0 <= position + tap < size for position in positions)] or range(kernel)
    first, count = taps[0], taps[-1] - taps[0] + 1
    before = padding - first
    return first, count, before, positions[-1] + padding + count - size - before
