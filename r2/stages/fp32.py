"""`stage=fp32`: the pretrained model, uncompressed."""

from dataclasses import dataclass

from torch import nn

from r2.data.batches import Data
from r2.recipe import Recipe
from r2.record import Outcome
from r2.regularizers import Regularizer
from r2.stages.stage import Stage
from r2.store import Run
from r2.training.loop import evaluate


@dataclass(frozen=True)
class FP32(Stage):
    """No compression."""

    def __call__(
        self, model: nn.Module, data: Data, recipe: Recipe, run: Run, regularizer: Regularizer
    ) -> tuple[nn.Module, Outcome]:
        return model, Outcome(evaluate(model, data, run.world, recipe))
