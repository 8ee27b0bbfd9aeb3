"""Range regularization (the paper's section 3, Eq. 1-3), KURE and L2, for convolution, linear and embedding layers.

Use them in any loop:

    reg = Margin(model)                       # after model.to(device)
    optimizer = SGD([{"params": model.parameters()}, *reg.param_groups(lr)], lr)
    ...
    loss.backward()
    reg.add_gradients()                       # the term's gradient, added in place: no graph, no communication
    optimizer.step()

or differentiate the value: `(loss + reg()).backward()`. Under DistributedDataParallel `add_gradients` comes after
`backward`, hence after the all-reduce: the term is the same on every rank. With a GradScaler it comes after the loss's
gradients are unscaled, otherwise the term is divided by the scale:

    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    reg.add_gradients()
    scaler.step(optimizer)
    scaler.update()

Weights in float16 or bfloat16 are summed in float32; the gradient is rounded once, when it is added to `.grad`. Float16
has no values below 6e-8, which is more than soft-min-max's gradient for a weight of a large layer.

Frozen weights, and weights that a step has not used (their `.grad` is None), are left out. A weight shared by several
layers counts once.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from r2.config import Count, NonNegative, Positive, UserError
from r2.kernels import argmax_abs, flat, fused

# Shorter tensors are faster through plain PyTorch than the compiler's start-up is worth.
_fused = partial(fused, at_least=1 << 18)


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


def kurtosis(w: Tensor, target: float = 1.8) -> Tensor:
    """(Kurt[w] - target)^2 with the unbiased standard deviation (Shkolnik et al. 2020), a scalar.

    A constant tensor has no kurtosis; its term is 0.
    """
    if w.numel() < 2 or not (variance := w.var()) > 0:
        return w.sum() * 0
    centred = w - w.mean()
    return ((centred**4).mean() / variance**2 - target) ** 2


KINDS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear, nn.Embedding
)  # fmt: skip


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Every convolution, linear and embedding weight by name, first and last layers included.

    One that several layers share stands there once, under the first name.
    """
    out: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, KINDS) and not any(module.weight is w for w in out.values()):
            out[f"{name}.weight"] = module.weight
    return out


def wide(w: Tensor) -> Tensor:
    """`w` in the type of its sums: float32, or float64 as it is."""
    return w if w.dtype == torch.float64 else w.float()


class Columns(NamedTuple):
    """What a step has gradients for: the layer and the column of each, in one order."""

    layers: list[int]
    columns: list[int]


def _take(values: Tensor, index: list[int]) -> Tensor:
    """values[index]; a list as an index would be copied to the device, and the host would wait for that."""
    return values if index == list(range(len(values))) else torch.stack([values[i] for i in index])


def _add(target: Tensor, index: list[int], added: Tensor) -> None:
    """target[index] += added, where an index may stand more than once."""
    if index == list(range(len(target))):
        target += added
    else:
        for i, value in zip(index, added.unbind(), strict=True):
            target[i] += value


