"""Which runs a table or figure needs, which of them exist, which pretrainings they share, and what the rest will cost.

An experiment of configs/experiment is a grid of overrides; every cell of it is composed exactly as the command line
composes one run, so a planned run and a typed one have the same directory.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from r2 import record
from r2.cli import CONFIGS, resolve
from r2.config import UserError, build, fingerprint, identity
from r2.hub import need_extra

PUBLISHED = Path(__file__).parents[1] / "results" / "records"
# Training images of the published sets: a plan must not need the data.
TRAIN_IMAGES = {"digits": 1437, "fashion_mnist": 60_000, "cifar10": 50_000, "imagenette": 9_469,
                "imagenet": 1_281_167, "imagenet_shards": 1_281_167, "qnli": 104_743}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run: its checked config, its name, and the pretraining that it starts from (None: it needs none)."""

    config: dict
    axes: dict
    name: str
    pretraining: str | None

    @property
    def directory(self) -> Path:
        return Path(self.config["out"]) / self.name

    def finished(self, records: Path | None) -> bool:
        """Whether its record lies in its own directory, or in the folder `records`."""
        return (self.directory / "record.json").exists() or bool(records and (records / f"{self.name}.json").exists())

    def pretrained(self) -> bool:
        found = Path(self.config["out"], "pretrained").glob(f"*-{self.pretraining}/model.pt")
        return self.pretraining is None or any(found)


def experiments() -> dict[str, Path]:
    return {path.stem: path for path in sorted(Path(CONFIGS, "experiment").glob("*.yaml"))}


def axes_of(experiment: str) -> dict[str, list[str]]:
    """The grid of an experiment: key to its values, as text.

    Raises:
        UserError: there is no such experiment.
    """
    path = experiments().get(experiment)
    if path is None:
        raise UserError(f"unknown experiment {experiment!r}: choose from {', '.join(experiments())}")
    params = OmegaConf.load(path).hydra.sweeper.params
    return {str(key): _values(str(value)) for key, value in params.items()}


def _values(text: str) -> list[str]:
    """The parts of `a,b,c`, a comma inside brackets not being a separator."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def cells(names: Iterable[str], overrides: list[str]) -> list[Cell]:
    """Every run of the experiments `names`, each once, under `overrides` (key=value, or key=a,b,c).

    Raises:
        UserError: an override that no run accepts, in one line.
    """
    given = dict(override.split("=", 1) for override in overrides)
    found: dict[str, Cell] = {}
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        for name in names:
            grid = axes_of(name)
            # Table 7 is of QNLI: asked for along with ImageNet's tables, it keeps its data and what goes with them.
            other = "data" in grid and given.get("data") not in (None, *grid["data"])
            kept = ("data", "recipe", "model") if other else ()
            asked = {key: value for key, value in given.items() if key.partition(".")[0] not in kept}
            grid |= {key: _values(value) for key, value in asked.items()}
            seeds = [_seed(value) for value in grid.pop("seed", ["0"])]
            for values in itertools.product(*grid.values()):
                config = _compose(name, [f"{key}={value}" for key, value in zip(grid, values, strict=True)])
                for seed in seeds:
                    words = [f"seed={seed}" if word.startswith("seed=") else word for word in config["overrides"]]
                    cell = _cell({**config, "seed": seed, "overrides": words})
                    found.setdefault(cell.name, cell)
    return list(found.values())


def cells_of(overrides: list[str]) -> list[Cell]:
    """The one run of a command line."""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return [_cell(_compose(None, overrides))]


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"seed={text}: is a whole number, 0 or more")
    return int(text)


def _compose(experiment: str | None, overrides: list[str]) -> dict:
    named = [f"experiment={experiment}"] if experiment else []
    cfg = compose("config", [*named, *overrides], return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return resolve(cfg, choices)


def _cell(config: dict) -> Cell:
    stage = build(config["stage"])
    axes = record.axes(config, stage)
    of_pretraining = fingerprint(identity(config, ("data", "model", "reg", "recipe")))
    name = f"{record.run_name(axes)}-{fingerprint(identity(config))}"
    return Cell(config, axes, name, None if stage.from_scratch else of_pretraining)


def groups(planned: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that share a pretraining together, in order; a cell without one stands alone."""
    found: dict[str, list[Cell]] = defaultdict(list)
    for cell in planned:
        found[cell.pretraining or cell.name].append(cell)
    return list(found.values())


UNKNOWN = "unknown"


class Rate(NamedTuple):
    """Measured speed: images/s of training, or the seconds of a stage that does not train."""

    images_per_second: float | None
    seconds: float | None
    source: str


