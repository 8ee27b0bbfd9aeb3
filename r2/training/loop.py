"""The training loop and evaluation. Pretraining and every fine-tuning stage use them."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from r2.config import UserError
from r2.console import Phase
from r2.data.batches import IGNORED, Data, chunk, mix
from r2.dist import World
from r2.models import Inputs
from r2.recipe import Recipe, learning_rate
from r2.regularizers import Regularizer
from r2.store import Run
from r2.training import resume
from r2.training.small_maps import fast_on_small_maps
from r2.training.timing import summary


@dataclass(frozen=True)
class Trained:
    """What a phase of training took.

    Attributes:
        seconds, images_per_second: evaluation and checkpoints included.
        timing: of the steps alone.
    """

    seconds: float
    images_per_second: float
    timing: dict[str, float] | None


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    run: Run,
    phase: str,
    optimizers: list[Optimizer],
    regularizer: Regularizer | None = None,
    before_epoch: Callable[[int], None] | None = None,
    before_update: Callable[[], None] | None = None,
    batchnorm: Literal["train", "freeze"] = "train",
    keys: str = "recipe",
) -> Trained:
    """Optimise `model` in place, going on from the phase's checkpoint if there is one.

    Args:
        phase: names the checkpoint, the curve and the progress bar.
        regularizer: its gradient is added after the all-reduce.
        before_epoch: called with the epoch's number before its first step.
        before_update: called when a step's gradients are there, before they are clipped.
        batchnorm: 'freeze' keeps the statistics that the model comes with.
        keys: the config group whose keys are in force, for what is said of a loss that is not finite.

    Raises:
        Diverged: the loss is not finite; names the step, the learning rate and the layer with the largest gradient.
            Weights that are not finite are refused before they reach a checkpoint.
        SystemExit: stopped by a signal, after writing a checkpoint.
    """
    world, device = run.world, run.world.device
    check_batch(recipe, world, phase, model)
    steps = data.steps(recipe.batch_size)
    total, warmup = steps * recipe.epochs, round(steps * recipe.warmup_epochs)
    if 0 < total <= warmup:
        run.say(
            f"{phase}: warmup_epochs={recipe.warmup_epochs:g} takes all {recipe.epochs} epochs, so the learning rate "
            "only rises; set recipe.warmup_epochs below recipe.epochs"
        )
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group.setdefault("initial_lr", group["lr"])
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16" and device.type == "cuda")
    upkeep = resume.Upkeep(run, phase, keys, data, steps, looks_every(world), model, optimizers, scaler, regularizer)
    position, sums = upkeep.position, upkeep.sums
    net = world.parallel(model)
    forward = torch.compile(net) if recipe.compile else fast_on_small_maps(net, device)
    reduction = "mean" if recipe.accumulate == 1 else "sum"  # the mean of a micro-batch without an image is NaN
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing, ignore_index=IGNORED, reduction=reduction)
    autocast = _autocast(recipe, device)

    with (
        upkeep.watch(),
        arithmetic(fast_arithmetic(recipe, device)),
        Phase(phase, total, upkeep.step, world.main) as bar,
    ):
        while position.epoch < recipe.epochs:
            if position.step == 0 and before_epoch:
                before_epoch(position.epoch)
            model.train()
            if batchnorm == "freeze":
                _freeze_batchnorm(model)
            batches = data.train(recipe.batch_size, run.seed, position.epoch, position.step)
            for inputs, labels in position.timing.waiting(batches):
                torch.manual_seed(mix(run.seed, position.epoch, position.step, world.rank))
                factor = learning_rate(upkeep.step, total, warmup, recipe.schedule)
                _begin_step(optimizers, factor)
                loss, seen = _backward(forward, net, inputs, labels, criterion, autocast, scaler, recipe)
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
                if before_update:
                    before_update()
                penalty = regularizer.add_gradients() if regularizer is not None else None
                sums.add(seen, penalty)
                upkeep.check_loss(loss if penalty is None else loss + penalty)
                if upkeep.due and bar.due():  # the device has nothing left to do that the bar would wait for
                    bar.update(upkeep.step + 1, _running(upkeep, recipe, factor * recipe.lr))
                _update(optimizers, scaler, recipe.clip_norm)
                upkeep.after_step()
            row = _epoch_row(phase, upkeep, data, recipe)
            bar.epoch(_line(row, recipe.epochs))
            upkeep.after_epoch(row, last=position.epoch == recipe.epochs - 1)
    seconds = upkeep.seconds() if not upkeep.resumed else max(position.seconds, 1e-9)
    return Trained(round(seconds, 2), round(total * recipe.batch_size / seconds, 1), summary(position.rows))


def looks_every(world: World) -> int:
    """Steps between two looks at the device, which wait for it; alone on a CPU there is nothing to wait for."""
    return 1 if world.device.type == "cpu" and world.size == 1 else 10


def fast_arithmetic(recipe: Recipe, device: torch.device) -> bool:
    """Whether training may compute float32 products fast: where most products are in 16 bits anyway."""
    return device.type == "cuda" and recipe.precision != "fp32"


def set_arithmetic(fast: bool) -> None:
    """How a GPU computes float32 products.

    Args:
        fast: with 10 bits of the factors (TF32), by the algorithm that cuDNN has timed as the fastest for the shape.
            Otherwise in IEEE float32 by cuDNN's deterministic algorithms, chosen by heuristics, which are the same in
            every process, so that a resumed run rounds as before.
    """
    # PyTorch's newer names make its compiler's questions about the older ones fail.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = fast
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = fast, not fast


@contextlib.contextmanager
def arithmetic(fast: bool) -> Iterator[None]:
    """`set_arithmetic`, and afterwards back."""
    cudnn, before = torch.backends.cudnn, torch.backends.cuda.matmul.allow_tf32
    of_cudnn = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    set_arithmetic(fast)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = of_cudnn


def _begin_step(optimizers: list[Optimizer], factor: float) -> None:
    """Clear the gradients and set every group's learning rate to `factor` times its first one."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.zero_grad()


