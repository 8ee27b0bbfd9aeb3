"""check=true: reports what a run will do and whether it would start, without training or writing anything.

python -m r2.run data=imagenet model=rn18 devices=8 check=true
python -m r2.run data=imagenet model=rn18 devices=8 check=true images_per_second=2500    # on a login node or a laptop
"""

import contextlib
import functools
import importlib.util
import json
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from r2 import record, store
from r2.config import UserError, build, last_line
from r2.console import say
from r2.data.facts import facts
from r2.dist import World, device_count
from r2.identity import Identity, trains
from r2.plan import cost, step
from r2.plan.cells import Cell, cell_of
from r2.plan.speeds import Given
from r2.training.loop import check_batches
from r2.zoo import weights

# Models that lie on the disk at the same time, at most: three checkpoints of the stage (the last, the one before, the
# one being written) of a model and two moments each, the pretrained and the final model, and the compressed file.
_COPIES = 12


def check(config: dict, given: Given | None = None) -> None:
    """Say what the run will do, and one line per problem on stderr.

    Args:
        given: speeds of another machine's GPUs, as of images_per_second: the run is planned for that one, and nothing
            is held against this one's devices, data and disk.

    Raises:
        UserError: the run would not start.
    """
    cell = cell_of(config)
    if config["images_per_second"] is not None:
        given = Given([cell], {"": config["images_per_second"]})
    problems = _look(cell, given, say)
    for problem in problems:
        print(f"r2: {problem}", file=sys.stderr)
    if problems:
        raise UserError(f"the run would not start: {cost.count(len(problems), 'problem')}, see above")
    say(_would_start(given))


def check_all(cells: list[Cell], given: Given | None) -> int:
    """Check many runs, as `check` does, and say once what all have in common; returns how many would not start."""
    found = []
    for cell in cells:
        lines = list[str]()
        problems = _look(cell, given, lines.append)
        found.append((cell, lines, problems))
    several = len(found) > 1
    for line in (same := _in_all([lines for _, lines, _ in found] if several else [])):
        say(line)
    for problem in (hindering := _in_all([problems for *_, problems in found] if several else [])):
        print(f"r2: {problem}", file=sys.stderr)
    for cell, lines, problems in found:
        command = record.command(cell.config)
        say(command)
        for line in lines:
            if line not in same and line.strip() != command:
                say(line)
        for problem in problems:
            if problem not in hindering:
                print(f"r2: {problem}", file=sys.stderr)
        say("  would not start" if problems else f"  {_would_start(given)}")
    failed = sum(bool(problems) for *_, problems in found)
    if failed:
        print(f"r2: {failed} of {cost.count(len(found), 'run')} would not start, see above", file=sys.stderr)
    return failed


def _in_all(lists: list[list[str]]) -> list[str]:
    return [line for line in lists[0] if all(line in other for other in lists)] if lists else []


def _would_start(given: Given | None) -> str:
    return "the run would start" + " where its data and devices are" * (given is not None)


def _look(cell: Cell, given: Given | None, say: Callable[[str], None]) -> list[str]:
    """Say what a run will do; returns its problems."""
    config, size, problems, elsewhere = cell.config, 0, list[str](), given is not None

    def tell(lines: Iterable[str]) -> bool:
        try:
            for line in lines:
                say(line)
        except UserError as error:
            if (problem := last_line(error)) not in problems:  # a network that is refused is refused by each
                problems.append(problem)
            return False
        return True

    try:
        size = cost.processes(config["devices"], elsewhere)
    except UserError as error:
        problems.append(last_line(error))
    world = World(size=max(1, size), device=_device())
    if elsewhere:
        say(f"devices: {cost.count(size, 'GPU')} of another machine; data, disk and compiler are not looked at here")
    elif size:
        say(f"devices: {size} x {_device_name(world.device)}")
    batches_fit = not size or tell(_training(cell, world, elsewhere))
    if not elsewhere:
        tell(_data(cell, world))
        tell(_disk(config))
        say(f"compiler: {_compiler(world.device)}")
    fits = tell(_fits(config))
    tell(_weights(config))
    tell(_progress(cell))
    if size and fits and batches_fit:
        tell(_time(cell, given))
    return problems