class Regularizer(nn.Module):
    """A weighted sum of one term per weight tensor (and per column, for `dim` > 1).

    Args:
        model: on its final device; its weights are held by reference.
        weight: factor on the whole term, which is in the weights' units (KURE's has none).
        dim: length of the vectors that DKM will cluster (Table 6): `dim` consecutive rows of the weight, which are
            output channels but for transposed convolutions. The scalar term is applied to each of the `dim` columns
            and summed.

    Raises:
        UserError: a weight is computed from other parameters (torch.nn.utils.parametrize, weight_norm, prune).
    """

    decay = 1.0  # factor on the optimizer's weight decay
    lr_mult = 1.0  # factor on the learning rate of the term's own parameters

    def __init__(self, model: nn.Module, weight: float = 0.01, dim: int = 1):
        super().__init__()
        self.weight, self.dim = weight, dim
        self._named = weights_of(model)  # a plain dict: the model owns these parameters
        for name, w in self._named.items():
            if not isinstance(w, nn.Parameter):
                raise UserError(
                    f"{name} is computed from other parameters, and a regularizer needs the parameter itself; "
                    "make it one first, for instance by torch.nn.utils.parametrize.remove_parametrizations"
                )

    def columns(self, every: bool = False) -> Iterator[tuple[int, int, Tensor]]:
        """(layer, column, weight) in a fixed order, of `every` weight or of those that are trained.

        A weight of fewer rows than `dim` has fewer columns.
        """
        for layer, w in enumerate(self._named.values()):
            if every or w.requires_grad:
                for column in range(min(self.dim, len(w))):
                    yield layer, column, w

    def part(self, w: Tensor, column: int) -> Tensor:
        return w if self.dim == 1 else w[column :: self.dim]

    def term(self, w: Tensor, layer: int, column: int) -> Tensor:
        """The differentiable term of one column of one layer."""
        raise NotImplementedError

    def measure(self, w: Tensor, grad: Tensor, layer: int, column: int) -> tuple[Tensor, ...]:
        """What `solve` needs to know of a flat column, as scalars; may add to the flat `grad` what is known by now."""
        raise NotImplementedError

    def solve(self, measured: Tensor, at: Columns) -> tuple[Tensor, Tensor | None]:
        """The arithmetic between a column's sums and its gradient, for all columns at once.

        Args:
            measured: (columns, scalars of `measure`).

        Returns:
            the terms (columns,), and what `pull` is given of each (columns, any) if there is more to add; also adds
            to the gradients of the term's own parameters.
        """
        raise NotImplementedError

    def pull(self, w: Tensor, grad: Tensor, coefficients: Tensor) -> None:
        """Add `scale()` times the term's gradient to the flat `grad`."""
        raise NotImplementedError

    def scale(self) -> float:
        return self.weight

    def forward(self) -> Tensor:
        """The weighted total over the weights that are trained, as a differentiable scalar."""
        terms = [self.term(wide(self.part(w, j)), i, j) for i, j, w in self.columns()]
        return self.scale() * torch.stack(terms).sum() if terms else self._zero()

    def _zero(self) -> Tensor:
        return torch.zeros((), device=next(iter(self._named.values())).device)

    @torch.no_grad()
    def add_gradients(self) -> Tensor:
        """Add the total's gradient to every `.grad` that there is; returns the total over those weights.

        Raises:
            UserError: no weight has a gradient, though some are trained.
        """
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        columns = list(self.columns())
        used = [(i, j, w) for i, j, w in columns if w.grad is not None]  # the others the step has not used
        if not used:
            if columns:
                raise UserError("no weight has a gradient: call add_gradients after loss.backward()")
            return self._zero()
        flats = []
        for _, j, w in used:
            assert w.grad is not None
            if self.dim == 1 and w.stride() == w.grad.stride():
                flats.append((flat(w.detach()), flat(w.grad)))
            else:  # columns are strided: work on a copy of each
                part = wide(self.part(w.detach(), j).reshape(-1))
                flats.append((part, torch.zeros_like(part)))
        measured = [self.measure(*pair, i, j) for pair, (i, j, _) in zip(flats, used, strict=True)]
        scalars = torch.stack([scalar for row in measured for scalar in row]).view(len(used), -1)
        terms, coefficients = self.solve(scalars, Columns([i for i, _, _ in used], [j for _, j, _ in used]))
        if coefficients is not None:
            for pair, row in zip(flats, coefficients.unbind(), strict=True):
                self.pull(*pair, row)
        for (_, added), (_, j, w) in zip(flats, used, strict=True):
            assert w.grad is not None
            if self.dim > 1 or w.stride() != w.grad.stride():
                grad = self.part(w.grad, j)
                grad += added.view(grad.shape)
        return self.scale() * terms.sum()

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """The optimizer group of the term's own parameters, if it has any: no weight decay, its rate lr * lr_mult."""
        parameters = list(self.parameters())
        group = {"params": parameters, "lr": lr * self.lr_mult, "weight_decay": 0.0}
        return [group] if parameters else []

    def log(self) -> dict[str, float]:
        """What is worth plotting of the term's own parameters."""
        return {}


class L2(Regularizer):
    """Weight decay alone, `factor` times the recipe's: the paper's L2 and 10x L2. The optimizer applies it.

    In a loop of your own set the optimizer's weight_decay instead: value and gradient are zero here.

    Args:
        factor: on the recipe's weight decay.
    """

    def __init__(self, model: nn.Module, factor: NonNegative = 1.0):
        super().__init__(model, weight=0.0)
        self.decay = factor

    def forward(self) -> Tensor:
        return self._zero()

    @torch.no_grad()
    def add_gradients(self) -> Tensor:
        return self._zero()


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

    def solve(self, measured: Tensor, at: Columns) -> tuple[Tensor, None]:
        return measured[:, 0], None


