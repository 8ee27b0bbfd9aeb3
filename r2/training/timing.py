"""Time and memory of training, measured by clock reads alone: nothing here waits for the device."""

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from r2.dist import World


@dataclass
class Timing:
    """One epoch's training steps, without evaluation and checkpoints; plain values, so that a checkpoint holds it.

    Attributes:
        steps: seconds of each step. The loop reads a value from the device at every `mark`, so the steps between two
            marks took what the device took; each counts as their mean.
        waited: seconds in which the loop stood still for a batch. A GPU may still have had work to do then, so of a
            GPU this is the most that data can have cost.
        memory_mib: peak so far, of the GPU in this epoch, else of the process (without its data workers).
    """

    steps: list[float] = field(default_factory=list)
    waited: float = 0.0
    memory_mib: float = 0.0

    def begin(self) -> None:
        """Start the clock: before the first step, and again after work that is not part of a step."""
        self._since, self._count, self._waiting = time.perf_counter(), 0, 0.0

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, each timed from asking to getting."""
        self.begin()
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self._waiting += time.perf_counter() - began
            self._count += 1
            yield batch

    def mark(self) -> None:
        """The loop has just read a value that the device had to finish the steps for."""
        now = time.perf_counter()
        self.steps += [(now - self._since) / self._count] * self._count
        self.waited += self._waiting
        self._since, self._count, self._waiting = now, 0, 0.0

    def note_memory(self, device: torch.device) -> None:
        if device.type == "cuda":
            self.memory_mib = max(self.memory_mib, torch.cuda.max_memory_allocated(device) / 2**20)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in bytes
            self.memory_mib = max(self.memory_mib, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)

    def row(self, batch_size: int, world: World) -> dict[str, float]:
        """The columns of the curve. Steps are those of the main process, which all ranks make together; the share of
        waiting and the memory are the largest of any rank."""
        self.note_memory(world.device)
        of_ranks = torch.zeros(world.size, 2, dtype=torch.float64, device=world.device)
        of_ranks[world.rank] = torch.tensor([self.waited / sum(self.steps), self.memory_mib])
        data_wait, memory = world.all_reduce(of_ranks).amax(0).tolist()
        ordered = sorted(self.steps)
        return {
            "images_per_second": round(batch_size * len(ordered) / sum(ordered), 1),
            "data_wait": round(data_wait, 4),
            "step_seconds_p50": round(statistics.median(ordered), 6),
            "step_seconds_p95": round(ordered[int(0.95 * (len(ordered) - 1) + 0.5)], 6),
            "peak_memory_mib": round(memory, 1),
        }


def summary(rows: list[dict]) -> dict[str, float] | None:
    """Over a phase's epochs: the median of each column, the largest memory; None without rows that have them."""
    rows = [row for row in rows if "data_wait" in row]
    if not rows:
        return None
    columns = ("images_per_second", "data_wait", "step_seconds_p50", "step_seconds_p95")
    medians = {name: round(statistics.median(row[name] for row in rows), 6) for name in columns}
    return {**medians, "peak_memory_mib": max(row["peak_memory_mib"] for row in rows)}