class Speeds:
    """What records say of the time that things take on this kind of device, and a short measurement where they don't.

    Args:
        records: of any runs.
        processes: that will share one run's training.
    """

    def __init__(self, records: list[dict], device: str, processes: int = 1):
        self.device, self.processes = device, processes
        self._known: dict[tuple, Rate] = {}
        for found in records:
            if found["device"]["type"] != device:
                continue
            axes, speed = found["axes"], found["images_per_second"]
            data, model, more = axes["data"], axes["model"], processes / found["processes"]
            if speed["pretrain"]:
                self._known[data, model, "pretrain"] = Rate(speed["pretrain"] * more, None, "records")
            rest = sum(v for phase, v in found["seconds"].items() if phase != "pretrain")
            trained = speed["stage"] and speed["stage"] * more
            self._known[data, model, axes["stage"]] = Rate(trained, None if trained else rest, "records")

    def pretraining(self, cell: Cell) -> tuple[float, str]:
        """Seconds, and where the speed comes from."""
        rate = self._rate(cell, "pretrain")
        return _images(cell, cell.config["recipe"]["epochs"]) / (rate.images_per_second or 1), rate.source

    def stage(self, cell: Cell) -> tuple[float, str]:
        stage = cell.config["stage"]
        epochs = cell.config["recipe"]["epochs"] if cell.pretraining is None else stage.get("epochs", 0)
        rate = self._known.get((cell.axes["data"], cell.axes["model"], cell.axes["stage"]))
        if cell.axes["stage"] == "fp32":
            return 0.0, "records"
        if rate is None and not epochs:
            return 0.0, UNKNOWN
        if rate is None:
            rate = self._rate(cell, "pretrain")._replace(source="at least: as fast as pretraining")
        return rate.seconds or _images(cell, epochs) / (rate.images_per_second or 1), rate.source

    def machine(self) -> str:
        if self.device == "cuda":
            return f"{self.processes} GPU{'s' * (self.processes > 1)} of this kind"
        return f"this machine's CPU, {self.processes} process{'es' * (self.processes > 1)}, one run at a time"

    def _rate(self, cell: Cell, kind: str) -> Rate:
        key = cell.axes["data"], cell.axes["model"], kind
        if key not in self._known:
            speed = measure(cell.config, self.device) * self.processes
            self._known[key] = Rate(speed, None, "measured now, without data")
        return self._known[key]


def _images(cell: Cell, epochs: int) -> int:
    data = cell.config["data"]
    return epochs * TRAIN_IMAGES.get(cell.axes["data"], data.get("train_images", 0))


def measure(config: dict, device: str, steps: int = 2) -> float:
    """Examples/s of bare training steps of the config's model, on random images of its size or texts of full length."""
    import time

    import torch
    from torch.nn import functional as F

    inputs: Any
    batch = min(256 if device == "cuda" else 4, config["recipe"]["batch_size"])
    if "max_length" in config["data"]:
        need_extra()
        from r2.mobilebert import network

        model = network(2, {"classifier_activation": False}).to(device)  # the published one; a plan downloads nothing
        ones = torch.ones(batch, config["data"]["max_length"], dtype=torch.long, device=device)
        inputs = {"input_ids": ones, "attention_mask": ones, "token_type_ids": ones}
    else:
        size, classes = config["data"].get("image_size", 32), 1000 if "imagenet" in config["choices"]["data"] else 10
        model = build(config["model"], num_classes=classes).to(device, memory_format=torch.channels_last)
        inputs = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=config["recipe"]["precision"] != "fp32"):
            loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        loss.item()
        seconds.append(time.perf_counter() - began)
    return batch / min(seconds[1:])


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `21 d`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def describe(planned: list[Cell], records: Path | None, speeds: Speeds) -> Iterator[str]:
    """The plan, line by line: each pretraining with its runs, then the totals."""
    total, sources, unknown = 0.0, set(), 0
    missing_runs = missing_pretrainings = 0
    for group in groups(planned):
        waiting = [cell for cell in group if not cell.finished(records)]
        if group[0].pretraining is not None:
            done, axes = group[0].pretrained(), group[0].axes
            seconds, source = speeds.pretraining(group[0]) if waiting and not done else (0.0, "")
            what = "finished" if done else f"missing, {duration(seconds)}" if waiting else "not needed"
            missing_pretrainings += bool(waiting and not done)
            total += seconds
            sources.add(source)
            yield (f"pretraining {axes['data']} {axes['model']} {axes['reg']} seed {axes['seed']}, "
                   f"{group[0].config['recipe']['epochs']} epochs: {what}")  # fmt: skip
        for cell in group:
            if cell not in waiting:
                yield f"  finished  {cell.name}"
                continue
            seconds, source = speeds.stage(cell)
            unknown += source == UNKNOWN
            missing_runs += 1
            total += seconds
            sources.add(source)
            yield f"  missing   {cell.name}" + (f", {duration(seconds)}" if seconds else "")
            yield f"            {record.command(cell.config)}"
    yield (f"{len(planned)} runs, {len(planned) - missing_runs} finished, {missing_runs} missing, "
           f"which need {missing_pretrainings} pretrainings")  # fmt: skip
    if missing_runs:
        known = ", ".join(sorted(sources - {"", UNKNOWN}))
        cost = f" ({total * speeds.processes / 3600:.1f} GPU-hours)" if speeds.device == "cuda" else ""
        yield f"estimated {duration(total)} on {speeds.machine()}{cost}" + (f"; speeds: {known}" if known else "")
    if unknown:
        yield f"not counted: {unknown} post-training runs of models whose time no record tells"


def known_records(folders: Iterable[Path | None]) -> list[dict[str, Any]]:
    """Every record of the folders that exist."""
    found = []
    for folder in folders:
        if folder is not None and folder.is_dir():
            found += record.find(folder)
    return found
