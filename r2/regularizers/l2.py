"""L2, the paper's baseline: the optimizer's weight decay."""

import torch
from torch import Tensor, nn

from r2.config import NonNegative
from r2.regularizers.regularizer import Regularizer


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
