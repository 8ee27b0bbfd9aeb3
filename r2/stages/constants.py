"""Folds constant BatchNorm channels to their constant.

Folding multiplies the weights of a channel by gamma / sqrt(variance + eps). A channel whose input is always the same
has no variance, so its factor is gamma / sqrt(eps), hundreds of times the others': on a per-tensor grid such a channel
alone sets the range, and all others round to zero. Its output is a single number, which the bias alone can represent.
"""

import torch
from torch import Tensor, nn

TOLERANCE = 1e-3  # of a layer's spread: an output that varies less is a constant


@torch.no_grad()
def fold_constants(model: nn.Module, batches: list[Tensor]) -> list[str]:
    """Give every BatchNorm channel of `model` whose output does not vary over the images a scale of 0 and its mean.

    BatchNorm's running variance alone does not tell: it holds what training saw, and fades slowly. So the outputs are
    measured: a channel is constant where its standard deviation, over images and places, is below a thousandth of the
    root mean square of its layer's. Training must agree, by a running variance of at most eps or a gamma below that
    limit: a channel that these images do not excite, but others do, stays. Folding then leaves weights of zero and a
    bias, and equalization, which passes over zero ranges, has no factor for it.

    Args:
        model: in evaluation mode; changed in place.
        batches: images (n, 3, h, w).

    Returns:
        `layer:channel` of each.
    """
    sums: dict[str, Tensor] = {}
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}

    def measure(name: str) -> None:
        def hook(_: nn.Module, __: tuple, y: Tensor) -> None:
            channels = y.transpose(0, 1).flatten(1).double()
            count = torch.full_like(channels[:, 0], channels.shape[1])
            found = torch.stack([count, channels.sum(1), channels.square().sum(1)])
            sums[name] = sums[name] + found if name in sums else found

        hooks.append(norms[name].register_forward_hook(hook))

    hooks: list = []
    for name in norms:
        measure(name)
    for batch in batches:
        model(batch)
    for registered in hooks:
        registered.remove()
    constants = []
    for name, (count, total, squares) in sums.items():
        mean = total / count
        variance = (squares / count - mean**2).clamp(min=0)
        norm, limit = norms[name], TOLERANCE * variance.mean().sqrt()
        assert norm.running_var is not None
        still = (variance.sqrt() <= limit) & ((norm.running_var <= norm.eps) | (norm.weight.abs() <= limit))
        norm.weight[still] = 0.0
        norm.bias[still] = mean[still].to(norm.bias.dtype)
        constants += [f"{name}:{channel}" for channel in still.nonzero().flatten().tolist()]
    return constants
