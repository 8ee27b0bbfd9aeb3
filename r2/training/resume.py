"""Checkpoints, resume, signals and the check for non-finite losses in a training phase."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from r2.config import Diverged, UserError, first_line
from r2.data.batches import Data
from r2.dist import World, stop_handlers, stopped
from r2.regularizers import Regularizer
from r2.store import Run
from r2.training.timing import Timing


@dataclass
class Position:
    """How far a phase is: next step, the epoch's sums as `Sums` holds them, and the curve so far."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    rows: list[dict] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)


class Sums:
    """Over the examples of an epoch, on the device: loss, correct predictions, examples, penalty of the regularizer."""

    def __init__(self, values: Tensor):
        self.values = values

    def add(self, seen: Tensor, penalty: Tensor | None) -> None:
        """`seen` is (loss, correct, examples) of a step, `penalty` what the regularizer added to its loss."""
        self.values[:3] += seen
        if penalty is not None:
            self.values[3] += penalty * seen[2]

    def means(self, world: World | None = None) -> tuple[float, float, float]:
        """Loss, top-1 in percent and penalty per example; with `world`, over all ranks."""
        values = self.values if world is None else world.all_reduce(self.values.clone())
        loss, correct, examples, penalty = values.tolist()
        examples = max(examples, 1)
        return loss / examples, 100 * correct / examples, penalty / examples


def advice(keys: str) -> str:
    """Advice for a diverging training, by the group whose keys apply."""
    return f"Lower {keys}.lr, or set a smaller {keys}.clip_norm; the last checkpoint is kept"


def check_weights(state: dict[str, Tensor], phase: str, keys: str, world: World) -> None:
    """
    Raises:
        Diverged: a weight or a buffer is not finite, so a run could not resume from it; on every rank, though
            BatchNorm's statistics differ between them.
    """
    unfit = torch.stack([~value.isfinite().all() for value in state.values()])  # one wait for the device
    for name, ranks in zip(state, world.all_reduce(unfit.double()).tolist(), strict=True):
        if ranks:
            raise Diverged(f"{phase}: {name} is not finite any more. {advice(keys)}")


def made_with(data: Data, world: World) -> dict[str, str]:
    """What a phase has to be resumed with, and after it what it had better be resumed with."""
    return {"data": data.fingerprint(), "torch": str(torch.__version__), "processes": str(world.size)}


def check_data(now: str, before: str | None, path: Path) -> None:
    """
    Args:
        now, before: fingerprints of the data, as they are and as they were for the file at `path`; None: unknown.

    Raises:
        UserError: they differ. The order of an epoch would be another one, and training images might be tested on.
    """
    if before not in (None, now):
        raise UserError(
            f"{path}: was made with different data ({before}; now {now}); "
            "restore that data, or delete the file to start again"
        )


def compare(now: dict[str, str], before: dict[str, str], run: Run, phase: str) -> None:
    """
    Raises:
        UserError: the data are not those of the checkpoint.
    """
    check_data(now["data"], before.get("data"), run.checkpoint(phase))
    changed = {name: value for name, value in before.items() if value != now[name]}
    for name, value in changed.items():
        run.say(f"{phase}: begun with {name} {value}, resumed with {now[name]}; equal up to rounding")


