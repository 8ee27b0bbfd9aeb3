"""Cost of a training step, as ratios to r2's fp32 step in the same process (ResNet-18, batch 32 at 64x64).

python scripts/bench/step.py [--batch 32] [--size 64] [--rounds 12] [--model resnet18]

Every round times each variant once, in turn, so a busy moment hits all of them; the minimum over rounds is printed.
"""

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from r2 import models, regularizers
from r2.quantizers.ewgs import EWGS
from r2.quantizers.layers import calibrate, quantizable, quantizer_parameters, swap
from r2.recipe import Recipe, sgd

parser = argparse.ArgumentParser()
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--size", type=int, default=64)
parser.add_argument("--rounds", type=int, default=12)
parser.add_argument("--model", default="resnet18", choices=["resnet18", "mobilenet_v1", "mobilenet_v2"])
arguments = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
images = torch.randn(arguments.batch, 3, arguments.size, arguments.size, device=device)
images = images.contiguous(memory_format=torch.channels_last)
labels = torch.randint(0, 1000, (arguments.batch,), device=device)
recipe = Recipe(epochs=1, batch_size=arguments.batch, lr=1e-4, weight_decay=1e-4)
original = getattr(models, arguments.model)(1000).to(device, memory_format=torch.channels_last)


def training_step(model, optimizers, reg=None) -> Callable[[], None]:
    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        if reg is not None:
            reg.add_gradients()
        for optimizer in optimizers:
            optimizer.step()

    return step


def gradients_alone(reg) -> Callable[[], None]:
    return lambda: reg.add_gradients()


variants: dict[str, Callable[[], None]] = {}
bare = copy.deepcopy(original)
variants["fp32"] = training_step(bare, [sgd(bare, recipe)])
F.cross_entropy(bare(images), labels).backward()
for kind in (regularizers.LInf, regularizers.Margin, regularizers.Kurtosis, regularizers.SoftMinMax):
    variants[kind.__name__] = gradients_alone(kind(bare))
quantized = copy.deepcopy(original)
layers = quantizable(quantized)
swap(layers, lambda name: EWGS(2, 2, 1e-3))
calibrate(quantized, layers, images)
scales = quantizer_parameters(layers)
known = {id(p) for p in scales}
weights = torch.optim.SGD([p for p in quantized.parameters() if id(p) not in known], 1e-4, momentum=0.9)
variants["EWGS W2A2"] = training_step(quantized, [weights, torch.optim.Adam(scales, 1e-5)])

best = dict.fromkeys(variants, float("inf"))
for round_ in range(arguments.rounds + 2):
    for name, variant in variants.items():
        if name in ("LInf", "Margin", "Kurtosis", "SoftMinMax"):
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
print(
    f"{arguments.model}, batch {arguments.batch} at {arguments.size}x{arguments.size}, {device.type}, "
    f"{torch.get_num_threads()} threads, torch {torch.__version__}"
)
print(f"fp32 step                 {1e3 * base:8.1f} ms")
for name, seconds in best.items():
    kind = "of the fp32 step" if name == "EWGS W2A2" else "added to the fp32 step (loss and gradient)"
    print(f"{name:<20}{1e3 * seconds:13.1f} ms = {100 * seconds / base:6.1f} % {kind}")
