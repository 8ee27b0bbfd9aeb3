"""Kills, signals and two processes: nothing finished is lost or done twice. Minutes, so marked slow."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ENV, SMALL

pytestmark = pytest.mark.slow
ARGS = [
    *SMALL,
    "reg=margin",
    "stage=ewgs",
    "recipe.epochs=3",
    "recipe.finetune.epochs=2",
    "checkpoint_seconds=0",
]
ARGS += ["model=mbv2"]  # with dropout


def weights(out):
    (path,) = out.glob("*/record.json")
    return json.loads(path.read_text())["sha256"]


def spawn(out, *arguments):
    command = [sys.executable, "-m", "r2.run", f"out={out}", *ARGS, *arguments]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def wait_for_checkpoint(out, process):
    seen = set()
    while process.poll() is None:
        found = {(p, p.stat().st_mtime_ns) for p in out.glob("**/*.ckpt") if p.exists()}
        if len(seen | found) >= 3:
            return
        seen |= found
        time.sleep(0.01)


def test_killed_runs_end_with_the_same_weights(tmp_path):
    whole = tmp_path / "whole"
    finish(spawn(whole))
    killed = tmp_path / "killed"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = spawn(killed)
        wait_for_checkpoint(killed, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        if number == signal.SIGTERM and process.returncode != 0:
            assert process.returncode in (143, -15), output
    finish(spawn(killed))
    assert weights(killed) == weights(whole)


def test_two_processes_share_one_run(tmp_path):
    first, second = spawn(tmp_path), spawn(tmp_path)
    outputs = [p.communicate(timeout=300)[0] for p in (first, second)]
    assert first.returncode == second.returncode == 0, outputs
    assert sum("not repeated" in o for o in outputs) == 1
    assert sum("waiting for process" in o for o in outputs) <= 1


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_gloo_processes_follow_one(tmp_path):
    common = [*SMALL, "recipe.epochs=3", "recipe.sync_bn=true", "recipe.lr=0.01", "reg=linf"]
    curves = []
    for devices in (1, 2):
        out = tmp_path / str(devices)
        command = [sys.executable, "-m", "r2.run", f"out={out}", *common, f"devices={devices}"]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        (path,) = out.glob("pretrained/*/curve-pretrain.csv")
        rows = [line.split(",") for line in path.read_text().splitlines()]
        curves.append([[float(row[rows[0].index(k)]) for k in ("loss", "val_loss")] for row in rows[1:]])
    one, two = torch.tensor(curves)
    torch.testing.assert_close(one[0], two[0], atol=2e-3, rtol=2e-3)
    # Rounding grows from step to step, by how much depends on the machine's instructions.
    torch.testing.assert_close(one, two, atol=2e-2, rtol=2e-2)


def children(pid):
    """Process ids of the Python children of `pid` (Linux)."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            found += [int(p) for p in file.read().split()]
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux") or (os.cpu_count() or 1) < 2, reason="Linux, two cores")
def test_a_dead_worker_ends_the_job_which_can_go_on(tmp_path):
    def two(out):
        return spawn(out, "devices=2", "recipe.sync_bn=true", "model=mbv1")

    finish(two(tmp_path / "whole"))
    killed = tmp_path / "killed"
    process = two(killed)
    wait_for_checkpoint(killed, process)
    workers = [p for p in children(process.pid) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(workers[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "SIGKILL" in output, output
    output = two(killed).communicate(timeout=300)[0]
    assert "going on at epoch" in output or "finished, not repeated" in output
    assert weights(killed) == weights(tmp_path / "whole")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_processes_inside_a_sweep(tmp_path):
    command = [
        sys.executable,
        "-m",
        "r2.run",
        "-m",
        f"out={tmp_path}",
        *SMALL,
        "devices=2",
        "reg=l2,linf",
        "stage=fp32",
    ]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(tmp_path.glob("*/record.json"))) == 2
