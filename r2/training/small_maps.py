"""Fast weight gradients of convolutions on maps smaller than their kernel, on a CPU.

There PyTorch falls back to plain code: on the 1x1 and 2x2 maps in which networks made for ImageNet end at 32x32, the
weight gradient of a depthwise convolution takes many times its forward pass (scripts/bench/step.py --size 32).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fast_on_small_maps(model: nn.Module, device: torch.device) -> Callable[[Any], Tensor]:
    """The forward pass of `model`, on a CPU within `small_maps`."""
    if device.type != "cpu":
        return model

    def forward(inputs: Any) -> Tensor:
        with small_maps():
            return model(inputs)

    return forward


def small_maps() -> AbstractContextManager:
    """Within it F.conv2d, which nn.Conv2d calls, leaves out the taps of a kernel that meet only padding.

    Results and gradients stay what they are, up to the order in which a sum is taken. A TorchFunctionMode would leave F
    alone, but it is called for every operation and every attribute of a tensor.
    """
    return mock.patch.object(F, "conv2d", _conv2d)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    larger = weight.shape[2] > input.shape[-2] and weight.shape[3] > input.shape[-1]
    plain = isinstance(stride, tuple) and isinstance(padding, tuple) and dilation == (1, 1)  # as nn.Conv2d calls it
    if larger and plain and torch.is_grad_enabled():
        return _convolve(input, weight, bias, stride, padding, groups)
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple, padding: tuple, groups: int) -> Tensor:
    seen = [_seen(*sizes) for sizes in zip(x.shape[-2:], weight.shape[2:], stride, padding, strict=True)]
    (top, rows, above, below), (first, columns, left, right) = seen
    if groups == 1 and (rows, columns) == tuple(weight.shape[2:]):
        return torch.conv2d(x, weight, bias, stride, padding)
    # Zeros that are part of the input keep PyTorch on its fast code; padding larger than the map does not.
    x = F.pad(x, (left, right, above, below)) if any((left, right, above, below)) else x
    weight = weight[:, :, top : top + rows, first : first + columns]
    return torch.conv2d(x, weight, bias, stride, 0, 1, groups)


@cache
def _seen(size: int, kernel: int, stride: int, padding: int) -> tuple[int, int, int, int]:
    """Of one dimension: the first tap that meets the map, how many do, and the zeros they need before and after it."""
    positions = range(-padding, size + padding - kernel + 1, stride)
    taps = [tap for tap in range(kernel) if any(0 <= position + tap < size for position in positions)] or range(kernel)
    first, count = taps[0], taps[-1] - taps[0] + 1
    before = padding - first
    return first, count, before, positions[-1] + padding + count - size - before
