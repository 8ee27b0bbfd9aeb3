"""The interface of a stage: a frozen dataclass whose fields are its config keys."""

from collections.abc import Mapping

from torch import Tensor, nn

from r2.config import UserError
from r2.data.batches import IGNORED, Data
from r2.models import Inputs
from r2.quantizers.layers import layer_bits, obstacles, quantizable
from r2.recipe import Recipe
from r2.record import Outcome
from r2.regularizers import Regularizer
from r2.store import Run

CALIBRATED = 256  # examples at most: one device holds every layer's input for all of them, whatever the recipe's batch


class Stage:
    """Takes a trained model to a compressed one.

    Attributes:
        from_scratch: the stage trains the untrained model itself, with the regularizer active.
        bits: what weight_bits is unless it is set.
        weight_bits, act_bits, dim: None where the stage has no such width.
        layer_bits: widths by layer name pattern.
        skip_first_last: these two layers stay as they are.
    """

    from_scratch: bool = False
    bits: int | None = None
    weight_bits: int | None = None
    act_bits: int | None = None
    dim: int | None = None
    layer_bits: Mapping[str, int] | None = None
    skip_first_last: bool = False

    def axes(self) -> dict:
        """The columns that tell this stage's records apart."""
        layers = "excl_first_last" if self.skip_first_last else "all"
        widths = {"weight_bits": self.weight_bits, "act_bits": self.act_bits, "dim": self.dim}
        return {**widths, "quantized_layers": layers if self.weight_bits else None}

    def check_widths(self, least: int, most: int, why: str, **others: int) -> None:
        """
        Raises:
            UserError: the weights, or `others` by key, have fewer or more bits than the method takes; says `why`.
        """
        assert self.weight_bits is not None
        widths = {"bits" if self.weight_bits == self.bits else "weight_bits": self.weight_bits, **others}
        widths |= {f"layer_bits.{pattern}": bits for pattern, bits in (self.layer_bits or {}).items()}
        for key, bits in widths.items():
            if not least <= bits <= most:
                raise UserError(f"stage.{key}={bits}: {why}")

    def check(self, model: nn.Module, calibration_images: int) -> None:
        """Refuse, before any training, what does not fit the model (built without values).

        Raises:
            UserError: a key and what may stand there.
        """
        layers = quantizable(model, self.skip_first_last)
        if self.weight_bits is not None:
            for name, why in obstacles(model).items():
                raise UserError(f"{name}: cannot be compressed, {why}; choose another model, or stage=fp32")
        layer_bits(list(layers), self.layer_bits)
        if self.act_bits is not None and any(isinstance(m, nn.Embedding) for m in model.modules()):
            raise UserError(
                "stage: it quantizes the inputs of layers, and an embedding's are token numbers; use stage=dkm"
            )

    def __call__(
        self, model: nn.Module, data: Data, recipe: Recipe, run: Run, regularizer: Regularizer
    ) -> tuple[nn.Module, Outcome]:
        """Compress `model`, which may be changed.

        Args:
            regularizer: of `model`, for a stage that trains from scratch.
        """
        raise NotImplementedError


def calibration_batch(data: Data, batch_size: int, seed: int) -> Inputs:
    """Training examples on the device, the same on every rank; without images that cannot be decoded."""
    inputs, labels = next(data.calibration(min(batch_size, CALIBRATED), seed))
    unread = labels == IGNORED
    return inputs[~unread] if isinstance(inputs, Tensor) and unread.any() else inputs
