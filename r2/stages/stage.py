"""What an experiment asks of a stage. A stage is a frozen dataclass whose fields are its config keys."""

from torch import nn

from r2.config import UserError
from r2.data.batches import Data
from r2.quantizers.layers import layer_bits, quantizable
from r2.recipe import Recipe
from r2.regularizers import Regularizer
from r2.store import Run


class Stage:
    """Takes a trained model to a compressed one.

    Attributes:
        from_scratch: the stage trains the untrained model itself, with the regularizer active.
    """

    from_scratch = False

    def axes(self) -> dict:
        """The columns that tell this stage's records apart."""
        layers = "excl_first_last" if getattr(self, "skip_first_last", False) else "all"
        widths = {name: getattr(self, name, None) for name in ("weight_bits", "act_bits", "dim")}
        return {**widths, "quantized_layers": layers if widths["weight_bits"] else None}

    def check(self, model: nn.Module) -> None:
        """Refuse, before any training, what does not fit the model (built without values).

        Raises:
            UserError: a key and what may stand there.
        """
        layers = quantizable(model, getattr(self, "skip_first_last", False))
        layer_bits(list(layers), getattr(self, "layer_bits", None))
        if hasattr(self, "act_bits") and any(isinstance(m, nn.Embedding) for m in model.modules()):
            raise UserError("stage: it quantizes what layers read, and an embedding reads token numbers; use stage=dkm")

    def __call__(
        self, model: nn.Module, data: Data, recipe: Recipe, run: Run, regularizer: Regularizer
    ) -> tuple[nn.Module, dict]:
        """Compress `model`, which may be changed.

        Args:
            regularizer: of `model`, for a stage that trains from scratch.

        Returns:
            the compressed model and what its record says of it: `metrics`, `initial` (metrics before), `epochs`,
            `seconds` by phase, and what else the stage knows.
        """
        raise NotImplementedError
