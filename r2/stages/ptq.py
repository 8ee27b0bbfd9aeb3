"""Post-training quantization through AIMET (paper section 4.2.1): nearest rounding, DFQ and AdaRound.

python -m r2.run stage=none
python -m r2.run stage=dfq stage.granularity=channel
python -m r2.run stage=adaround stage.iterations=10000
"""

import contextlib
import copy
import math
import multiprocessing
import pickle
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from r2 import console
from r2.config import Bits, Count, Fraction, NonNegative, Positive, UserError
from r2.data.batches import IGNORED, Data
from r2.dist import end_with_parent
from r2.quantizers.calibration import check_weights
from r2.quantizers.layers import compressed, layer_bits, quantizable, signal_to_noise
from r2.recipe import Recipe
from r2.record import Outcome
from r2.regularizers import Regularizer
from r2.stages import aimet, bias_correction, simulation
from r2.stages.aimet import Work
from r2.stages.constants import fold_constants
from r2.stages.graph import equalizable, places
from r2.stages.stage import Stage
from r2.store import Run
from r2.training.loop import evaluate, set_arithmetic
from r2.zoo.modular import modular


@dataclass(frozen=True, kw_only=True)
class PTQ(Stage):
    """Fold BatchNorm, let the method work on the float network, calibrate every quantizer.

    Args:
        bits: of the weights, unless `weight_bits` says otherwise.
        act_bits: of image, activations and logits.
        layer_bits: weight widths by layer name pattern, e.g. {classifier: 8}.
        skip_first_last: these two layers keep their weights; image and logits are then not quantized either.
        granularity: one weight grid per tensor or per output channel.
        symmetric: the weights' grid; activations are always asymmetric.
        scheme: how ranges are found; 'percentile' keeps `percentile` percent of the values.
        fold_constant: a BatchNorm channel that does not vary becomes a bias alone; false is AIMET's own folding.
    """

    bits: Bits
    weight_bits: Bits
    act_bits: Bits
    layer_bits: dict[str, Bits] | None
    skip_first_last: bool
    granularity: Literal["tensor", "channel"]
    symmetric: bool
    scheme: Literal["tf_enhanced", "min_max", "percentile"]
    percentile: Positive = 99.99
    calibration_batch_size: Count
    fold_constant: bool = True

    def __post_init__(self) -> None:
        self.check_widths(2, 16, "AIMET's grids have 2 to 16 bits", act_bits=self.act_bits)
        if not 50 <= self.percentile <= 100:
            raise UserError(f"stage.percentile={self.percentile}: choose 50 to 100")

    def check(self, model: nn.Module, calibration_images: int) -> None:
        super().check(model, calibration_images)
        model = modular(model)
        places(model, self._left_out(model))
        if self.equalizes() and not equalizable(model):
            raise UserError(
                "cross-layer equalization finds no pair of layers in this model; use stage=none or adaround"
            )

    def __call__(
        self, model: nn.Module, data: Data, recipe: Recipe, run: Run, regularizer: Regularizer
    ) -> tuple[nn.Module, Outcome]:
        initial = evaluate(model, data, run.world, recipe)
        calibration = data.calibration(self.calibration_batch_size, run.seed)
        batches = [x[y != IGNORED] for x, y in calibration]  # type: ignore[index]  # images: `check` refuses text
        done = apart(self.compress, model, batches, run)
        quantized = done["model"]
        return quantized, Outcome(
            metrics=evaluate(quantized, data, run.world, recipe),
            initial=initial,
            seconds=done["seconds"],
            sqnr_db=signal_to_noise(quantized, batches[0], done["originals"]),
            details=done["details"],
        )

    def compress(self, model: nn.Module, batches: list[Tensor], directory: Path, key: str, seed: int) -> dict[str, Any]:
        """Quantize a copy of `model`, outside any process group.

        Args:
            batches: calibration images (n, 3, h, w), on the model's device.
            directory: receives encodings.json and simulation.pt.

        Returns:
            the quantized `model`, its `originals` (float weights by layer name), `seconds`, and `details` of what was
            used.
        """
        began = time.monotonic()
        with aimet.alone(directory, seed) as (version, scratch):
            loaded = time.monotonic()
            model = modular(model)
            constants = fold_constants(model, batches) if self.fold_constant else None
            net, norms = aimet.fold(model, batches[0][:2])
            check_weights(quantizable(net))
            where = places(model, self._left_out(model))
            bits = {name: self.weight_bits for name in quantizable(net, self.skip_first_last)}
            bits |= layer_bits(list(bits), self.layer_bits)
            config = aimet.write_config(scratch / "config.json", self.granularity, self.symmetric)
            work = Work(
                net, norms, where, bits, self.act_bits, self.scheme, self.percentile, batches, config, directory
            )
            sim, used, seconds = self.method(work)
            quantized = simulation.translate(sim, work)
            simulation.save(sim, quantized, work, key)
        rest = time.monotonic() - loaded - sum(seconds.values())
        seconds = {"load_aimet": loaded - began, "calibrate": rest, **seconds}
        originals = {name: net.get_parameter(f"{name}.weight").detach() for name in bits}
        return {
            "model": quantized,
            "originals": originals,
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "details": {
                "aimet": version,
                "granularity": self.granularity,
                "symmetric": self.symmetric,
                "scheme": self.scheme,
                "calibration_images": sum(len(x) for x in batches),
                "calibration_batch_size": self.calibration_batch_size,
                "calibration_seed": seed,
                "constant_channels": constants,
                "weight_sqnr_db": weight_sqnr(quantized, originals),
                "quantizers": {kind: len(names) for kind, names in asdict(where).items()},
                **used,
            },
        }

    def equalizes(self) -> bool:
        """Whether cross-layer equalization comes first."""
        return False

    def method(self, work: Work) -> tuple[Any, dict, dict[str, float]]:
        """Returns the calibrated simulation, what the record says of it, and seconds by phase."""
        raise NotImplementedError

    def _left_out(self, model: nn.Module) -> tuple[str, ...]:
        names = list(quantizable(model))
        return (names[0], names[-1]) if self.skip_first_last else ()


