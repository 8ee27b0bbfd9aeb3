"""What every regularizer shares: the weights it reads, and one fused pass over all of them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from r2.config import UserError
from r2.kernels import dense, flat

KINDS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear, nn.Embedding
)  # fmt: skip


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Every convolution, linear and embedding weight by name, first and last layers included.

    One that several layers share stands there once, under the first name.
    """
    out: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, KINDS):
            weight = module.weight  # read once: a parametrized one is computed anew each time
            if not any(weight is w for w in out.values()):
                out[f"{name}.weight"] = weight
    return out


def wide(w: Tensor) -> Tensor:
    """`w` in the type of its sums: float32, or float64 as it is."""
    return w if w.dtype == torch.float64 else w.float()


class Columns(NamedTuple):
    """What a step has gradients for: the layer and the column of each, in one order."""

    layers: list[int]
    columns: list[int]


def take(values: Tensor, index: list[int]) -> Tensor:
    """values[index]; a list as an index would be copied to the device, and the host would wait for that."""
    return values if index == list(range(len(values))) else torch.stack([values[i] for i in index])


def add_at(target: Tensor, index: list[int], added: Tensor) -> None:
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
        UserError: there is no weight, or one is computed from other parameters otherwise than by
            torch.nn.utils.parametrize: the old weight_norm and prune keep the last forward's.
    """

    decay = 1.0  # factor on the optimizer's weight decay
    lr_mult = 1.0  # factor on the learning rate of the term's own parameters

    def __init__(self, model: nn.Module, weight: float = 0.01, dim: int = 1):
        super().__init__()
        self.weight, self.dim = weight, dim
        self._named = weights_of(model)  # a plain dict: the model owns these parameters
        if not self._named:
            raise UserError(
                "the model has no convolution, linear layer or embedding, so there is nothing to regularize"
            )
        self._parametrized: dict[str, Any] = {}  # layers by the name of their weight
        for name, w in self._named.items():
            if isinstance(w, nn.Parameter):
                continue
            layer = model.get_submodule(name.removesuffix(".weight"))
            if not parametrize.is_parametrized(layer, "weight"):
                raise UserError(
                    f"{name} is computed from other parameters by a hook; use torch.nn.utils.parametrizations, or make "
                    "it a parameter first (torch.nn.utils.remove_weight_norm, prune.remove)"
                )
            self._parametrized[name] = layer
            self._named[name] = w.detach().requires_grad_(w.requires_grad)

    def weights(self) -> list[Tensor]:
        """As they are now: the parameters, and what parametrizations make of theirs."""
        with torch.enable_grad():
            return [self._parametrized[n].weight if n in self._parametrized else w for n, w in self._named.items()]

    def columns(
        self, weights: Sequence[Tensor] | None = None, every: bool = False
    ) -> Iterator[tuple[int, int, Tensor]]:
        """(layer, column, weight) in a fixed order, of `every` weight or of those that are trained.

        A weight of fewer rows than `dim` has fewer columns.
        """
        for layer, w in enumerate(self.weights() if weights is None else weights):
            if every or w.requires_grad:
                for column in range(min(self.dim, len(w))):
                    yield layer, column, w

    def part(self, w: Tensor, column: int) -> Tensor:
        return w if self.dim == 1 else w[column :: self.dim]

    def term(self, w: Tensor, layer: int, column: int) -> Tensor:
        """The differentiable term of one column of one layer, without `weight`; of any shape, in float32 or float64."""
        raise NotImplementedError

    def measure(self, w: Tensor, grad: Tensor, layer: int, column: int) -> tuple[Tensor, ...]:
        """What `solve` needs to know of a flat column, as scalars; may add to the flat `grad` what is known by now.

        Unless a subclass knows its gradient: all of it, by autograd.
        """
        parameters = list(self.parameters())
        with torch.enable_grad():
            value = self.term(leaf := wide(w).detach().requires_grad_(), layer, column)
            found = torch.autograd.grad(value, [leaf, *parameters], allow_unused=True, materialize_grads=True)
        grad.add_(found[0].to(grad.dtype), alpha=self.scale())
        for parameter, pulled in zip(parameters, found[1:], strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(pulled, alpha=self.scale())
        return (value.detach(),)

    def solve(self, measured: Tensor, at: Columns) -> tuple[Tensor, Tensor | None]:
        """The arithmetic between a column's sums and its gradient, for all columns at once.

        Args:
            measured: (columns, scalars of `measure`).

        Returns:
            the terms (columns,), and what `pull` is given of each (columns, any) if there is more to add; also adds
            to the gradients of the term's own parameters.
        """
        return measured[:, 0], None

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
        weights = self.weights()
        leaves = [self._leaf(name, w) for name, w in zip(self._named, weights, strict=True)]
        columns = list(self.columns(leaves))
        used = [(i, j, w) for i, j, w in columns if w.grad is not None]  # the others the step has not used
        if not used:
            if columns:
                raise UserError("no weight has a gradient: call add_gradients after loss.backward()")
            return self._zero()
        flats = []
        for _, j, w in used:
            assert w.grad is not None
            if self._in_place(w):
                flats.append((flat(w.detach()), flat(w.grad)))
            else:  # columns and other layouts are strided: work on a copy of each
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
            if not self._in_place(w):
                grad = self.part(w.grad, j)
                grad += added.view(grad.shape)
        for name, w, leaf in zip(self._named, weights, leaves, strict=True):
            if leaf is not w and leaf.grad is not None:
                originals = self._originals(name)
                found = torch.autograd.grad(w, originals, leaf.grad, allow_unused=True, materialize_grads=True)
                for original, added in zip(originals, found, strict=True):
                    original.grad += added
        return self.scale() * terms.sum()

    def _originals(self, name: str) -> list[Any]:
        """The parameters with a gradient that a parametrized weight is computed from."""
        found = self._parametrized[name].parametrizations.weight.parameters()
        return [p for p in found if p.requires_grad and p.grad is not None]

    def _leaf(self, name: str, w: Tensor) -> Tensor:
        """A parametrized weight with a gradient of its own, if the step has used it; any other as it is."""
        if name not in self._parametrized:
            return w
        leaf = w.detach().requires_grad_(w.requires_grad)
        if self._originals(name):
            leaf.grad = torch.zeros_like(leaf)
        return leaf

    def _in_place(self, w: Tensor) -> bool:
        """Whether the flat weight and gradient are views, in the same order."""
        return self.dim == 1 and w.grad is not None and w.stride() == w.grad.stride() and dense(w)

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """The optimizer group of the term's own parameters, if it has any: no weight decay, its rate lr * lr_mult."""
        parameters = list(self.parameters())
        group = {"params": parameters, "lr": lr * self.lr_mult, "weight_decay": 0.0}
        return [group] if parameters else []

    def log(self) -> dict[str, float]:
        """What is worth plotting of the term's own parameters."""
        return {}
