"""Affine quantization on a fixed grid, the result of post-training methods: q = clip(round(x / scale) + zero, 0, n)."""

from typing import Any

import torch
from torch import Tensor, nn

from r2.quantizers.layers import Quantizer, WeightGrid


class Affine(Quantizer):
    """One layer's weight on a grid, per tensor or per output channel.

    Attributes:
        scale, zero_point: (channels,) or (1,); the levels are (code - zero_point) * scale, code in 0 .. 2^bits - 1.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, weight_bits: int, channels: int = 1):
        super().__init__()
        self.weight_bits, self.channels = weight_bits, channels
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("zero_point", torch.full((channels,), float(2 ** (weight_bits - 1))))

    def weight(self, w: Tensor) -> Tensor:
        return self.decode(self.encode(w), w)

    @torch.no_grad()
    def encode(self, w: Tensor) -> Tensor:
        rows = w.reshape(self.channels, -1)
        codes = torch.round(rows / self.scale[:, None]) + self.zero_point[:, None]
        return codes.clamp(0, 2**self.weight_bits - 1).reshape(-1).to(torch.int32)

    def decode(self, codes: Tensor, like: Tensor) -> Tensor:
        rows = codes.view(self.channels, -1).to(like.dtype)
        return ((rows - self.zero_point[:, None]) * self.scale[:, None]).view(like.shape)

    def weight_grid(self) -> WeightGrid:
        zero, last = self.zero_point, 2**self.weight_bits - 1
        return WeightGrid(0, 1, min(0, int(zero.min())), max(last, int(zero.max())), self.scale, zero)

    def settings(self) -> dict[str, Any]:
        return {"weight_bits": self.weight_bits, "channels": self.channels}


class Activation(nn.Module):
    """Affine quantization of an activation, simulated: x to its nearest level."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, scale: float = 1.0, zero_point: float = 0.0):
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("zero_point", torch.tensor(float(zero_point)))

    def forward(self, x: Tensor) -> Tensor:
        codes = (torch.round(x / self.scale) + self.zero_point).clamp(0, 2**self.bits - 1)
        return (codes - self.zero_point) * self.scale


def quantize_input(module: nn.Module, activation: Activation) -> None:
    """Let `module` see its first input through `activation`."""
    module.input_quantizer = activation
    module.register_forward_pre_hook(_through_input)


def quantize_output(module: nn.Module, activation: Activation) -> None:
    """Let others see `module`'s output through `activation`."""
    module.output_quantizer = activation
    module.register_forward_hook(_through_output)


def _through_input(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (module.input_quantizer(inputs[0]), *inputs[1:])


def _through_output(module: Any, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return module.output_quantizer(output)