@_fused
def _largest(w: Tensor, grad: Tensor, scale: float) -> Tensor:
    index = argmax_abs(w)
    value = w.index_select(0, index)
    grad.index_add_(0, index, (scale * value.sign()).to(grad.dtype))
    return wide(value).abs().squeeze()


class Margin(Regularizer):
    """Eq. 2 with one learnable margin M per layer (and column), initialised at 2 std of the weights.

    dL/dM = sign(M) (1 - n), n the number of weights outside, is exact under autograd. It is of order N, and plain SGD
    throws M far outside the weights; divided by N, it cannot pull M back either (measured; see docs/paper.md,
    "Differences"). `add_gradients` therefore adds

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
        m = _take(self.margin.detach().view(-1), entries)
        # an M of exactly 0 has no sign, and must grow all the same
        sign = torch.where(m < 0, -1.0, 1.0)
        pull = self.weight * sign * (1 - outside).clamp(-1, 1) * largest
        assert self.margin.grad is not None
        _add(self.margin.grad.view(-1), entries, pull)
        self._counts.zero_()
        _add(self._counts.view(-1), entries, outside)
        return m.abs() + excess, None

    def log(self) -> dict[str, float]:
        return {
            "margin_max": self.margin.detach().abs().max().item(),
            "outside_max": self._counts.max().item(),
        }


@_fused
def _margin(w: Tensor, grad: Tensor, m: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    w, m = wide(w), m.abs()
    excess = (w.abs() - m).relu()
    outside = excess > 0
    grad.add_(w.sign() * outside * scale)
    return excess.sum(), outside.sum().to(m.dtype), m + excess.amax()  # the last is max(m, max |w|)


class SoftMinMax(Regularizer):
    """Eq. 3 with one learnable temperature per layer, shared by its columns.

    As written the temperature settles where Var_p + Var_q = exp(-alpha), near -ln(2 var(w)), so the term never
    becomes a hard min-max (see docs/paper.md, "Differences"). Give the optimizer `param_groups(lr)`, or it never moves.

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
        zp, p1, p2, zq, q1, q2, top, bottom = measured.unbind(1)
        alpha = _take(self.temperature.detach(), at.layers)
        s_max, s_min = p1 / zp, q1 / zq
        coefficients = torch.stack(
            [alpha, top, bottom,
             self.weight * (1 - alpha * s_max) / zp, self.weight * alpha / zp,
             self.weight * (1 + alpha * s_min) / zq, self.weight * alpha / zq], 1
        )  # fmt: skip
        spread = (p2 / zp - s_max**2) + (q2 / zq - s_min**2)
        once = torch.exp(-alpha)
        if self.dim > 1:  # a layer's columns share its temperature, whose own term counts once
            once = torch.stack([value * (column == 0) for value, column in zip(once, at.columns, strict=True)])
        assert self.temperature.grad is not None
        _add(self.temperature.grad, at.layers, self.weight * (spread - once))
        return s_max - s_min + once, coefficients

    def pull(self, w: Tensor, grad: Tensor, coefficients: Tensor) -> None:
        _soft_gradient(w, grad, coefficients)

    def log(self) -> dict[str, float]:
        alpha = self.temperature.detach()
        return {"temperature_min": alpha.min().item(), "temperature_max": alpha.max().item()}


