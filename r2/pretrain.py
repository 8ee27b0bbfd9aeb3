"""The pretrained checkpoint of (data, model, regularizer, recipe, seed): loaded if finished, resumed if interrupted.

With the user's own weights, it is those weights, either evaluated unchanged or fine-tuned.
"""

import csv
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import nn

from r2 import store
from r2.config import build
from r2.data.batches import Data
from r2.dist import World, sync_batchnorm
from r2.identity import of_pretraining, trains
from r2.recipe import Recipe, optimizer_of
from r2.record import Pretrained, reused
from r2.regularizers import describe
from r2.store import Run
from r2.trackers import Tracker
from r2.training.loop import Trained, evaluate, train
from r2.training.resume import check_data
from r2.zoo import weights


def pretrain(config: dict, data: Data, recipe: Recipe, world: World, tracker: Tracker) -> tuple[nn.Module, Pretrained]:
    """Train the new model with the regularizer active, unless anybody with this `out` already has.

    Returns:
        the model in evaluation mode on its device, and what is known of it.
    """
    identity = of_pretraining(config)
    directory = identity.directory
    if world.main:
        store.make_directory(directory)
    world.barrier()
    run = Run(directory, identity.key, world, config["seed"], config["checkpoint_seconds"], tracker.log)

    model = _new(config, data, recipe, world)
    finished = directory / "model.pt"
    with store.lock(directory, world, run.say):
        if world.broadcast(finished.exists()):
            state = run.finished()
            check_data(data.fingerprint(), state.get("data"), finished)  # an older version saved none
            model.load_state_dict(state["model"])
            run.say(f"pretrained: {directory} (finished, not repeated){reused()}")
            return model.eval(), Pretrained(**state["info"])
        if world.main:
            store.write_json(directory / "config.json", identity.values)
        initial = describe(model)
        done = {}
        if trains(config):
            done = asdict(_trained(model, config, data, recipe, run))
        else:
            run.say(f"pretrained weights: {config['weights']['source']}, unchanged")
        metrics = evaluate(model, data, world, recipe)
        known = Pretrained(
            weights=describe(model),
            weights_initial=initial,
            metrics=metrics,
            sha256=store.digest(model.state_dict()),
            skipped_images=data.count_skipped(),
            **done,
        )
        if world.main:
            made = {"format": "r2", "key": identity.key, "data": data.fingerprint()}
            store.save(finished, {**made, "model": model.state_dict(), "info": asdict(known)})
            store.remove(run.checkpoint("pretrain"), run.checkpoint("pretrain").with_suffix(".previous"))
        world.barrier()
    return model.eval(), known


def _trained(model: nn.Module, config: dict, data: Data, recipe: Recipe, run: Run) -> Trained:
    if recipe.syncs_batchnorm(run.world.size):
        model = sync_batchnorm(model, run.world)
    regularizer = build(config["reg"], model).to(run.world.device)
    optimizer = optimizer_of(model, recipe, regularizer)
    note_weights = _weights_curve(model, run)
    done = train(model, data, recipe, run, "pretrain", [optimizer], regularizer, before_epoch=note_weights)
    note_weights(recipe.epochs)
    return done


def _weights_curve(model: nn.Module, run: Run) -> Callable[[int], None]:
    """curve-weights.csv: range and kurtosis of every layer at the start of each epoch, and at the end."""
    path = run.directory / "curve-weights.csv"

    def note(epoch: int) -> None:
        if not run.world.main:
            return
        before = csv.DictReader(path.read_text().splitlines()) if path.exists() else ()
        rows: list[dict] = [row for row in before if int(row["epoch"]) < epoch]  # a resumed run may come here again
        rows += [{"epoch": epoch, "layer": name, **layer} for name, layer in describe(model).items()]
        run.write_curve("weights", rows)

    return note


def untrained(config: dict, data: Data, recipe: Recipe, world: World, tracker: Tracker) -> tuple[nn.Module, Pretrained]:
    """The new model, or the user's, for a stage that trains it with the whole recipe; returns what `pretrain` does."""
    model = _new(config, data, recipe, world)
    weights = describe(model)
    return model, Pretrained(weights, weights)


def _new(config: dict, data: Data, recipe: Recipe, world: World) -> nn.Module:
    torch.manual_seed(config["seed"])
    model = weights.load(build(config["model"], num_classes=data.num_classes), config).to(world.device)
    return model.to(memory_format=torch.channels_last) if recipe.channels_last else model
