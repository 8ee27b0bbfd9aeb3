"""What runs will cost: time from the speeds that records tell or a short measurement, and memory."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from r2 import record
from r2.config import build
from r2.data.facts import facts
from r2.hub import need_extra
from r2.models import Inputs
from r2.paths import RESULTS
from r2.plan.cells import Cell, groups

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
        given: images/s of one process in pretraining, for every model, instead of what records tell.
    """

    def __init__(self, records: list[dict], device: str, processes: int = 1, given: float | None = None):
        self.device, self.processes, self.given = device, processes, given
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
        return self._training(self._trained(cell), cell, cell.config["recipe"]["epochs"])

    def stage(self, cell: Cell) -> tuple[float, str]:
        """Seconds, and where the speed comes from."""
        stage = cell.config["stage"]
        epochs = cell.config["recipe"]["epochs"] if cell.pretraining is None else stage.get("epochs", 0)
        if cell.axes["stage"] == "fp32":
            return 0.0, ""
        rate = self._known.get((cell.axes["data"], cell.axes["model"], cell.axes["stage"]))
        if rate is None and epochs:
            rate = self._trained(cell)._replace(source="at least: as fast as pretraining")
        return (rate.seconds, rate.source) if rate and rate.seconds else self._training(rate, cell, epochs)

    def _training(self, rate: Rate | None, cell: Cell, epochs: int) -> tuple[float, str]:
        images = facts(cell.config).train_images
        if rate is None or not rate.images_per_second or images is None:
            return 0.0, UNKNOWN
        return epochs * images / rate.images_per_second, rate.source

    def machine(self) -> str:
        if self.device == "cuda":
            return f"{self.processes} GPU{'s' * (self.processes > 1)}" + (" of this kind" if self.given is None else "")
        return f"this machine's CPU, {self.processes} process{'es' * (self.processes > 1)}, one run at a time"

    def _trained(self, cell: Cell) -> Rate:
        """Speed of pretraining."""
        if self.given is not None:
            return Rate(self.given * self.processes, None, f"{self.given:g} images/s of one GPU as given, all models")
        key = cell.axes["data"], cell.axes["model"], "pretrain"
        if key not in self._known:
            speed = measure(cell.config, self.device) * self.processes
            self._known[key] = Rate(speed, None, "measured now, without data")
        return self._known[key]


def measure(config: dict, device: str, steps: int = 2) -> float:
    """Examples/s of bare training steps of the config's model, on random images of its size or texts of full length."""
    batch = min(256 if device == "cuda" else 4, config["recipe"]["batch_size"])
    model, inputs, labels = _example(config, batch, device)
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        loss = _loss(config, model, inputs, labels)
        loss.backward()
        loss.item()
        seconds.append(time.perf_counter() - began)
    return batch / min(seconds[1:])


def memory(config: dict, examples: int) -> tuple[float, float]:
    """GiB that pretraining takes on a device with `examples` at once, before any optimizer step is made.

    The first is what backward keeps of the examples, counted by saved_tensors_hooks on tensors without values, so that
    a CPU tells it of a GPU. The second is weights, gradients and the optimizer's moments. The libraries' workspaces
    and, during backward, a few gradients of activations come on top; torch.compile may keep less.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # holding it keeps its address from being used again
        return tensor

    with FakeTensorMode():
        model, inputs, labels = _example(config, examples, "cpu")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _loss(config, model, inputs, labels)
    for tensor in (*model.parameters(), *model.buffers()):
        kept.pop(tensor.untyped_storage()._cdata, None)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = 2 if config["recipe"].get("optimizer") == "adamw" else 1
    return sum(storage.nbytes() for storage in kept.values()) / 2**30, (2 + moments) * weights / 2**30


def _example(config: dict, batch: int, device: str) -> tuple[nn.Module, Inputs, Tensor]:
    """The config's model in training mode, with inputs and labels of a batch."""
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    if "max_length" in config["data"]:
        need_extra()
        from r2.mobilebert import network

        with torch.device(device):
            model = network(2, {"classifier_activation": False})  # the published one; a plan downloads nothing
        ones = torch.ones(batch, config["data"]["max_length"], dtype=torch.long, device=device)
        return model.train(), {"input_ids": ones, "attention_mask": ones, "token_type_ids": ones}, labels
    known = facts(config)
    size = known.image_size or 224
    with torch.device(device):
        model = build(config["model"], num_classes=known.num_classes or 1000)  # where unknown: it hardly counts
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    return model.train(), images, labels


def _loss(config: dict, model: nn.Module, inputs: Inputs, labels: Tensor) -> Tensor:
    with torch.autocast(labels.device.type, dtype=torch.bfloat16, enabled=config["recipe"]["precision"] != "fp32"):
        return F.cross_entropy(model(inputs), labels)


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
            cost = f", {duration(seconds)}" if seconds else ""
            what = "finished" if done else f"missing{cost}" if waiting else "not needed"
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
    if total:
        known = ", ".join(sorted(sources - {"", UNKNOWN}))
        cost = f" ({total * speeds.processes / 3600:.1f} GPU-hours)" if speeds.device == "cuda" else ""
        yield f"estimated {duration(total)} on {speeds.machine()}{cost}" + (f"; speeds: {known}" if known else "")
    if unknown:
        yield f"not counted: {unknown} post-training runs whose time no record tells"


def speeds_here(config: dict, *folders: Path | None, given: float | None = None) -> Speeds:
    """Of as many of this machine's devices as the config asks for, by the records in `folders` and the published.

    With `given`, images/s of one GPU, of GPUs, wherever they are.
    """
    device, devices = "cuda" if given is not None or torch.cuda.is_available() else "cpu", config["devices"]
    processes = max(1, torch.cuda.device_count()) if devices == "auto" else int(devices)
    return Speeds(known_records([RESULTS / "records", *folders]), device, processes, given)


def known_records(folders: Iterable[Path | None]) -> list[dict[str, Any]]:
    """Every record of the folders that exist."""
    found = []
    for folder in folders:
        if folder is not None and folder.is_dir():
            found += record.find(folder)
    return found
