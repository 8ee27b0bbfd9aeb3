"""PACT activations (Choi et al. 2018) and DoReFa weights (Zhou et al. 2016), as PACT uses them.

Activation, n = 2^bits - 1:  y = round(clip(x, 0, a) n / a) a / n;   dx = g on 0 <= x <= a,  da = sum of g where x >= a
Weight, b > 1:               y = 2 round((t / (2 max|t|) + 1/2) n) / n - 1,  t = tanh(w); the rounding is straight
                             through, the gradient flows through max|t|
Weight, b = 1:               y = sign(w) mean|w|, the mean a constant, the gradient straight through
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from r2.config import UserError
from r2.kernels import argmax_abs, flat, fused, matching, unflat
from r2.quantizers.layers import ActivationGrid, Operation, Quantizer, WeightGrid, output_ratio, values


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
    return _clipped(x, alpha, bits, x.new_full((), float(signed)))


def _clipped(x: Tensor, alpha: Tensor, bits: int, signed: Tensor) -> Tensor:
    """`signed`, 0 or 1, stays on the device: a Python condition would wait for it in every step."""
    levels = 2.0**bits - 1 - signed * 2.0 ** (bits - 1)  # 2^(bits - 1) - 1 on either side of zero
    return _Clip.apply(x, alpha, levels.to(x.dtype), -signed.to(x.dtype))


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, levels, side):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, alpha, side)
        return unflat(_clip(flat(x), alpha, levels, side), x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, alpha, side = ctx.saved_tensors
        grad = matching(grad, x)
        gx, ga = _clip_gradients(flat(x), flat(grad), alpha, side)
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
        quantized, t = _dorefa(values, largest, levels)
        ctx.save_for_backward(w, t, top, largest)
        return unflat(quantized, w)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if ctx.bits == 1:
            return grad, None
        w, t, top, largest = ctx.saved_tensors
        gw, total = _dorefa_gradient(t, flat(matching(grad, w)), largest)
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

    def __init__(self, weight_bits: int, act_bits: int | None, alpha: float | None = None):
        super().__init__()
        self.weight_bits, self.act_bits, self.start = weight_bits, act_bits, alpha
        self.alpha = nn.Parameter(torch.tensor(1.0 if alpha is None else alpha), requires_grad=act_bits is not None)
        self.register_buffer("output_scale", torch.tensor(1.0))
        self.register_buffer("signed", torch.tensor(0.0))
        self.register_buffer("weight_size", torch.tensor(1.0))  # mean|w| at 1 bit, known to `decode` after `encode`

    @torch.no_grad()
    def initialise(self, inputs: Sequence[Tensor], weight: Tensor, operation: Operation) -> None:
        """Signed where the input has negative values; the output as large as the original operation's."""
        if self.act_bits is not None:
            x = values(inputs)
            self.signed.copy_(x.min() < 0)
            if self.act_bits == 1 and self.signed:
                raise UserError("pact at 1 bit: a layer's input has negative values, which 1 bit cannot sign")
            if self.start is None:
                self.alpha.copy_(_first_clip(x))
        self.output_scale.copy_(output_ratio(self, inputs, weight, operation))

    def weight(self, w: Tensor) -> Tensor:
        return quantize_weight(w, self.weight_bits)

    def act(self, x: Tensor) -> Tensor:
        if self.act_bits is None:
            return x
        return _clipped(x, self._clip(), self.act_bits, self.signed)

    def _clip(self) -> Tensor:
        return self.alpha.abs().clamp(min=1e-6)

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

    def weight_grid(self) -> WeightGrid:
        last = 2**self.weight_bits - 1  # 2 code / n - 1: every second integer from -n to n, times 1 / n
        scale = self.weight_size if self.weight_bits == 1 else torch.tensor(1 / last)
        return WeightGrid(-last, 2, -last, last, scale)

    def activation_grid(self) -> ActivationGrid | None:
        if self.act_bits is None:
            return None
        last = 2 ** (self.act_bits - 1) - 1 if self.signed else 2**self.act_bits - 1
        return ActivationGrid(-last if self.signed else 0, last, self._clip() / last)

    def settings(self) -> dict[str, Any]:
        return {"weight_bits": self.weight_bits, "act_bits": self.act_bits}


def _first_clip(x: Tensor) -> Tensor:
    """3 root mean squares of the first batch: it clips a few values, so that the clip has a gradient from the start.

    A clip above every value has none: of 28 clips that started at 8, none had moved at the end of a training.
    """
    size = 3 * x.square().mean().sqrt()
    return torch.where(size > 0, torch.minimum(size, x.abs().amax()), torch.ones_like(size))
