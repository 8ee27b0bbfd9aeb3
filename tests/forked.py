"""The real command line in forked processes: what takes seconds to import is imported once, in the fork server."""

import contextlib
import multiprocessing
import os
import sys
import time
from unittest import mock

from conftest import ENV

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


class Run:
    """`python -m r2.run *words` in a process of its own; `log` gets what it prints.

    Args:
        before: called in the process before the command line is read; must be a function of a module.
    """

    def __init__(self, log, *words, before=None, env=None):
        self.log, self.words, self.marks = log, words, []
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
        """The phase in which it ended, None between phases."""
        inside = []
        for _, phase, begins in self.marks:
            inside.append(phase) if begins else inside.remove(phase)
        return inside[-1] if inside else None


def _main(log, words, before, env, writer):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.environ.update(env)
    sys.argv[1:] = words
    from r2 import cli

    for phase, functions in PHASES.items():
        for name, function in functions:
            _marked(writer, phase, name, function)
    if before:
        before()
    cli.main("r2.run")


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