@dataclass(frozen=True, kw_only=True)
class Nearest(PTQ):
    """Every weight to its nearest level; the paper's column None."""

    def method(self, work: Work) -> tuple[Any, dict, dict[str, float]]:
        return aimet.simulate(work), {}, {}


@dataclass(frozen=True, kw_only=True)
class DFQ(PTQ):
    """Data-free quantization (Nagel et al. 2019): ReLU6 becomes ReLU, equalization, high-bias folding, bias correction.

    Args:
        bias_correction: 'analytic' takes mean inputs from BatchNorm, and measures only where it tells none.
    """

    bias_correction: Literal["empirical", "analytic", "none"]

    def equalizes(self) -> bool:
        return True

    def method(self, work: Work) -> tuple[Any, dict, dict[str, float]]:
        began = time.monotonic()
        statistics, used = aimet.equalize(work, self.fold_constant)
        seconds = {"equalize": time.monotonic() - began}
        if self.bias_correction != "none":
            began = time.monotonic()
            used |= self._correct_biases(work, statistics)
            seconds["correct_biases"] = time.monotonic() - began
        return aimet.simulate(work), {"bias_correction": self.bias_correction, **used}, seconds

    def _correct_biases(self, work: Work, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, int]:
        # As AIMET did: only the shift that weights and image cause, activations float.
        weights_only = replace(work, places=replace(work.places, outputs=set()))
        quantized = simulation.translate(aimet.simulate(weights_only), weights_only)
        net = aimet.own(work.net)
        expected = bias_correction.expected_inputs(net, statistics) if self.bias_correction == "analytic" else {}
        biases = bias_correction.correct(net, quantized, work.batches, expected)
        for name, bias in biases.items():
            work.net.get_submodule(name).bias = nn.Parameter(bias)
        return {
            "corrected_analytically": len(biases.keys() & expected.keys()),
            "corrected_empirically": len(biases.keys() - expected.keys()),
        }


