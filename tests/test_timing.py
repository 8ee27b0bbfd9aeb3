"""What the curve says of time and memory, also of an epoch that was interrupted."""

import csv
import json
from dataclasses import asdict

import pytest
import torch
from conftest import SMALL

from r2.dist import World
from r2.training import timing
from r2.training.timing import Timing

WORLD = World()


class Clock:
    """Moves only where the test says so."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def epoch(self, found, data, step, steps=20, sync_every=1):
        """`steps` steps of `step` seconds, whose batches take `data` seconds each."""

        def batches():
            for i in range(steps):
                self.now += data
                yield i

        for i in found.waiting(batches()):
            self.now += step * (1 + i // 10)  # from the eleventh on twice as long
            if i % sync_every == sync_every - 1:
                found.mark()
        return found.row(8, WORLD)


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(timing, "time", found)
    return found


def test_time_is_split_into_waiting_and_working(clock):
    row = clock.epoch(Timing(), data=3.0, step=1.0, steps=10)
    assert (row["data_wait"], row["step_seconds_p50"], row["images_per_second"]) == (0.75, 4.0, 2.0)
    assert clock.epoch(Timing(), data=0.0, step=1.0)["data_wait"] == 0.0


def test_steps_between_two_marks_count_as_their_mean(clock):
    found = Timing()
    row = clock.epoch(found, data=0.0, step=1.0, sync_every=5)
    assert found.steps == [1.0] * 10 + [2.0] * 10
    assert (row["step_seconds_p50"], row["step_seconds_p95"]) == (1.5, 2.0)


def test_an_interrupted_epoch_keeps_its_first_part(clock):
    first = Timing()
    clock.epoch(first, data=1.0, step=1.0, steps=6)
    second = Timing(**json.loads(json.dumps(asdict(first))))
    row = clock.epoch(second, data=0.0, step=5.0, steps=4)
    assert second.steps == [2.0] * 6 + [5.0] * 4 and row["data_wait"] == 6 / 32 == 0.1875
    assert second.memory_mib >= first.memory_mib > 100


def test_what_happens_between_steps_is_no_part_of_them(clock):
    found = Timing()
    for i in found.waiting(iter(range(4))):
        clock.now += 1
        found.mark()
        if i == 1:
            clock.now += 100  # a checkpoint
            found.begin()
    assert found.steps == [1.0] * 4


def test_a_phase_is_its_epochs_medians(clock):
    rows = [{"epoch": 1}, *(clock.epoch(Timing(), 0.0, step, steps=3) for step in (1.0, 9.0, 2.0))]  # 1: an older r2
    assert timing.summary(rows)["step_seconds_p50"] == 2.0
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_gpu_is_its_own_and_of_this_epoch():
    device = torch.device("cuda", 0)
    torch.empty(64 << 20, dtype=torch.uint8, device=device)
    first, second = Timing(), Timing()
    first.note_memory(device)
    second.note_memory(device)
    assert first.memory_mib >= 64 > second.memory_mib
