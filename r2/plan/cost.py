"""The cost of runs: the plan line by line, and the speeds that it assumes."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from r2 import record
from r2.config import UserError
from r2.dist import device_count
from r2.identity import trains
from r2.paths import RESULTS
from r2.plan.cells import Cell, groups
from r2.plan.speeds import UNKNOWN, Given, Speeds


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `21 d`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def describe(planned: list[Cell], records: Path | None, speeds: Speeds) -> Iterator[str]:
    """The plan, line by line: each pretraining with its runs, then the totals."""
    total, sources = 0.0, set[str]()
    unknown_runs = unknown_pretrainings = missing_runs = missing_pretrainings = 0
    for group in groups(planned):
        waiting = [cell for cell in group if not cell.finished(records)]
        if group[0].pretraining is not None:
            config, axes, done = group[0].config, group[0].axes, group[0].pretrained() or not trains(group[0].config)
            seconds, source = speeds.pretraining(group[0]) if waiting and not done else (0.0, "")
            cost = f", {duration(seconds)}" if seconds else ""
            what = "finished" if done else f"missing{cost}" if waiting else "not needed"
            missing_pretrainings += bool(waiting and not done)
            unknown_pretrainings += source == UNKNOWN
            total += seconds
            sources |= set(source.split("; "))
            of = f"{axes['data']} {axes['model']} {axes['reg']} seed {axes['seed']}"
            begun = f" from {config['weights']['source']}" if config["weights"] else ""
            if trains(config):
                yield f"pretraining {of}{begun}, {count(config['recipe']['epochs'], 'epoch')}: {what}"
            else:
                yield f"no pretraining {of}:{begun} as it is"
        for cell in group:
            if cell not in waiting:
                yield f"  finished  {cell.name}"
                continue
            seconds, source = speeds.stage(cell)
            unknown_runs += source == UNKNOWN
            missing_runs += 1
            total += seconds
            sources |= set(source.split("; "))
            yield f"  missing   {cell.name}" + (f", {duration(seconds)}" if seconds else "")
            yield f"            {record.command(cell.config)}"
    yield (f"{count(len(planned), 'run')}, {len(planned) - missing_runs} finished, {missing_runs} missing, "
           f"which need{'s' * (missing_runs == 1)} {count(missing_pretrainings, 'pretraining')}")  # fmt: skip
    if total:
        known = "; ".join(sorted(sources - {"", UNKNOWN}))
        cost = f" ({total * speeds.processes / 3600:.1f} GPU-hours)" if speeds.device == "cuda" else ""
        yield f"estimated {duration(total)} on {speeds.machine()}{cost}" + (f"; speeds: {known}" if known else "")
    if unknown_runs or unknown_pretrainings:
        yield (f"not counted: {count(unknown_runs, 'run')} and {count(unknown_pretrainings, 'pretraining')}, "
               "of data whose size is not known")  # fmt: skip


def processes(devices: int | str, elsewhere: bool) -> int:
    """How many devices share a run's training.

    Of another machine, as many as are asked for, whatever is here; auto, which would be all of its GPUs, counts as one.

    Raises:
        UserError: of this machine, more than it has.
    """
    if elsewhere:
        return 1 if devices == "auto" else int(devices)
    try:
        return int(os.environ.get("WORLD_SIZE", 0)) or device_count(devices)
    except UserError as error:
        raise UserError(
            f"{error}; to plan for another machine's GPUs, add images_per_second=N, the training speed of one"
        ) from None


def speeds(devices: int | str, given: Given | None, *folders: Path | None) -> Speeds:
    """Of this machine's devices, by the records in `folders` and the published; with `given`, of GPUs of another one.

    Raises:
        UserError: more devices than there are here.
    """
    device = "cuda" if given or torch.cuda.is_available() else "cpu"
    return Speeds(known_records([RESULTS / "records", *folders]), device, processes(devices, given is not None), given)


def known_records(folders: Iterable[Path | None]) -> list[record.Record]:
    """Every readable record of the folders that exist: another run's damaged one hinders no plan."""
    found: list[record.Record] = []
    for folder in filter(None, folders):
        for path in record.paths(folder):
            with contextlib.suppress(UserError):
                found.append(record.read(path))
    return found


def count(number: int, what: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {what}{'s' * (number != 1)}"
