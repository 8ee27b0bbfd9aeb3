"""Every stage of a run in every kind of file and program: size, equality, memory and speed, beside the float model.

python scripts/bench/export.py [--stages none lsq dkm ...] [--rounds 20] [--cpu-time] [KEY=VALUE of r2.run ...]

The runs are made first, by `python -m r2.run -m stage=fp32,... out=OUT KEY=VALUE ...`; those that are finished are not
repeated. Times are the best of rounds that go through all stages of one program in turn; a ratio is to `fp32` in the
same program; OpenVINO is told to compute in f32. Equality is with PyTorch's predictions over the validation images.
"""

import argparse
import contextlib
import ctypes
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from r2 import export, pack, record
from r2.config import UserError, build
from r2.dist import World
from r2.export.card import size
from r2.training.loop import best

STAGES = ["none", "dfq", "adaround", "ewgs", "lsq", "pact", "dkm"]
Predict = Callable[[Tensor], Tensor]

parser = argparse.ArgumentParser()
parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="of r2.run, such as model=mbv1 reg=linf")
parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES, help="beside fp32")
parser.add_argument("--targets", nargs="+", default=list(export.TARGETS), choices=list(export.TARGETS))
parser.add_argument("--out", type=Path, default=Path("outputs/export"))
parser.add_argument("--rounds", type=int, default=20)
parser.add_argument("--batch", type=int, default=64, help="images at a time for the images per second")
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--cpu-time", action="store_true", help="processor time, for a busy machine and one thread")
arguments = parser.parse_intermixed_args()
torch.set_num_threads(arguments.threads)
clock = time.process_time if arguments.cpu_time else time.perf_counter


def openvino(path: Path) -> Predict:
    import openvino as ov

    compiled = ov.Core().compile_model(
        str(path), "CPU", {"INFERENCE_NUM_THREADS": arguments.threads, "INFERENCE_PRECISION_HINT": "f32"}
    )
    return lambda images: torch.from_numpy(compiled(images.contiguous().numpy())[0].copy())


def packed(path: Path) -> Predict:
    return torch.no_grad()(pack.load(path))


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def files(run: Path, model: nn.Module, images: Tensor) -> dict[str, tuple[Path, Callable[[Path], Predict | None]]]:
    """By the name of a file and its program."""
    found: dict[str, tuple[Path, Callable[[Path], Predict | None]]] = {
        "packed, torch": (run / "model.safetensors", packed)
    }
    for name in arguments.targets:
        target, path = export.TARGETS[name], run / f"model{export.TARGETS[name].suffix}"
        try:
            module = target.load()
            module.write(model, path, images)
        except UserError as error:
            print(f"{run.name}: {error}")
            continue
        found[f"{name}, {target.runtime}"] = path, module.predict
        with contextlib.suppress(ImportError):
            if name == "onnx":
                import openvino as _  # noqa: F401

                found["onnx, OpenVINO"] = path, openvino
    return found


def equal(model: nn.Module, predict: Predict) -> float:
    """Of the predictions, in percent."""
    same, count = 0, 0
    with torch.no_grad():
        for images, _ in data.val(256):
            both = best(model(images))[:, 0], best(predict(images))[:, 0]
            same, count = same + int((both[0] == both[1]).sum()), count + len(images)
    return 100 * same / count


def seconds(predict: Predict, images: Tensor) -> float:
    began = clock()
    predict(images)
    return clock() - began


def against(ratio: float) -> str:
    return "1" if ratio == 1 else f"{ratio:.2f}x slower" if ratio > 1 else f"{1 / ratio:.2f}x faster"


stages = ["fp32", *arguments.stages]
command = ["-m", "r2.run", "-m", f"stage={','.join(stages)}", f"out={arguments.out}", *arguments.keys]
print("python", *command, flush=True)
subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
runs = {}
for path in arguments.out.glob("*/record.json"):
    found = record.read(path)
    if (stage := found["axes"]["stage"]) in runs:
        parser.error(f"{arguments.out} holds two runs of {stage}; give another --out")
    runs[stage] = path.parent, found
data = build(runs["fp32"][1]["config"]["data"]).to(World())
images = next(iter(data.val(max(2, arguments.batch))))[0].contiguous()
models = {stage: pack.load(runs[stage][0] / "model.safetensors") for stage in stages}
written = {stage: files(runs[stage][0], model, images[:2]) for stage, model in models.items()}

print(f"{arguments.threads} threads, batches of 1 and {len(images)}")
heads = ("stage", "MiB", "equal %", "load ms", "memory MiB", "1 image ms", "of fp32", "images/s", "of fp32")
for program in written["fp32"]:
    print(f"\n{program}\n" + "".join(f"{head:>14}" for head in heads))
    loaded: dict[str, Predict] = {}
    facts: dict[str, list[str]] = {}
    written["fp32"][program][1](written["fp32"][program][0])  # loads the runtime itself, which no stage's file costs
    for stage in stages:
        if program not in written[stage]:
            continue
        path, load = written[stage][program]
        before, began = resident(), clock()
        predict = load(path)
        facts[stage] = [f"{size(path) / 2**20:.3f}"]
        if predict is not None:
            took = clock() - began
            predict(images)
            held = (resident() - before) / 2**20
            facts[stage] += [f"{equal(models[stage], predict):.2f}", f"{1e3 * took:.0f}", f"{held:.1f}"]
            loaded[stage] = predict
    fastest = {(stage, count): float("inf") for stage in loaded for count in (1, len(images))}
    for _ in range(arguments.rounds):
        for stage, count in fastest:
            fastest[stage, count] = min(fastest[stage, count], seconds(loaded[stage], images[:count]))
    for stage, row in facts.items():
        if stage in loaded:
            one, many = (fastest[stage, count] for count in (1, len(images)))
            ratios = [against(fastest[stage, count] / fastest["fp32", count]) for count in (1, len(images))]
            row += [f"{1e3 * one:.2f}", ratios[0], f"{len(images) / many:.0f}", ratios[1]]
        else:
            row += ["no program here"]
        print("".join(f"{cell:>14}" for cell in [stage, *row]), flush=True)