@dataclass(frozen=True, kw_only=True)
class AdaRound(PTQ):
    """Learned rounding (Nagel et al. 2020), layer by layer.

    Args:
        iterations: per layer.
        batches: of calibration images to use; null for all.
        batch_size: images per iteration.
        regularization: weight of the term that drives each rounding up or down.
        beta_start, beta_end: annealing of that term.
        warm_start: share of the iterations without it.
        equalize_first: ReLU6 becomes ReLU and cross-layer equalization comes first.
    """

    scheme: Literal["tf_enhanced", "min_max"]
    iterations: Count
    batches: Count | None
    batch_size: Count
    regularization: NonNegative
    beta_start: Positive
    beta_end: Positive
    warm_start: Fraction
    equalize_first: bool

    def equalizes(self) -> bool:
        return self.equalize_first

    def check(self, model: nn.Module, calibration_images: int) -> None:
        super().check(model, calibration_images)
        self._count(math.ceil(calibration_images / self.calibration_batch_size))

    def _count(self, there: int) -> int:
        """How many of the batches that are there it uses."""
        if self.batches and self.batches > there:
            raise UserError(f"stage.batches={self.batches}: there are {there}, of {self.calibration_batch_size}")
        return self.batches or there

    def method(self, work: Work) -> tuple[Any, dict, dict[str, float]]:
        count = self._count(len(work.batches))
        used = aimet.equalize(work, self.fold_constant)[1] if self.equalize_first else {}
        console.say(f"adaround: {len(work.bits)} layers, {self.iterations:,} iterations each")
        began = time.monotonic()
        rounded = aimet.adaround(
            work,
            count,
            self.batch_size,
            default_num_iterations=self.iterations,
            default_reg_param=self.regularization,
            default_beta_range=(self.beta_start, self.beta_end),
            default_warm_start=self.warm_start,
        )
        seconds = {"adaround": time.monotonic() - began}
        images = sum(len(x) for x in work.batches[:count])
        used |= {"iterations": self.iterations, "batch_size": self.batch_size, "adaround_images": images}
        return aimet.simulate(work, rounded), used, seconds


@torch.no_grad()
def weight_sqnr(quantized: nn.Module, originals: Mapping[str, Tensor]) -> dict[str, float]:
    """10 log10(sum w^2 / sum (w - q(w))^2) in dB per compressed layer; infinite without an error.

    Args:
        originals: the weights w before quantization, by layer name.
    """
    found = {}
    for name, layer in compressed(quantized).items():
        w, q = originals[name].double(), layer.weight.double()
        power, error = w.square().sum().item(), (w - q).square().sum().item()
        found[name] = round(10 * math.log10(power / error), 3) if power and error else math.inf
    return found


def apart(function: Callable[..., dict], model: nn.Module, batches: list[Tensor], run: Run) -> dict[str, Any]:
    """`function(model, batches, directory, key, seed)` outside any process group, for AdaRound would wait there for the
    other ranks: here, or by rank 0 in a process of its own, for all ranks.
    """
    arguments = (run.directory, run.key, run.seed)
    if not torch.distributed.is_initialized():
        return function(model, batches, *arguments)
    world, outcome = run.world, None
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) if world.main else None
    with pool or contextlib.nullcontext():
        if pool:
            payload = (function, copy.deepcopy(model).cpu(), [x.cpu() for x in batches], world.device, arguments)
            future = pool.submit(_apart, pickle.dumps(payload))
        # Short waits, so that no collective call of the other ranks outlasts its timeout.
        while not world.broadcast(pool is None or bool(wait([future], timeout=10).done)):
            pass
        if pool:
            outcome = future.exception() or future.result()
    outcome = world.broadcast(outcome)
    if isinstance(outcome, BaseException):
        raise outcome
    done = pickle.loads(outcome)
    done["model"].to(world.device)
    done["originals"] = {name: weight.to(world.device) for name, weight in done["originals"].items()}
    return done


def _apart(payload: bytes) -> bytes:
    end_with_parent()
    set_arithmetic(fast=False)
    function, model, batches, device, arguments = pickle.loads(payload)
    done = function(model.to(device), [x.to(device) for x in batches], *arguments)
    done["model"].cpu()
    done["originals"] = {name: weight.cpu() for name, weight in done["originals"].items()}
    return pickle.dumps(done)
