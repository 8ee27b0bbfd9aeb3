"""Fifty kills at random moments of every phase: what comes out is what comes out without them."""

import csv
import json
import random
import signal
import time

import pytest
from conftest import SMALL
from forked import PHASES, Run

pytestmark = pytest.mark.slow
TINY = [*SMALL, "model=mbv1", "reg=margin", "data.train_images=128", "data.val_images=50", "recipe.batch_size=16",
        "recipe.epochs=4", "recipe.finetune.epochs=3", "recipe.finetune.batch_size=16",
        "recipe.finetune.adaround_iterations=2", "checkpoint_seconds=0"]  # fmt: skip
EWGS = ["stage=ewgs", "stage.delta=hessian", "stage.hessian_batches=1", "stage.hessian_probes=2"]
DKM, ADAROUND = ["stage=dkm"], ["stage=adaround"]
# A phase, the run that is killed in it, and how often. The last one begins anew each time and takes what is left over.
PLAN = [("pretrain", EWGS, 8), ("hessian", EWGS, 4), ("ewgs", EWGS, 7), ("packing", EWGS, 4), ("record", EWGS, 4),
        ("dkm", DKM, 8), ("calibration", ADAROUND, 5), ("adaround", ADAROUND, 50)]  # fmt: skip
CLOCKS = {"seconds", "images_per_second", "timing", "command", "config"}  # of a record: tell of speed and of `out`
CLOCK_COLUMNS = {"images_per_second", "data_wait", "step_seconds_p50", "step_seconds_p95", "peak_memory_mib"}


def results(out):
    """Everything that a set of runs has come to, without what the clock says: records, curves and packed files."""
    found = {}
    for path in out.glob("*/record.json"):
        record = json.loads(path.read_text())
        found[path.parent.name, "record"] = {key: value for key, value in record.items() if key not in CLOCKS}
        found[path.parent.name, "file"] = path.with_name("model.safetensors").read_bytes()
    for path in out.glob("**/curve-*.csv"):
        rows = list(csv.DictReader(path.read_text().splitlines()))
        found[path.parent.name, path.name] = [[v for k, v in row.items() if k not in CLOCK_COLUMNS] for row in rows]
        if path.name != "curve-weights.csv":
            assert [row["epoch"] for row in rows] == [str(i + 1) for i in range(len(rows))]
    return found


def durations(run):
    begun, found = {}, {}
    for at, phase, begins in run.marks:
        if begins:
            begun[phase] = at
        else:
            found[phase] = at - begun[phase]
    return found


def test_fifty_kills_change_nothing(tmp_path):
    random_ = random.Random(0)
    seconds = {}
    for words in (EWGS, DKM, ADAROUND):
        whole = Run(tmp_path / "whole.log", f"out={tmp_path / 'whole'}", *TINY, *words)
        assert whole.wait() == 0, whole.output()
        seconds |= durations(whole)
    assert seconds.keys() == PHASES.keys()

    out, log = tmp_path / "killed", tmp_path / "killed.log"
    kills, hits = 0, dict.fromkeys(PHASES, 0)
    for phase, words, count in PLAN:
        tries = 0
        while tries < count and kills < 50:
            run = Run(log, f"out={out}", *TINY, *words)
            # A phase that goes on from checkpoints shall not be over before the kills for it are.
            share = 1.2 / count if phase in ("pretrain", "ewgs", "dkm") else 1.0
            if not run.follow(phase):
                assert run.wait() == 0, run.output()
                break  # it is over
            time.sleep(random_.random() * share * seconds[phase])
            number = random_.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
            run.signal(number)
            status = run.wait()
            assert status in (-number, 128 + number, 0), run.output()
            tries += 1
            kills += status != 0
            if status != 0 and run.where():
                hits[run.where()] += 1
    assert kills == 50 and all(hits.values()), hits
    for words in (EWGS, DKM, ADAROUND):
        last = Run(log, f"out={out}", *TINY, *words)
        assert last.wait() == 0, last.output()
    assert results(out) == results(tmp_path / "whole")
    told = log.read_text()
    assert "Traceback" not in told, told
    assert not [*out.glob("**/*.part"), *out.glob("**/*.ckpt"), *out.glob("**/*.previous"), *out.glob("**/.owner")]
