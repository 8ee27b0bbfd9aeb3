"""EWGS: element-wise gradient scaling (Lee, Kim and Ham, CVPR 2021).

Forward, n = 2^bits - 1 levels:   z = (x - lower) / (upper - lower),  q = round(n clip(z, 0, 1)) / n
Backward of the discretiser:      g_z = g (1 + delta sign(g) (z - q)),  on the closed interval 0 <= z <= 1
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from r2.kernels import flat, fused, matching, unflat
from r2.quantizers.layers import ActivationGrid, Operation, Quantizer, WeightGrid, output_ratio, values


def quantize(x: Tensor, lower: Tensor, upper: Tensor, bits: int, delta: float | Tensor = 0.0) -> Tensor:
    """Discretise `x` to 2^bits levels in [0, 1].

    Gradients go to `x`, `lower` and `upper`; clipped elements give none. delta=0 is the straight-through estimator.

    Args:
        x: any shape.
        lower, upper: 0-d bounds, lower < upper.
        bits: 1 to 32.
        delta: gradient scaling factor, a float or a 0-d tensor.
    """
    if not 1 <= bits <= 32:
        raise ValueError(f"bits must be between 1 and 32, got {bits}")
    levels = torch.full((), 2.0**bits - 1, dtype=x.dtype, device=x.device)
    delta = torch.as_tensor(delta, dtype=x.dtype, device=x.device)
    return _Quantize.apply(x, lower, upper, levels, delta, x.new_ones(()), x.new_zeros(()))


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, lower, upper, levels, delta, gain, shift):  # type: ignore[no-untyped-def]
        """gain q + shift: one pass for what follows q."""
        ctx.save_for_backward(x, lower, upper, levels, delta, gain)
        return unflat(_discretise(flat(x), lower, upper, levels, gain, shift), x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, lower, upper, levels, delta, gain = ctx.saved_tensors
        grad = matching(grad, x)
        gx, gz_z, gz = _scaled_gradient(flat(x), flat(grad), lower, upper, levels, delta, gain)
        width = upper - lower
        # z = (x - l)/(u - l):  dz/du = -z/(u - l),  dz/dl = (z - 1)/(u - l)
        return unflat(gx, x), ((gz_z - gz) / width).view_as(lower), (-gz_z / width).view_as(upper), *[None] * 4


@fused
def _discretise(x: Tensor, lower: Tensor, upper: Tensor, levels: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    z = ((x - lower) / (upper - lower)).clamp(0, 1)
    return torch.round(z * levels) / levels * gain + shift


@fused
def _scaled_gradient(
    x: Tensor, grad: Tensor, lower: Tensor, upper: Tensor, levels: Tensor, delta: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    z = (x - lower) / (upper - lower)
    q = torch.round(z.clamp(0, 1) * levels) / levels
    # The mask is explicit: the closed interval is the method's, whatever clamp's gradient is at its bounds.
    gz = torch.where((z >= 0) & (z <= 1), gain * grad * (1 + delta * torch.sign(grad) * (z - q)), 0.0)
    return gz / (upper - lower), (gz * z).sum(), gz.sum()


class EWGS(Quantizer):
    """One layer's EWGS: discrete weights in [-1, 1], discrete inputs in [0, 1], one learnable output scale.

    A signed layer (its input has negative values, decided at calibration) computes with q + lower / (upper - lower),
    the dequantised input over its range, so that zero stays zero; an unsigned one is exactly the official form.

    Args:
        weight_bits, act_bits: widths; act_bits None leaves the input as it is.
        delta: initial gradient scaling factor of both.
        weight_init: 'official' starts the weights' bounds at 3 std; 'capped' at the largest |w| where that is less, for
            after range regularization no weight reaches 3 std and the outer levels would start empty.
    """

    weight_lower: nn.Parameter
    weight_upper: nn.Parameter
    act_lower: nn.Parameter
    act_upper: nn.Parameter
    output_scale: nn.Parameter
    weight_delta: Tensor
    act_delta: Tensor
    signed: Tensor
    tap: Callable[[str, Tensor], Tensor] | None = None  # where the Hessian estimate reaches the discrete values

    def __init__(
        self,
        weight_bits: int,
        act_bits: int | None,
        delta: float = 0.0,
        weight_init: Literal["official", "capped"] = "official",
    ):
        super().__init__()
        self.weight_bits, self.act_bits, self.weight_init = weight_bits, act_bits, weight_init
        for name in ("weight_lower", "weight_upper", "act_lower", "act_upper", "output_scale"):
            used = act_bits is not None or not name.startswith("act")
            setattr(self, name, nn.Parameter(torch.ones(()), requires_grad=used))
        self.register_buffer("weight_delta", torch.tensor(float(delta)))
        self.register_buffer("act_delta", torch.tensor(float(delta)))
        self.register_buffer("signed", torch.tensor(0.0))

    @torch.no_grad()
    def initialise(self, inputs: Sequence[Tensor], weight: Tensor, operation: Operation) -> None:
        """Official: 3 std of the weights; 3 std of a half normal for the inputs; the output as large as before."""
        bound = 3 * _spread(weight)
        if self.weight_init == "capped":
            bound = torch.minimum(bound, _spread_or_one(weight.abs().amax()))
        self.weight_lower.copy_(-bound)
        self.weight_upper.copy_(bound)
        if self.act_bits is not None:
            x = values(inputs)
            std, least = _spread(x), x.min()
            half_normal = least + 3 * std / math.sqrt(1 - 2 / math.pi)
            self.signed.copy_(least < 0)
            self.act_lower.copy_(torch.where(least < 0, -3 * std, least))
            self.act_upper.copy_(torch.where(least < 0, 3 * std, half_normal))
        self.output_scale.copy_(output_ratio(self, inputs, weight, operation))

    def weight(self, w: Tensor) -> Tensor:
        """2q - 1 in [-1, 1]."""
        bounds = self.weight_lower, self.weight_upper
        if self.tap is not None:
            return self.tap("weight", quantize(w, *bounds, self.weight_bits, self.weight_delta)) * 2 - 1
        levels = w.new_full((), 2.0**self.weight_bits - 1)
        return _Quantize.apply(w, *bounds, levels, self.weight_delta, w.new_full((), 2.0), w.new_full((), -1.0))

    def act(self, x: Tensor) -> Tensor:
        if self.act_bits is None:
            return x
        q = quantize(x, self.act_lower, self.act_upper, self.act_bits, self.act_delta)
        if self.tap is not None:
            q = self.tap("act", q)
        return q + self.signed * self.act_lower / (self.act_upper - self.act_lower)

    def out(self, y: Tensor) -> Tensor:
        return y * self.output_scale.abs()

    @torch.no_grad()
    def encode(self, w: Tensor) -> Tensor:
        q = quantize(w, self.weight_lower, self.weight_upper, self.weight_bits)
        return torch.round(q.reshape(-1) * (2**self.weight_bits - 1)).to(torch.int32)

    def decode(self, codes: Tensor, like: Tensor) -> Tensor:
        return (codes.to(like.dtype) / (2**self.weight_bits - 1) * 2 - 1).view(like.shape)

    def weight_grid(self) -> WeightGrid:
        last = 2**self.weight_bits - 1  # 2 code / n - 1: every second integer from -n to n, times 1 / n
        return WeightGrid(-last, 2, -last, last, torch.tensor(1 / last))

    def activation_grid(self) -> ActivationGrid | None:
        if self.act_bits is None:
            return None
        last, lower, width = 2**self.act_bits - 1, self.act_lower, self.act_upper - self.act_lower
        offset = lower / width if self.signed else None
        return ActivationGrid(0, last, width / last, out_scale=torch.tensor(1 / last), shift=lower, offset=offset)

    def settings(self) -> dict[str, Any]:
        return {"weight_bits": self.weight_bits, "act_bits": self.act_bits}


def _spread(x: Tensor) -> Tensor:
    """The unbiased standard deviation; 1 for a constant, which has no range to quantize."""
    return _spread_or_one(x.std() if x.numel() > 1 else x.abs().sum())


def _spread_or_one(spread: Tensor) -> Tensor:
    return torch.where(spread > 0, spread, torch.ones_like(spread))
