"""The paper's range regularizers: L-inf, margin and soft-min-max (section 3, Eq. 1 to 3)."""

import torch
from torch import Tensor, nn

from r2.config import Count, NonNegative, Positive
from r2.kernels import argmax_abs, fused
from r2.regularizers.regularizer import Columns, Regularizer, add_at, take, wide


def l_inf(w: Tensor) -> Tensor:
    """max |w| (Eq. 1), a scalar."""
    return w.abs().amax()


def margin(w: Tensor, m: Tensor) -> Tensor:
    """|m| + sum(relu(|w| - |m|)) (Eq. 2), a scalar; `m` is the layer's 0-d margin.

    The sum runs over the excess alone: its minimum over m is max |w|.
    """
    return m.abs() + (w.abs() - m.abs()).relu().sum()


def soft_min_max(w: Tensor, alpha: Tensor) -> Tensor:
    """(s_max - s_min) + exp(-alpha) (Eq. 3), a scalar; `alpha` is the layer's 0-d temperature."""
    w = w.reshape(-1)
    s_max = (w * torch.softmax(alpha * w, 0)).sum()
    s_min = (w * torch.softmax(-alpha * w, 0)).sum()
    return s_max - s_min + torch.exp(-alpha)


class LInf(Regularizer):
    """Eq. 1: sum over layers of max |w|; a subgradient at one of the largest weights.

    Args:
        model, weight, dim: as `Regularizer`; the paper's weight is 0.01.
    """

    def __init__(self, model: nn.Module, weight: NonNegative = 0.01, dim: Count = 1):
        super().__init__(model, weight, dim)

    def term(self, w: Tensor, layer: int, column: int) -> Tensor:
        return l_inf(w)

    def measure(self, w: Tensor, grad: Tensor, layer: int, column: int) -> tuple[Tensor, ...]:
        return (_largest(w, grad, self.weight),)


@fused
def _largest(w: Tensor, grad: Tensor, scale: float) -> Tensor:
    index = argmax_abs(w)
    value = w.index_select(0, index)
    grad.index_add_(0, index, (scale * value.sign()).to(grad.dtype))
    return wide(value).abs().squeeze()


class Margin(Regularizer):
    """Eq. 2 with one learnable margin M per layer (and column), initialised at 2 std of the weights.

    dL/dM = sign(M) (1 - n), n the number of weights outside, is exact under autograd. It is of order N, and plain SGD
    throws M far outside the weights; divided by N, it cannot pull M back either (measured; see
    docs/paper.md). `add_gradients` therefore adds

        sign(M) clip(1 - n, -1, 1) max(|M|, max |w|),

    so that one rate suits every layer: M shrinks in proportion to itself where nothing is outside, grows in
    proportion to the weights where two or more are, and rests where one is. With SGD at momentum 0.9 and weight 0.01
    a step is about 0.1 lr of that size at most. Give the optimizer `param_groups(lr)`, or M stays where it starts.

    Args:
        model, weight, dim: as `Regularizer`; the paper's weight is 0.01.
        lr_mult: factor on the learning rate of M.

    Attributes:
        margin: M, (weights, dim), in the weights' units.
    """

    def __init__(self, model: nn.Module, weight: NonNegative = 0.01, dim: Count = 1, lr_mult: Positive = 1.0):
        super().__init__(model, weight, dim)
        self.lr_mult = lr_mult
        start = wide(next(iter(self._named.values())).detach()).new_zeros(len(self._named), dim)
        for i, j, w in self.columns(every=True):
            part = wide(self.part(w.detach(), j))
            start[i, j] = 2 * part.std() if part.numel() > 1 else part.abs().sum()  # one weight does not deviate
        self.margin = nn.Parameter(start)
        self._counts = torch.zeros_like(self.margin.detach())

    def term(self, w: Tensor, layer: int, column: int) -> Tensor:
        return margin(w, self.margin[layer, column])

    def measure(self, w: Tensor, grad: Tensor, layer: int, column: int) -> tuple[Tensor, ...]:
        return _margin(w, grad, self.margin.detach()[layer, column], self.weight)

    def solve(self, measured: Tensor, at: Columns) -> tuple[Tensor, None]:
        excess, outside, largest = measured.unbind(1)
        entries = [layer * self.dim + column for layer, column in zip(at.layers, at.columns, strict=True)]
        m = take(self.margin.detach().view(-1), entries)
        # an M of exactly 0 has no sign, and must grow all the same
        sign = torch.where(m < 0, -1.0, 1.0)
        pull = self.weight * sign * (1 - outside).clamp(-1, 1) * largest
        assert self.margin.grad is not None
        add_at(self.margin.grad.view(-1), entries, pull)
        self._counts.zero_()
        add_at(self._counts.view(-1), entries, outside)
        return m.abs() + excess, None

    def log(self) -> dict[str, float]:
        return {
            "margin_max": self.margin.detach().abs().max().item(),
            "outside_max": self._counts.max().item(),
        }


