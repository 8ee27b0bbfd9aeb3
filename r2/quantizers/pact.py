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
from r2.kernels import argmax_abs, exactly, flat, fused, matching, unflat
from r2.quantizers.calibration import best_clip, output_ratio, values
from r2.quantizers.layers import ActivationGrid, Operation, Quantizer, WeightGrid


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
    half, top = (x.new_full((), value) for value in (2.0 ** (bits - 1), 2.0**bits - 1))
    return _Clip.apply(x, alpha, x.new_full((), float(signed)), half, top)


class _Clip(torch.autograd.Function):
    """`signed`, 0 or 1, stays on the device: a Python condition would wait for it in every step."""

    @staticmethod
    def forward(ctx, x, alpha, signed, half, top):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, alpha, signed)
        return unflat(_clip(flat(x), alpha, signed, half, top), x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, alpha, signed = ctx.saved_tensors
        gx, ga = _clip_gradients(flat(x), flat(matching(grad, x)), alpha, signed)
        return unflat(gx, x), ga, None, None, None


def _size(alpha: Tensor) -> Tensor:
    """Training may push a clip through zero; its size is what counts."""
    return alpha.abs().clamp(min=1e-6)


@fused
def _clip(x: Tensor, alpha: Tensor, signed: Tensor, half: Tensor, top: Tensor) -> Tensor:
    alpha, levels = _size(alpha), top - signed * half  # 2^(bits - 1) - 1 on either side of zero
    clipped = torch.minimum(torch.maximum(x, (-signed * alpha).to(x.dtype)), alpha.to(x.dtype))
    return torch.round(clipped * (levels / alpha)) * (alpha / levels)


@fused
def _clip_gradients(x: Tensor, grad: Tensor, alpha: Tensor, signed: Tensor) -> tuple[Tensor, Tensor]:
    # The bounds are explicit: dx is on the closed interval, and x = alpha moves alpha too.
    size = _size(alpha)
    low, side = -signed * size, torch.where(alpha.abs() >= 1e-6, alpha.sign(), 0.0)
    above, below = torch.where(x >= size, grad, 0.0), torch.where((x <= low) & (signed > 0), grad, 0.0)
    return torch.where((x >= low) & (x <= size), grad, 0.0), (above - below).sum() * side


def quantize_weight(w: Tensor, bits: int) -> Tensor:
    """DoReFa: 2^bits levels in [-1, 1] (at 1 bit +-mean|w|, at 32 `w` itself); the gradient goes to `w`.

    Raises:
        ValueError: bits outside 1 to 32.
    """
    if not 1 <= bits <= 32:
        raise ValueError(f"bits must be between 1 and 32, got {bits}")
    return w if bits == 32 else _DoReFa.apply(w, bits, w.new_ones(()))


class _DoReFa(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, bits, scale):  # type: ignore[no-untyped-def]
        """The levels times a constant scale."""
        values = flat(w)
        ctx.bits = bits
        if bits == 1:
            ctx.save_for_backward(scale)
            return unflat(torch.where(values >= 0, 1.0, -1.0).to(w.dtype) * values.abs().mean() * scale, w)
        levels = torch.full((), 2.0**bits - 1, dtype=w.dtype, device=w.device)
        quantized, largest = exactly(_dorefa, w)(values, levels, scale)
        ctx.save_for_backward(w, largest, scale)
        return unflat(quantized, w)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if ctx.bits == 1:
            return grad * ctx.saved_tensors[0], None, None
        w, largest, scale = ctx.saved_tensors
        return unflat(_dorefa_gradient(flat(w), flat(matching(grad, w)), largest, scale), w), None, None


@fused
def _dorefa(w: Tensor, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    largest = w.abs().amax().tanh()
    largest = torch.where(largest > 0, largest, 1.0)
    return (2 * (torch.round((w.tanh() / (2 * largest) + 0.5) * levels) / levels) - 1) * scale, largest


@fused
def _dorefa_gradient(w: Tensor, grad: Tensor, largest: Tensor, scale: Tensor) -> Tensor:
    t, grad, top = w.tanh(), grad * scale, argmax_abs(w)
    slope = 1 - t * t
    at_top = t.index_select(0, top).sign() * slope.index_select(0, top) * (grad * t).sum() / largest / largest
    return (grad / largest * slope).index_add(0, top, -at_top)


class PACT(Quantizer):
    """One layer's PACT: DoReFa weights, a learnable clip for the input, and a constant output scale.

    DoReFa's weights fill [-1, 1] whatever the weights' range. BatchNorm absorbs that, the last layer has none; so the
    scale that keeps the output's size at calibration stays on every layer. It is not in the papers and not learned.
    """

    alpha: nn.Parameter
    output_scale: Tensor
    signed: Tensor
    weight_size: Tensor
    act_half: Tensor
    act_top: Tensor

    def __init__(self, weight_bits: int, act_bits: int | None, alpha: float | None = None):
        super().__init__()
        self.weight_bits, self.act_bits, self.start = weight_bits, act_bits, alpha
        self.alpha = nn.Parameter(torch.tensor(1.0 if alpha is None else alpha), requires_grad=act_bits is not None)
        self.register_buffer("output_scale", torch.tensor(1.0))
        self.register_buffer("signed", torch.tensor(0.0))
        self.register_buffer("weight_size", torch.tensor(1.0))  # mean|w| at 1 bit, known to `decode` after `encode`
        if act_bits is not None:
            for name, value in (("act_half", 2.0 ** (act_bits - 1)), ("act_top", 2.0**act_bits - 1)):
                self.register_buffer(name, torch.tensor(value), persistent=False)

    @torch.no_grad()
    def initialise(self, inputs: Sequence[Tensor], weight: Tensor, operation: Operation) -> None:
        """Signed where the input has negative values; the output as large as the original operation's."""
        if self.act_bits is not None:
            x = values(inputs)
            self.signed.copy_(x.min() < 0)
            if self.act_bits == 1 and self.signed:
                raise UserError("pact at 1 bit: a layer's input has negative values, which 1 bit cannot sign")
            if self.start is None:
                # It depends on the levels: 2 bits and a sign are three, and at 3 root mean squares 87 % of a normal
                # distribution becomes zero. At 8, above every value, no clip had moved at the end of a training.
                bits, signed = self.act_bits, bool(self.signed)
                self.alpha.copy_(best_clip(x, lambda x, clip: quantize_activation(x, clip, bits, signed)))
        self.output_scale.fill_(1.0)
        self.output_scale.copy_(output_ratio(self, inputs, weight, operation))

    def weight(self, w: Tensor) -> Tensor:
        """DoReFa's levels times the output scale: the operation is linear, and a weight has fewer elements."""
        if self.weight_bits == 32:
            return w * self.output_scale
        return _DoReFa.apply(w, self.weight_bits, self.output_scale)

    def act(self, x: Tensor) -> Tensor:
        if self.act_bits is None:
            return x
        return _Clip.apply(x, self.alpha, self.signed, self.act_half, self.act_top)

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
            return ((2 * values - 1) * self.weight_size * self.output_scale).view(like.shape)
        return ((2 * (values / (2**self.weight_bits - 1)) - 1) * self.output_scale).view(like.shape)

    def weight_grid(self) -> WeightGrid:
        last = 2**self.weight_bits - 1  # 2 code / n - 1: every second integer from -n to n, times 1 / n
        size = self.weight_size if self.weight_bits == 1 else 1 / last
        return WeightGrid(-last, 2, -last, last, self.output_scale * size)

    def activation_grid(self) -> ActivationGrid | None:
        if self.act_bits is None:
            return None
        last = 2 ** (self.act_bits - 1) - 1 if self.signed else 2**self.act_bits - 1
        return ActivationGrid(-last if self.signed else 0, last, _size(self.alpha) / last)

    def settings(self) -> dict[str, Any]:
        return {"weight_bits": self.weight_bits, "act_bits": self.act_bits}
