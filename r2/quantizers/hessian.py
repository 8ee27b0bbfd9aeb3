"""EWGS's gradient scaling factor from the Hessian (Lee et al. 2021, section 3.2):

    delta = max(0, mean over batches of (Tr(H_q) / N) / (3 std(dL/dq)))

with H_q the Hessian of the loss by a layer's discrete weights or inputs q (N of them). One Rademacher probe serves
all layers at once; the official code probes each layer separately, at a cost proportional to the number of layers.
Both are unbiased.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r2.models import Inputs


def gradient_scales(
    model: nn.Module, layers: Iterable[str], batches: Iterable[tuple[Inputs, Tensor]], probes: int, seed: int
) -> dict[str, dict[str, float]]:
    """delta of every layer, {"weight": ..., "act": ...}. The model is left untouched.

    Args:
        batches: training inputs and labels; the estimate is the mean over them.
        probes: at most so many per batch; stops when every trace moves by less than a thousandth.
    """
    replica = copy.deepcopy(model).train()  # the pass moves BatchNorm's statistics
    modules = dict(replica.named_modules())
    synchronised: list[Any] = [module for module in replica.modules() if type(module) is nn.SyncBatchNorm]
    for norm in synchronised:  # has no second derivative; every rank has the same batch
        norm.__class__ = nn.BatchNorm2d
    taps: dict[tuple[str, str], Tensor] = {}

    def record(name: str):  # type: ignore[no-untyped-def]
        def tap(kind: str, q: Tensor) -> Tensor:
            taps[name, kind] = q if q.requires_grad else q.requires_grad_()
            return taps[name, kind]

        return tap

    names = list(layers)
    for name in names:
        modules[name].quantizer.tap = record(name)  # type: ignore[union-attr,assignment]
    estimates: dict[tuple[str, str], list[float]] = {}
    generator = torch.Generator().manual_seed(seed)
    for inputs, labels in batches:
        taps.clear()
        loss = F.cross_entropy(replica(inputs), labels)
        keys, values = list(taps), list(taps.values())
        gradients = torch.autograd.grad(loss, values, create_graph=True)
        traces = _hutchinson(gradients, values, probes, generator)
        for key, gradient, trace in zip(keys, gradients, traces, strict=True):
            spread = 3 * gradient.detach().std().item() if gradient.numel() > 1 else 0.0
            estimates.setdefault(key, []).append(trace / gradient.numel() / spread if spread > 0 else 0.0)
    out: dict[str, dict[str, float]] = {name: {} for name in names}
    for (name, kind), values_ in estimates.items():
        out[name][kind] = max(0.0, sum(values_) / len(values_))
    return out


def _hutchinson(
    gradients: tuple[Tensor, ...], values: list[Tensor], probes: int, generator: torch.Generator
) -> list[float]:
    """Traces of the diagonal blocks of the Hessian."""
    sums = [0.0] * len(values)
    previous: list[float] | None = None
    for probe in range(1, probes + 1):
        signs = [(torch.randint(0, 2, v.shape, generator=generator) * 2.0 - 1).to(v.device, v.dtype) for v in values]
        products = torch.autograd.grad(gradients, values, signs, retain_graph=True, allow_unused=True)
        for i, (product, sign) in enumerate(zip(products, signs, strict=True)):
            sums[i] += 0.0 if product is None else (product * sign).sum().item()
        means = [s / probe for s in sums]
        if previous and all(abs(m - p) < 1e-3 * (abs(p) + 1e-6) for m, p in zip(means, previous, strict=True)):
            break
        previous = means
    return [s / probe for s in sums]
