"""Faults: nothing finished is lost or done twice, and every fault is told in one line. Minutes, where marked slow."""

import ast
import contextlib
import functools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ENV, SMALL
from forked import EWGS, TINY, Run, alive, children, results, wait_for

from r2 import record, store, trackers
from r2.config import Diverged
from r2.dist import World
from r2.plan import cells as planned
from r2.training.resume import check_weights

ROOT = Path(__file__).parents[1]
TWO_CORES = pytest.mark.skipif(
    not sys.platform.startswith("linux") or (os.cpu_count() or 1) < 2, reason="Linux, two cores"
)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_processes_share_one_run(tmp_path):
    first, second = spawn(tmp_path), spawn(tmp_path)
    outputs = [p.communicate(timeout=300)[0] for p in (first, second)]
    assert first.returncode == second.returncode == 0, outputs
    assert sum("not repeated" in o for o in outputs) == 1
    assert sum("waiting for process" in o for o in outputs) <= 1


@pytest.mark.slow
@TWO_CORES
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


@pytest.mark.slow
@TWO_CORES
def test_a_dead_worker_ends_the_job_which_can_resume(tmp_path):
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
    assert "resumed at epoch" in output or "finished, not repeated" in output
    assert weights(killed) == weights(tmp_path / "whole")


@pytest.mark.slow
@TWO_CORES
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run without faults comes to."""
    out = tmp_path_factory.mktemp("whole")
    run = Run(out / "log", f"out={out}", *TINY, *EWGS)
    assert run.wait() == 0, run.output()
    return results(out)


def refused(run, *words):
    """The one line that a run ends with."""
    assert run.wait() == 2, run.output()
    (line,) = [line for line in run.output().splitlines() if line.startswith("r2: ") and all(w in line for w in words)]
    assert "Traceback" not in run.output()
    return line


def no_room_for(name):
    """The system refuses more than 100 bytes of the file `name`, and of no other."""
    write = store.write

    def limited(path, data):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if path.name == name else soft, hard))
        try:
            write(path, data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    store.write = limited


@pytest.mark.slow
def test_a_write_that_fails_ends_the_run_which_resumes_once_there_is_room(tmp_path, whole):
    """For every file that a run writes, in the order in which it does."""
    names = ["config.json", "curve-weights.csv", "pretrain.ckpt", "curve-pretrain.csv", "model.pt", "ewgs.ckpt",
             "curve-ewgs.csv", "model.safetensors", "record.json"]  # fmt: skip
    for name in names:
        full = functools.partial(no_room_for, name)
        run = Run(tmp_path / f"{name}.log", f"out={tmp_path}", *TINY, *EWGS, before=full)
        assert f"{name} (File too large); what was saved before is intact" in refused(run, "cannot write")
        assert not list(tmp_path.glob("**/*.part"))
    last = Run(tmp_path / "log", f"out={tmp_path}", *TINY, *EWGS)
    assert last.wait() == 0 and "finished, not repeated" in last.output()
    assert results(tmp_path) == whole


DISK = """
mount -t tmpfs -o size=3m tmpfs $OUT && exec 2>&1
$R2; echo "status $?"
mount -o remount,ro $OUT
$R2; echo "status $?"
mount -o remount,rw,size=64m $OUT
$R2; echo "status $?"
cp -r $OUT/* $KEEP
"""


@pytest.mark.slow
def test_a_full_disk_and_one_that_cannot_be_written(tmp_path, whole):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs mounts of its own (unshare)")
    out, keep = tmp_path / "out", tmp_path / "keep"
    out.mkdir()
    keep.mkdir()
    words = " ".join(f"'{word}'" for word in [f"out={out}", *TINY, *EWGS])
    script = DISK.replace("$R2", f"{sys.executable} -m r2.run {words}")
    env = {**ENV, "OUT": str(out), "KEEP": str(keep)}
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], env=env, capture_output=True, text=True, timeout=300)
    full, read_only, last = done.stdout.split("status ")[:3]
    assert "pretrain.ckpt (No space left on device); what was saved before is intact" in full, done.stdout
    assert read_only.startswith("2\n") and "(Read-only file system); choose another with out=DIR" in read_only
    assert last.startswith("2\n") and "pretrain: resumed at epoch" in last, done.stdout
    assert "Traceback" not in done.stdout and results(keep) == whole


def poisoned(what, at):
    """Step `at` gives a loss or a gradient that is no number."""
    from r2.training import loop as train

    backward, steps = train._backward, [0]

    def call(forward, net, *rest):
        loss, seen = backward(forward, net, *rest)
        steps[0] += 1
        if steps[0] == at and what == "loss":
            loss = loss * float("nan")
        elif steps[0] == at:
            next(net.parameters()).grad.fill_(float("nan"))
        return loss, seen

    train._backward = call


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("at", [7, 22])
def test_a_non_finite_loss_ends_the_run_before_it_is_saved(tmp_path, whole, what, at):
    """In pretraining (16 steps) and in quantization-aware training; the run resumes from before it."""
    run = Run(tmp_path / "nan.log", f"out={tmp_path}", *TINY, *EWGS, before=functools.partial(poisoned, what, at))
    refused(run, "not finite", f"Lower {'recipe' if at == 7 else 'stage'}.lr", "the last checkpoint is kept")
    (path,) = tmp_path.glob("**/*.ckpt")
    state = store.load(path)
    assert state["position"]["epoch"] * 4 + state["position"]["step"] == (at - 1) % 16
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    last = Run(tmp_path / "log", f"out={tmp_path}", *TINY, *EWGS)
    assert last.wait() == 0 and results(tmp_path) == whole


