"""EWGS: element-wise gradient scaling (Lee, Kim and Ham, CVPR 2021).

Forward, n = 2^bits - 1 levels:   z = (x - lower) / (upper - lower),  q = round(n clip(z, 0, 1)) / n
Backward of the discretiser:      g_z = g (1 + delta sign(g) (z - q)),  on the closed interval 0 <= z <= 1
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from r2.kernels import exactly, flat, fused, matching, unflat
from r2.quantizers.calibration import output_ratio, values
from r2.quantizers.layers import ActivationGrid, Operation, Quantizer, WeightGrid


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
    return _Inputs.apply(x, lower, upper, levels, delta, x.new_zeros(()))


class _Inputs(torch.autograd.Function):
    """q + signed lower / (upper - lower): from q alone, or with the offset that keeps zero where it was."""

    @staticmethod
    def forward(ctx, x, lower, upper, levels, delta, signed):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, lower, upper, levels, delta, signed)
        return unflat(_inputs(flat(x), lower, upper, levels, signed), x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, *others = ctx.saved_tensors
        gx, g_lower, g_upper = _input_gradients(flat(x), flat(matching(grad, x)), *others)
        return unflat(gx, x), g_lower, g_upper, None, None, None


class _Weights(torch.autograd.Function):
    """(2 q - 1) |scale|."""

    @staticmethod
    def forward(ctx, w, lower, upper, levels, delta, scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(w, lower, upper, levels, delta, scale)
        return unflat(exactly(_weights, w)(flat(w), lower, upper, levels, scale), w)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        w, *others = ctx.saved_tensors
        gw, g_lower, g_upper, g_scale = _weight_gradients(flat(w), flat(matching(grad, w)), *others)
        return unflat(gw, w), g_lower, g_upper, None, None, g_scale


@fused
def _inputs(x: Tensor, lower: Tensor, upper: Tensor, levels: Tensor, signed: Tensor) -> Tensor:
    width = upper - lower
    return torch.round(((x - lower) / width).clamp(0, 1) * levels) / levels + signed * lower / width


@fused
def _weights(w: Tensor, lower: Tensor, upper: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    z = ((w - lower) / (upper - lower)).clamp(0, 1)
    return (torch.round(z * levels) / levels * 2 - 1) * scale.abs()


@fused
def _input_gradients(
    x: Tensor, grad: Tensor, lower: Tensor, upper: Tensor, levels: Tensor, delta: Tensor, signed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    width = upper - lower
    z = (x - lower) / width
    gz = _discretiser_gradient(z, torch.round(z.clamp(0, 1) * levels) / levels, grad, delta)
    offset = signed * grad.sum() / width
    # z = (x - l) / (u - l):  dz/du = -z / (u - l),  dz/dl = (z - 1) / (u - l)
    moment, total = (gz * z).sum(), gz.sum()
    g_lower = (moment - total) / width + offset * (upper / width)
    return gz / width, g_lower, -moment / width - offset * (lower / width)


@fused
def _weight_gradients(
    w: Tensor, grad: Tensor, lower: Tensor, upper: Tensor, levels: Tensor, delta: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = upper - lower
    z = (w - lower) / width
    q = torch.round(z.clamp(0, 1) * levels) / levels
    gz = _discretiser_gradient(z, q, 2 * scale.abs() * grad, delta)
    moment, total = (gz * z).sum(), gz.sum()
    g_scale = (grad * (2 * q - 1)).sum() * scale.sign()
    return gz / width, (moment - total) / width, -moment / width, g_scale


def _discretiser_gradient(z: Tensor, q: Tensor, grad: Tensor, delta: Tensor) -> Tensor:
    # The mask is explicit: the closed interval is the method's, whatever clamp's gradient is at its bounds.
    return torch.where((z >= 0) & (z <= 1), grad * (1 + delta * torch.sign(grad) * (z - q)), 0.0)


class EWGS(Quantizer):
    """One layer's EWGS: discrete weights in [-1, 1], discrete inputs in [0, 1], one learnable output scale.

    The official code multiplies the output by the scale; here it multiplies the weight, which gives the same and costs
    less.

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
    weight_levels: Tensor
    act_levels: Tensor
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
        for name, bits in (("weight_levels", weight_bits), ("act_levels", act_bits or 1)):
            self.register_buffer(name, torch.tensor(2.0**bits - 1), persistent=False)

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
        self.output_scale.fill_(1.0)
        self.output_scale.copy_(output_ratio(self, inputs, weight, operation))

    def weight(self, w: Tensor) -> Tensor:
        """2q - 1 in [-1, 1], times the output scale."""
        bounds = self.weight_lower, self.weight_upper
        if self.tap is not None:
            q = self.tap("weight", quantize(w, *bounds, self.weight_bits, self.weight_delta))
            return (q * 2 - 1) * self.output_scale.abs()
        return _Weights.apply(w, *bounds, self.weight_levels, self.weight_delta, self.output_scale)

    def act(self, x: Tensor) -> Tensor:
        if self.act_bits is None:
            return x
        bounds = self.act_lower, self.act_upper
        if self.tap is not None:
            q = self.tap("act", quantize(x, *bounds, self.act_bits, self.act_delta))
            return q + self.signed * self.act_lower / (self.act_upper - self.act_lower)
        return _Inputs.apply(x, *bounds, self.act_levels, self.act_delta, self.signed)

    @torch.no_grad()
    def encode(self, w: Tensor) -> Tensor:
        levels, unsigned = self.weight_levels.to(w.dtype), w.new_zeros(())
        q = unflat(exactly(_inputs, w)(flat(w), self.weight_lower, self.weight_upper, levels, unsigned), w)
        return torch.round(q.reshape(-1) * (2**self.weight_bits - 1)).to(torch.int32)

    def decode(self, codes: Tensor, like: Tensor) -> Tensor:
        q = codes.to(like.dtype) / (2**self.weight_bits - 1)
        return ((q * 2 - 1) * self.output_scale.abs()).view(like.shape)

    def weight_grid(self) -> WeightGrid:
        last = 2**self.weight_bits - 1  # 2 code / n - 1: every second integer from -n to n, times 1 / n
        return WeightGrid(-last, 2, -last, last, self.output_scale.abs() / last)

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
