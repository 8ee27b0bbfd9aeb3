"""All GPU tests and benchmarks, in at most nine minutes on one GPU, without internet access.

python scripts/bench/gpu.py --out results/gpu [--smallest] [--only dkm,steps]

Each section is a process of its own with its own limit of time: where one fails or is too slow its error is recorded,
and the others still run. <out>/gpu.json is written after every section; `python -m r2.report` makes the table in
docs/results.md of results/gpu. Without a CUDA device, or with --smallest, everything runs at its smallest size, which
measures nothing and shows that it runs; on a CPU the limits are ten times as long.

Peers take part where they are installed: timm, Brevitas and coremltools (pip install -e '.[bench]' has the last two).
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r2 import models, regularizers
from r2.clustering import passes
from r2.palettize import Palette, initial_centroids, vectorize
from r2.paths import REPOSITORY
from r2.quantizers.calibration import calibrate
from r2.quantizers.ewgs import EWGS
from r2.quantizers.layers import quantizable, swap
from r2.quantizers.lsq import LSQ
from r2.quantizers.pact import PACT
from r2.recipe import Recipe, optimizer_of
from r2.record import commit, finite
from r2.store import make_directory, write
from r2.training.loop import set_arithmetic

LIMIT = 540  # seconds of all sections together
CODEBOOKS = [(1, 1), (2, 1), (4, 1), (2, 2), (4, 4)]
OF_A_LAYER = [(2, 1), (4, 1), (4, 4), (8, 1)]  # each compiles kernels of its own, for seconds
REGULARIZERS = [regularizers.L2, regularizers.Kurtosis, regularizers.LInf, regularizers.Margin, regularizers.SoftMinMax]
QUANTIZERS: dict[str, Callable[[], nn.Module]] = {
    "ewgs": lambda: EWGS(2, 2), "lsq": lambda: LSQ(2, 2), "pact": lambda: PACT(2, 2),
    **{f"dkm {b} bits dim {d}": partial(Palette, b, d, 0.05, True, 5, 0.0) for b, d in ((1, 1), (4, 1), (4, 4))},
}  # fmt: skip

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of gpu.json")
parser.add_argument("--smallest", action="store_true", help="shows that everything runs, and measures nothing")
parser.add_argument("--only", default="", help="sections, with commas")
parser.add_argument("--section", help=argparse.SUPPRESS)  # this process is that section, and --out its result's file

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def loaded(name: str, *words: str) -> ModuleType:
    """A neighbouring benchmark as a module, as if it had been started with these words."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.argv = sys.argv, [f"{name}.py", *words]
    try:
        spec.loader.exec_module(module)
    finally:
        sys.argv = before
    return module


def output_of(*command: str) -> str:
    """What a Python program prints; raises RuntimeError with its last line where it fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return done.stdout


def settled(step: Callable[[], object]) -> Callable[[], None]:
    """A step whose end the clock waits for."""

    def run() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def best_ms(variants: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """Milliseconds of the best round of each variant, in turn."""
    best = dict.fromkeys(variants, float("inf"))
    for round_ in range(rounds + warm_up):
        for name, variant in variants.items():
            began = time.perf_counter()
            settled(variant)()
            if round_ >= warm_up:
                best[name] = min(best[name], 1e3 * (time.perf_counter() - began))
    return best


def peak_mib(step: Callable[[], object]) -> float | None:
    """How far allocated memory rises during a step; None on a CPU."""
    if device.type != "cuda":
        return None
    settled(step)()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    settled(step)()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# ------------------------------------------------------------------------------------------------ agreement


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference by the norm of what is expected."""
    found, expected = found.detach().cpu().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.detach().flatten().cpu() for p in model.parameters() if p.grad is not None])


