"""LSQ: learned step size quantization (Esser et al., ICLR 2020).

Forward:   y = s round(clip(x / s, q_min, q_max))
Backward:  dx = g  on the closed interval q_min <= x / s <= q_max, else 0
           ds = k sum g (round(z) - z inside | q_min below | q_max above),  z = x / s,  k = 1 / sqrt(N q_max)
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from r2.config import UserError
from r2.kernels import exactly, flat, fused, matching, unflat
from r2.quantizers.calibration import best_clip, values
from r2.quantizers.layers import ActivationGrid, Operation, Quantizer, WeightGrid


def quantize(x: Tensor, step: Tensor, quant_min: int, quant_max: int, grad_scale: float | None = None) -> Tensor:
    """Round `x` to the nearest of `step` times the integers quant_min .. quant_max.

    Gradients go to `x` and `step`.

    Args:
        x: any shape.
        step: positive; 0-d, or one per output channel of a weight, (o, 1, ...) beside x's (o, ...).
        quant_min, quant_max: integer bounds, quant_min <= 0 < quant_max.
        grad_scale: factor on the step's gradient; by default 1 / sqrt(N quant_max) with N the elements that share a
            step, the batch counted in.
    """
    if not quant_min <= 0 < quant_max:
        raise ValueError(f"the bounds must hold quant_min <= 0 < quant_max, got {quant_min} and {quant_max}")
    one, half, top, scale = (
        None if value is None else x.new_full((), value) for value in (1, -quant_min, quant_max - quant_min, grad_scale)
    )
    return _Quantize.apply(x, step, one, half, top, scale)


class _Quantize(torch.autograd.Function):
    """The levels are 0 .. top, and with `signed` 1 in place of 0 -half .. top - half: it stays on the device."""

    @staticmethod
    def forward(ctx, x, step, signed, half, top, scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, step, signed, half, top, scale)
        return unflat(exactly(_round, x)(_rows(x, step), _column(step), signed, half, top), x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, step, *others = ctx.saved_tensors
        gx, gs = _gradients(_rows(x, step), _rows(matching(grad, x), step), _column(step), *others)
        return unflat(gx, x), gs if step.ndim == 0 else gs.view_as(step), None, None, None, None


def _rows(x: Tensor, step: Tensor) -> Tensor:
    """In memory order, (n,) or (steps, elements that share one): output channels come first in both formats."""
    return flat(x) if step.ndim == 0 else flat(x).view(step.numel(), -1)


def _column(step: Tensor) -> Tensor:
    """Beside the rows."""
    return step if step.ndim == 0 else step.view(-1, 1)


def _positive(step: Tensor) -> Tensor:
    """Training may push a step through zero; its size is what counts."""
    return step.abs().clamp(min=1e-8)


@fused
def _round(x: Tensor, step: Tensor, signed: Tensor, half: Tensor, top: Tensor) -> Tensor:
    size, low = _positive(step).to(x.dtype), -signed * half
    return torch.round(torch.minimum(torch.maximum(x / size, low.to(x.dtype)), (top + low).to(x.dtype))) * size


@fused
def _gradients(
    x: Tensor, grad: Tensor, step: Tensor, signed: Tensor, half: Tensor, top: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    low = -signed * half
    high = top + low
    z = x / _positive(step).to(x.dtype)
    inside = (z >= low) & (z <= high)
    slope = torch.where(inside, torch.round(z) - z, torch.where(z < low, low, high).to(z.dtype))
    scale = (x.shape[-1] * high).rsqrt() if scale is None else scale
    # the sign of a step that went through zero; none where its size is held at the least
    side = torch.where(step.abs() >= 1e-8, step.sign(), 0.0)
    return torch.where(inside, grad, 0.0), ((grad * slope).sum(-1, keepdim=x.ndim > 1) * scale).to(step.dtype) * side


@torch.no_grad()
def bound_gradients(steps: Sequence[nn.Parameter]) -> None:
    """Clip every step's gradient to the step, between backward and the clipping of all gradients.

    A layer whose outputs have almost no variance gets gradients of any size through BatchNorm. One of them would leave
    nothing of the others when they are clipped together, and stay in the momentum.
    """
    pairs = [(step.grad, step.abs()) for step in steps if step.grad is not None]
    if pairs:
        gradients, most = map(list, zip(*pairs, strict=True))
        _clamp(gradients, list(torch._foreach_neg(most)), most)


def bound_updates(optimizer: torch.optim.Optimizer, steps: Sequence[nn.Parameter], limit: float) -> None:
    """From now on an update of `optimizer` changes a step by at most `limit` of itself, so that it keeps its sign.

    Bounded gradients alone do not stop a step that shrinks: its bound shrinks too, and cannot turn the momentum of the
    time when it was larger, which carries it through zero.
    """
    before = [step.detach().clone() for step in steps]

    @torch.no_grad()
    def keep(*_: Any) -> None:
        torch._foreach_copy_(before, list(steps))

    @torch.no_grad()
    def bound(*_: Any) -> None:
        reach = torch._foreach_mul(torch._foreach_abs(before), limit)
        _clamp(list(steps), list(torch._foreach_sub(before, reach)), list(torch._foreach_add(before, reach)))

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(bound)


def _clamp(values: list[Tensor], low: list[Tensor], high: list[Tensor]) -> None:
    torch._foreach_maximum_(values, low)
    torch._foreach_minimum_(values, high)


def bounds(bits: int, signed: bool) -> tuple[int, int]:
    """The integer range of a width.

    Raises:
        UserError: 1 bit signed, whose largest level is 0, so that the step has no start and no gradient scale.
    """
    if signed and bits == 1:
        raise UserError(
            "lsq at 1 bit signed is not defined: its largest level is 0, so the step 2 mean|w| / sqrt(0) is infinite; "
            "give 2 bits or more"
        )
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


class LSQ(Quantizer):
    """One layer's LSQ: a step for the weight and one for the input, which is unsigned where it never is negative.

    Args:
        weight_bits, act_bits: widths; act_bits None leaves the input as it is.
        channels: steps of the weight, one per output channel, or 1.
        act_init: 'official' starts the input's step at 2 mean|x| / sqrt(q_max); 'fitted' where it rounds the first
            batch best. Behind a ReLU most inputs are zero and their mean is small: at 2 bits the official step clips
            most of the others, and the gradient grows from layer to layer.
    """

    weight_step: nn.Parameter
    act_step: nn.Parameter
    signed: Tensor
    one: Tensor
    weight_half: Tensor
    weight_top: Tensor
    act_half: Tensor
    act_top: Tensor

    def __init__(
        self,
        weight_bits: int,
        act_bits: int | None,
        channels: int = 1,
        act_init: Literal["official", "fitted"] = "official",
    ):
        super().__init__()
        bounds(weight_bits, signed=True)
        self.weight_bits, self.act_bits, self.channels, self.act_init = weight_bits, act_bits, channels, act_init
        self.weight_step = nn.Parameter(torch.ones(()) if channels == 1 else torch.ones(channels))
        self.act_step = nn.Parameter(torch.ones(()), requires_grad=act_bits is not None)
        self.register_buffer("signed", torch.tensor(0.0))
        low, high = self._weight_bounds()
        ranges = {"weight_half": -low, "weight_top": high - low}
        if act_bits is not None:
            ranges |= {"act_half": 2 ** (act_bits - 1), "act_top": 2**act_bits - 1}
        for name, value in ({"one": 1} | ranges).items():
            self.register_buffer(name, torch.tensor(float(value)), persistent=False)

    @torch.no_grad()
    def initialise(self, inputs: Sequence[Tensor], weight: Tensor, operation: Operation) -> None:
        """2 mean|x| / sqrt(q_max), of the weight and, if official, of the first batch."""
        start = _first_step(_rows(weight, self.weight_step), weight.new_full((), self._weight_bounds()[1]))
        self.weight_step.copy_(start.view_as(self.weight_step))
        if self.act_bits is not None:
            x = values(inputs)
            self.signed.copy_(x.min() < 0)
            if self.act_bits == 1 and self.signed:
                raise UserError("lsq at 1 bit: a layer's input has negative values, which 1 bit cannot sign")
            if self.act_init == "official":
                self.act_step.copy_(_first_step(x.reshape(1, -1), self._act_bounds()[1]).view(()))
            else:
                low, high = (int(bound) for bound in self._act_bounds())
                self.act_step.copy_(best_clip(x, lambda x, clip: quantize(x, clip / high, low, high)) / high)

    def _weight_bounds(self) -> tuple[int, int]:
        return bounds(self.weight_bits, signed=True)

    def _act_bounds(self) -> tuple[Tensor, Tensor]:
        """On the device: a Python condition on `signed` would wait for it."""
        low = -self.signed * self.act_half
        return low, low + self.act_top

    def weight(self, w: Tensor) -> Tensor:
        return _Quantize.apply(w, self.weight_step, self.one, self.weight_half, self.weight_top, None)

    def act(self, x: Tensor) -> Tensor:
        if self.act_bits is None:
            return x
        return _Quantize.apply(x, self.act_step, self.signed, self.act_half, self.act_top, None)

    @torch.no_grad()
    def encode(self, w: Tensor) -> Tensor:
        low, high = self._weight_bounds()
        levels = torch.round((w / self._weight_size(w)).clamp(low, high)).reshape(-1)
        return levels.to(torch.int32) - low

    def decode(self, codes: Tensor, like: Tensor) -> Tensor:
        low, _ = self._weight_bounds()
        return (codes + low).to(like.dtype).view(like.shape) * self._weight_size(like)

    def _weight_size(self, like: Tensor) -> Tensor:
        size = _positive(self.weight_step).to(like.dtype)
        return size if self.channels == 1 else size.view(-1, *[1] * (like.ndim - 1))

    def weight_grid(self) -> WeightGrid:
        low, high = self._weight_bounds()
        return WeightGrid(low, 1, low, high, _positive(self.weight_step))

    def activation_grid(self) -> ActivationGrid | None:
        if self.act_bits is None:
            return None
        low, high = (int(bound) for bound in self._act_bounds())
        return ActivationGrid(low, high, _positive(self.act_step))

    def settings(self) -> dict[str, Any]:
        return {"weight_bits": self.weight_bits, "act_bits": self.act_bits, "channels": self.channels}


def _first_step(x: Tensor, quant_max: Tensor) -> Tensor:
    """One for each row of x."""
    size = x.abs().mean(-1)
    return 2 * torch.where(size > 0, size, torch.ones_like(size)) / quant_max.sqrt()
