"""Training recipe: the `recipe` group, its optimizer and its learning-rate schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from r2.config import Count, Fraction, NonNegative, Positive
from r2.regularizers import Regularizer


@dataclass(frozen=True)
class Recipe:
    """How to optimise. `batch_size` is global: over all devices and all micro-batches of a step.

    `momentum` and `nesterov` are SGD's; AdamW has PyTorch's betas and epsilon. `sync_bn` auto synchronises BatchNorm
    over several devices if each has 16 images or fewer at once.
    """

    epochs: Count
    batch_size: Count
    lr: Positive
    weight_decay: NonNegative
    warmup_epochs: NonNegative = 0.0
    momentum: Fraction = 0.9
    nesterov: bool = True
    label_smoothing: Fraction = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    compile: bool = False
    accumulate: Count = 1
    clip_norm: Positive | None = None
    sync_bn: bool | Literal["auto"] = False
    finetune: dict = field(default_factory=dict)  # the stages' epochs, batch and learning rates
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["cosine", "linear"] = "cosine"

    def syncs_batchnorm(self, devices: int) -> bool:
        if self.sync_bn == "auto":
            return devices > 1 and self.batch_size <= 16 * devices * self.accumulate
        return self.sync_bn


def optimizer_of(
    model: nn.Module, recipe: Recipe, regularizer: Regularizer | None = None, apart: Iterable[nn.Parameter] = ()
) -> Optimizer:
    """Optimizer of the model, with the regularizer's weight decay, and of the regularizer's own parameters.

    SGD decays every parameter, AdamW only those with two dimensions or more (no bias, no norm), as is usual for each.
    Parameters `apart` are left to another optimizer or group.
    """
    left_out = {id(p) for p in apart}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in left_out]
    decay = recipe.weight_decay * (regularizer.decay if regularizer else 1.0)
    extra = regularizer.param_groups(recipe.lr) if regularizer else []
    if recipe.optimizer == "sgd":
        groups: list[dict] = [{"params": parameters, "weight_decay": decay}, *extra]
        return torch.optim.SGD(groups, recipe.lr, recipe.momentum, nesterov=recipe.nesterov, fused=True)
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay}]
    groups += [{"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}, *extra]
    return torch.optim.AdamW(groups, recipe.lr, fused=True)


def learning_rate(step: int, total: int, warmup: int, schedule: str = "cosine") -> float:
    """Factor on every group's learning rate: linear warm-up, then by `schedule` to 0."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "linear":
        return (total - step) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def finetuning(
    recipe: Recipe, epochs: int, batch_size: int, lr: float, weight_decay: float, clip_norm: float | None
) -> Recipe:
    """The recipe of a stage: the machine's settings stay, the schedule is its own, without warm-up or smoothing."""
    return replace(
        recipe,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        nesterov=False,
        warmup_epochs=0.0,
        label_smoothing=0.0,
        clip_norm=clip_norm,
    )
