"""How long runs take: from records, from speeds that the user has measured, or from a short measurement."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from r2.config import UserError
from r2.data.facts import facts
from r2.plan import step
from r2.plan.cells import Cell
from r2.quantizers.layers import quantizable
from r2.record import Record

UNKNOWN = "unknown"
# Of post-training stages, by results/records. In training steps of one image, for one calibration image: AIMET
# collects a histogram per quantizer. In seconds: an iteration of AdaRound costs as much however small its layer is.
_CALIBRATED, _BIAS_CORRECTED = 6.4, 2.5
_ITERATION = 1.3e-3


class Rate(NamedTuple):
    """Measured speed: images/s of training, or the seconds of a stage that does not train."""

    images_per_second: float | None
    seconds: float | None
    source: str


class Given:
    """Images/s of one GPU, as measured by the user, for every network of a plan.

    A speed is of one network, named as in the runs' names (mbv1-0.25). Under no name it is of each model of the plan
    as that keeps most memory for its backward, which is at its largest width; of images, if there are also texts.
    Other widths follow in proportion to what they keep: small convolutions wait for memory. Multiplications would
    promise too much, 3.1 times the images/s for MobileNet-V2 at half the width, where an RTX 3090 gives 1.75 and this
    rule 1.83 (timm's results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv).

    Raises:
        UserError: a name that is no network of the plan, or a model that nothing is said of.
    """

    def __init__(self, cells: Iterable[Cell], said: Mapping[str, float]):
        self._kept: dict[str, float] = {}
        self._known: dict[str, list[tuple[Cell, float]]] = defaultdict(list)  # by model: networks with a speed
        by_model: dict[str, dict[str, list[Cell]]] = defaultdict(lambda: defaultdict(list))
        for cell in {_network(cell): cell for cell in cells}.values():
            by_model[_model(cell)][cell.axes["model"]].append(cell)
        names = sorted(name for networks in by_model.values() for name in networks)
        for name in said.keys() - {""} - set(names):
            raise UserError(f"images_per_second={name}:{said[name]:g}: the plan's networks are {', '.join(names)}")
        for model, networks in by_model.items():
            every = [cell for of_name in networks.values() for cell in of_name]
            texts = "max_length" in every[0].config["data"] and len(by_model) > 1  # N is of the images then
            for name in networks.keys() & said.keys():
                self._known[model].append((self._largest(networks[name]), said[name]))
            if model not in self._known and ("" not in said or texts):
                name = self._largest(every).axes["model"]
                raise UserError(f"images_per_second: says nothing of {name}; add ,{name}:N")
            if model not in self._known:
                self._known[model].append((self._largest(every), said[""]))

    def speed(self, cell: Cell) -> tuple[float, str]:
        """Images/s of one GPU, and where that comes from."""
        known = self._known[_model(cell)]
        network = _network(cell)
        for own, speed in known:
            if network == _network(own):
                return speed, f"{speed:g} images/s of one GPU as given for {cell.axes['model']}"
        own, speed = min(known, key=lambda one: max(r := self._ratio(cell, one[0]), 1 / r))
        scaled = speed * self._ratio(cell, own)
        name = cell.axes["model"] + ("" if cell.axes["data"] == own.axes["data"] else f" on {cell.axes['data']}")
        return scaled, f"about {scaled:.0f} for {name}, by what it keeps in memory against {own.axes['model']}"

    def _largest(self, cells: list[Cell]) -> Cell:
        return max(cells, key=self._memory) if len(cells) > 1 else cells[0]

    def _ratio(self, cell: Cell, other: Cell) -> float:
        return self._memory(other) / self._memory(cell)

    def _memory(self, cell: Cell) -> float:
        network = _network(cell)
        if network not in self._kept:
            self._kept[network] = step.memory(cell.config, 64)[0]
        return self._kept[network]


def _model(cell: Cell) -> str:
    return cell.config["choices"]["model"]


def _network(cell: Cell) -> str:
    """What a training step's speed depends on."""
    size = facts(cell.config).image_size, cell.config["data"].get("max_length")
    return json.dumps([cell.config["model"], cell.config["recipe"]["precision"], size], sort_keys=True)


class Speeds:
    """The time that things take on one kind of device.

    Args:
        records: of any runs.
        device: 'cuda' or 'cpu'.
        processes: that will share one run's training.
        given: speeds of one process in training, instead of what records tell.
    """

    def __init__(self, records: list[Record], device: str, processes: int = 1, given: Given | None = None):
        self.device, self.processes, self.given = device, processes, given
        self._known: dict[tuple, Rate] = {}
        for found in records if given is None else []:
            if found["device"]["type"] != device:
                continue
            axes, speed = found["axes"], found["images_per_second"]
            more = processes / found["processes"]
            if speed["pretrain"]:
                self._known[axes["data"], axes["model"]] = Rate(speed["pretrain"] * more, None, "records")
            rest = sum(v for phase, v in found["seconds"].items() if phase != "pretrain")
            trained = speed["stage"] and speed["stage"] * more
            if trained or rest:  # a diverged run's record has neither
                self._known[_stage(axes, found["config"])] = Rate(trained, None if trained else rest, "records")

    def pretraining(self, cell: Cell) -> tuple[float, str]:
        """Seconds, and where the speed comes from: phrases between semicolons."""
        return self._training(self._trained(cell), cell, cell.config["recipe"]["epochs"])

    def stage(self, cell: Cell) -> tuple[float, str]:
        """As `pretraining`."""
        stage = cell.config["stage"]
        epochs = cell.config["recipe"]["epochs"] if cell.pretraining is None else stage.get("epochs", 0)
        if cell.axes["stage"] == "fp32":
            return 0.0, ""
        rate = self._known.get(_stage(cell.axes, cell.config))
        if not epochs:
            return self._after_training(cell, rate)
        if rate is None:
            rate = self._trained(cell)
            rate = rate._replace(source=f"{rate.source}; fine-tuning at least: as fast as pretraining")
        return self._training(rate, cell, epochs)

    def _after_training(self, cell: Cell, rate: Rate | None) -> tuple[float, str]:
        """Of a post-training stage: what it does itself, on one device, and the evaluation before and after."""
        trained, images = self._trained(cell), facts(cell.config).val_images
        if not trained.images_per_second or images is None:
            return 0.0, UNKNOWN
        evaluation = 2 * images / 3 / trained.images_per_second  # forward alone is a third of a step
        if rate and rate.seconds:
            return rate.seconds + evaluation, rate.source
        worth, seconds = post_training(cell.config)
        own = worth * self.processes / trained.images_per_second + seconds
        return own + evaluation, f"{trained.source}; post-training estimated from training speed"

    def _training(self, rate: Rate, cell: Cell, epochs: int) -> tuple[float, str]:
        images = facts(cell.config).train_images
        if not rate.images_per_second or images is None:
            return 0.0, UNKNOWN
        return epochs * images / rate.images_per_second, rate.source

    def machine(self) -> str:
        if self.device == "cuda":
            return f"{self.processes} GPU{'s' * (self.processes > 1)}" + (" of this kind" if self.given is None else "")
        return f"this machine's CPU, {self.processes} process{'es' * (self.processes > 1)}, one run at a time"

    def _trained(self, cell: Cell) -> Rate:
        """Speed of pretraining."""
        if self.given is not None:
            speed, source = self.given.speed(cell)
            return Rate(speed * self.processes, None, source)
        key = cell.axes["data"], cell.axes["model"]
        if key not in self._known:
            # A minute for a large network: whoever waits should know for what. Not in the plan, which may be piped.
            print(f"r2: measuring a training step of {key[1]} on this machine", file=sys.stderr, flush=True)
            speed = step.measure(cell.config, self.device) * self.processes
            self._known[key] = Rate(speed, None, "measured now, without data")
        return self._known[key]


def _stage(axes: dict, config: dict) -> tuple:
    """What a stage's speed depends on. A post-training one takes as long as it iterates, and over so many images."""
    work = () if config["stage"].get("epochs") else (
        config["stage"].get("iterations"), config["data"].get("calibration_images"))  # fmt: skip
    return axes["data"], axes["model"], axes["stage"], *work


def post_training(config: dict) -> tuple[float, float]:
    """What a post-training stage does on one device: in images of a training step, and in seconds of any network."""
    stage, images = config["stage"], config["data"].get("calibration_images", 0)
    worth, seconds = _CALIBRATED * images, 0.0
    if stage.get("bias_correction", "none") != "none":
        worth += _BIAS_CORRECTED * images
    if "iterations" in stage:
        layers = len(quantizable(step.example(config, 1, "meta")[0], stage["skip_first_last"]))
        used = min(images, (stage["batches"] or images) * stage["calibration_batch_size"])
        # Each layer's share of a step is taken once per iteration, and two networks run up to each layer before that.
        worth += stage["iterations"] * stage["batch_size"] + layers * used / 3
        seconds += layers * stage["iterations"] * _ITERATION
    return worth, seconds