def ready(configs: Iterable[dict]) -> None:
    """Look once for each data set, number of devices and weights that the unfinished ones of many runs need.

    Raises:
        UserError: the first that is not there, or a folder of results that cannot be written.
    """
    missing = [config for config in configs if not config["check"] and not cell_of(config).finished(None)]
    for config, *_ in _alike(missing, "out"):
        _room(Path(config["out"]))
    for sharing in _alike(missing, "data", "devices"):
        if not os.environ.get("WORLD_SIZE"):
            device_count(sharing[0]["devices"])
        with contextlib.closing(build(sharing[0]["data"])) as data:
            for config, *_ in _alike(sharing, "model", "weights"):
                if config["weights"] is not None:
                    weights.fitting(_network(config, data.num_classes), config)


def _alike(configs: Iterable[dict], *keys: str) -> list[list[dict]]:
    """Configs that have the same at all `keys` together, in order."""
    found: dict[str, list[dict]] = defaultdict(list)
    for config in configs:
        found[json.dumps([config[key] for key in keys], sort_keys=True)].append(config)
    return list(found.values())


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU process of {os.cpu_count()} cores"
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
    return f"{torch.cuda.get_device_name(device)}, {free:.0f} of {total:.0f} GiB free"


def _network(config: dict, num_classes: int | None = None) -> nn.Module:
    """The config's model without values."""
    return _built(json.dumps(config["model"]), num_classes or facts(config).num_classes or 1000)  # hardly count