class Upkeep:
    """Keeps one phase of training: its position, its checkpoints, its clock, and what stops it.

    Args:
        phase: names the checkpoint.
        keys: the config group whose keys are in force, for what is said of a training that diverges.
        steps: of an epoch.
        every: steps between two looks at the device, at its losses and at the other ranks.
    """

    def __init__(
        self,
        run: Run,
        phase: str,
        keys: str,
        data: Data,
        steps: int,
        every: int,
        model: nn.Module,
        optimizers: list[Optimizer],
        scaler: torch.amp.GradScaler,
        regularizer: Regularizer | None,
    ):
        self.run, self.phase, self.keys, self.steps, self.every = run, phase, keys, steps, every
        self.model, self.optimizers, self.scaler, self.regularizer = model, optimizers, scaler, regularizer
        self._made_with = made_with(data, run.world)
        self.position, self.resumed = self._resume()
        self.sums = Sums(self.position.sums.to(run.world.device))
        self._before, self._began, self._saved = self.position.seconds, time.monotonic(), time.monotonic()
        self._losses: list[Tensor] = []
        self._signal, self._handlers = 0, dict[int, Any]()

    def _resume(self) -> tuple[Position, bool]:
        state = self.run.resume(self.phase)
        if state is None:
            return Position(), False
        compare(self._made_with, state.get("made_with", {}), self.run, self.phase)
        try:
            position = self._restore(state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise UserError(
                f"{self.run.checkpoint(self.phase)}: does not fit this version of r2 ({reason}); "
                "delete it to start again"
            ) from None
        self.run.say(f"{self.phase}: resumed at epoch {position.epoch + 1}, step {position.step}")
        return position, True

    def _restore(self, state: dict) -> Position:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        if self.regularizer is not None:
            self.regularizer.load_state_dict(state["regularizer"])
        saved = state["position"]
        return Position(**{**saved, "timing": Timing(**saved.get("timing", {}))})  # an older version saved none

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Signals that stop a run are remembered, and obeyed after a checkpoint, with status 128 + the signal's.

        A second Ctrl-C does not wait for it.
        """
        with stop_handlers() as self._handlers:
            for number, handler in self._handlers.items():
                if handler is not signal.SIG_IGN:  # as a shell has it for SIGINT in the background
                    signal.signal(number, self._remember)
            yield

    def _remember(self, number: int, _: Any) -> None:
        if number == self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    @property
    def step(self) -> int:
        """Over all epochs."""
        return self.position.epoch * self.steps + self.position.step

    @property
    def due(self) -> bool:
        """Whether this step looks at the device."""
        at = self.position.step
        return at % self.every == self.every - 1 or at == self.steps - 1

    def seconds(self) -> float:
        """So far, without the time between two processes."""
        return self._before + time.monotonic() - self._began

    def check_loss(self, loss: Tensor) -> None:
        """Before a step's update, so that no checkpoint holds what comes of it.

        Raises:
            Diverged: this loss or one since the last look is not finite.
        """
        self._losses.append(loss)
        if not self.due:
            return
        bad = (~torch.isfinite(torch.stack(self._losses))).to(torch.float32)
        if self.run.world.all_reduce(bad).any():
            raise Diverged(self._diverged(self.step - len(self._losses) + 1 + int(bad.nonzero()[0])))
        self._losses.clear()

    def _diverged(self, step: int) -> str:
        norms = {n: p.grad.norm().item() for n, p in self.model.named_parameters() if p.grad is not None}
        worst = max(norms, key=lambda n: (not math.isfinite(norms[n]), norms[n])) if norms else "none"
        return (
            f"{self.phase}: the loss is not finite at step {step} (lr {self.optimizers[0].param_groups[0]['lr']:.3g}); "
            f"the largest gradient is in {worst} ({norms.get(worst, 0):.3g}). {advice(self.keys)}"
        )

    def after_step(self) -> None:
        """
        Raises:
            SystemExit: a signal came; a checkpoint is written.
        """
        due = self.due
        self.position.step += 1
        if not due:
            return
        self.position.timing.mark()
        if self.position.step < self.steps:
            self._stop_or_save()

    def after_epoch(self, row: dict, last: bool) -> None:
        """Take up the curve's row; what `after_step` does, at an epoch's end; the last one is always saved."""
        self.position.rows.append(row)
        self.run.write_curve(self.phase, self.position.rows)
        self.run.log(row)
        self.sums.values.zero_()
        self.position.epoch, self.position.step, self.position.timing = self.position.epoch + 1, 0, Timing()
        if last:
            self._save()
        else:
            self._stop_or_save()

    def _stop_or_save(self) -> None:
        stop, due = self._agreed(time.monotonic() - self._saved >= self.run.checkpoint_seconds)
        if stop:
            self._save()
            self.run.say(f"{self.phase}: stopped by signal {int(self._signal)}; the same command resumes it")
            raise stopped(self._signal, self._handlers)
        if due:
            self._save()

    def _agreed(self, due: bool) -> tuple[bool, bool]:
        """Whether any rank has had a signal, and whether a checkpoint is due on any: ranks save together."""
        world = self.run.world
        if world.size > 1:
            flags = torch.tensor([float(self._signal), float(due)], device=world.device)
            signalled, due = (flag > 0 for flag in world.all_reduce(flags).tolist())
            self._signal = self._signal or (signal.SIGTERM if signalled else 0)
        return bool(self._signal), due

    def _save(self) -> None:
        world, position = self.run.world, self.position
        position.seconds, position.sums = self.seconds(), self.sums.values.cpu()
        position.timing.note_memory(world.device)
        model = self.model.state_dict()
        check_weights(model, self.phase, self.keys, world)
        self.run.save_state(
            self.phase,
            made_with=self._made_with,
            position=asdict(position),
            model=model,
            optimizers=[o.state_dict() for o in self.optimizers],
            scaler=self.scaler.state_dict(),
            regularizer=self.regularizer.state_dict() if self.regularizer is not None else None,
        )
        self._saved = time.monotonic()
        position.timing.begin()
