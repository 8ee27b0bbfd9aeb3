"""Cost of post-training quantization, as ratios to what it cannot do without, all in this process.

python scripts/bench/ptq.py [--model mobilenet_v2] [--width 1.0] [--size 32] [--images 256] [--threads 1]

`none` and `dfq` against one float pass over the calibration images; AdaRound's iteration against a forward and a
backward pass of each layer over a batch of 32.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r2 import models
from r2.quantizers.affine import Affine
from r2.quantizers.layers import quantizable, swap
from r2.stages.ptq import DFQ, PTQ, AdaRound, Nearest

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="mobilenet_v2", choices=["resnet18", "mobilenet_v1", "mobilenet_v2"])
parser.add_argument("--width", type=float, default=1.0)
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--images", type=int, default=256)
parser.add_argument("--iterations", type=int, nargs=2, default=[10, 110], help="two lengths; their difference counts")
parser.add_argument("--threads", type=int, default=1)
arguments = parser.parse_args()

torch.set_num_threads(arguments.threads)
torch.manual_seed(0)
model = getattr(models, arguments.model)(10, arguments.width).eval()
batches = list(torch.randn(arguments.images, 3, arguments.size, arguments.size).split(64))
common = dict(
    bits=4, weight_bits=4, act_bits=8, layer_bits=None, skip_first_last=False, granularity="tensor", symmetric=True,
    scheme="tf_enhanced", calibration_batch_size=64,
)  # fmt: skip
rounding = dict(
    batches=None, batch_size=32, regularization=0.01, beta_start=20, beta_end=2, warm_start=0.2, equalize_first=False
)


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - began)
    return best


def spent(stage: PTQ) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return stage.compress(model, batches, Path(folder), "bench", 0)["seconds"]


@torch.no_grad()
def float_pass() -> None:
    for batch in batches:
        model(batch)


def layer_inputs() -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: found.setdefault(name, inputs[0].clone()))  # type: ignore[misc]
        for name, layer in quantizable(model).items()
    ]
    with torch.no_grad():
        model(batches[0][:32])
    for hook in hooks:
        hook.remove()
    return found


def pass_of(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    weight = layer.weight.detach().clone().requires_grad_()
    wanted = layer.operation(x, weight).detach()
    return lambda: F.mse_loss(layer.operation(x, weight), wanted).backward()


one_pass = seconds(float_pass, 5)
spent(Nearest(**common))  # loads AIMET
stages = {
    "none": Nearest(**common),
    "dfq": DFQ(**common, bias_correction="empirical"),
    "dfq, analytic": DFQ(**common, bias_correction="analytic"),
}
costs: dict[str, dict[str, float]] = {}
for name, stage in 2 * list(stages.items()):
    costs[name] = min(spent(stage), costs.get(name, {}), key=lambda parts: sum(parts.values()) or float("inf"))
times: dict[int, float] = dict.fromkeys(arguments.iterations, float("inf"))
for n in 2 * arguments.iterations:  # in turn, so that a busy moment hits both
    times[n] = min(times[n], spent(AdaRound(**common, **rounding, iterations=n))["adaround"])
short, long = (times[n] for n in arguments.iterations)
iteration = (long - short) / (arguments.iterations[1] - arguments.iterations[0])
inputs, layers = layer_inputs(), quantizable(model)
swap(layers, lambda name: Affine(4))
floor = sum(seconds(pass_of(layer, inputs[name]), 20) for name, layer in layers.items())

print(
    f"{arguments.model} {arguments.width}, {arguments.images} images at {arguments.size}x{arguments.size}, "
    f"{arguments.threads} threads, torch {torch.__version__}"
)
print(f"float pass over the images        {one_pass:8.2f} s")
for name, parts in costs.items():
    total = sum(parts.values())
    print(f"{name:<34}{total:8.2f} s = {total / one_pass:6.1f} passes   ({parts})")
print(f"floor: every layer once, batch 32 {1e3 * floor:8.1f} ms")
print(f"AdaRound's iteration, all layers  {1e3 * iteration:8.1f} ms = {iteration / floor:6.1f} floors")
