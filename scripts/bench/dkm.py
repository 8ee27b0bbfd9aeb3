"""DKM against coremltools 9, and its cost in a training step, all ratios from this one process.

python scripts/bench/dkm.py [--rounds 5] [--init] [--cpu-time]    # needs the extra `bench`

Per layer: forward and backward through 512x512x3x3 weights, three iterations each, from the same centroids. Bytes
saved for backward are counted by saved-tensor hooks; errors are against the same equation in float64 by autograd.
Per step: ResNet-18 with a palette in all 21 layers beside the fp32 step. Peak memory is the kernel's resident
high-water mark, reset before a step and after the allocator gave back what was free (Linux).
Every round times each variant once, in turn; the minimum over rounds counts. `--init` adds coremltools' k-means at
4 bits, which takes minutes.
"""

import argparse
import copy
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from r2 import models
from r2.palettize import Palette, hard, initial_centroids, vectorize
from r2.quantizers.calibration import calibrate
from r2.quantizers.layers import quantizable, swap
from r2.recipe import Recipe, optimizer_of

parser = argparse.ArgumentParser()
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--init", action="store_true", help="coremltools' k-means at 4 bits too")
parser.add_argument("--skip-step", action="store_true")
parser.add_argument("--skip-layer", action="store_true")
parser.add_argument("--cpu-time", action="store_true", help="processor time, for a busy machine and one thread")
parser.add_argument("--channels", type=int, default=512, help="of the one layer, in and out")
parser.add_argument("--batch", type=int, default=32, help="of a training step; a second one has half of batch and size")
parser.add_argument("--size", type=int, default=64)
parser.add_argument("--width", type=float, default=1.0, help="of ResNet-18")
arguments = parser.parse_args()
part = arguments.channels // 4  # input channels at which errors are measured
clock = time.process_time if arguments.cpu_time else time.perf_counter
CODEBOOKS = [(1, 1), (2, 1), (4, 1), (2, 2), (4, 4)]


def interleaved(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(rounds):
        for name, variant in variants.items():
            began = clock()
            variant()
            best[name] = min(best[name], clock() - began)
    return best


def timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = clock()
    result = function()
    return clock() - began, result


def saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of the storages that autograd keeps, each once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(sizes.values())


# ------------------------------------------------------------------------------------------------ one layer


def theirs(bits: int, dim: int, centroids: Tensor | None):
    from coremltools.optimize.torch.palettization.fake_palettize import FakePalettize

    plain = {"palett_epsilon": 0.0, "prune_threshold": 0.0, "zero_threshold": 0.0}  # DKM's equation, three iterations
    observer = torch.ao.quantization.MinMaxObserver.with_args(dtype=torch.qint8, quant_min=-128, quant_max=127)
    module = FakePalettize(observer, bits, dim, advanced_options=plain)
    module.enable_fake_palett()
    module.create_partitions(weight.detach())
    if centroids is not None:
        module.centroids = [centroids]
    return module


def float64(w: Tensor, c: Tensor, dim: int, gradient: Tensor) -> tuple[Tensor, Tensor]:
    w = w.detach().double().requires_grad_()
    vectors, c = vectorize(w, dim)[0], c.double()
    for _ in range(3):
        A = torch.softmax(-(vectors[:, None] - c[None]).square().sum(2) / 1e-4, 1)
        c = A.t() @ vectors / A.sum(0)[:, None]
    (A @ c * vectorize(gradient.double(), dim)[0]).sum().backward()
    return (A @ c).detach(), w.grad


def layer_rows() -> None:
    c = arguments.channels
    print(f"\none layer, {c}x{c}x3x3, forward and backward; errors at {c}x{part}x3x3: W~ in weights, gradient relative")
    for bits, dim in CODEBOOKS:
        start = initial_centroids(vectorize(weight.detach(), dim)[0], 2**bits)
        ours = Palette(bits, dim, iterations=3, tolerance=0.0)
        peer = theirs(bits, dim, start)

        def one(module, w: Tensor, start: Tensor = start) -> Tensor:
            if isinstance(module, Palette):
                module.centroids.copy_(start)
                return module.weight(w)
            module.centroids = [start.clone()]
            return module(w)

        def both(module, run: Callable = one) -> None:
            weight.grad = None
            run(module, weight).backward(gradient)

        both(ours)
        best = interleaved({"ours": lambda m=ours: both(m), "peer": lambda m=peer: both(m)}, arguments.rounds)
        saved = [saved_bytes(lambda m=m: one(m, weight)) for m in (ours, peer)]
        errors = []
        exact, exact_gradient = float64(weight[:, :part], start, dim, gradient[:, :part])
        for module in (ours, peer):
            small = weight[:, :part].detach().clone().requires_grad_()
            soft = one(module, small)
            soft.backward(gradient[:, :part])
            errors.append((vectorize(soft.detach().double(), dim)[0] - exact).abs().max().item())
            errors.append(((small.grad - exact_gradient).norm() / exact_gradient.norm()).item())
        print(
            f"  {bits} bits, dim {dim}: {1e3 * best['ours']:7.1f} ms, coremltools {1e3 * best['peer']:7.1f} ms, "
            f"{best['peer'] / best['ours']:5.1f}x faster; saved {saved[0] / weight.nbytes:.2f}x the weights, "
            f"coremltools {saved[1] / weight.nbytes:.1f}x; "
            f"error {errors[0]:.1e} and {errors[1]:.1e}, coremltools {errors[2]:.1e} and {errors[3]:.1e}",
            flush=True,
        )


def init_rows() -> None:
    print(f"\nk-means at the start, {weight.numel():,} weights")
    for bits, dim in CODEBOOKS:
        vectors = vectorize(weight.detach(), dim)[0]
        seconds, c = timed(lambda b=bits, v=vectors: initial_centroids(v, 2**b))
        inertia = (vectors - c[hard(vectors, c).long()]).double().square().sum().item()
        line = f"  {bits} bits, dim {dim}: {seconds:6.2f} s, inertia {inertia:.4f}"
        if (bits, dim) == (2, 1) or arguments.init:
            peer = theirs(bits, dim, None)
            torch.manual_seed(0)
            peer_seconds, _ = timed(lambda m=peer: m.init_partitions(weight.detach()))
            c = peer.centroids[0]
            peer_inertia = (vectors - c[hard(vectors, c).long()]).double().square().sum().item()
            line += f"; coremltools {peer_seconds:6.1f} s = {peer_seconds / seconds:.0f}x, inertia {peer_inertia:.4f}"
        print(line, flush=True)


# ------------------------------------------------------------------------------------------------ a training step


def peak_bytes(step: Callable[[], object]) -> int:
    """How far resident memory rises during a step."""
    status = Path("/proc/self/status")

    def read(key: str) -> int:
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(key)).split()[1])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS")
    step()
    return read("VmHWM") - before