def _update(optimizers: list[Optimizer], scaler: torch.amp.GradScaler, clip_norm: float | None) -> None:
    if clip_norm:
        parameters = [p for o in optimizers for g in o.param_groups for p in g["params"]]
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()


def _freeze_batchnorm(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def check_batches(stage: dict, recipe: Recipe, world: World, model: nn.Module) -> None:
    """Of pretraining and of a stage's own training, by its config, before either.

    Raises:
        UserError: as `check_batch`.
    """
    check_batch(recipe, world, "recipe", model)
    if stage.get("epochs") and not stage.get("from_scratch"):
        check_batch(replace(recipe, batch_size=stage["batch_size"]), world, "stage", model)


def check_batch(recipe: Recipe, world: World, phase: str, model: nn.Module) -> None:
    """
    Raises:
        UserError: a step's batch cannot be shared out evenly, or leaves BatchNorm one image, which has no variance.
    """
    parts = world.size * recipe.accumulate
    if recipe.batch_size % parts:
        raise UserError(
            f"{phase}: batch_size={recipe.batch_size} does not divide by {world.size} devices x "
            f"{recipe.accumulate} micro-batches"
        )
    if recipe.batch_size == parts and has_batchnorm(model):
        raise UserError(
            f"{phase}: batch_size={recipe.batch_size} leaves one image to each of {world.size} devices x "
            f"{recipe.accumulate} micro-batches, and BatchNorm has no variance over one; use a larger batch_size"
        )


def has_batchnorm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


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
            count = (y != IGNORED).sum()
            with autocast():
                logits = forward(x)
                loss = criterion(logits, y)
            if recipe.accumulate > 1:
                loss = loss / count.clamp(min=1) / len(parts)
            scaler.scale(loss).backward()
        with torch.no_grad():
            total += loss.detach()
            correct = (logits.argmax(1) == y).sum()
            seen += torch.stack([loss.detach() * len(parts) * count, correct, count])
    return total, seen


def _epoch_row(phase: str, upkeep: resume.Upkeep, data: Data, recipe: Recipe) -> dict:
    """The curve's row of the epoch that has just ended."""
    world, regularizer = upkeep.run.world, upkeep.regularizer
    loss, top1, penalty = upkeep.sums.means(world)
    held_out = evaluate(upkeep.model, data, world, recipe)
    return {
        "phase": phase,
        "epoch": upkeep.position.epoch + 1,
        "loss": round(loss, 6),
        "top1": round(top1, 4),
        "penalty": round(penalty, 6),
        "val_loss": held_out["loss"],
        "val_top1": held_out["top1"],
        "val_top5": held_out["top5"],
        "lr": upkeep.optimizers[0].param_groups[0]["lr"],
        **upkeep.position.timing.row(recipe.batch_size, world),
        **(regularizer.log() if regularizer is not None else {}),
    }


def _line(row: dict, epochs: int) -> str:
    return (
        f"epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}  top-1 {row['top1']:.2f}  "
        f"val loss {row['val_loss']:.4f}  val top-1 {row['val_top1']:.2f}  {row['images_per_second']:.0f} examples/s"
    )


def _running(upkeep: resume.Upkeep, recipe: Recipe, lr: float) -> str:
    loss, top1, _ = upkeep.sums.means()
    rate = (upkeep.step + 1) * recipe.batch_size / upkeep.seconds()
    return (
        f"epoch {upkeep.position.epoch + 1}/{recipe.epochs}  loss {loss:.3f}  "
        f"top-1 {top1:.1f}  lr {lr:.2g}  {rate:.0f} examples/s"
    )


def best(logits: Tensor) -> Tensor:
    """The five best classes (n, 5), as torch.topk orders them: logits of 8 bits are often equal."""
    return logits.topk(min(5, logits.shape[1]), 1).indices


@torch.no_grad()
@arithmetic(fast=False)
def evaluate(model: nn.Module, data: Data, world: World, recipe: Recipe) -> dict[str, float]:
    """Top-1 and top-5 in percent, and mean cross-entropy, over the validation images, each counted once.

    In IEEE float32, whatever the recipe's precision, as the packed file is read: autocast moves values off their grids.
    """
    world.broadcast_buffers(model)
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    for inputs, labels in data.val(max(1, min(2 * recipe.batch_size // world.size, 512))):
        logits, keep = model(inputs).float(), labels != IGNORED
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
