"""Quantization-aware training from the pretrained checkpoint, without the regularizer (paper section 3, last part)."""

import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from r2.config import Bits, Count, NonNegative, Positive
from r2.data.batches import Data
from r2.dist import sync_batchnorm
from r2.quantizers import ewgs
from r2.quantizers.hessian import gradient_scales
from r2.quantizers.swap import calibrate, quantizable, quantizer_parameters, swap
from r2.recipe import Recipe, sgd
from r2.store import Run
from r2.train import evaluate, train


@dataclass(frozen=True)
class QAT:
    """Swap the layers, initialise from one batch, train: SGD for weights, Adam for quantizer parameters.

    Args:
        bits: both widths, unless `weight_bits` or `act_bits` says otherwise.
        input_bits: of the image at the first layer; null leaves it as it is.
        delta: gradient scaling, or 'hessian' to estimate it per layer (0 in the first epoch, as official).
        batchnorm: 'train' lets the statistics move on, 'freeze' keeps those of pretraining.
    """

    quantizer: Literal["ewgs"]
    bits: Bits
    weight_bits: Bits
    act_bits: Bits
    input_bits: Bits | None
    skip_first_last: bool
    delta: NonNegative | Literal["hessian"]
    hessian_interval: Count
    hessian_batches: Count
    hessian_batch_size: Count
    hessian_probes: Count
    batchnorm: Literal["train", "freeze"]
    epochs: Count
    batch_size: Count
    lr: Positive
    quantizer_lr: Positive
    weight_decay: NonNegative

    def axes(self) -> dict:
        """The columns that tell this stage's records apart."""
        layers = "excl_first_last" if self.skip_first_last else "all"
        return {"weight_bits": self.weight_bits, "act_bits": self.act_bits, "quantized_layers": layers}

    def __call__(self, model: nn.Module, data: Data, recipe: Recipe, run: Run) -> tuple[nn.Module, dict]:
        """Returns the quantized model and its record: `metrics`, `initial` (before training) and `seconds`."""
        recipe = replace(
            recipe,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            nesterov=False,
            warmup_epochs=0.0,
            label_smoothing=0.0,
        )
        if recipe.sync_bn:
            model = sync_batchnorm(model, run.world)
        began = time.monotonic()
        layers = quantizable(model, self.skip_first_last)
        first = next(iter(quantizable(model)))
        delta = 0.0 if self.delta == "hessian" else self.delta

        def quantizer(name: str) -> nn.Module:
            return ewgs.Quantizer(self.weight_bits, self.input_bits if name == first else self.act_bits, delta)

        swap(layers, ewgs.twins, quantizer)
        images, _ = next(data.calibration(self.batch_size, run.seed))
        calibrate(model, layers, images)
        initial = evaluate(model, data, run.world, recipe)
        calibrated = time.monotonic()

        parameters = quantizer_parameters(layers)
        ids = {id(p) for p in parameters}
        weights = sgd(model, recipe)
        weights.param_groups[0]["params"] = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
        adam = torch.optim.Adam(parameters, self.quantizer_lr)

        def estimate(epoch: int) -> None:
            if epoch == 0 or epoch % self.hessian_interval:
                return
            batches = data.calibration(self.hessian_batch_size, run.seed, epoch)
            some = (batch for _, batch in zip(range(self.hessian_batches), batches, strict=False))
            scales = gradient_scales(model, layers, some, self.hessian_probes, run.seed + epoch)
            for name, found in scales.items():
                for kind, value in found.items():
                    getattr(layers[name].quantizer, f"{kind}_delta").fill_(value)

        def freeze() -> None:
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

        done = train(
            model,
            data,
            recipe,
            run,
            self.quantizer,
            [weights, adam],
            before_epoch=estimate if self.delta == "hessian" else None,
            frozen=freeze if self.batchnorm == "freeze" else None,
        )
        return model, {
            "metrics": evaluate(model, data, run.world, recipe),
            "initial": initial,
            "images_per_second": done["images_per_second"],
            "seconds": {"calibrate": round(calibrated - began, 2), self.quantizer: done["seconds"]},
        }