def step_rows(batch: int, size: int) -> None:
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,))
    recipe = Recipe(epochs=1, batch_size=batch, lr=1e-4, weight_decay=1e-4)
    original = models.resnet18(1000, arguments.width).to(memory_format=torch.channels_last)

    def training_step(model) -> Callable[[], None]:
        optimizer = optimizer_of(model, recipe)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return step

    variants = {"fp32": training_step(copy.deepcopy(original))}
    for iterations, tolerance in ((5, 1e-4), (5, 0.0)):
        for bits, dim in CODEBOOKS:
            model = copy.deepcopy(original)
            layers = quantizable(model)
            swap(
                layers, lambda name, b=bits, d=dim, i=iterations, t=tolerance: Palette(b, d, iterations=i, tolerance=t)
            )
            began = clock()
            calibrate(model, layers, images)
            seconds = clock() - began
            stop = "until 1e-4" if tolerance else "always"
            variants[f"{bits} bits, dim {dim}, 5 iterations {stop:<10} (start {seconds:4.1f} s)"] = training_step(model)
    interleaved(variants, 3)  # compile, and let the centroids settle
    best = interleaved(variants, arguments.rounds)
    base, floor = best.pop("fp32"), peak_bytes(variants["fp32"])
    print(
        f"\nResNet-18 step, batch {batch} at {size}x{size}: fp32 {1e3 * base:.1f} ms, {floor / 1e6:.0f} MB at its peak"
    )
    for name, seconds in best.items():
        extra = (peak_bytes(variants[name]) - floor) / 1e6
        print(f"  {name}: {1e3 * seconds:7.1f} ms = {seconds / base:.2f}x, {extra:+.0f} MB", flush=True)


torch.manual_seed(0)
print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
weight = (torch.randn(arguments.channels, arguments.channels, 3, 3) * 0.02).requires_grad_()
gradient = torch.randn_like(weight)
if not arguments.skip_layer:
    layer_rows()
    init_rows()
if not arguments.skip_step:
    step_rows(arguments.batch, arguments.size)
    step_rows(arguments.batch // 2, arguments.size // 2)
