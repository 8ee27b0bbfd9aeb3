"""KURE (Shkolnik et al. 2020): kurtosis towards that of a uniform distribution."""

import torch
from torch import Tensor, nn

from r2.config import Count, NonNegative, Positive
from r2.kernels import fused
from r2.regularizers.regularizer import Columns, Regularizer, take, wide


def kurtosis(w: Tensor, target: float = 1.8) -> Tensor:
    """(Kurt[w] - target)^2 with the unbiased standard deviation (Shkolnik et al. 2020), a scalar.

    A constant tensor has no kurtosis; its term is 0.
    """
    if w.numel() < 2:
        return w.sum() * 0
    variance, centred = w.var(), w - w.mean()
    varies = variance > 0  # by torch.where, since a condition in Python waits for a GPU
    term = ((centred**4).mean() / torch.where(varies, variance, 1.0) ** 2 - target) ** 2
    return torch.where(varies, term, 0.0)


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
        n = take(self._sizes, [self._at[key] for key in zip(at.layers, at.columns, strict=True)])
        return _solved(measured, n, self.target, self.scale())

    def pull(self, w: Tensor, grad: Tensor, coefficients: Tensor) -> None:
        _kurtosis_gradient(w, grad, coefficients)


@fused
def _moments(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w = wide(w)
    square = w * w
    return w.sum(), square.sum(), (square * w).sum(), (square * square).sum()


@fused
def _solved(measured: Tensor, n: Tensor, target: float, scale: float) -> tuple[Tensor, Tensor]:
    mean, raw2, raw3, raw4 = (measured.to(n.dtype) / n[:, None]).unbind(1)
    m2 = (raw2 - mean**2).clamp(min=0)
    m3 = raw3 - 3 * mean * raw2 + 2 * mean**3
    m4 = raw4 - 4 * mean * raw3 + 6 * mean**2 * raw2 - 3 * mean**4
    bessel = n / (n - 1).clamp(min=1)
    variance = m2 * bessel
    valid = variance > 1e-20
    inverse = torch.where(valid, variance, 1.0).rsqrt()
    kurt = m4 * inverse**4
    outer = torch.where(valid, 2 * (kurt - target), 0.0) * scale
    factor = outer * 4 / n * inverse
    skew = m3 * inverse**3
    # factor (z^3 - mean z^3 - z k n / (n - 1)), z = (w - mean) inverse
    coefficients = torch.stack([mean, inverse, factor, -factor * kurt * bessel, -factor * skew], 1)
    terms = torch.where(valid, (kurt - target) ** 2, 0.0)
    return terms.to(measured.dtype), coefficients.to(measured.dtype)


@fused
def _kurtosis_gradient(w: Tensor, grad: Tensor, coefficients: Tensor) -> None:
    mean, inverse, cubic, linear, constant = coefficients.unbind()
    z = (wide(w) - mean) * inverse
    grad.add_(z * (cubic * z * z + linear) + constant)
