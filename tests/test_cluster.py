"""Launchers and clusters in small: SLURM's scripts, jobs that are preempted, and two nodes on the loopback."""

import contextlib
import csv
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as td
from conftest import ENV, SMALL
from hydra.errors import MissingConfigException
from torch import nn
from torchvision.io import write_jpeg

from r2 import compose
from r2.config import UserError
from r2.data import images
from r2.data.folder import Folder
from r2.dist import STOP_SIGNALS, World, stop_handlers, stopped
from r2.store import digest

# One step and one checkpoint per epoch, so that there is always one to go on from and always something left to do.
ARGS = [*SMALL, "model=mbv1", "data.train_images=64", "data.val_images=10", "recipe.epochs=40", "checkpoint_seconds=0"]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux") or (os.cpu_count() or 1) < 2, reason="Linux, two cores")


def digests(out):
    records = [json.loads(path.read_text()) for path in out.glob("*/record.json")]
    return {(r["axes"]["reg"], r["axes"]["stage"]): r["sha256"] for r in records}


def epochs(out):
    (path,) = out.glob("pretrained/*/curve-pretrain.csv")
    return [row["epoch"] for row in csv.DictReader(path.read_text().splitlines())]


def wait_for(condition, what, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def test_a_stop_is_reported_to_the_handler_of_before():
    told = []
    with stop_handlers() as outer:
        signal.signal(signal.SIGUSR2, lambda number, frame: told.append(number))
        with stop_handlers() as handlers:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            assert stopped(signal.SIGUSR2, handlers).code == 140 and told == [signal.SIGUSR2]
            assert stopped(signal.SIGTERM, handlers).code == 143  # nobody handled it
        assert signal.getsignal(signal.SIGUSR2) is handlers[signal.SIGUSR2]
    assert signal.getsignal(signal.SIGUSR2) == outer[signal.SIGUSR2]


@pytest.fixture
def small_folder(tmp_path):
    """A data set that is read by one worker, its first batches, and the worker."""
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(8):
            write_jpeg(torch.full((3, 40, 40), 16 * i, dtype=torch.uint8), str(tmp_path / name / f"{i}.jpg"))
    words = {"workers": 1, "on_bad_image": "error", "calibration_images": 4}
    others = multiprocessing.active_children()
    with contextlib.closing(Folder(str(tmp_path), num_classes=2, image_size=32, **words).to(World())) as data:
        batches = data.train(2, 0, 0)
        next(batches)
        (worker,) = set(multiprocessing.active_children()).difference(others)
        yield data, batches, worker


@pytest.fixture
def short_stall(monkeypatch):
    monkeypatch.setattr(images, "STALL", 5.0)


def test_a_data_worker_that_hangs_ends_the_run(short_stall, small_folder):
    data, batches, worker = small_folder
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match="no images for 5 s, a data worker or its disk hangs"):
        list(batches)  # some may lie ready
        list(data.train(2, 0, 1))
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL


def test_data_workers_leave_signals_to_the_main_process(small_folder):
    _, batches, worker = small_folder
    for number in STOP_SIGNALS:
        os.kill(worker.pid, number)
    assert len(list(batches)) == 7 and worker.is_alive()


def test_slurm_without_its_package_names_the_mend():
    text = "In 'hydra/launcher/slurm': Could not find 'hydra/launcher/submitit_slurm'"
    error = MissingConfigException(text, "hydra/launcher/submitit_slurm", ["basic", "slurm"])
    assert "pip install 'r2[cluster]'" in compose.one_line(error)


@pytest.fixture
def slurm(tmp_path):
    """A PATH on which sbatch keeps the script that it is given, and refuses it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in (("sbatch", f'cp "$1" {tmp_path}/script; echo refused >&2; exit 1'), ("srun", "exit 1")):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755 | stat.S_IXUSR)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_slurm_gets_an_array_that_is_warned_and_requeued(r2, tmp_path, slurm):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["-m", "experiment=table2", "data=imagenet", "hydra/launcher=slurm", "hydra.launcher.partition=gpu"]
    done = r2(*words, env=slurm)
    assert done.returncode == 1 and "refused" in done.stderr
    script = (tmp_path / "script").read_text()
    for line in ("--array=0-59%20", "--partition=gpu", "--gpus-per-node=8", "--requeue", "--signal=USR2@120",
                 "--time=1440", "--nodes=1", "--ntasks-per-node=1"):  # fmt: skip
        assert f"#SBATCH {line}\n" in script, line


@pytest.mark.slow
@LINUX
def test_a_preempted_job_goes_back_into_the_queue_and_resumes(tmp_path):
    """Two cells of Table 3 as jobs of submitit's local executor; one is warned as SLURM warns."""
    pytest.importorskip("submitit")
    words = ["-m", "experiment=table3", *ARGS, "reg=l2,linf"]

    def sweep(out, *more):
        command = [sys.executable, "-m", "r2.run", f"out={out}", *words, *more]
        return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    out = tmp_path / "jobs"
    process = sweep(out, "hydra/launcher=local")
    wait_for(lambda: [*out.glob("pretrained/*_l2_*/pretrain.previous")] or process.poll() is not None, "no checkpoint")
    (owner,) = out.glob("pretrained/*_l2_*/.owner")
    os.kill(int(owner.read_text().split()[1]), signal.SIGUSR2)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    logs = [path.read_text() for path in out.glob(".submitit/**/*.out")]
    assert sum("resumed at epoch" in log for log in logs) == 1 and len(logs) == 2
    output, _ = (whole := sweep(tmp_path / "whole")).communicate(timeout=600)
    assert whole.returncode == 0, output
    assert len(digests(out)) == 2 and digests(out) == digests(tmp_path / "whole")


