"""Fifty kills at random moments of every phase: what comes out is what comes out without them."""

import contextlib
import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ENV
from forked import ADAROUND, DKM, EWGS, LINUX, PHASES, TINY, Run, alive, children, results, wait_for
from torchvision.io import write_jpeg

from r2 import store
from r2.plan import cells as planned

pytestmark = pytest.mark.slow
NEAREST = ["stage=none"]
# A phase, the run that is killed in it, and how often: 54, of which pretraining may miss a few, being done only once.
PLAN = [("pretrain", EWGS, 9), ("hessian", EWGS, 6), ("ewgs", EWGS, 8), ("packing", EWGS, 6), ("record", EWGS, 6),
        ("calibration", NEAREST, 5), ("adaround", ADAROUND, 4), ("dkm", DKM, 10)]  # fmt: skip


def durations(run):
    begun, found = {}, {}
    for at, phase, begins in run.marks:
        if begins:
            begun[phase] = at
        else:
            found[phase] = at - begun[phase]
    return found


@pytest.mark.parametrize("model", ["mbv1", "mbv2"])  # the second has dropout, residuals and signed inputs
def test_fifty_kills_change_nothing(model, tmp_path):
    tiny = [f"model={model}" if word.startswith("model=") else word for word in TINY]
    random_ = random.Random(0)
    seconds = {}
    for words in (EWGS, NEAREST, ADAROUND, DKM):
        whole = Run(tmp_path / "whole.log", f"out={tmp_path / 'whole'}", *tiny, *words)
        assert whole.wait() == 0, whole.output()
        seconds |= durations(whole)
    assert seconds.keys() == PHASES.keys()

    out, log = tmp_path / "killed", tmp_path / "killed.log"

    def start(words):
        return Run(log, f"out={out}", *tiny, *words, "force=true")  # a run that was not hit in time begins anew

    kills, hits = 0, dict.fromkeys(PHASES, 0)
    for phase, words, count in PLAN:
        # A phase that goes on from checkpoints shall not be over before the kills for it are.
        share = 0.8 / count if phase in ("pretrain", "ewgs", "dkm") else 0.9
        while hits[phase] < count:
            run = start(words)
            if not run.follow(phase):
                assert run.wait() == 0, run.output()
                break  # pretraining is over
            time.sleep(random_.random() * share * seconds[phase])
            number = random_.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
            run.signal(number)
            status = run.wait()
            assert status in (-number, 128 + number, 0), run.output()
            kills += status != 0
            if status != 0 and run.where():
                hits[run.where()] += 1
    assert kills >= 50 and min(hits.values()) >= 2, hits
    for words in (EWGS, NEAREST, ADAROUND, DKM):
        last = start(words)
        assert last.wait() == 0, last.output()
    assert results(out) == results(tmp_path / "whole")
    assert "Traceback" not in log.read_text(), log.read_text()
    assert not [*out.glob("**/*.part"), *out.glob("**/*.ckpt"), *out.glob("**/*.previous"), *out.glob("**/.owner")]


def later(path):
    """Every file is of the year 2100."""
    for file in path.glob("**/*"):
        os.utime(file, (4102444800, 4102444800))


def jumping():
    """The wall clock goes back and forth by years with every look at it."""
    clock, jump = time.time, itertools.cycle([3e8, -3e8, 0])
    time.time = lambda: clock() + next(jump)


def test_clock_jumps_change_nothing(tmp_path):
    out = tmp_path / "whole"
    run = Run(tmp_path / "whole.log", f"out={out}", *TINY, *EWGS)
    assert run.wait() == 0, run.output()
    for phase, delay in (("pretrain", 0.5), ("ewgs", 0.5), ("none", 0)):
        run = Run(tmp_path / "log", f"out={tmp_path / 'jumps'}", *TINY, *EWGS, before=jumping)
        if run.follow(phase):
            time.sleep(delay)
            run.signal(signal.SIGKILL)
            later(tmp_path / "jumps")
        assert run.wait() in (0, -signal.SIGKILL), run.output()
    assert results(tmp_path / "jumps") == results(out)
    (path,) = tmp_path.glob("jumps/*/record.json")
    assert all(0 <= seconds < 600 for seconds in json.loads(path.read_text())["seconds"].values())


