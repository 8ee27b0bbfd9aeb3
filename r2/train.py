"""The one optimisation loop, and evaluation. Pretraining and every fine-tuning stage call it."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from r2 import resume
from r2.config import UserError
from r2.console import Phase
from r2.data.batches import IGNORED, Data, chunk, mix
from r2.dist import World, stop_handlers, stopped
from r2.models import Inputs
from r2.recipe import Recipe, learning_rate
from r2.regularizers import Regularizer
from r2.store import Run
from r2.timing import Timing, summary


class _Stop:
    """Set by a signal; the loop then writes a checkpoint and leaves with 128 + the signal's number."""

    def __init__(self) -> None:
        self.signal = 0
        self.handlers: dict[int, Any] = {}  # those that stand back while this one watches

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        with stop_handlers() as self.handlers:
            for number in self.handlers:
                signal.signal(number, self._set)
            yield

    def _set(self, number: int, _: Any) -> None:
        self.signal = number


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    run: Run,
    phase: str,
    optimizers: list[Optimizer],
    regularizer: Regularizer | None = None,
    before_epoch: Callable[[int], None] | None = None,
    batchnorm: Literal["train", "freeze"] = "train",
    keys: str = "recipe",
) -> dict:
    """Optimise `model` in place, going on from the phase's checkpoint if there is one.

    Args:
        phase: names the checkpoint, the curve and the progress bar.
        regularizer: its gradient is added after the all-reduce.
        before_epoch: called with the epoch's number before its first step.
        batchnorm: 'freeze' keeps the statistics that the model comes with.
        keys: the config group whose keys are in force, for what is said of a loss that is not finite.

    Returns:
        seconds, images_per_second (evaluation and checkpoints included), timing of the steps, and the curve's rows.

    Raises:
        UserError: the loss is not finite; names the step, the learning rate and the layer with the largest gradient.
            Weights that are not finite are refused before they reach a checkpoint.
        SystemExit: stopped by a signal, after writing a checkpoint.
    """
    world, device = run.world, run.world.device
    check_batch(recipe, world, phase)
    steps = data.steps(recipe.batch_size)
    total, warmup = steps * recipe.epochs, round(steps * recipe.warmup_epochs)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16" and device.type == "cuda")
    position, made_with = resume.Position(), resume.made_with(data, world)
    state = run.resume(phase)
    if state is not None:
        resume.compare(made_with, state.get("made_with", {}), run, phase)
        try:
            position = resume.restore(state, model, optimizers, scaler, regularizer)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0][:100]
            raise UserError(
                f"{run.checkpoint(phase)}: does not fit this version of r2 ({reason}); delete it to start again"
            ) from None
        run.say(f"{phase}: going on at epoch {position.epoch + 1}, step {position.step}")
    net = world.parallel(model)
    forward = torch.compile(net) if recipe.compile else net
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing, ignore_index=IGNORED)
    autocast = _autocast(recipe, device)
    sync_every = 1 if device.type == "cpu" and world.size == 1 else 10
    stop, began, saved = _Stop(), time.monotonic(), time.monotonic()
    before = position.seconds
    sums = position.sums.to(device)

    def write_checkpoint() -> None:
        nonlocal saved
        position.seconds, position.sums = before + time.monotonic() - began, sums.cpu()
        position.timing.note_memory(device)
        state = resume.state_of(position, model, optimizers, scaler, regularizer)
        if world.main:
            resume.check_weights(state["model"], phase, keys)
        run.save_state(phase, made_with=made_with, **state)
        saved = time.monotonic()
        position.timing.begin()

    with stop.watch(), Phase(phase, total, position.epoch * steps + position.step, world.main) as bar:
        while position.epoch < recipe.epochs:
            if position.step == 0 and before_epoch:
                before_epoch(position.epoch)
            model.train()
            if batchnorm == "freeze":
                _freeze_batchnorm(model)
            batches = position.timing.waiting(data.train(recipe.batch_size, run.seed, position.epoch, position.step))
            losses: list[Tensor] = []
            for inputs, labels in batches:
                step = position.epoch * steps + position.step
                torch.manual_seed(mix(run.seed, position.epoch, position.step, world.rank))
                factor = learning_rate(step, total, warmup, recipe.schedule)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = group["initial_lr"] * factor
                    optimizer.zero_grad()
                loss, seen = _backward(forward, net, inputs, labels, criterion, autocast, scaler, recipe)
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
                if regularizer is not None:
                    penalty = regularizer.add_gradients()
                    sums[3] += penalty * seen[2]
                    loss = loss + penalty
                losses.append(loss)
                due = position.step % sync_every == sync_every - 1 or position.step == steps - 1
                if due:
                    _check_finite(losses, step, optimizers[0].param_groups[0]["lr"], model, world, phase, keys)
                    losses.clear()
                if recipe.clip_norm:
                    parameters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
                    nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
                for optimizer in optimizers:
                    scaler.step(optimizer)
                scaler.update()
                sums[:3] += seen
                position.step += 1
                if due:
                    position.timing.mark()
                if bar.due():
                    bar.update(step + 1, _running(sums, position, recipe, factor * recipe.lr, steps, began, before))
                if due and position.step < steps and _any_stop(stop, world):
                    write_checkpoint()
                    raise _interrupted(run, phase, stop)
                if due and position.step < steps and time.monotonic() - saved >= run.checkpoint_seconds:
                    write_checkpoint()
            row = _epoch_row(phase, position, sums, world, data, model, recipe, regularizer, optimizers[0])
            position.rows.append(row)
            run.write_curve(phase, position.rows)
            run.log(row)
            bar.epoch(_line(row, recipe.epochs))
            sums.zero_()
            position.epoch, position.step, position.timing = position.epoch + 1, 0, Timing()
            last = position.epoch == recipe.epochs
            if last or time.monotonic() - saved >= run.checkpoint_seconds:
                write_checkpoint()
            if not last and _any_stop(stop, world):
                write_checkpoint()
                raise _interrupted(run, phase, stop)
    seconds = before + time.monotonic() - began if before == 0 or state is None else max(before, position.seconds)
    return {
        "seconds": round(seconds, 2),
        "images_per_second": round(total * recipe.batch_size / seconds, 1),
        "timing": summary(position.rows),
        "rows": position.rows,
    }


