"""torch.distributed: processes, their devices, and communication of tensors and objects."""

import contextlib
import ctypes
import functools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from r2.config import UserError, last_line

# Ctrl-C, and what batch systems send before they end a job: SLURM one of the next two, submitit the last.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_TOLERANCE = 3.0  # seconds between the first and the last rank that give up waiting


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size`, computing on `device`."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            td.all_reduce(tensor)
        return tensor

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank; plain Python values or CPU tensors."""
        if self.size == 1:
            return value
        box = [value]
        td.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Rank 0's buffers (BatchNorm statistics), on every rank."""
        if self.size > 1:
            for buffer in model.buffers():
                td.broadcast(buffer, src=0)

    def barrier(self) -> None:
        self.broadcast(None)

    def parallel(self, model: nn.Module) -> nn.Module:
        """`model` with gradients averaged over ranks, in the same order of summation from the first step on."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        net = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        _lay_buckets(net)
        return net


def _lay_buckets(net: DistributedDataParallel) -> None:
    """Let `net` lay out its buckets now; every gradient is 0 afterwards.

    DDP does so once, by the order in which the gradients of its first backward arrive. The position of a gradient sets
    the order in which a ring of more than two ranks sums it, so a process that resumes from a checkpoint would sum its
    first step in another order than one that was never stopped. Therefore the first backward is this one, which does
    not run the model: gradients arrive from the last parameter to the first, about as in training, and communication
    still overlaps.
    """
    parameters = [p for p in net.module.parameters() if p.requires_grad]
    zero = torch.zeros((), device=parameters[0].device)  # an argument, which DDP wants on a GPU

    def nothing(start: Tensor) -> Tensor:
        return functools.reduce(torch.add, (0 * p.sum() for p in parameters), start)

    with mock.patch.dict(vars(net.module), forward=nothing):  # hides the class's own for this one call
        net(zero).backward()


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all ranks on a CPU, where torch's own SyncBatchNorm does not run."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce

        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        count = x.numel() // x.shape[1] * td.get_world_size()
        mean = all_reduce(x.sum((0, 2, 3))) / count
        centred = x - mean.view(1, -1, 1, 1)
        variance = all_reduce((centred**2).sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / max(count - 1, 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def sync_batchnorm(model: nn.Module, world: World) -> nn.Module:
    """Every BatchNorm2d of `model` over the batches of all ranks; same parameter names and values.

    Raises:
        UserError: timm's BatchNorm with an activation of its own, on CPUs.
    """
    if world.size == 1:
        return model
    fused = any(isinstance(m, nn.BatchNorm2d) and hasattr(m, "act") for m in model.modules())
    if world.device.type == "cuda":
        if fused:  # PyTorch's own would lose the activation
            from timm.layers import convert_sync_batchnorm

            return convert_sync_batchnorm(model)
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if fused:
        raise UserError(
            "recipe.sync_bn: timm's BatchNormAct2d can be synchronised only on GPUs; set recipe.sync_bn=false"
        )
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model


def keep_freed_memory() -> None:
    """Let glibc keep what this process frees for its next step, instead of handing it back to the system.

    A training step on a CPU allocates and frees the same tensors again and again; by default thousands of its pages are
    new in every step. Blocks above 32 MiB are not kept, the most glibc allows.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            set_option = ctypes.CDLL(None).mallopt
            set_option(-3, 32 << 20)  # M_MMAP_THRESHOLD: larger blocks are separate mappings
            set_option(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the heap's end above which it goes back


def launch(function: Callable[[dict, World], Any], config: dict) -> Any:
    """Call `function(config, world)` on every device of the config; returns rank 0's result.

    Under torchrun or SLURM the process joins that world. Otherwise PyTorch's elastic launcher starts the workers
    and hands them the plain dict, so Hydra composes once.
    """
    if config["threads"] != "auto":
        torch.set_num_threads(config["threads"])
        os.environ["OMP_NUM_THREADS"] = str(config["threads"])  # for processes started from here
    if "TORCHELASTIC_RUN_ID" in os.environ or ("RANK" in os.environ and "WORLD_SIZE" in os.environ):
        return _join(function, config)
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        os.environ.setdefault("RANK", os.environ["SLURM_PROCID"])
        os.environ.setdefault("WORLD_SIZE", os.environ["SLURM_NTASKS"])
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_node()
        job = int(os.environ.get("SLURM_JOB_ID", 0))  # two jobs may share a node
        os.environ.setdefault("MASTER_PORT", str(20_000 + job % 10_000))
        return _join(function, config)
    count = device_count(config["devices"])
    if count == 1:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        return function(config, World(device=device))
    return _start(function, config, count)


def _first_node() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise UserError("MASTER_ADDR: scontrol does not tell the first node; set it to that node's name") from None


@contextlib.contextmanager
def stop_handlers() -> Iterator[dict[int, Any]]:
    """The handlers of STOP_SIGNALS, put back at the end; none outside the main thread, which alone may set them."""
    here = threading.current_thread() is threading.main_thread()
    found: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS} if here else {}
    try:
        yield found
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)


def stopped(number: int, handlers: dict[int, Any]) -> SystemExit:
    """The exit of a process that has left a checkpoint because of a signal.

    Whoever handled the signal before hears of it now: submitit puts the job back into the queue and leaves.
    """
    handler = handlers.get(number)
    if callable(handler) and handler is not signal.default_int_handler:  # Python's own, of Ctrl-C, would only raise
        handler(number, None)
    return SystemExit(128 + number)


def ignore_stop_signals() -> None:
    """For data workers: a batch system may signal every process of a job, and only the main one has an answer."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """For a process of multiprocessing: SIGTERM as soon as the process that started it is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def device_count(devices: int | str) -> int:
    """Processes to start: one per GPU, or as asked.

    Raises:
        UserError: more than there are; there are GPUs that this torch cannot use.
    """
    gpus = torch.cuda.device_count()
    if gpus and not torch.cuda.is_available():  # the first asks the driver, the second CUDA
        raise UserError(
            f"this machine's GPUs cannot be used by torch {torch.__version__}: install one for its driver "
            "(nvidia-smi names the CUDA version), or hide them by CUDA_VISIBLE_DEVICES="
        )
    if devices == "auto":
        return max(gpus, 1)
    available, kind = (gpus, "GPU") if gpus else (os.cpu_count() or 1, "CPU core")
    if int(devices) > available:
        raise UserError(f"devices={devices}: this machine has {available} {kind}{'s' * (available > 1)}")
    return int(devices)


def _start(function: Callable, config: dict, count: int) -> Any:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # a worker says itself why it stops
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
        signals_to_handle=",".join(["SIGHUP", "SIGQUIT", *(number.name for number in STOP_SIGNALS)]),
    )
    with stop_handlers() as handlers:  # the launcher takes them over
        try:
            return elastic_launch(settings, _worker)(function, config)[0]
        except SignalException as stop:
            raise stopped(stop.sigval, handlers) from None
        except ChildFailedError as error:
            first = error.get_first_failure()[1]
            if first.exitcode in (2, *(128 + number for number in STOP_SIGNALS)):
                raise SystemExit(first.exitcode) from None  # the worker has said why
            raise


def _worker(function: Callable, config: dict) -> Any:
    # PyTorch's `record` hands a worker's traceback to the launcher.
    from torch.distributed.elastic.multiprocessing.errors import record

    end_with_parent()
    return record(_join)(function, config)


def _gpu_of(local: int) -> int:
    """The number of the GPU of this node's process `local`.

    Raises:
        UserError: there are fewer GPUs.
    """
    there = torch.cuda.device_count()
    if there == 1 and "SLURM_LOCALID" in os.environ:
        return 0  # where SLURM binds a GPU to each task, a task sees that one alone
    if local >= there:
        raise UserError(f"LOCAL_RANK={local}: this machine has {there} GPUs")
    return local


def _join(function: Callable, config: dict) -> Any:
    local = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        local = _gpu_of(local)
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    td.init_process_group(backend, timeout=timedelta(seconds=config["dist_timeout_seconds"]))
    world = World(td.get_rank(), td.get_world_size(), device)
    try:
        result = function(config, world)
    except UserError as error:
        if _first_to_tell():
            print(f"r2: {last_line(error)}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except RuntimeError as error:
        _name_the_hung(world, config["dist_timeout_seconds"], error)
        raise
    td.destroy_process_group()
    return result


def _first_to_tell() -> bool:
    """A mistake is mostly the same on every rank, and reported once."""
    try:
        return td.distributed_c10d._get_default_store().add("r2/told", 1) == 1
    except RuntimeError:
        return False  # the rank that held the store has reported it and left


def _name_the_hung(world: World, seconds: float, error: RuntimeError) -> None:
    """After a gloo collective that no rank returns from: the ranks that waited report it and name the others.

    NCCL ends the processes that waited by itself, with a message of its own.
    """
    timed_out = any(words in str(error).lower() for words in ("timed out", "timeout"))  # else a rank has left before
    store = td.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=10))
    try:
        store.set(f"r2/waited/{world.rank}", "")
        time.sleep(_TOLERANCE * timed_out)
        waited = [rank for rank in range(world.size) if store.check([f"r2/waited/{rank}"])]
    except RuntimeError:
        waited = [*range(1, world.size)]  # rank 0 may keep the store
    hung = [str(rank) for rank in range(world.size) if rank not in waited]
    if timed_out and hung and world.rank == waited[0]:
        print(
            f"r2: rank {', '.join(hung)} of {world.size} hangs: no answer for {seconds:g} s (dist_timeout_seconds); "
            "the same command resumes from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
