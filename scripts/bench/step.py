"""Cost of a training step, as ratios to r2's fp32 step in the same process (ResNet-18, batch 32 at 64x64).

python scripts/bench/step.py [--batch 32] [--size 64] [--rounds 12] [--model resnet18] [--width 1.0] [--count]

Every round times each variant once, in turn, so a busy moment hits all of them; the minimum over rounds
is printed. Steps compute convolutions as r2 does, "PyTorch's own" as PyTorch does (r2/training/small_maps.py).
"r2's loop" is r2.training.loop with all its checks and metrics, against the bare model, loss, backward and optimizer
step on the same tensors.

--count prints instead how many operations each variant gives PyTorch to do, without compiled kernels: on a GPU, about
what it launches.
"""

import argparse
import contextlib
import copy
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from r2 import models, regularizers
from r2.data.batches import Data
from r2.dist import World, keep_freed_memory
from r2.kernels import fused
from r2.quantizers.calibration import calibrate
from r2.quantizers.ewgs import EWGS
from r2.quantizers.layers import quantizable, quantizer_parameters, swap
from r2.quantizers.lsq import LSQ, bound_gradients, bound_updates
from r2.quantizers.pact import PACT
from r2.recipe import Recipe, optimizer_of
from r2.store import Run
from r2.training.loop import set_arithmetic, train
from r2.training.small_maps import fast_on_small_maps

parser = argparse.ArgumentParser()
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--size", type=int, default=64)
parser.add_argument("--rounds", type=int, default=12)
parser.add_argument("--model", default="resnet18", choices=["resnet18", "mobilenet_v1", "mobilenet_v2"])
parser.add_argument("--width", type=float, default=1.0)
parser.add_argument("--count", action="store_true")
arguments = parser.parse_args()

keep_freed_memory()  # as r2's commands do
set_arithmetic(fast=False)  # in fp32
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
images = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=device)
images = images.contiguous(memory_format=torch.channels_last)
labels = torch.randint(0, 1000, (arguments.batch,), device=device)
recipe = Recipe(epochs=1, batch_size=arguments.batch, lr=1e-4, weight_decay=1e-4)
original = getattr(models, arguments.model)(1000, arguments.width).to(device, memory_format=torch.channels_last)


def training_step(model, optimizers, reg=None, forward=None, bound=None) -> Callable[[], None]:
    forward = forward or fast_on_small_maps(model, device)  # as r2's loop has it

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(forward(images), labels).backward()
        if reg is not None:
            reg.add_gradients()
        if bound is not None:
            bound()
        for optimizer in optimizers:
            optimizer.step()

    return step


def gradients_alone(reg) -> Callable[[], None]:
    return lambda: reg.add_gradients()


def quantized_step(kind) -> Callable[[], None]:
    model = copy.deepcopy(original)
    layers = quantizable(model)
    swap(layers, lambda name: kind(2, 2))
    calibrate(model, layers, images)
    scales = quantizer_parameters(layers)
    sgd = optimizer_of(model, recipe, apart=scales)
    if kind is EWGS:
        return training_step(model, [sgd, torch.optim.Adam(scales, 1e-5, fused=True)])
    sgd.add_param_group({"params": scales, "weight_decay": 0.0})
    if kind is LSQ:
        bound_updates(sgd, scales, 0.1)
    return training_step(model, [sgd], bound=partial(bound_gradients, scales) if kind is LSQ else None)


class OneBatch(Data):
    """The same tensors at every step; one image to validate."""

    num_classes, val_images = 1000, 1

    def __init__(self, steps: int):
        self.train_images = arguments.batch * steps

    def _contents(self):
        return iter([images.cpu().numpy(), labels.cpu().numpy()])

    def train(self, batch_size, seed, epoch, start=0):
        return ((images, labels) for _ in range(self.train_images // batch_size))

    def val(self, batch_size):
        return iter([(images[:1], labels[:1])])


def whole_loop(steps: int) -> None:
    """r2's training loop: metrics, checks, progress, curve; one evaluation and one checkpoint at the end."""
    model = copy.deepcopy(original)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = Run(Path(folder), "bench", World(device=device), 0, 1e9, lambda row: None)
        train(model, OneBatch(steps).to(run.world), recipe, run, "bench", [optimizer_of(model, recipe)])


def bare_loop(steps: int) -> None:
    model = copy.deepcopy(original)
    step = training_step(model, [optimizer_of(model, recipe)])
    for _ in range(steps):
        step()


REGULARIZERS = (regularizers.LInf, regularizers.Margin, regularizers.Kurtosis, regularizers.SoftMinMax)
variants: dict[str, Callable[[], None]] = {}
bare = copy.deepcopy(original)
variants["fp32"] = training_step(bare, [optimizer_of(bare, recipe)])
plain = copy.deepcopy(original)
variants["PyTorch's own"] = training_step(plain, [optimizer_of(plain, recipe)], forward=plain)
F.cross_entropy(bare(images), labels).backward()
for kind in REGULARIZERS:
    variants[kind.__name__] = gradients_alone(kind(bare))
for kind in (EWGS, LSQ, PACT):
    variants[f"{kind.__name__} W2A2"] = quantized_step(kind)


class Operations(TorchDispatchMode):
    """Counts what is computed; a view computes nothing."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def count_operations() -> None:
    fused.__call__ = lambda self, *arguments: self.plain(*arguments)
    for name, variant in variants.items():
        variant()  # an optimizer's first step makes its moments
        with Operations() as operations:
            variant()
        print(f"{name:<20}{operations.count:13,} operations")


if arguments.count:
    count_operations()
    raise SystemExit

LOOPS = {
    f"{name} loop {n}": partial(loop, n) for name, loop in [("r2", whole_loop), ("bare", bare_loop)] for n in (5, 15)
}
variants |= LOOPS

best = dict.fromkeys(variants, float("inf"))
for round_ in range(arguments.rounds + 2):
    for name, variant in variants.items():
        if name in LOOPS and round_ and (round_ - 2) % 3:  # long: once to warm up, then every third round
            continue
        for p in bare.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        variant()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if round_ >= 2:  # the first two compile and warm up
            best[name] = min(best[name], time.perf_counter() - began)

base = best.pop("fp32")
long_minus_short = {k: best.pop(f"{k} loop 15") - best.pop(f"{k} loop 5") for k in ("r2", "bare")}  # 10 steps
print(
    f"{arguments.model} {arguments.width}, batch {arguments.batch} at {arguments.size}x{arguments.size}, "
    f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}"
)
print(f"fp32 step           {1e3 * base:13.1f} ms")
for name, seconds in best.items():
    kind = "of the fp32 step" if "W2A2" in name or "own" in name else "added to the fp32 step (loss and gradient)"
    print(f"{name:<20}{1e3 * seconds:13.1f} ms = {100 * seconds / base:6.1f} % {kind}")
ratio = long_minus_short["r2"] / long_minus_short["bare"]
print(f"r2's loop           {100 * long_minus_short['r2']:13.1f} ms = {100 * ratio:6.1f} % of a bare loop, per step")
