"""Plan, run and render tables and figures of the paper.

python -m r2.reproduce table=2 data=imagenet plan=true          # the runs it needs, which exist, what the rest costs
python -m r2.reproduce table=2,3 data=fashion_mnist seeds=0,1,2 jobs=2
python -m r2.reproduce all

    table=1..7  figure=1,2  all    what to reproduce
    plan=true                      only report what would be run, and its cost on the devices of this machine
    images_per_second=N            with plan=true or check=true: the measured pretraining speed of one GPU. The plan is
                                   then for devices=N GPUs of another machine. N is for each model at its largest width
                                   in the plan, other widths are scaled; mbv1-1.0:N,mbv1-0.25:N,... sets it per network
    check=true                     check each missing run as python -m r2.run does
    seeds=0,1,2                    repeat every run with these seeds
    jobs=N                         concurrent pretrainings, each with its share of a CPU's threads
    records=DIR                    runs with a record in DIR are not repeated; records of new runs are copied to DIR.
                                   Pages are written into DIR, or beside it if it is called "records"

Every other key=value is passed to each run as in python -m r2.run; key=a,b,c makes or replaces an axis of the table.
"""

import math
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

from r2.config import GROUPS, UserError, last_line, signature
from r2.hints import unknown_key

_OWN = ("table", "figure", "plan", "images_per_second", "seeds", "jobs", "records")


@dataclass(frozen=True)
class Request:
    """The command line, read."""

    experiments: list[str]
    overrides: list[str]
    plan: bool
    jobs: int
    records: Path | None
    images_per_second: dict[str, float]


