"""DKM (Cho et al. 2021): fine-tune with soft clustering of the weights, then assign each weight to its centroid."""

import time
from dataclasses import dataclass
from typing import Literal

from torch import nn

from r2.config import Bits, Count, NonNegative, Positive
from r2.data.batches import Data
from r2.dist import sync_batchnorm
from r2.palettize import Palette, relative_temperature
from r2.quantizers.calibration import check_weights
from r2.quantizers.layers import compressed, layer_bits, quantizable, signal_to_noise, swap
from r2.recipe import Recipe, finetuning, optimizer_of
from r2.record import Outcome
from r2.regularizers import Regularizer
from r2.stages.stage import Stage, calibration_batch
from r2.store import Run
from r2.training.loop import evaluate, train


@dataclass(frozen=True, kw_only=True)
class DKM(Stage):
    """Every layer's weights become 2^bits centroids of `dim` numbers: bits / dim bits per weight.

    Args:
        temperature: of the softmax over negative squared distances; with temperature_mode 'relative' it is a multiple
            of the variance of the layer's weights, so that a layer is soft whatever the size of its weights. None:
            `relative_temperature` of the layer's bits, or coremltools' 1e-4 with temperature_mode 'absolute'.
        iterations, tolerance: of k-means within one step; it starts from the centroids of the step before.
    """

    bits: Bits
    dim: Count
    weight_bits: Bits
    layer_bits: dict[str, Bits] | None
    skip_first_last: bool
    temperature: Positive | None
    temperature_mode: Literal["absolute", "relative"]
    iterations: Count
    tolerance: NonNegative
    batchnorm: Literal["train", "freeze"]
    epochs: Count
    batch_size: Count
    lr: Positive
    weight_decay: NonNegative
    clip_norm: Positive | None

    def __post_init__(self) -> None:
        self.check_widths(1, 8, "dkm stores an index of at most 8 bits per vector")

    def __call__(
        self, model: nn.Module, data: Data, recipe: Recipe, run: Run, regularizer: Regularizer
    ) -> tuple[nn.Module, Outcome]:
        recipe = finetuning(recipe, self.epochs, self.batch_size, self.lr, self.weight_decay, self.clip_norm)
        if recipe.syncs_batchnorm(run.world.size):
            model = sync_batchnorm(model, run.world)
        began = time.monotonic()
        self.cluster(model, run.seed)
        initial, softness = evaluate(model, data, run.world, recipe), _soft_shares(model)
        clustered = time.monotonic()
        done = train(
            model, data, recipe, run, "dkm", [optimizer_of(model, recipe)], batchnorm=self.batchnorm, keys="stage"
        )
        left_out = {name: n for name, layer in compressed(model).items() if (n := layer.quantizer.tail(layer.weight))}
        return model, Outcome(
            metrics=evaluate(model, data, run.world, recipe),
            initial=initial,
            epochs=self.epochs,
            seconds={"cluster": round(clustered - began, 2), "dkm": done.seconds},
            images_per_second=done.images_per_second,
            timing=done.timing,
            sqnr_db=signal_to_noise(model, calibration_batch(data, self.batch_size, run.seed)),
            details={"left_out_weights": left_out, "initial_soft_share": softness, "soft_share": _soft_shares(model)},
        )

    def cluster(self, model: nn.Module, seed: int) -> None:
        """Give every layer its first centroids."""
        layers = quantizable(model, self.skip_first_last)
        overrides = layer_bits(list(layers), self.layer_bits)
        relative = self.temperature_mode == "relative"

        def palette(name: str) -> Palette:
            bits = overrides.get(name, self.weight_bits)
            by_bits = relative_temperature(bits, self.dim) if relative else 1e-4
            return Palette(bits, self.dim, self.temperature or by_bits, relative, self.iterations, self.tolerance)

        check_weights(layers)
        swap(layers, palette)
        for layer in compressed(model).values():
            layer.quantizer.initialise(None, layer.weight, layer.operation, seed=seed)


def _soft_shares(model: nn.Module) -> dict[str, float]:
    """Per layer, the share of the vectors that no centroid has for itself; layers without a vector are left out."""
    shares = {name: layer.quantizer.soft_share(layer.weight) for name, layer in compressed(model).items()}
    return {name: round(share, 4) for name, share in shares.items() if share is not None}