def agreement(smallest: bool) -> dict[str, Any]:
    """Relative differences of one training step of every method on the device from the same on the CPU, in float32."""
    set_arithmetic(fast=False)
    torch.manual_seed(0)
    size, batch = (32, 4) if smallest else (64, 32)
    original = models.mobilenet_v1(10, 0.25).train()
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    found: dict[str, Any] = {}

    def step(model: nn.Module, regularizer: type | None = None) -> tuple[Tensor, Tensor]:
        where = next(model.parameters()).device
        logits = model(images.to(where))
        F.cross_entropy(logits, labels.to(where)).backward()
        if regularizer is not None:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)  # so that its own gradient is what is compared
            regularizer(model).to(where).add_gradients()
        return logits, gradients(model)

    def both(model: nn.Module, **named: Any) -> dict[str, float]:
        (logits, grad), (logits2, grad2) = step(copy.deepcopy(model), **named), step(model.to(device), **named)
        return {"logits": relative(logits2, logits), "gradient": relative(grad2, grad)}

    found["fp32"] = both(copy.deepcopy(original))
    for kind in (
        regularizers.L2,
        regularizers.Kurtosis,
        regularizers.LInf,
        regularizers.Margin,
        regularizers.SoftMinMax,
    ):
        found[kind.__name__] = both(copy.deepcopy(original), regularizer=kind)
    for name, quantizer in QUANTIZERS.items():
        model = copy.deepcopy(original)
        layers = quantizable(model)
        swap(layers, lambda _, quantizer=quantizer: quantizer())
        calibrate(model, layers, images)
        found[name] = both(model)
        keep(found)
    for name in ("none", "dfq", "adaround"):
        found[name] = {"logits": _of_post_training(name, original, images, 2 if smallest else 50)}
        keep(found)
    return found


def _of_post_training(name: str, original: nn.Module, images: Tensor, iterations: int) -> float:
    from r2.config import build
    from r2.plan.cells import cells_of

    words = ["data=fake", "recipe=smoke", f"recipe.finetune.adaround_iterations={iterations}", f"stage={name}"]
    stage = build(cells_of(words)[0].config["stage"])
    logits = []
    for where in (torch.device("cpu"), device):
        model = copy.deepcopy(original).eval().to(where)
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            torch.manual_seed(0)
            done = stage.compress(model, list(images.to(where).split(16)), Path(folder), "bench", 0)
        with torch.no_grad():
            logits.append(done["model"].eval()(images.to(where)))
    return relative(logits[1], logits[0])


# ------------------------------------------------------------------------------------------------ speed and memory


def dkm(smallest: bool) -> dict[str, Any]:
    """One layer, forward and backward, three iterations: our kernels, plain PyTorch, coremltools; errors by float64."""
    channels = 16 if smallest else 512
    bench = loaded("dkm", "--skip-layer", "--skip-step", "--channels", str(channels))
    torch.manual_seed(0)
    weight = (torch.randn(channels, channels, 3, 3, device=device) * 0.02).requires_grad_()
    gradient = torch.randn_like(weight)
    bench.weight, bench.gradient = weight, gradient
    with_peer = importlib.util.find_spec("coremltools") is not None
    rows: dict[str, Any] = {"weights_mib": weight.nbytes / 2**20}
    for bits, dim in CODEBOOKS[:3] if smallest else OF_A_LAYER:
        start = initial_centroids(vectorize(weight.detach(), dim)[0], 2**bits).to(device)
        palette = Palette(bits, dim, iterations=3, tolerance=0.0).to(device)

        def ours(palette: Palette = palette, start: Tensor = start) -> None:
            palette.centroids.copy_(start)
            weight.grad = None
            palette.weight(weight).backward(gradient)

        def plain(step: Callable[[], None] = ours) -> None:
            chosen, passes._triton = passes._triton, lambda: None
            try:
                step()
            finally:
                passes._triton = chosen

        variants: dict[str, Callable[[], None]] = {"ours": ours}
        if device.type == "cuda":
            variants["plain"] = plain
        if with_peer and bits < 8:  # 256 centroids take it 200 times the weights
            made: list[nn.Module] = []  # in the first call, whose failure is a result

            def peer(made: list = made, start: Tensor = start, bits: int = bits, dim: int = dim) -> None:
                if not made:
                    made.append(bench.theirs(bits, dim, start).to(device))
                made[0].centroids = [start.clone()]
                weight.grad = None
                made[0](weight).backward(gradient)

            variants["coremltools"] = peer
        row: dict[str, Any] = {}
        for name, step in list(variants.items()):
            try:
                row[name] = {"mib": peak_mib(step)}
                settled(step)()
            except Exception as error:  # a peer that does not run here is a result too
                row[name] = {"error": _line(error)}
                del variants[name]
        for name, ms in best_ms(variants, 1 if smallest else 5, warm_up=1).items():
            row[name]["ms"] = ms
        part = channels // 4
        exact, exact_gradient = bench.float64(weight[:, :part], start, dim, gradient[:, :part])
        small = weight[:, :part].detach().clone().requires_grad_()
        palette.centroids.copy_(start)
        soft = palette.weight(small)
        soft.backward(gradient[:, :part])
        row["ours"]["weights_off"] = (vectorize(soft.detach().double(), dim)[0] - exact).abs().max().item()
        row["ours"]["gradient_off"] = ((small.grad - exact_gradient).norm() / exact_gradient.norm()).item()
        rows[f"{bits} bits, dim {dim}"] = row
        keep(rows)
    return rows


