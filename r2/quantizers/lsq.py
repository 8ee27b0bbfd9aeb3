"""LSQ: learned step size quantization (Esser et al., ICLR 2020).

Forward:   y = s round(clip(x / s, q_min, q_max))
Backward:  dx = g  on the closed interval q_min <= x / s <= q_max, else 0
           ds = k sum g (round(z) - z inside | q_min below | q_max above),  z = x / s,  k = 1 / sqrt(N q_max)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from r2.config import UserError
from r2.kernels import flat, fused, matching, unflat
from r2.quantizers.layers import Quantizer


def quantize(x: Tensor, step: Tensor, quant_min: int, quant_max: int, grad_scale: float | None = None) -> Tensor:
    """Round `x` to the nearest of `step` times the integers quant_min .. quant_max.

    Gradients go to `x` and `step`.

    Args:
        x: any shape.
        step: 0-d, positive.
        quant_min, quant_max: integer bounds, quant_min <= 0 < quant_max.
        grad_scale: factor on the step's gradient; by default 1 / sqrt(x.numel() quant_max), the batch counted in.
    """
    if not quant_min <= 0 < quant_max:
        raise ValueError(f"the bounds must hold quant_min <= 0 < quant_max, got {quant_min} and {quant_max}")
    scale = 1 / math.sqrt(x.numel() * quant_max) if grad_scale is None else grad_scale
    return _Quantize.apply(x, step, *(x.new_full((), value) for value in (quant_min, quant_max, scale)))


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, step, low, high, scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, step, low, high, scale)
        kernel = _round if x.numel() >= 4096 and x.dtype != torch.float64 else _round.plain
        return unflat(kernel(flat(x), step, low, high), x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, step, low, high, scale = ctx.saved_tensors
        grad = matching(grad, x)
        kernel = _gradients if x.numel() >= 4096 and x.dtype != torch.float64 else _gradients.plain
        gx, gs = kernel(flat(x), flat(grad), step, low, high)
        return unflat(gx, x), (gs * scale).view_as(step), None, None, None


@fused
def _round(x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.round(torch.minimum(torch.maximum(x / step, low), high)) * step


@fused
def _gradients(x: Tensor, grad: Tensor, step: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    z = x / step
    inside = (z >= low) & (z <= high)
    slope = torch.where(inside, torch.round(z) - z, torch.where(z < low, low, high))
    return torch.where(inside, grad, 0.0), (grad * slope).sum()


def bounds(bits: int, signed: bool) -> tuple[int, int]:
    """The integer range of a width.

    Raises:
        UserError: 1 bit signed, whose largest level is 0, so that the step has no start and no gradient scale.
    """
    if signed and bits == 1:
        raise UserError("lsq at 1 bit signed is not defined: its largest level is 0, so the step 2 mean|w| / sqrt(0)")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class LSQ(Quantizer):
    """One layer's LSQ: a step for the weight and one for the input, which is unsigned where it never is negative."""

    weight_step: nn.Parameter
    act_step: nn.Parameter
    signed: Tensor

    def __init__(self, weight_bits: int, act_bits: int | None):
        super().__init__()
        bounds(weight_bits, signed=True)
        self.weight_bits, self.act_bits = weight_bits, act_bits
        self.weight_step = nn.Parameter(torch.ones(()))
        self.act_step = nn.Parameter(torch.ones(()), requires_grad=act_bits is not None)
        self.register_buffer("signed", torch.tensor(0.0))

    @torch.no_grad()
    def initialise(self, x: Tensor, weight: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        """2 mean|x| / sqrt(q_max), of the weight and of the first batch."""
        self.weight_step.copy_(_first_step(weight, bounds(self.weight_bits, signed=True)[1]))
        if self.act_bits is not None:
            self.signed.fill_(float(x.min() < 0))
            self.act_step.copy_(_first_step(x, bounds(self.act_bits, bool(self.signed))[1]))

    def weight(self, w: Tensor) -> Tensor:
        return quantize(w, _positive(self.weight_step), *bounds(self.weight_bits, signed=True))

    def act(self, x: Tensor) -> Tensor:
        if self.act_bits is None:
            return x
        return quantize(x, _positive(self.act_step), *bounds(self.act_bits, bool(self.signed)))

    @torch.no_grad()
    def encode(self, w: Tensor) -> Tensor:
        low, high = bounds(self.weight_bits, signed=True)
        levels = torch.round((w.reshape(-1) / _positive(self.weight_step)).clamp(low, high))
        return levels.to(torch.int32) - low

    def decode(self, codes: Tensor, like: Tensor) -> Tensor:
        low, _ = bounds(self.weight_bits, signed=True)
        return ((codes + low).to(like.dtype) * _positive(self.weight_step)).view(like.shape)

    def settings(self) -> dict[str, Any]:
        return {"weight_bits": self.weight_bits, "act_bits": self.act_bits}


def _first_step(x: Tensor, quant_max: int) -> Tensor:
    size = x.abs().mean()
    return 2 * torch.where(size > 0, size, torch.ones_like(size)) / math.sqrt(quant_max)


def _positive(step: Tensor) -> Tensor:
    """Training may push a step through zero; its size is what counts."""
    return step.abs().clamp(min=1e-8)
