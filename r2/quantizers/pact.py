"""PACT activations (Choi et al. 2018) and DoReFa weights (Zhou et al. 2016), as PACT uses them.

Activation, n = 2^bits - 1:  y = round(clip(x, 0, a) n / a) a / n;   dx = g on 0 <= x <= a,  da = sum of g where x >= a
Weight, b > 1:               y = 2 round((t / (2 max|t|) + 1/2) n) / n - 1,  t = tanh(w); the rounding is straight
                             through, the gradient flows through max|t|
Weight, b = 1:               y = sign(w) mean|w|, the mean a constant, the gradient straight through
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from r2.config import UserError
from r2.kernels import argmax_abs, flat, fused, matching, unflat
from r2.quantizers.layers import Quantizer, output_ratio


def quantize_activation(x: Tensor, alpha: Tensor, bits: int, signed: bool = False) -> Tensor:
    """Clip `x` to [0, alpha] and round it to 2^bits levels; gradients go to `x` and `alpha`.

    Args:
        x: any shape.
        alpha: 0-d, positive.
        bits: 1 to 32; at 32 only clips.
        signed: [-alpha, alpha] with 2^(bits - 1) - 1 levels on either side of zero, for inputs that are not behind a
            ReLU (not in the paper, which has only ReLU inputs); bits >= 2.
    """
    if not 1 <= bits <= 32 or (signed and bits == 1):
        raise ValueError(f"bits must be between {1 + signed} and 32, got {bits}")
    levels = 2.0 ** (bits - 1) - 1 if signed else 2.0**bits - 1
    return _Clip.apply(x, alpha, x.new_full((), levels), x.new_full((), -1.0 if signed else 0.0))


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, levels, side):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, alpha, side)
        kernel = _clip if x.numel() >= 4096 and x.dtype != torch.float64 else _clip.plain
        return unflat(kernel(flat(x), alpha, levels, side), x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, alpha, side = ctx.saved_tensors
        grad = matching(grad, x)
        kernel = _clip_gradients if x.numel() >= 4096 and x.dtype != torch.float64 else _clip_gradients.plain
        gx, ga = kernel(flat(x), flat(grad), alpha, side)
        return unflat(gx, x), ga.view_as(alpha), None, None


@fused
def _clip(x: Tensor, alpha: Tensor, levels: Tensor, side: Tensor) -> Tensor:
    clipped = torch.minimum(torch.maximum(x, side * alpha), alpha)
    return torch.round(clipped * (levels / alpha)) * (alpha / levels)


@fused
def _clip_gradients(x: Tensor, grad: Tensor, alpha: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    # The bounds are explicit: dx is on the closed interval, and x = alpha moves alpha too.
    low = side * alpha
    above, below = torch.where(x >= alpha, grad, 0.0), torch.where((x <= low) & (side < 0), grad, 0.0)
    return torch.where((x >= low) & (x <= alpha), grad, 0.0), (above - below).sum()


def quantize_weight(w: Tensor, bits: int) -> Tensor:
    """DoReFa: 2^bits levels in [-1, 1] (at 1 bit +-mean|w|, at 32 `w` itself); the gradient goes to `w`.

    Raises:
        ValueError: bits outside 1 to 32.
    """
    if not 1 <= bits <= 32:
        raise ValueError(f"bits must be between 1 and 32, got {bits}")
    return w if bits == 32 else _DoReFa.apply(w, bits)


class _DoReFa(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, bits):  # type: ignore[no-untyped-def]
        values = flat(w)
        ctx.bits = bits
        if bits == 1:
            return unflat(torch.where(values >= 0, 1.0, -1.0).to(w.dtype) * values.abs().mean(), w)
        top = argmax_abs(values)
        largest = values[top].abs().tanh().squeeze()
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        levels = torch.full((), 2.0**bits - 1, dtype=w.dtype, device=w.device)
        kernel = _dorefa if w.numel() >= 4096 and w.dtype != torch.float64 else _dorefa.plain
        quantized, t = kernel(values, largest, levels)
        ctx.save_for_backward(w, t, top, largest)
        return unflat(quantized, w)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if ctx.bits == 1:
            return grad, None
        w, t, top, largest = ctx.saved_tensors
        kernel = _dorefa_gradient if w.numel() >= 4096 and w.dtype != torch.float64 else _dorefa_gradient.plain
        gw, total = kernel(t, flat(matching(grad, w)), largest)
        gw[top] -= t[top].sign() * total / largest / largest * (1 - t[top] ** 2)
        return unflat(gw, w), None


@fused
def _dorefa(w: Tensor, largest: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(w)
    return 2 * (torch.round((t / (2 * largest) + 0.5) * levels) / levels) - 1, t


@fused
def _dorefa_gradient(t: Tensor, grad: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    return grad / largest * (1 - t * t), (grad * t).sum()


class PACT(Quantizer):
    """One layer's PACT: DoReFa weights, a learnable clip for the input, and a constant output scale.

    DoReFa's weights fill [-1, 1] whatever the weights' range. BatchNorm absorbs that, the last layer has none; so the
    scale that keeps the output's size at calibration stays on every layer. It is not in the papers and not learned.
    """

    alpha: nn.Parameter
    output_scale: Tensor
    signed: Tensor
    weight_size: Tensor

    def __init__(self, weight_bits: int, act_bits: int | None, alpha: float = 8.0):
        super().__init__()
        self.weight_bits, self.act_bits = weight_bits, act_bits
        self.alpha = nn.Parameter(torch.tensor(float(alpha)), requires_grad=act_bits is not None)
        self.register_buffer("output_scale", torch.tensor(1.0))
        self.register_buffer("signed", torch.tensor(0.0))
        self.register_buffer("weight_size", torch.tensor(1.0))  # mean|w| at 1 bit, known to `decode` after `encode`

    @torch.no_grad()
    def initialise(self, x: Tensor, weight: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Signed where the input has negative values; the output as large as the original operation's."""
        self.signed.fill_(float(self.act_bits is not None and x.min() < 0))
        if self.signed and self.act_bits == 1:
            raise UserError("pact at 1 bit: a layer's input has negative values, which 1 bit cannot sign")
        self.output_scale.copy_(output_ratio(self, x, weight, operation))

    def weight(self, w: Tensor) -> Tensor:
        return quantize_weight(w, self.weight_bits)

    def act(self, x: Tensor) -> Tensor:
        if self.act_bits is None:
            return x
        return quantize_activation(x, self.alpha.abs().clamp(min=1e-6), self.act_bits, bool(self.signed))

    def out(self, y: Tensor) -> Tensor:
        return y * self.output_scale

    @torch.no_grad()
    def encode(self, w: Tensor) -> Tensor:
        values = w.reshape(-1)
        if self.weight_bits == 1:
            self.weight_size.copy_(flat(w).abs().mean())
            return (values >= 0).to(torch.int32)
        levels = 2**self.weight_bits - 1
        quantized = quantize_weight(w, self.weight_bits).reshape(-1)  # in memory order, as `weight` computes
        return torch.round((quantized + 1) / 2 * levels).to(torch.int32)

    def decode(self, codes: Tensor, like: Tensor) -> Tensor:
        values = codes.to(like.dtype)
        if self.weight_bits == 1:
            return ((2 * values - 1) * self.weight_size).view(like.shape)
        return (2 * (values / (2**self.weight_bits - 1)) - 1).view(like.shape)

    def settings(self) -> dict[str, Any]:
        return {"weight_bits": self.weight_bits, "act_bits": self.act_bits}