def steps(smallest: bool) -> dict[str, Any]:
    """Training steps against the fp32 step (scripts/bench/step.py), and Brevitas's and DKM's beside them."""
    words = ["--rounds", "1", "--batch", "2", "--size", "32", "--model", "mobilenet_v1", "--width", "0.25"]
    if not smallest:
        words = ["--rounds", "6", "--batch", "256", "--size", "112"]
    set_arithmetic(fast=False)  # as in r2's training in fp32
    text = output_of(str(Path(__file__).with_name("step.py")), *words)
    found: dict[str, Any] = {"setting": text.splitlines()[0]}
    for name, ms, percent in re.findall(r"^(\S.*?)\s{2,}([\d.]+) ms(?: =\s+([\d.]+) %)?", text, re.MULTILINE):
        found[name] = {"ms": float(ms)} | ({"percent": float(percent)} if percent else {})
    keep(found)
    batch, size = (2, 32) if smallest else (256, 112)
    model = models.mobilenet_v1(1000, 0.25) if smallest else models.resnet18(1000)
    images, labels = _tensors(batch, size)
    variants = {"fp32": _training_step(copy.deepcopy(model), images, labels, "fp32")}
    for bits, dim in CODEBOOKS[: 1 if smallest else None]:
        palettized = copy.deepcopy(model).to(device, memory_format=torch.channels_last)
        layers = quantizable(palettized)
        swap(layers, lambda _, bits=bits, dim=dim: Palette(bits, dim, 0.05, True))
        calibrate(palettized, layers, images[:2])
        palettized.to(device)
        variants[f"DKM {bits} bits, dim {dim}"] = _training_step(palettized, images, labels, "fp32")
    with contextlib.suppress(Exception):  # a peer that is not there, or does not run here
        variants["Brevitas W2A2"] = _training_step(_by_brevitas(copy.deepcopy(model)), images, labels, "fp32")
    best = best_ms(variants, 1 if smallest else 5)
    base = best.pop("fp32")
    return found | {name: {"ms": ms, "percent": 100 * ms / base} for name, ms in best.items()}


def _by_brevitas(model: nn.Module) -> nn.Module:
    """Every convolution and linear layer as Brevitas's, weights and inputs of 2 bits by its default quantizers."""
    from brevitas import nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat

    common = {"weight_bit_width": 2, "input_quant": Int8ActPerTensorFloat, "input_bit_width": 2}
    for name, layer in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        bias = getattr(layer, "bias", None) is not None
        if isinstance(layer, nn.Conv2d):
            new: nn.Module = qnn.QuantConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                groups=layer.groups, bias=bias, **common,
            )  # fmt: skip
        elif isinstance(layer, nn.Linear):
            new = qnn.QuantLinear(layer.in_features, layer.out_features, bias, **common)
        else:
            continue
        setattr(parent, name.rpartition(".")[2], new)
    return model


def _tensors(batch: int, size: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 1000, (batch,), device=device)


