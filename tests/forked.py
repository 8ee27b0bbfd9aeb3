"""The real command line in forked processes: what takes seconds to import is imported once, in the fork server."""

import contextlib
import csv
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
from conftest import ENV, SMALL

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["pytest", "aimet_torch", "forked", "r2.run", "r2.record", "r2.stages.ptq", "wandb"])
# Where each phase of a run begins and ends: module, function. Records are gathered by the first, written by the second.
PHASES = {
    "pretrain": [("r2.pretrain", "train")],
    "hessian": [("r2.stages.qat", "gradient_scales")],
    "ewgs": [("r2.stages.qat", "train")],
    "dkm": [("r2.stages.dkm", "train")],
    "calibration": [("r2.stages.aimet", "simulate")],
    "adaround": [("r2.stages.aimet", "adaround")],
    "packing": [("r2.pack", "save")],
    "record": [("r2.record", "make"), ("r2.store.Run", "finish")],
}

TINY = [*SMALL, "model=mbv1", "reg=margin", "data.train_images=64", "data.val_images=20", "recipe.batch_size=16",
        "recipe.epochs=4", "recipe.finetune.epochs=3", "recipe.finetune.batch_size=16",
        "recipe.finetune.adaround_iterations=2", "checkpoint_seconds=0"]  # fmt: skip
EWGS = ["stage=ewgs", "stage.delta=hessian", "stage.hessian_batches=1", "stage.lr=0.001",
        "stage.hessian_probes=2"]  # fmt: skip
DKM, ADAROUND = ["stage=dkm"], ["stage=adaround"]
# Of a record: speed, how and where it was asked for (its name says what), checkout, and its own sum.
OTHER = {"seconds", "images_per_second", "timing", "command", "choices", "config", "commit", "digest"}
CLOCK_COLUMNS = {"images_per_second", "data_wait", "step_seconds_p50", "step_seconds_p95", "peak_memory_mib"}


def results(out):
    """Everything that a set of runs has come to, without what the clock says: records, curves and packed files."""
    found = {}
    for path in out.glob("*/record.json"):
        record = json.loads(path.read_text())
        found[path.parent.name, "record"] = {key: value for key, value in record.items() if key not in OTHER}
        found[path.parent.name, "file"] = path.with_name("model.safetensors").read_bytes()
    for path in out.glob("**/curve-*.csv"):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        found[path.parent.name, path.name] = [[v for k, v in row.items() if k not in CLOCK_COLUMNS] for row in rows]
        if path.name != "curve-weights.csv":
            assert [row["epoch"] for row in rows] == [str(i + 1) for i in range(len(rows))]
    return found


def call(command, cwd, timeout=300):
    """As subprocess.run of `python -m` and the words of command, with what it prints captured, seconds sooner."""
    with mock.patch.dict(os.environ, ENV), tempfile.TemporaryDirectory() as folder:
        said = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        process = context.Process(target=_call, args=(command, cwd, said))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, process.exitcode, *(Path(path).read_text() for path in said))


def _call(command, cwd, said):
    os.chdir(cwd)
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    _enter(*command)


def _enter(name, *words):
    """As `python -m` does."""
    multiprocessing.set_start_method(None, force=True)  # the system's own, for processes that the run starts
    sys.argv[1:] = words
    if name == "r2.run":
        import r2.run
        from r2 import cli

        cli.main(r2.run.start, r2.run.ready, r2.run.compare)
    else:
        importlib.import_module(name).main()


class Run:
    """`python -m r2.run *words` in a process of its own; `log` gets what it prints.

    Args:
        before: called in the process before the command line is read; must be a function of a module.
    """

    def __init__(self, log, *words, before=None, env=None):
        self.log, self.marks, self.began = log, [], time.monotonic()
        with mock.patch.dict(os.environ, ENV):  # the first call starts the server
            self._reader, writer = context.Pipe(duplex=False)
            self.process = context.Process(target=_main, args=(str(log), words, before, env or {}, writer))
            self.process.start()
        writer.close()

    def output(self):
        return self.log.read_text()

    def wait(self, timeout=300):
        """Its exit status; marks holds (time, phase, begins?) of everything."""
        self.follow(None)
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.output()}"
        return self.process.exitcode

    def follow(self, phase):
        """Return when `phase` has begun (True) or the process has ended (False)."""
        try:
            while True:
                self.marks.append(self._reader.recv())
                if self.marks[-1][1:] == (phase, True):
                    return True
        except EOFError:
            return False

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.process.pid, number)

    def where(self):
        """The phase in which a signal ended it, None between phases."""
        inside = []
        for _, phase, begins in self.marks:
            inside.append(phase) if begins else inside.remove(phase)
        if self.process.exitcode > 128:  # it has left the phase by itself, after a checkpoint
            return self.marks[-1][1]
        return inside[-1] if inside else None


def _main(log, words, before, env, writer):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.environ.update(env)
    for phase, functions in PHASES.items():
        for name, function in functions:
            _marked(writer, phase, name, function)
    if before:
        before()
    _enter("r2.run", *words)


def _marked(writer, phase, name, function):
    import pkgutil

    place = pkgutil.resolve_name(name)
    original = getattr(place, function)

    def call(*args, **kwargs):
        writer.send((time.monotonic(), phase, True))
        try:
            return original(*args, **kwargs)
        finally:
            writer.send((time.monotonic(), phase, False))

    setattr(place, function, call)


def alive(pid):
    """Whether a process is there and is not only waiting to be reaped (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children(pid):
    """The processes that `pid` has started, and those that they have (Linux)."""
    found = [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


def wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found
