"""What the curve says of time and memory, also of an epoch that was interrupted."""

import csv
import json
import time
from dataclasses import asdict

import pytest
import torch
from conftest import SMALL

from r2 import timing
from r2.dist import World
from r2.timing import Timing

WORLD = World()


def epoch(found, data, step, steps=20, sync_every=1):
    """`steps` steps of `step` seconds, whose batches take `data` seconds each."""

    def batches():
        for i in range(steps):
            time.sleep(data)
            yield i

    for i in found.waiting(batches()):
        time.sleep(step)
        if i % sync_every == sync_every - 1:
            found.mark()
    return found.row(8, WORLD)


def test_time_is_split_into_waiting_and_working():
    row = epoch(Timing(), data=0.006, step=0.002)
    assert row["data_wait"] > 0.6 and row["step_seconds_p50"] >= 0.008
    assert row["images_per_second"] <= 8 / 0.008
    assert epoch(Timing(), data=0.0, step=0.004)["data_wait"] < 0.3


def test_steps_between_two_marks_count_as_their_mean():
    found = Timing()
    row = epoch(found, data=0.0, step=0.002, sync_every=10)
    assert len(found.steps) == 20 and len(set(found.steps)) == 2
    assert row["step_seconds_p50"] <= row["step_seconds_p95"] == pytest.approx(max(found.steps), abs=1e-6)


def test_an_interrupted_epoch_keeps_its_first_part():
    first = Timing()
    epoch(first, data=0.0, step=0.001, steps=15)
    second = Timing(**json.loads(json.dumps(asdict(first))))
    epoch(second, data=0.0, step=0.005, steps=5)
    assert second.steps[:15] == first.steps and len(second.steps) == 20
    assert second.memory_mib >= first.memory_mib > 100


def test_what_happens_between_steps_is_no_part_of_them():
    found = Timing()
    for i in found.waiting(iter(range(4))):
        found.mark()
        if i == 1:
            time.sleep(0.2)  # a checkpoint
            found.begin()
    assert len(found.steps) == 4 and max(found.steps) < 0.1


def test_a_phase_is_its_epochs_medians():
    rows = [{"epoch": 1}, *(epoch(Timing(), 0.0, step, steps=3) for step in (0.001, 0.03, 0.002))]  # 1: an older r2
    assert 0.002 <= timing.summary(rows)["step_seconds_p50"] < 0.03
    assert timing.summary(rows[:1]) is None


def test_curve_and_record_say_it(r2):
    done = r2(*SMALL, "recipe.epochs=2", "stage=dkm")
    assert done.returncode == 0, done.stderr
    (path,) = r2.out.glob("pretrained/*/curve-pretrain.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert all(0 <= float(row["data_wait"]) < 1 and float(row["peak_memory_mib"]) > 100 for row in rows)
    (path,) = r2.out.glob("*/record.json")
    of_phases = json.loads(path.read_text())["timing"]
    for phase in of_phases.values():
        assert phase["step_seconds_p95"] >= phase["step_seconds_p50"] > 0


@pytest.mark.gpu
def test_memory_of_a_gpu_is_its_own_and_of_this_epoch():
    device = torch.device("cuda", 0)
    torch.empty(64 << 20, dtype=torch.uint8, device=device)
    first, second = Timing(), Timing()
    first.note_memory(device)
    second.note_memory(device)
    assert first.memory_mib >= 64 > second.memory_mib