def _training_step(
    model: nn.Module, images: Tensor, labels: Tensor, precision: str, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    model = model.to(device, memory_format=torch.channels_last).train()
    if optimizer is None:
        optimizer = optimizer_of(model, Recipe(epochs=1, batch_size=len(images), lr=1e-4, weight_decay=1e-4))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def throughput(smallest: bool) -> dict[str, Any]:
    """Images/s of training steps at 224, batch 256, in bf16; timm's networks and optimizer on the same tensors."""
    set_arithmetic(fast=True)  # as in r2's training in bf16
    batch, size = (2, 32) if smallest else (256, 224)
    images, labels = _tensors(batch, size)
    with_timm = importlib.util.find_spec("timm") is not None
    names = {"resnet18": "resnet18", "mobilenet_v1": "mobilenetv1_100", "mobilenet_v2": "mobilenetv2_100"}
    found: dict[str, Any] = {"setting": f"batch {batch} at {size}x{size}, bf16, channels_last"}
    for name, theirs in names.items():
        ours = getattr(models, name)(1000, 0.25 if smallest else 1.0)
        variants = {"r2": _training_step(ours, images, labels, "bf16")}
        if with_timm:
            import timm
            from timm.optim import create_optimizer_v2

            peer = timm.create_model(theirs, num_classes=1000).to(device, memory_format=torch.channels_last)
            optimizer = create_optimizer_v2(peer, opt="sgd", lr=1e-4, weight_decay=1e-4, momentum=0.9, fused=True)
            variants["timm"] = _training_step(peer, images, labels, "bf16", optimizer)
        row: dict[str, Any] = {}
        for benchmark in (False, True)[: 2 if device.type == "cuda" else 1]:
            torch.backends.cudnn.benchmark = benchmark
            for variant, ms in best_ms(variants, 1 if smallest else 8, warm_up=1 if smallest else 3).items():
                row[variant + ", cudnn.benchmark" * benchmark] = 1e3 * batch / ms
        found[name] = row
        keep(found)
    return found


def images_in(smallest: bool) -> dict[str, Any]:
    """Images/s of the input pipeline alone, to normalised batches on the device (scripts/bench/data.py)."""
    workers = min(16, os.cpu_count() or 1)
    words = ["--rounds", "1", "--images", "64", "--batch", "32", "--workers", "1"]
    if not smallest:
        words = ["--rounds", "2", "--images", "512", "--batch", "128", "--workers", str(workers)]
    text = output_of(str(Path(__file__).with_name("data.py")), *words)
    end_to_end = text[text.index("end to end") :]
    found: dict[str, Any] = {"setting": end_to_end.splitlines()[0].rstrip(":"), "cores": os.cpu_count()}
    for name, rate in re.findall(r"^  (\w+)\s+(\d+) images/s", end_to_end, re.MULTILINE):
        found[name] = float(rate)
    return found


# ------------------------------------------------------------------------------------------------ whole runs


def _run(out: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "r2.run", f"out={out}", "devices=1", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _ended(process: "subprocess.Popen[str]") -> int:
    _, errors = process.communicate()
    if process.returncode not in (0, 128 + signal.SIGTERM):
        raise RuntimeError((errors.strip().splitlines() or ["no message"])[-1])
    return process.returncode


def _record(out: Path) -> dict[str, Any]:
    (path,) = out.glob("*/record.json")
    return json.loads(path.read_text())


def resume(smallest: bool) -> dict[str, Any]:
    """Two whole runs and one that is stopped and resumed: the same bits, or how far apart they end."""
    words = ["data=fake", "recipe=smoke", "recipe.epochs=4", "model.width_mult=0.25", "stage=ewgs", "threads=1"]
    if not smallest:
        words = ["data=digits", "recipe.epochs=3", "recipe.finetune.epochs=2", "model=mbv2", "stage=ewgs"]
    with tempfile.TemporaryDirectory() as folder:
        outs = {name: Path(folder, name) for name in ("first", "second", "resumed")}
        started = [_run(out, *words, "reg=margin", "checkpoint_seconds=0.1") for out in outs.values()]
        while started[2].poll() is None and not list(outs["resumed"].glob("**/*.ckpt")):
            time.sleep(0.05)
        started[2].terminate()
        stopped = _ended(started[2]) != 0
        _ended(_run(outs["resumed"], *words, "reg=margin"))
        for process in started[:2]:
            _ended(process)
        records = {name: _record(out) for name, out in outs.items()}
    values = {name: r["sha256"]["final"] for name, r in records.items()}
    return {
        "stopped": stopped,
        "two_whole_runs_are_equal": values["first"] == values["second"],
        "resumed_equals_whole": values["first"] == values["resumed"],
        "top1": {name: r["metrics"]["top1"] for name, r in records.items()},
        "fp32_top1": {name: r["fp32"]["top1"] for name, r in records.items()},
    }


def cell(smallest: bool) -> dict[str, Any]:
    """One whole cell of the study: Fashion-MNIST where it lies on this machine, else the digits."""
    places = Path("/usr/share/datasets/fashion-mnist"), Path(os.environ.get("R2_DATA", "data"), "fashion_mnist")
    words = ["data=digits", "model=mbv2", "recipe.epochs=10", "recipe.finetune.epochs=5"]
    if any(place.is_dir() for place in places):
        words = ["data=fashion_mnist", "recipe=study", "model=mbv1", "model.width_mult=0.25"]
    if smallest:
        words = ["data=fake", "recipe=smoke", "model=mbv1", "model.width_mult=0.25", "threads=1"]
    words += ["reg=margin", "stage=ewgs"]
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        _ended(_run(Path(folder), *words))
        seconds, found = time.monotonic() - began, _record(Path(folder))
    kept = {name: found[name] for name in ("metrics", "fp32", "seconds", "images_per_second", "timing", "device")}
    return {"command": " ".join(["python -m r2.run", *words]), "wall_seconds": seconds, **kept}


def tests(smallest: bool) -> dict[str, Any]:
    """pytest -m gpu: how many pass; those that there was no time for are in neither count."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=line", "-p", "no:cacheprovider"]
    folder = REPOSITORY / "tests"
    if not folder.is_dir():
        raise RuntimeError("an installed r2 has no tests; run this in a checkout")
    command += [str(folder / f"test_{name}.py") for name in (["gpu"] if smallest else ["gpu", "shards", "timing"])]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": 0, "finished": False}
    assert process.stdout is not None
    line = ""
    for line in process.stdout:
        if match := re.match(r"\S*(test_\w+\.py::\S+) (PASSED|FAILED|ERROR|SKIPPED)", line):
            if match[2] in ("FAILED", "ERROR"):
                found["failed"].append(match[1])
            else:
                found[match[2].lower()] += 1
            keep(found)
    ended = process.wait()
    if not (found["passed"] or found["failed"] or found["skipped"]):
        raise RuntimeError(f"pytest ran no test and ended with {ended}: {line.strip()}")
    found["finished"] = ended in (0, 1)
    return found


# ------------------------------------------------------------------------------------------------ sections

# In the order of what is missed most; seconds that each may take, LIMIT in all. The tests have whatever is left.
SECTIONS: dict[str, tuple[Callable[[bool], dict[str, Any]], int]] = {
    "agreement": (agreement, 110),
    "dkm": (dkm, 60),
    "throughput": (throughput, 60),
    "steps": (steps, 80),
    "resume": (resume, 60),
    "cell": (cell, 80),
    "input": (images_in, 50),
    "tests": (tests, 40),
}
_kept: Path | None = None  # where the section of this process leaves its result


def keep(result: dict[str, Any]) -> None:
    """Leave a section's result, or what there is of it, where the process that started it looks."""
    assert _kept is not None
    write(_kept, json.dumps(finite(result)).encode())


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def in_a_process(name: str, seconds: float, smallest: bool) -> dict[str, Any]:
    """What a section finds, or its error, or both where the time was too short."""
    with tempfile.TemporaryDirectory() as folder:
        result, began, error = Path(folder, "result.json"), time.monotonic(), None
        command = [sys.executable, str(Path(__file__)), "--section", name, "--out", str(result)]
        with (Path(folder) / "errors").open("w+") as errors:
            if smallest:  # nothing is measured: no compiling, which takes longer than the rest
                command, environment = [*command, "--smallest"], {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
            else:
                environment = dict(os.environ)
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
            )
            try:
                if process.wait(seconds):
                    errors.seek(0)
                    error = (errors.read().strip().splitlines() or [f"ended with {process.returncode}"])[-1]
            except subprocess.TimeoutExpired:
                error = f"not finished in {seconds:.0f} s"
            finally:  # it and what it has started end, also where this program is told to
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1)}
        if result.exists():
            found["result"] = json.loads(result.read_text())
        return found | ({"error": error} if error else {})