def without_wandb():
    sys.modules["wandb"] = None


@pytest.mark.slow
def test_wandb_that_refuses_hangs_or_is_missing_changes_nothing(tmp_path, whole):
    def run(told, before=None, **env):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        out.mkdir()
        env = {"WANDB_API_KEY": "a" * 40, "HOME": str(tmp_path), **env}
        process = Run(out / "log", f"out={out}", *TINY, *EWGS, "tracker=wandb", before=before, env=env)
        assert process.wait() == 0 and f"r2: wandb {told}" in process.output(), process.output()
        assert process.marks[0][0] - process.began < trackers.PATIENCE + 30, process.output()
        assert results(out) == whole

    with socket.create_server(("localhost", 0)) as hole:  # takes connections and never answers
        silent = f"http://localhost:{hole.getsockname()[1]}"
        run("cannot be reached (Failed", WANDB_BASE_URL=silent)
        run("cannot be reached", WANDB_BASE_URL="http://localhost:1")
        run("cannot be reached (No API key", WANDB_API_KEY="", WANDB_BASE_URL=silent)
        run("is off", before=without_wandb)


def test_a_tracker_that_hangs_is_given_up(monkeypatch, capsys):
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    began = time.monotonic()
    for hanging in ("start", "log", "close"):

        def call(which, hanging=hanging):
            return lambda *_: time.sleep(60) if which == hanging else None

        def start(call=call):
            call("start")()
            return call("log"), call("close")

        with trackers.Tracker("slow", start) as tracker:
            for _ in range(3):
                tracker.log({"epoch": 1})
    assert time.monotonic() - began < 5
    assert capsys.readouterr().out.count("slow is off for the rest of this run (no answer for 0.2 s)") == 3


def test_a_tracker_is_closed_when_a_run_fails_too_and_is_told():
    closed = []
    with trackers.Tracker("ok", lambda: (print, closed.append)):
        pass
    with pytest.raises(SystemExit), trackers.Tracker("ok", lambda: (print, closed.append)):
        raise SystemExit(143)
    assert closed == [False, True]


@pytest.mark.slow
@TWO_CORES
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named(tmp_path, rank):
    process = spawn(tmp_path, "devices=2", "model=mbv1", "recipe.epochs=40", "dist_timeout_seconds=10")
    wait_for_checkpoint(tmp_path, process)
    workers = [p for p in children(process.pid) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    (owner,) = tmp_path.glob("pretrained/*/.owner")
    main = int(owner.read_text().split()[1])
    hung = main if rank == 0 else next(p for p in workers if p != main)
    os.kill(hung, signal.SIGSTOP)
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):  # the launcher has done so
            os.kill(hung, signal.SIGKILL)
    assert process.returncode == 1 and f"r2: rank {rank} of 2 hangs: no answer for 10 s" in output, output


