"""Quantization-aware training: EWGS and LSQ from the pretrained checkpoint without the regularizer (paper section 3,
last part), PACT from scratch with it (section 4.2.2).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from r2.config import Bits, Count, NonNegative, Positive, UserError
from r2.data.batches import Data
from r2.dist import sync_batchnorm
from r2.pack import WIDEST
from r2.quantizers import ewgs, lsq, pact
from r2.quantizers.calibration import calibrate
from r2.quantizers.hessian import gradient_scales
from r2.quantizers.layers import (
    Quantizer,
    layer_bits,
    levels_in_use,
    quantizable,
    quantizer_parameters,
    scalars,
    signal_to_noise,
    swap,
)
from r2.recipe import Recipe, finetuning, optimizer_of
from r2.record import Outcome
from r2.regularizers import Regularizer
from r2.stages.stage import Stage, calibration_batch
from r2.store import Run
from r2.training.loop import evaluate, has_batchnorm, train


@dataclass(frozen=True, kw_only=True)
class QAT(Stage):
    """Swap the layers, initialise the quantizers from one batch, train.

    Args:
        bits: both widths, unless `weight_bits`, `act_bits` or `layer_bits` says otherwise.
        input_bits: of the image at the first layer; null leaves it as it is.
        layer_bits: widths of both by layer name pattern, e.g. {classifier: 8}.
        clip_norm: of the gradient of all weights and quantizers together.
        batchnorm: 'train' lets the statistics move on, 'freeze' keeps those of pretraining.
    """

    bits: Bits
    weight_bits: Bits
    act_bits: Bits
    input_bits: Bits | None
    layer_bits: dict[str, Bits] | None
    skip_first_last: bool
    batchnorm: Literal["train", "freeze"]
    epochs: Count
    batch_size: Count
    lr: Positive
    quantizer_lr: Positive
    weight_decay: NonNegative
    clip_norm: Positive | None

    def __post_init__(self) -> None:
        self.check_widths(1, WIDEST, f"a packed file stores weights of at most {WIDEST} bits")

    def check(self, model: nn.Module, calibration_images: int) -> None:
        super().check(model, calibration_images)
        if calibration_images == 1 and has_batchnorm(model):
            raise UserError("data.calibration_images=1: quantizers are calibrated over a batch, and BatchNorm has no "
                            "variance over one image; use 2 or more")  # fmt: skip

    def quantizer(self, weight_bits: int, act_bits: int | None, channels: int) -> Quantizer:
        """A new quantizer of one layer of `channels` outputs."""
        raise NotImplementedError

    def optimizers(
        self, model: nn.Module, parameters: list[nn.Parameter], recipe: Recipe, regularizer: Regularizer | None
    ) -> list[Optimizer]:
        """Optimizers of the weights and of the quantizers' `parameters`: here SGD, which does not decay the latter."""
        optimizer = optimizer_of(model, recipe, regularizer, apart=parameters)
        optimizer.add_param_group({"params": parameters, "lr": self.quantizer_lr, "weight_decay": 0.0})
        return [optimizer]

    def before_epoch(
        self, model: nn.Module, layers: dict[str, nn.Module], data: Data, run: Run
    ) -> Callable[[int], None] | None:
        return None

    def before_update(self, parameters: list[nn.Parameter]) -> Callable[[], None] | None:
        """What is done to the gradients of the quantizers' `parameters` before each update."""
        return None

    def prepare(self, model: nn.Module) -> dict[str, nn.Module]:
        """Give every layer a quantizer, not initialised yet; returns these layers."""
        layers = quantizable(model, self.skip_first_last)
        first = next(iter(quantizable(model)))
        overrides = layer_bits(list(layers), self.layer_bits)

        def quantizer(layer: str) -> Quantizer:
            act_bits = self.input_bits if layer == first else overrides.get(layer, self.act_bits)
            if isinstance(layers[layer], nn.Embedding):  # it reads token numbers
                act_bits = None
            return self.quantizer(overrides.get(layer, self.weight_bits), act_bits, len(layers[layer].weight))  # type: ignore[arg-type]

        swap(layers, quantizer)
        return layers

    def __call__(
        self, model: nn.Module, data: Data, recipe: Recipe, run: Run, regularizer: Regularizer
    ) -> tuple[nn.Module, Outcome]:
        name = type(self).__name__.lower()
        if not self.from_scratch:
            recipe = finetuning(recipe, self.epochs, self.batch_size, self.lr, self.weight_decay, self.clip_norm)
        if recipe.syncs_batchnorm(run.world.size):
            model = sync_batchnorm(model, run.world)
        began = time.monotonic()
        layers = self.prepare(model)
        images = calibration_batch(data, recipe.batch_size, run.seed)
        calibrate(model, layers, images, frozen=self.batchnorm == "freeze")
        initial = evaluate(model, data, run.world, recipe)
        start = {"levels_in_use": levels_in_use(layers), "quantizers": scalars(layers)}
        calibrated = time.monotonic()
        parameters = quantizer_parameters(layers)
        done = train(
            model,
            data,
            recipe,
            run,
            name,
            self.optimizers(model, parameters, recipe, regularizer if self.from_scratch else None),
            regularizer if self.from_scratch else None,
            before_epoch=self.before_epoch(model, layers, data, run),
            before_update=self.before_update(parameters),
            batchnorm=self.batchnorm,
            keys="recipe" if self.from_scratch else "stage",
        )
        return model, Outcome(
            metrics=evaluate(model, data, run.world, recipe),
            initial=initial,
            epochs=recipe.epochs,
            seconds={"calibrate": round(calibrated - began, 2), name: done.seconds},
            images_per_second=done.images_per_second,
            timing=done.timing,
            sqnr_db=signal_to_noise(model, images),
            details={
                "levels_in_use": {"start": start["levels_in_use"], "end": levels_in_use(layers)},
                "quantizers": {"start": start["quantizers"], "end": scalars(layers)},
            },
        )