def main() -> None:
    global _kept
    arguments = parser.parse_args()
    if arguments.section:
        _kept = arguments.out
        keep(SECTIONS[arguments.section][0](arguments.smallest))
        os._exit(0)  # leaving otherwise waits for the processes of compilers
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    wanted = arguments.only.split(",") if arguments.only else list(SECTIONS)
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--only {','.join(sorted(unknown))}: sections are {', '.join(SECTIONS)}")
    smallest = arguments.smallest or device.type == "cpu"
    path = make_directory(arguments.out) / "gpu.json"
    gpu = torch.cuda.get_device_properties(0) if device.type == "cuda" else None
    found: dict[str, Any] = {
        "device": {"type": device.type, "name": gpu.name if gpu else None,
                   "gib": round(gpu.total_memory / 2**30, 1) if gpu else None},
        "versions": {"torch": str(torch.__version__), "cuda": torch.version.cuda,
                     "cudnn": torch.backends.cudnn.version() if gpu else None, "python": sys.version.split()[0]},
        "commit": commit(),
        "smallest": smallest,
        "sections": {},
    }  # fmt: skip
    began, patience = time.monotonic(), 1 if gpu else 10
    for name in [name for name in SECTIONS if name in wanted]:
        left = LIMIT * patience - (time.monotonic() - began)
        seconds = left if name == "tests" else min(left, SECTIONS[name][1] * patience)
        found["sections"][name] = (
            in_a_process(name, seconds, smallest) if left > 5 else {"error": f"no time left of {LIMIT} s"}
        )
        write(path, (json.dumps(found, indent=1) + "\n").encode())
        of = found["sections"][name]
        print(f"{name:<12}{of.get('seconds', 0):6.1f} s  {of.get('error', 'done')}", flush=True)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