@_fused
def _soft_sums(w: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
    low, high = w.amin(), w.amax()
    w, low, high = wide(w), wide(low), wide(high)
    # exp(alpha (w - peak)) <= 1 for either sign of alpha
    top, bottom = torch.where(alpha >= 0, high, low), torch.where(alpha >= 0, low, high)
    p, q = torch.exp(alpha * (w - top)), torch.exp(alpha * (bottom - w))
    pw, qw = p * w, q * w
    return p.sum(), pw.sum(), (pw * w).sum(), q.sum(), qw.sum(), (qw * w).sum(), top, bottom


@_fused
def _soft_gradient(w: Tensor, grad: Tensor, coefficients: Tensor) -> None:
    # p (1 + alpha (w - s_max)) - q (1 - alpha (w - s_min)), the constants folded
    alpha, top, bottom, p0, p1, q0, q1 = coefficients.unbind()
    w = wide(w)
    p, q = torch.exp(alpha * (w - top)), torch.exp(alpha * (bottom - w))
    grad.add_(p * (p0 + p1 * w) - q * (q0 - q1 * w))


class Kurtosis(Regularizer):
    """KURE (Shkolnik et al. 2020): the mean over the trained layers of (Kurt[w] - target)^2.

    Args:
        model, weight, dim: as `Regularizer`; the official weight is 1.0.
        target: the kurtosis that is aimed at; 1.8 is a uniform distribution's.
    """

    def __init__(self, model: nn.Module, weight: NonNegative = 1.0, target: Positive = 1.8, dim: Count = 1):
        super().__init__(model, weight, dim)
        self.target = target
        columns = [(i, j, self.part(w, j)) for i, j, w in self.columns(every=True)]
        device = columns[0][2].device
        exact = torch.float64 if device.type != "mps" else torch.float32
        self._sizes = torch.tensor([part.numel() for _, _, part in columns], dtype=exact, device=device)
        self._at = {(i, j): at for at, (i, j, _) in enumerate(columns)}

    def scale(self) -> float:
        return self.weight / max(1, sum(w.requires_grad for w in self._named.values()))

    def term(self, w: Tensor, layer: int, column: int) -> Tensor:
        return kurtosis(w, self.target)

    def measure(self, w: Tensor, grad: Tensor, layer: int, column: int) -> tuple[Tensor, ...]:
        # Power sums about zero: exact enough in float32 while the weights are centred near it.
        return _moments(w)

    def solve(self, measured: Tensor, at: Columns) -> tuple[Tensor, Tensor]:
        n = _take(self._sizes, [self._at[key] for key in zip(at.layers, at.columns, strict=True)])
        mean, raw2, raw3, raw4 = (measured.to(n.dtype) / n[:, None]).unbind(1)
        m2 = (raw2 - mean**2).clamp(min=0)
        m3 = raw3 - 3 * mean * raw2 + 2 * mean**3
        m4 = raw4 - 4 * mean * raw3 + 6 * mean**2 * raw2 - 3 * mean**4
        bessel = n / (n - 1).clamp(min=1)
        variance = m2 * bessel
        valid = variance > 1e-20
        inverse = torch.where(valid, variance, 1.0).rsqrt()
        kurt = m4 * inverse**4
        outer = torch.where(valid, 2 * (kurt - self.target), 0.0) * self.scale()
        factor = outer * 4 / n * inverse
        skew = m3 * inverse**3
        # factor (z^3 - mean z^3 - z k n / (n - 1)), z = (w - mean) inverse
        coefficients = torch.stack([mean, inverse, factor, -factor * kurt * bessel, -factor * skew], 1)
        terms = torch.where(valid, (kurt - self.target) ** 2, 0.0)
        return terms.to(measured.dtype), coefficients.to(measured.dtype)

    def pull(self, w: Tensor, grad: Tensor, coefficients: Tensor) -> None:
        _kurtosis_gradient(w, grad, coefficients)


@_fused
def _moments(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w = wide(w)
    square = w * w
    return w.sum(), square.sum(), (square * w).sum(), (square * square).sum()


@_fused
def _kurtosis_gradient(w: Tensor, grad: Tensor, coefficients: Tensor) -> None:
    mean, inverse, cubic, linear, constant = coefficients.unbind()
    z = (wide(w) - mean) * inverse
    grad.add_(z * (cubic * z * z + linear) + constant)


def describe(model: nn.Module) -> dict[str, dict[str, float]]:
    """Per weight: `range` (max - min), `max_abs`, `std` (unbiased), in its units; `kurtosis`, NaN of a constant."""
    out = {}
    for name, w in weights_of(model).items():
        w = w.detach().double()
        std = w.std().item() if w.numel() > 1 else 0.0
        kurt = ((w - w.mean()) ** 4).mean().item() / std**4 if std > 0 else math.nan
        low, high = (v.item() for v in w.aminmax())
        out[name] = {"range": high - low, "max_abs": max(high, -low), "std": std, "kurtosis": kurt}
    return out