@dataclass(frozen=True, kw_only=True)
class EWGS(QAT):
    """Official optimizers: SGD for the weights, Adam for the quantizers, both on a cosine.

    Args:
        delta: gradient scaling, or 'hessian' to estimate it per layer (0 in the first epoch, as official).
        weight_init: of the weights' bounds; 'official' is 3 std, 'capped' no more than the largest |w|.
    """

    weight_init: Literal["official", "capped"]
    delta: NonNegative | Literal["hessian"]
    hessian_interval: Count
    hessian_batches: Count
    hessian_batch_size: Count
    hessian_probes: Count

    def check(self, model: nn.Module, calibration_images: int) -> None:
        super().check(model, calibration_images)
        if self.delta == "hessian" and self.hessian_batch_size == 1 and has_batchnorm(model):
            raise UserError("stage.hessian_batch_size=1: BatchNorm has no variance over one image; use 2 or more")

    def quantizer(self, weight_bits: int, act_bits: int | None, channels: int) -> Quantizer:
        delta = 0.0 if self.delta == "hessian" else float(self.delta)
        return ewgs.EWGS(weight_bits, act_bits, delta, self.weight_init)

    def optimizers(
        self, model: nn.Module, parameters: list[nn.Parameter], recipe: Recipe, regularizer: Regularizer | None
    ) -> list[Optimizer]:
        adam = torch.optim.Adam(parameters, self.quantizer_lr, fused=True)
        return [optimizer_of(model, recipe, regularizer, apart=parameters), adam]

    def before_epoch(
        self, model: nn.Module, layers: dict[str, nn.Module], data: Data, run: Run
    ) -> Callable[[int], None] | None:
        def estimate(epoch: int) -> None:
            if epoch == 0 or epoch % self.hessian_interval:
                return
            batches = data.calibration(self.hessian_batch_size, run.seed, epoch)
            several = (batch for batch in batches if len(batch[1]) > 1)  # BatchNorm has no variance over one image
            some = (batch for _, batch in zip(range(self.hessian_batches), several, strict=False))
            scales = gradient_scales(model, layers, some, self.hessian_probes, run.seed + epoch)
            for name, found in scales.items():
                for kind, value in found.items():
                    getattr(layers[name].quantizer, f"{kind}_delta").fill_(value)

        return estimate if self.delta == "hessian" else None