@functools.cache
def _built(model_config: str, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return build(json.loads(model_config), num_classes=num_classes)


def _weights(config: dict) -> Iterator[str]:
    """Whether the user's weights are there and fit, and what becomes of them."""
    given = config["weights"]
    if given is None:
        return
    path = weights.path_of(config)
    if given["file"] is None and not path.exists():
        yield f"weights: {path} will be downloaded"
    elif facts(config).num_classes is not None:
        weights.fitting(_network(config), config)
    done = "trained on with the recipe" if given["trained"] else "evaluated as they are, without a pretraining"
    head = ", under a new last layer" if given["new_head"] else ""
    yield f"weights: {given['source']} (sha256 {given['sha256'][:8]}...){head}, {done}"


def _training(cell: Cell, world: World, elsewhere: bool) -> Iterator[str]:
    """Whether the batches can be shared out, and the memory that one takes."""
    config = cell.config
    recipe = build(config["recipe"])
    check_batches(config["stage"], recipe, world, _network(config))
    each = recipe.batch_size // world.size
    kept, weights = step.memory(config, each // recipe.accumulate)
    # keep_freed_memory: peak_memory_mib of MobileNet-V2's records on digits is 1.6 to 1.8 GiB beside 0.13 counted here.
    beside = "; libraries and freed memory that is kept take 1 to 2 GiB more" * (world.device.type == "cpu")
    halved = f" (recipe.accumulate={2 * recipe.accumulate} halves this)" * (each % (2 * recipe.accumulate) == 0)
    yield (
        f"memory: training the float network at recipe.precision={recipe.precision} takes about {kept + weights:.2f} "
        f"GiB of each device, {kept:.2f} of them for {each // recipe.accumulate:,} examples at once{halved}{beside}"
    )
    trained = cell.pretraining is None or (trains(config) and not cell.pretrained())
    room = _memory_of_each(world)
    if elsewhere or not trained or kept + weights <= room:
        return
    parts = (n for n in range(recipe.accumulate + 1, each) if each % n == 0)
    enough = next((n for n in parts if sum(step.memory(config, each // n)) <= room), None)
    advice = f"recipe.accumulate={enough} or " if enough else ""
    raise UserError(
        f"memory: training takes about {kept + weights:.2f} GiB of each device, which has {room:.2f} GiB; "
        f"set {advice}a smaller recipe.batch_size"
    )


def _memory_of_each(world: World) -> float:
    """GiB of a GPU, or of a process's share of this machine."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[1] / 2**30
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / here / 2**30


def _data(cell: Cell, world: World) -> Iterator[str]:
    config = cell.config
    yield from _read(
        json.dumps(config["data"]), cell.axes["data"], config["recipe"]["batch_size"], config["seed"], world
    )


@functools.cache  # the runs of a table mostly read the same
def _read(data_config: str, name: str, batch_size: int, seed: int, world: World) -> list[str]:
    data = build(json.loads(data_config)).to(world)
    began = time.perf_counter()
    with contextlib.closing(data):
        _, labels = next(data.train(batch_size, seed, 0))
    took = time.perf_counter() - began
    return [
        f"data: {name}, {data.describe()}",
        f"data: the first batch, {len(labels):,} for each process, took {took:.2f} s",
    ]


def _disk(config: dict) -> Iterator[str]:
    yield f"disk: {_room(Path(config['out']), _network(config))}"


def _fits(config: dict) -> Iterator[str]:
    """Nothing, unless the stage refuses the model."""
    images = config["data"].get("calibration_images", 0)
    build(config["stage"]).check(_network(config), min(images, facts(config).train_images or images))
    yield from ()


def _time(cell: Cell, given: Given | None) -> Iterator[str]:
    yield from cost.describe([cell], None, _speeds(cell.config["devices"], given, Path(cell.config["out"])))


_speeds = functools.cache(cost.speeds)  # for the runs of a table, of which each network is measured once


def _room(out: Path, model: nn.Module | None = None) -> str:
    """What a run of `model` leaves, beside what is free.

    Raises:
        UserError: `out` cannot be written, or its disk has too little room.
    """
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    store.make_directory(existing)
    kept = model.state_dict().values() if model is not None else ()
    needed = _COPIES * sum(t.numel() * t.element_size() for t in kept) / 2**30
    free = shutil.disk_usage(existing).free / 2**30
    if free < needed:
        raise UserError(
            f"out={out}: {free:.2f} GiB are free and the run may need {needed:.2f} GiB; "
            "make room or choose another with out=DIR"
        )
    return f"up to {needed:.2f} GiB of {free:,.0f} GiB free under {existing}"


def _compiler(device: torch.device) -> str:
    """The compiler that the fused kernels need; without it they are PyTorch's own operations, and slower."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch.compile looks for it
    found = shutil.which(name)
    missing = [] if found else [f"no {name} (CXX names another)"]
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        missing.append("no triton")
    return f"{' and '.join(missing)}: kernels are not fused, and slower" if missing else f"{found}, kernels are fused"


def _progress(cell: Cell) -> Iterator[str]:
    """What exists of the run and of its pretraining.

    Raises:
        UserError: a checkpoint that cannot be used.
    """
    finished = (cell.directory / "record.json").exists()
    if finished:
        again = "is repeated because of force=true" if cell.config["force"] else "is not repeated (force=true does it)"
        yield f"run: {cell.directory} is finished and {again}"
    if not finished or cell.config["force"]:
        yield from _state("run", cell.run, cell.config["seed"])
    if cell.pretraining is not None:
        run = yield from _state("pretraining", cell.pretraining, cell.config["seed"])
        if cell.pretrained():
            run.finished()


def _state(what: str, identity: Identity, seed: int) -> Generator[str, None, store.Run]:
    directory = identity.directory
    held_by = store.holder(directory)
    if held_by:
        yield f"{what}: {held_by} is working on {directory}; the run waits for it"
    run = store.Run(directory, identity.key, World(), seed, 0, lambda row: None)
    for checkpoint in sorted(directory.glob("*.ckpt")):
        state = run.resume(checkpoint.stem)
        if state is not None:
            epoch, step = state["position"]["epoch"] + 1, state["position"]["step"]
            yield f"{what}: {checkpoint} resumes at epoch {epoch}, step {step}"
    return run