def _freeze_batchnorm(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def check_batch(recipe: Recipe, world: World, phase: str) -> None:
    """
    Raises:
        UserError: a step's batch cannot be shared out evenly.
    """
    parts = world.size * recipe.accumulate
    if recipe.batch_size % parts:
        raise UserError(
            f"{phase}: batch_size={recipe.batch_size} does not divide by {world.size} devices x "
            f"{recipe.accumulate} micro-batches"
        )


def _autocast(recipe: Recipe, device: torch.device) -> Callable[[], Any]:
    if recipe.precision == "fp32":
        return contextlib.nullcontext
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float16
    return lambda: torch.autocast(device.type, dtype=dtype)


def _backward(
    forward: Callable,
    net: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    criterion: nn.Module,
    autocast: Callable,
    scaler: torch.amp.GradScaler,
    recipe: Recipe,
) -> tuple[Tensor, Tensor]:
    """Gradients of the mean loss over the micro-batches; returns it and (loss sum, correct, count)."""
    parts = list(zip(chunk(inputs, recipe.accumulate), labels.chunk(recipe.accumulate), strict=True))
    total, seen = (
        torch.zeros((), device=labels.device),
        torch.zeros(3, dtype=torch.float64, device=labels.device),
    )
    for i, (x, y) in enumerate(parts):
        last = i == len(parts) - 1
        with contextlib.nullcontext() if last or not isinstance(net, DistributedDataParallel) else net.no_sync():
            with autocast():
                logits = forward(x)
                loss = criterion(logits, y) / len(parts)
            scaler.scale(loss).backward()
        with torch.no_grad():
            count = (y != IGNORED).sum()
            total += loss.detach()
            correct = (logits.argmax(1) == y).sum()
            seen += torch.stack([loss.detach() * len(parts) * count, correct, count])
    return total, seen


def _check_finite(
    losses: list[Tensor], step: int, lr: float, model: nn.Module, world: World, phase: str, keys: str
) -> None:
    bad = (~torch.isfinite(torch.stack(losses))).to(torch.float32)
    if not world.all_reduce(bad).any():
        return
    first = step - len(losses) + 1 + int(bad.nonzero()[0])
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    worst = max(norms, key=lambda n: (not math.isfinite(norms[n]), norms[n])) if norms else "none"
    raise UserError(
        f"{phase}: the loss is not finite at step {first} (lr {lr:.3g}); the largest gradient is in {worst} "
        f"({norms.get(worst, 0):.3g}). {resume.mend(keys)}"
    )


def _any_stop(stop: _Stop, world: World) -> bool:
    if world.size == 1:
        return bool(stop.signal)
    flag = world.all_reduce(torch.tensor(float(stop.signal), device=world.device))
    stop.signal = stop.signal or (signal.SIGTERM if flag > 0 else 0)
    return bool(stop.signal)


def _interrupted(run: Run, phase: str, stop: _Stop) -> SystemExit:
    run.say(f"{phase}: stopped by signal {int(stop.signal)}; the same command goes on from here")
    return stopped(stop.signal, stop.handlers)


def _epoch_row(
    phase: str,
    position: resume.Position,
    sums: Tensor,
    world: World,
    data: Data,
    model: nn.Module,
    recipe: Recipe,
    regularizer: Regularizer | None,
    optimizer: Optimizer,
) -> dict:
    loss, correct, count, penalty = world.all_reduce(sums.clone()).tolist()
    count = max(count, 1)
    held_out = evaluate(model, data, world, recipe)
    return {
        "phase": phase,
        "epoch": position.epoch + 1,
        "loss": round(loss / count, 6),
        "top1": round(100 * correct / count, 4),
        "penalty": round(penalty / count, 6),
        "val_loss": held_out["loss"],
        "val_top1": held_out["top1"],
        "val_top5": held_out["top5"],
        "lr": optimizer.param_groups[0]["lr"],
        **position.timing.row(recipe.batch_size, world),
        **(regularizer.log() if regularizer is not None else {}),
    }


def _line(row: dict, epochs: int) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}  top-1 {row['top1']:.2f}  "
        f"val loss {row['val_loss']:.4f}  val top-1 {row['val_top1']:.2f}  {row['images_per_second']:.0f} examples/s"
    )