@dataclass(frozen=True, kw_only=True)
class LSQ(QAT):
    """Steps are trained by the weights' SGD, at `quantizer_lr` and without weight decay.

    Args:
        granularity: one step per weight tensor or per output channel.
        act_init: first step of a layer's input; 'fitted' rounds the first batch best.
        step_limit: an update changes a step by at most this times itself, and its gradient is at most the step; null is
            the official rule.
    """

    granularity: Literal["tensor", "channel"]
    act_init: Literal["official", "fitted"]
    step_limit: Positive | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for bits in (self.weight_bits, *(self.layer_bits or {}).values()):
            lsq.bounds(bits, signed=True)
        if self.input_bits == 1:
            raise UserError("stage.input_bits=1: the image has negative values, which 1 bit cannot sign under lsq")
        if self.step_limit is not None and self.step_limit >= 1:
            raise UserError(
                f"stage.step_limit={self.step_limit}: must be below 1, or a step may become 0; null is no limit"
            )

    def quantizer(self, weight_bits: int, act_bits: int | None, channels: int) -> Quantizer:
        return lsq.LSQ(weight_bits, act_bits, channels if self.granularity == "channel" else 1, self.act_init)

    def before_update(self, parameters: list[nn.Parameter]) -> Callable[[], None] | None:
        return None if self.step_limit is None else partial(lsq.bound_gradients, parameters)

    def optimizers(
        self, model: nn.Module, parameters: list[nn.Parameter], recipe: Recipe, regularizer: Regularizer | None
    ) -> list[Optimizer]:
        (optimizer,) = super().optimizers(model, parameters, recipe, regularizer)
        if self.step_limit is not None:
            lsq.bound_updates(optimizer, parameters, self.step_limit)
        return [optimizer]


_ENOUGH_STEPS = 2500  # of PACT from scratch; 2,800 give MobileNet-V1 0.25 on Fashion-MNIST 70 % at 2 bits


@dataclass(frozen=True, kw_only=True)
class PACT(QAT):
    """Clips are trained by the weights' SGD and have their own weight decay.

    Args:
        from_scratch: train the untrained model by the whole recipe with the regularizer active, as the paper does;
            else fine-tune the pretrained one by `epochs`, `batch_size`, `lr` and `weight_decay`.
        alpha: first clip of every layer; null takes it from the first batch.
        alpha_decay: weight decay of the clips.
    """

    from_scratch: bool  # type: ignore[misc]
    alpha: Positive | None
    alpha_decay: NonNegative

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input_bits == 1:
            raise UserError("stage.input_bits=1: the image has negative values, which 1 bit cannot sign under pact")

    def quantizer(self, weight_bits: int, act_bits: int | None, channels: int) -> Quantizer:
        return pact.PACT(weight_bits, act_bits, self.alpha)

    def __call__(
        self, model: nn.Module, data: Data, recipe: Recipe, run: Run, regularizer: Regularizer
    ) -> tuple[nn.Module, Outcome]:
        depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in model.modules())
        each, bits = data.steps(recipe.batch_size), min(self.weight_bits, self.act_bits)
        if self.from_scratch and depthwise and bits <= 2 and each * recipe.epochs < _ENOUGH_STEPS:
            run.say(
                f"pact: at 2 bits from scratch, networks with depthwise convolutions stay at chance for the first 500 "
                f"to 1,100 steps (docs/pilots.md), and this one has {each * recipe.epochs:,}; set recipe.epochs to "
                f"{-(-_ENOUGH_STEPS // each)} or more"
            )
        return super().__call__(model, data, recipe, run, regularizer)

    def optimizers(
        self, model: nn.Module, parameters: list[nn.Parameter], recipe: Recipe, regularizer: Regularizer | None
    ) -> list[Optimizer]:
        optimizer = optimizer_of(model, recipe, regularizer, apart=parameters)
        group: dict[str, Any] = {"params": parameters, "weight_decay": self.alpha_decay}
        optimizer.add_param_group(group if self.from_scratch else {**group, "lr": self.quantizer_lr})
        return [optimizer]