def read(arguments: list[str]) -> Request:
    """
    Raises:
        UserError: a word that is no key=value, or a value that its key does not take.
    """
    own: dict[str, str] = {}
    overrides: dict[str, str] = {}
    from r2.compose import words_of

    known = list(dict.fromkeys([*_OWN, *GROUPS, *signature("r2.config.Root")]))
    for word in words_of(arguments):
        key, equals, value = word.partition("=")
        if word == "all":
            own |= {"table": "1,2,3,4,5,6,7", "figure": "1,2"}
        elif not equals or not value:
            raise UserError(f"{word!r}: expected key=value, e.g. table=2 plan=true, or all")
        elif key.isidentifier() and key not in known:
            raise UserError(unknown_key(key, known))
        else:
            (own if key in _OWN else overrides)[key] = value
    wanted = [f"table{n}" for n in own["table"].split(",")] if "table" in own else []
    wanted += [f"figure{n}" for n in own["figure"].split(",")] if "figure" in own else []
    if not wanted:
        raise UserError("nothing asked for: give table=1..7, figure=1,2 or all")
    if own.get("plan", "false") not in ("true", "false"):
        raise UserError(f"plan={own['plan']}: must be true or false")
    jobs = own.get("jobs", "1")
    if not jobs.isdecimal() or int(jobs) < 1:
        raise UserError(f"jobs={jobs}: must be a whole number, 1 or more")
    speeds = _speeds(own["images_per_second"]) if "images_per_second" in own else {}
    if speeds and own.get("plan") != "true" and overrides.get("check") != "true":
        raise UserError(f"images_per_second={own['images_per_second']}: only a plan uses it; add plan=true")
    if "seeds" in own:
        overrides["seed"] = own["seeds"]
    if int(jobs) > 1 and "threads" not in overrides:
        overrides["threads"] = str(max(1, (os.cpu_count() or 1) // int(jobs)))
    records = Path(own["records"]) if "records" in own else None
    words = [f"{k}={v}" for k, v in overrides.items()]
    return Request(wanted, words, own.get("plan") == "true", int(jobs), records, speeds)


def _speeds(text: str) -> dict[str, float]:
    """Images/s by network name, as r2.plan.speeds.Given reads them; of N alone, under no name."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition(":")
        value = float(number) if re.fullmatch(r"\d*\.?\d+(e[+-]?\d+)?", number) else 0.0
        if name in found or not 0 < value < math.inf:
            raise UserError(
                f"images_per_second={text}: must be a number above 0, or NETWORK:NUMBER,... as mbv1-0.25:9000"
            )
        found[name] = value
    return found


def reproduce(request: Request) -> int:
    """Do what was asked; returns how many runs failed."""
    from r2 import record, store
    from r2.plan import cost
    from r2.plan.cells import cells as planned
    from r2.plan.check import check_all, ready
    from r2.plan.speeds import Given
    from r2.report import page

    words = dict(word.split("=", 1) for word in request.overrides)
    if not request.images_per_second and words.get("devices", "").isdecimal():
        cost.processes(words["devices"], False)  # before the time that the runs of a table take to compose
    cells = planned(request.experiments, request.overrides)
    used = sorted({cell.axes["data"] for cell in cells} - {"imagenet", "qnli"})
    if "data" not in words and used:
        print(f"on {', '.join(used)}; the paper's are data=imagenet")
    given = Given(cells, request.images_per_second) if request.images_per_second else None
    out = Path(cells[0].config["out"])
    if request.plan:
        speeds = cost.speeds(cells[0].config["devices"], given, request.records, out)
        for line in cost.describe(cells, request.records, speeds):
            print(line)
        if speeds.device == "cpu":
            print("for GPU-hours, add images_per_second=N, the training speed of one GPU "
                  "(a column of a run's curve-pretrain.csv)")  # fmt: skip
        if given is None:
            print("check=true tells whether they would start on this machine")
        return 0
    missing = [cell for cell in cells if not cell.finished(request.records)]
    if cells[0].config["check"]:
        return check_all(missing, given)
    print(
        f"r2: {cost.count(len(cells), 'run')}, {len(cells) - len(missing)} finished before, {len(missing)} to do",
        flush=True,
    )
    if request.records is not None:
        store.make_directory(request.records, "records")
    ready(cell.config for cell in missing)
    reasons = run_all(missing, request.jobs, visible_gpus())
    failed = [cell for cell in missing if not record.path_of(cell.directory).exists()]
    for cell in failed:
        print(f"r2: failed: {record.command(cell.config)} ({reasons.get(cell.name, 'not begun')})", file=sys.stderr)
    for cell in cells:
        if record.path_of(cell.directory).name == "diverged.json":
            print(f"r2: diverged, counted at chance: {record.command(cell.config)}", file=sys.stderr)
    folder = out
    if request.records is not None:
        collect(cells, request.records)
        folder = request.records.parent if request.records.name == "records" else request.records
    if len(failed) < len(cells):
        written = page.write(folder, out / "pretrained")
        for path in written:
            if not path.is_relative_to(folder):  # the README's and the docs' blocks of r2's own results
                print(f"r2: written: {path}")
        print(f"r2: tables, figures and claims are in {folder}; all of it on one page: {folder / 'report.html'}")
    return len(failed)


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]


def run_all(cells: list, jobs: int, gpus: list[str]) -> dict[str, str]:
    """Run cells in processes of their own, those of one pretraining in one after the other.

    A post-training stage takes one GPU: once a pretraining is there, its post-training cells run side by side.

    Args:
        gpus: shared out evenly among the jobs.

    Returns:
        why each run that failed did so, by its name.

    Raises:
        UserError: more jobs than GPUs, or more devices than a job's share of them.
    """
    from r2.plan.cells import groups

    if gpus and jobs > len(gpus):
        raise UserError(f"jobs={jobs}: this machine has {len(gpus)} GPUs, and a job takes at least one")
    share = len(gpus) // jobs
    for wanted in (cell.config["devices"] for cell in cells):
        if gpus and wanted != "auto" and wanted > share:
            raise UserError(f"devices={wanted}: with jobs={jobs} a job has {share} of this machine's {len(gpus)} GPUs")
    free = gpus[: share * jobs]
    waiting = [task for group in groups(cells) for task in _tasks(group, share)]
    running, reasons = list[_Job](), dict[str, str]()
    try:
        while waiting or running:
            while task := next((t for t in waiting if t.gpus <= len(free) and (gpus or len(running) < jobs)), None):
                waiting.remove(task)
                running.append(_Job(task, [free.pop(0) for _ in range(task.gpus)]))
            wait([job.process.sentinel for job in running])
            for job in [job for job in running if not job.process.is_alive()]:
                running.remove(job)
                free += job.gpus
                reasons |= job.reasons()
                waiting = [*_tasks([*job.untouched(), *job.later], share), *waiting]
    finally:  # stopped: the runs write a checkpoint, and the same command resumes them
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.join()
    return reasons


class _Task(NamedTuple):
    """Cells of one pretraining: `now` in one process on so many GPUs, `later` when the pretraining is there."""

    now: list
    later: list
    gpus: int


def _tasks(cells: list, gpus: int) -> list[_Task]:
    """What can begin now of cells of one pretraining."""
    later = [cell for cell in cells if cell.pretraining and not cell.config["stage"].get("epochs")] if gpus > 1 else []
    if cells and later == cells:
        if cells[0].pretrained():
            return [_Task([replace(cell, config={**cell.config, "devices": 1})], [], 1) for cell in cells]
        later = later[1:]  # the first one pretrains
    return [_Task([cell for cell in cells if cell not in later], later, gpus)] if cells else []


class _Job:
    """A process that runs a task's cells one after the other and tells how each ended."""

    def __init__(self, task: _Task, gpus: list[str]):
        self.cells, self.later, self.gpus = task.now, task.later, gpus
        context = get_context("spawn")
        self._reader, writer = context.Pipe(duplex=False)
        self.process = context.Process(target=_run, args=([cell.config for cell in task.now], gpus, writer))
        self.process.start()
        writer.close()
        self._ends: list[str] = []

    def reasons(self) -> dict[str, str]:
        """Why runs of the ended process failed, by name."""
        while self._reader.poll():
            try:
                self._ends.append(self._reader.recv())
            except EOFError:
                break
        if self._killed_by() and len(self._ends) < len(self.cells):
            self._ends.append(f"killed by {signal.Signals(self._killed_by()).name}")
        return {cell.name: end for cell, end in zip(self.cells, self._ends, strict=False) if end}

    def untouched(self) -> list:
        """The cells behind the one that the process was killed in, e.g. for want of memory."""
        return self.cells[len(self._ends) :] if self._killed_by() else []

    def _killed_by(self) -> int:
        """The signal's number; 0 if the process left by itself."""
        return max(0, -(self.process.exitcode or 0))


def _run(configs: list[dict], gpus: list[str], ends: Connection) -> None:
    """A failure is reported and ends one run, not the others."""
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)  # before anything imports torch
    from r2.dist import end_with_parent
    from r2.run import start

    end_with_parent()
    for config in configs:
        end = ""
        try:
            start(config)
        except UserError as error:
            end = last_line(error)
            print(f"r2: {end}", file=sys.stderr, flush=True)
        except SystemExit as stop:
            if stop.code and int(stop.code) >= 128:  # a signal: the whole group stops
                raise
            end = "see above"
        except Exception as error:
            end = f"{type(error).__name__}, see above"
            traceback.print_exc()
        ends.send(end)


def collect(cells: Iterable, records: Path) -> None:
    """Copy each finished cell's record to records/<name>.json."""
    from r2 import record

    for cell in cells:
        found = record.path_of(cell.directory)
        if found.exists():
            shutil.copyfile(found, records / f"{cell.name}.json")


def main(arguments: list[str] | None = None) -> None:
    words, failed = sys.argv[1:] if arguments is None else arguments, 0
    from r2.cli import refusals

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with refusals():
        if not words or {"-h", "--help"} & set(words):
            print(__doc__)
        else:
            failed = reproduce(read(words))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