@pytest.mark.slow
@TWO_CORES
def test_workers_end_with_the_process_that_started_them(tmp_path):
    process = spawn(tmp_path, "devices=2", "model=mbv1", "recipe.epochs=40")
    wait_for_checkpoint(tmp_path, process)
    workers = children(process.pid)
    process.kill()
    process.communicate(timeout=60)  # they hold its output
    wait_for(lambda: not any(map(alive, workers)), 60)
    (directory,) = tmp_path.glob("pretrained/*")
    assert len(workers) >= 2 and store.holder(directory) is None
    assert store.load(directory / "pretrain.ckpt")["position"]["epoch"] < 40


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_answered_with_a_checkpoint(tmp_path, number):
    run = Run(tmp_path / "log", f"out={tmp_path}", *TINY, "recipe.epochs=400", "checkpoint_seconds=1000")
    assert run.follow("pretrain"), run.output()
    time.sleep(0.5)
    began = time.monotonic()
    run.signal(number)
    assert run.wait() == 128 + number and time.monotonic() - began < 10, run.output()
    assert f"pretrain: stopped by signal {int(number)}; the same command resumes it" in run.output()
    (path,) = tmp_path.glob("pretrained/*/pretrain.ckpt")
    position = store.load(path)["position"]
    again = Run(tmp_path / "again", f"out={tmp_path}", *TINY, "recipe.epochs=400", "checkpoint_seconds=1000")
    assert again.follow("pretrain")
    wait_for(lambda: "resumed at" in again.output(), 60)
    again.signal(signal.SIGTERM)
    assert again.wait() == 143
    assert f"resumed at epoch {position['epoch'] + 1}, step {position['step']}" in again.output()


@pytest.mark.slow
def test_ctrl_c_outside_of_training_is_one_line(tmp_path):
    run = Run(tmp_path / "log", f"out={tmp_path}", *TINY, "stage=adaround", "stage.iterations=100000")
    assert run.follow("pretrain")
    wait_for(lambda: "adaround:" in run.output(), 120)
    run.signal(signal.SIGINT)
    assert run.wait() == 130
    assert "r2: interrupted; the same command" in run.output() and "Traceback" not in run.output()


def test_what_cannot_change_a_result_does_not_change_a_run():
    (first,) = planned.cells_of(TINY)
    for word in ("tracker=wandb", "devices=2", "checkpoint_seconds=5", "out=elsewhere", "dist_timeout_seconds=9"):
        (same,) = planned.cells_of([*TINY, word])
        assert same.name == first.name and same.pretraining.key == first.pretraining.key
    (other,) = planned.cells_of([*TINY, "reg.weight=0.5"])
    assert other.name != first.name and other.pretraining.key != first.pretraining.key


def test_nothing_depends_on_the_wall_clock():
    for path in ROOT.glob("r2/**/*.py"):
        assert not re.search(r"time\.(time|ctime|localtime|strftime)\(|datetime\.", path.read_text()), path


def test_every_promise_names_a_test_that_exists():
    promises = {path: re.findall(r"(tests/\w+\.py)::(\w+)", path.read_text()) for path in ROOT.glob("docs/*.md")}
    assert any(promises.values())
    for path, tests in promises.items():
        for file, name in tests:
            tree = ast.parse((ROOT / file).read_text())
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert name in functions, f"{path.name}: {file} has no {name}"


def test_a_training_that_diverges_leaves_a_record_at_chance(tmp_path):
    """It counts in a study as long as the run has no other."""
    ran = Run(tmp_path / "log", f"out={tmp_path}", *TINY, *EWGS, "stage.lr=1e30", "stage.clip_norm=null")
    assert ran.wait() == 2 and "is not finite" in ran.output()
    (found,) = record.read_all(tmp_path)
    assert found["metrics"]["top1"] == 10.0 and found["fp32"]["loss"] != found["metrics"]["loss"]
    assert "is not finite" in found["details"]["diverged"]
    (path,) = tmp_path.glob("*/diverged.json")
    assert not (path.parent / "record.json").exists() and record.path_of(path.parent) == path
    shutil.copyfile(path, path.parent / "record.json")
    assert record.path_of(path.parent).name == "record.json" and len(record.find(tmp_path)) == 1


class Two(World):
    """Two processes, of which the other one's third buffer is not finite."""

    def all_reduce(self, tensor):
        return tensor + torch.tensor([0.0, 0.0, 1.0])


def test_weights_that_are_not_finite_on_one_process_end_all_of_them():
    state = {"weight": torch.ones(2), "bias": torch.ones(1), "running_var": torch.ones(1)}
    check_weights(state, "pretrain", "recipe", World())
    with pytest.raises(Diverged, match="pretrain: running_var is not finite any more"):
        check_weights(state, "pretrain", "recipe", Two(0, 2))
    with pytest.raises(Diverged, match="bias"):
        check_weights({**state, "bias": torch.tensor([math.nan])}, "pretrain", "recipe", World())


def test_tensorboard_gets_every_row(tmp_path):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with trackers.tensorboard(tmp_path, {}) as tracker:
        for epoch in (1, 2):
            tracker.log({"phase": "pretrain", "epoch": epoch, "loss": 0.5 / epoch})
    found = tensorboard.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in found.Scalars("pretrain/loss")] == [(1, 0.5), (2, 0.25)]