@fused
def _margin(w: Tensor, grad: Tensor, m: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    w, m = wide(w), m.abs()
    excess = (w.abs() - m).relu()
    outside = excess > 0
    grad.add_(w.sign() * outside * scale)
    return excess.sum(), outside.sum().to(m.dtype), m + excess.amax()  # the last is max(m, max |w|)


class SoftMinMax(Regularizer):
    """Eq. 3 with one learnable temperature per layer, shared by its columns.

    As written the temperature settles where Var_p + Var_q = exp(-alpha), near -ln(2 var(w)), so the term never
    becomes a hard min-max (see docs/paper.md). Give the optimizer `param_groups(lr)`, or it never moves.

    Args:
        model, weight, dim: as `Regularizer`; the paper's weight is 0.01.
        temperature: its start, per unit of weight; the paper's 0.1.
        lr_mult: factor on the learning rate of the temperatures.

    Attributes:
        temperature: (weights,).
    """

    def __init__(
        self,
        model: nn.Module,
        weight: NonNegative = 0.01,
        dim: Count = 1,
        temperature: float = 0.1,
        lr_mult: Positive = 1.0,
    ):
        super().__init__(model, weight, dim)
        self.lr_mult = lr_mult
        device = next(iter(self._named.values())).device
        self.temperature = nn.Parameter(torch.full((len(self._named),), temperature, device=device))

    def term(self, w: Tensor, layer: int, column: int) -> Tensor:
        alpha = self.temperature[layer]
        return soft_min_max(w, alpha) - (torch.exp(-alpha) if column else 0)

    def measure(self, w: Tensor, grad: Tensor, layer: int, column: int) -> tuple[Tensor, ...]:
        return _soft_sums(w, self.temperature.detach()[layer])

    def solve(self, measured: Tensor, at: Columns) -> tuple[Tensor, Tensor]:
        alpha = take(self.temperature.detach(), at.layers)
        distance, spread, coefficients = _solved(measured, alpha, self.weight)
        once = torch.exp(-alpha)
        if self.dim > 1:  # a layer's columns share its temperature, whose own term counts once
            once = torch.stack([value * (column == 0) for value, column in zip(once, at.columns, strict=True)])
        assert self.temperature.grad is not None
        add_at(self.temperature.grad, at.layers, self.weight * (spread - once))
        return distance + once, coefficients

    def pull(self, w: Tensor, grad: Tensor, coefficients: Tensor) -> None:
        _soft_gradient(w, grad, coefficients)

    def log(self) -> dict[str, float]:
        alpha = self.temperature.detach()
        return {"temperature_min": alpha.min().item(), "temperature_max": alpha.max().item()}


@fused
def _soft_sums(w: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
    low, high = w.amin(), w.amax()
    w, low, high = wide(w), wide(low), wide(high)
    # exp(alpha (w - peak)) <= 1 for either sign of alpha
    top, bottom = torch.where(alpha >= 0, high, low), torch.where(alpha >= 0, low, high)
    p, q = torch.exp(alpha * (w - top)), torch.exp(alpha * (bottom - w))
    pw, qw = p * w, q * w
    return p.sum(), pw.sum(), (pw * w).sum(), q.sum(), qw.sum(), (qw * w).sum(), top, bottom


@fused
def _solved(measured: Tensor, alpha: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    zp, p1, p2, zq, q1, q2, top, bottom = measured.unbind(1)
    s_max, s_min = p1 / zp, q1 / zq
    coefficients = torch.stack(
        [alpha, top, bottom,
         scale * (1 - alpha * s_max) / zp, scale * alpha / zp, scale * (1 + alpha * s_min) / zq, scale * alpha / zq], 1
    )  # fmt: skip
    return s_max - s_min, (p2 / zp - s_max**2) + (q2 / zq - s_min**2), coefficients


@fused
def _soft_gradient(w: Tensor, grad: Tensor, coefficients: Tensor) -> None:
    # p (1 + alpha (w - s_max)) - q (1 - alpha (w - s_min)), the constants folded
    alpha, top, bottom, p0, p1, q0, q1 = coefficients.unbind()
    w = wide(w)
    p, q = torch.exp(alpha * (w - top)), torch.exp(alpha * (bottom - w))
    grad.add_(p * (p0 + p1 * w) - q * (q0 - q1 * w))