class Node:
    """A node of a cluster: torchrun's agent and its workers."""

    def __init__(self, out, port, workers, *words, nodes=2, host=1):
        self.log = out.with_suffix(f".{time.monotonic_ns()}.log")
        rendezvous = [f"--rdzv-endpoint=localhost:{port}", f"--rdzv-conf=is_host={host},join_timeout=600"]
        command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={workers}",
                   "--rdzv-backend=c10d", "--rdzv-id=r2", *rendezvous, "--local-addr=localhost", "--max-restarts=3",
                   "--monitor-interval=0.2", "-m", "r2.run", f"out={out}", *ARGS, "recipe.sync_bn=true",
                   *words]  # fmt: skip
        # PyTorch 2.14 otherwise keeps its address from a node that joins later.
        env = {**ENV, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with self.log.open("w") as log:
            self.agent = subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def workers(self):
        tasks = Path(f"/proc/{self.agent.pid}/task").glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split()]

    def lose(self, what="node"):
        """Kill the agent, whose workers go on as orphans, or everything at once."""
        for pid in [self.agent.pid, *(self.workers() if what == "node" else ())]:
            os.kill(pid, signal.SIGKILL)
        self.agent.wait()

    def end(self):
        assert self.agent.wait(timeout=600) == 0, self.log.read_text()[-3000:]


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def progress(out, log):
    """Returns once the run, as it is now, has written two checkpoints more."""

    def checkpoints():
        return [path.stat().st_mtime_ns for path in out.glob("pretrained/*/pretrain.ckpt")]

    seen = set(checkpoints())
    wait_for(lambda: len(seen.update(checkpoints()) or seen) >= 3, log.read_text)


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize("workers, lost", [(1, "node"), (2, "agent")])
def test_two_nodes_survive_a_killed_worker_and_one_that_is_replaced(tmp_path, workers, lost):
    out, port = tmp_path / "nodes", free_port()
    first, second = Node(out, port, workers), Node(out, port, workers, host=0)
    try:
        progress(out, first.log)
        os.kill(second.workers()[0], signal.SIGKILL)
        progress(out, first.log)
        second.lose(lost)
        second = Node(out, port, workers, host=0)
        first.end()
        second.end()
    finally:
        for node in (first, second):
            if node.agent.poll() is None:
                node.lose()
    assert first.log.read_text().count("resumed at epoch") == 2
    whole = tmp_path / "whole"
    Node(whole, free_port(), 2 * workers, nodes=1).end()
    assert epochs(out) == epochs(whole) == [str(i) for i in range(1, 41)]
    assert digests(out) == digests(whole)


def test_buckets_are_laid_before_the_first_step_and_nothing_else_changes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 2))
    before, state = digest(model.state_dict()), torch.get_rng_state()
    td.init_process_group("gloo", store=td.HashStore(), rank=0, world_size=1)
    try:
        net = World(0, 2).parallel(model)
        assert digest(model.state_dict()) == before and torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
        net.zero_grad()
        net(torch.randn(2, 3, 8, 8)).sum().backward()
        places = [p.grad.storage_offset() for p in model.parameters()]  # in their bucket
        assert places == sorted(places, reverse=True) and all(p.grad.any() for p in model[4].parameters())
    finally:
        td.destroy_process_group()


@pytest.mark.slow
@LINUX
def test_four_processes_end_with_the_same_weights_wherever_they_are_killed(tmp_path):
    """One worker, then everything, within an epoch of 40 steps with a checkpoint at every tenth."""
    out, whole = tmp_path / "killed", tmp_path / "whole"
    words = ["data.train_images=320", "recipe.batch_size=8", "recipe.epochs=2", "recipe.sync_bn=false"]
    node = Node(out, free_port(), 4, *words, nodes=1)
    progress(out, node.log)
    os.kill(random.choice(node.workers()), signal.SIGKILL)  # the agent starts all of them again
    progress(out, node.log)
    node.lose()
    assert re.search(r"resumed at epoch \d, step \d0", node.log.read_text())
    for folder in (out, whole):
        Node(folder, free_port(), 4, *words, nodes=1).end()
    assert digests(out) == digests(whole)