def _running(
    sums: Tensor, position: resume.Position, recipe: Recipe, lr: float, steps: int, began: float, before: float
) -> str:
    loss, correct, count, _ = sums.tolist()
    done = (position.epoch * steps + position.step) * recipe.batch_size
    rate = done / (before + time.monotonic() - began)
    return (
        f"epoch {position.epoch + 1}/{recipe.epochs}  loss {loss / max(count, 1):.3f}  "
        f"top-1 {100 * correct / max(count, 1):.1f}  lr {lr:.2g}  {rate:.0f} examples/s"
    )


@torch.no_grad()
def best(logits: Tensor) -> Tensor:
    """The five best classes (n, 5), as torch.topk orders them: logits of 8 bits are often equal."""
    return logits.topk(min(5, logits.shape[1]), 1).indices


def evaluate(model: nn.Module, data: Data, world: World, recipe: Recipe) -> dict[str, float]:
    """Top-1 and top-5 in percent, and mean cross-entropy, over the validation images, each counted once."""
    world.broadcast_buffers(model)
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    autocast = _autocast(recipe, world.device)
    for inputs, labels in data.val(max(1, min(2 * recipe.batch_size // world.size, 512))):
        with autocast():
            logits = model(inputs)
        logits, keep = logits.float(), labels != IGNORED
        top = best(logits) == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        sums += torch.stack([loss, top[:, 0].sum(), top.sum(), keep.sum()])
    loss, top1, top5, count = world.all_reduce(sums).tolist()
    if count == 0:
        raise UserError("no validation image can be decoded; look at the data folder")
    return {
        "loss": round(loss / count, 6),
        "top1": round(100 * top1 / count, 4),
        "top5": round(100 * top5 / count, 4),
        "images": int(count),
    }
