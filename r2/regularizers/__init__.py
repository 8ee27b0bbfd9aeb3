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

from torch import nn

from r2.regularizers.kure import Kurtosis, kurtosis
from r2.regularizers.l2 import L2
from r2.regularizers.ranges import LInf, Margin, SoftMinMax, l_inf, margin, soft_min_max
from r2.regularizers.regularizer import Regularizer, weights_of

__all__ = [
    "L2", "Kurtosis", "LInf", "Margin", "Regularizer", "SoftMinMax", "describe", "kurtosis", "l_inf", "margin",
    "soft_min_max", "weights_of",
]  # fmt: skip


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