@LINUX
def test_kills_of_a_run_with_data_workers_change_nothing_and_leave_no_process(tmp_path):
    """Augmentation in two processes beside the one that is killed."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 2)):
        for label in range(10):
            folder = tmp_path / "data" / split / f"n{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (3, 48, 40), generator=generator, dtype=torch.uint8)
                write_jpeg(pixels, str(folder / f"{i}.jpg"))
    words = [word for word in TINY if not word.startswith("data")]
    words += ["data=imagenette", f"data.root={tmp_path / 'data'}", "data.image_size=32", "data.workers=2"]
    whole = Run(tmp_path / "whole.log", f"out={tmp_path / 'whole'}", *words, "stage=fp32")
    assert whole.wait() == 0, whole.output()
    random_, out = random.Random(1), tmp_path / "killed"
    workers = []
    for _ in range(4):
        run = Run(tmp_path / "log", f"out={out}", *words, "stage=fp32")
        assert run.follow("pretrain"), run.output()
        wait_for(lambda run=run: len(children(run.process.pid)) >= 2 or not run.process.is_alive())
        workers += children(run.process.pid)
        time.sleep(0.4 * random_.random())
        run.signal(random_.choice([signal.SIGKILL, signal.SIGTERM]))
        run.wait()
    assert len(workers) >= 4
    last = Run(tmp_path / "log", f"out={out}", *words, "stage=fp32")
    assert last.wait() == 0 and results(out) == results(tmp_path / "whole"), last.output()
    wait_for(lambda: not any(map(alive, workers)), 20)


def test_two_sweeps_share_their_pretrainings(tmp_path):
    """Each is trained once, whoever comes first, and both sweeps finish."""
    sweeps = [Run(tmp_path / f"{i}.log", f"out={tmp_path / 'out'}", "-m", *TINY, *words) for i, words in
              enumerate((["reg=l2,margin", "stage=fp32,lsq"], ["reg=margin,l2", "stage=lsq,dkm"]))]  # fmt: skip
    assert [sweep.wait() for sweep in sweeps] == [0, 0], sweeps[0].output() + sweeps[1].output()
    told = sweeps[0].output() + sweeps[1].output()
    assert told.count("pretrain: epoch 1/4") == 2  # l2, margin
    assert told.count("lsq: epoch 1/3") == told.count("dkm: epoch 1/3") == 2
    assert len(list(tmp_path.glob("out/*/record.json"))) == 6


def reproduce(log, *words):
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, "-m", "r2.reproduce", *words], env=ENV, stdout=file, stderr=file)


@LINUX
def test_a_table_survives_its_driver_and_three_broken_cells(tmp_path):
    """The driver is killed; then of eight cells one raises, one is killed and one meets NaN; then all is well."""
    out, log = tmp_path / "out", tmp_path / "log"
    overrides = [*(w for w in TINY if not w.startswith("reg")), "reg=l2,margin", "stage.bits=1,2,3,4", f"out={out}",
                 "recipe.epochs=1", "recipe.finetune.epochs=2"]  # fmt: skip
    cells = {(c.axes["reg"], c.axes["weight_bits"]): c.directory for c in planned.cells(["table5"], overrides)}
    assert len(cells) == 8

    def finished():
        records = {cell: path / "record.json" for cell, path in cells.items()}
        return {cell: path.stat().st_mtime_ns for cell, path in records.items() if path.exists()}

    def owner_of(cell):
        """The process that trains a cell, once it has written a checkpoint."""
        with contextlib.suppress(OSError):
            return (cells[cell] / "dkm.ckpt").exists() and int((cells[cell] / ".owner").read_text().split()[1])

    driver = reproduce(log, "table=5", *overrides)
    job = wait_for(lambda: owner_of(("l2", 2)))
    started = children(driver.pid)
    driver.kill()
    driver.wait()
    wait_for(lambda: not any(map(alive, started)), 30)
    assert job in started and finished().keys() == {("l2", 1)}

    state = store.load(cells["l2", 2] / "dkm.ckpt")
    nowhere = {**state["position"], "step": "no number"}  # where the loop cannot go on
    store.save(cells["l2", 2] / "dkm.ckpt", {**state, "position": nowhere})
    state["model"]["features.0.0.weight"][0] = float("nan")
    cells["margin", 2].mkdir()
    store.save(cells["margin", 2] / "dkm.ckpt", {**state, "key": cells["margin", 2].name[-8:]})
    before = finished()
    driver = reproduce(log, "table=5", *overrides)
    os.kill(wait_for(lambda: owner_of(("margin", 3))), signal.SIGKILL)
    assert driver.wait(timeout=300) == 1
    reasons = [line for line in log.read_text().splitlines() if line.startswith("r2: failed: python -m r2.run")]
    whys = ("TypeError, see above", "killed by SIGKILL")
    diverged = [line for line in log.read_text().splitlines() if line.startswith("r2: diverged, counted at chance: ")]
    assert len(diverged) == 1 and "reg=margin" in diverged[0] and (cells["margin", 2] / "diverged.json").exists()
    assert len(reasons) == 2 and all(any(why in line for line in reasons) for why in whys), reasons
    assert finished().keys() == cells.keys() - {("l2", 2), ("margin", 2), ("margin", 3)}
    assert finished().items() >= before.items()

    before = finished()
    for cell in (("l2", 2), ("margin", 2)):
        store.remove(*cells[cell].glob("dkm.*"))
    (cells["margin", 2] / "diverged.json").unlink()
    assert reproduce(log, "table=5", *overrides).wait(timeout=300) == 0, log.read_text()
    assert "8 runs, 5 finished before, 3 to do" in log.read_text()
    assert finished().keys() == cells.keys() and finished().items() >= before.items()


def broken(seed):
    """Of a sweep inside one process, the runs of two seeds fail: one raises, one loses its numbers."""
    from r2.stages import dkm

    train = dkm.train

    def call(model, data, recipe, run, *rest, **more):
        if run.seed == seed:
            raise RuntimeError("broken on purpose")
        if run.seed == seed + 1:
            next(model.parameters()).data.fill_(float("nan"))
        return train(model, data, recipe, run, *rest, **more)

    dkm.train = call


def test_a_sweep_in_one_process_lists_what_failed(tmp_path):
    words = [f"out={tmp_path}", "-m", *TINY, "recipe.epochs=1", "seed=0,1,2,3", "stage=dkm"]
    sweep = Run(tmp_path / "log", *words, before=functools.partial(broken, 1))
    assert sweep.wait() in (1, 2)
    told = [line for line in sweep.output().splitlines() if line.startswith("r2: failed:")]
    assert len(told) == 2 and "seed=1" in told[0] and "(RuntimeError, see above)" in told[0]
    assert "seed=2" in told[1] and "not finite" in told[1] and len(list(tmp_path.glob("*/record.json"))) == 2
    again = Run(tmp_path / "again", *words)
    assert again.wait() == 0 and again.output().count("not repeated (force=true") == 2, again.output()
    assert again.output().count("dkm: epoch 1/3") == 2
