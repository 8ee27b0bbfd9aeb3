"""One experiment: compose, pretrain (once), apply the stage, record.

python -m r2.run model=mbv2 reg=margin stage=ewgs
python -m r2.run -m reg=l2,kure,linf,margin stage=ewgs
python -m r2.run model=mbv2 reg=margin stage=ewgs check=true    # report whether it would start, and what it will do
"""

import contextlib
from typing import TYPE_CHECKING

from r2 import cli
from r2.config import Diverged, build
from r2.identity import axes, of_run

if TYPE_CHECKING:
    from r2.dist import World
    from r2.record import Record


def start(config: dict) -> "Record | None":
    """Run a checked plain config on its devices; returns the record."""
    if config["check"]:
        from r2.plan.check import check

        check(config)
        return None
    from r2.dist import launch  # torch is imported here, after every check

    return launch(experiment, config)


def ready(configs: list[dict]) -> None:
    """Refuse runs that would all meet the same obstacle, before the first one starts."""
    from r2.plan.check import ready

    ready(configs)


def experiment(config: dict, world: "World") -> "Record":
    """The whole experiment on one rank; returns the record."""
    import torch

    from r2 import console, pack, record, store
    from r2.dist import keep_freed_memory
    from r2.pretrain import pretrain, untrained
    from r2.report import layer
    from r2.training.loop import check_batches, set_arithmetic

    keep_freed_memory()
    set_arithmetic(fast=False)
    record.commit()  # of the code that is loaded now, whatever becomes of the checkout during the run
    stage, recipe = build(config["stage"]), build(config["recipe"])
    columns = axes(config, stage)
    identity = of_run(config, columns)
    directory = identity.directory
    if world.main:
        store.make_directory(directory)
    world.barrier()
    run = store.Run(directory, identity.key, world, config["seed"], config["checkpoint_seconds"], lambda row: None)
    with store.lock(directory, world, run.say):
        finished = directory / "record.json"
        if world.broadcast(finished.exists() and not config["force"]):
            found = record.read(finished, identity.name)
            record.check_packed(found, directory / "model.safetensors")
            run.say(f"{directory}: finished before, not repeated (force=true repeats it){record.reused()}")
        else:
            tracking = config["tracker"] if world.main else {"_target_": "r2.trackers.none"}
            with (
                contextlib.closing(build(config["data"]).to(world)) as data,
                build(tracking, directory, config) as tracker,
            ):
                run.say(f"run {identity.name}")
                run.say(f"{columns['data']}: {data.describe()}")
                run.log = tracker.log
                with torch.device("meta"):
                    shape = build(config["model"], num_classes=data.num_classes)
                stage.check(shape, min(data.calibration_images, data.train_images))
                check_batches(config["stage"], recipe, world, shape)
                beginning = untrained if stage.from_scratch else pretrain
                pretrained = None
                try:
                    model, pretrained = beginning(config, data, recipe, world, tracker)
                    model, outcome = stage(model, data, recipe, run, build(config["reg"], model).to(world.device))
                except Diverged as error:  # a result too: at chance in the tables
                    begun = untrained(config, data, recipe, world, tracker)
                    size = pack.size(begun[0])
                    found = record.of_diverged(config, columns, directory, pretrained, begun, size, error, data, world)
                    run.note_diverged(found)
                    raise
                if world.main:
                    pack.save(model, directory / "model.safetensors")
                    (directory / "weights.png").unlink(missing_ok=True)  # of the run before, with force=true
                size, skipped = pack.size(model), data.count_skipped()
                found = record.make(config, columns, directory, pretrained, model, size, outcome, data, skipped, world)
                run.finish(model, found)
    if world.main:
        console.summary(found, directory)
        layer.beside([found], directory / "weights.png")
    return found


def compare(configs: list[dict]) -> None:
    """The end of a sweep: its finished runs side by side, whichever process made them."""
    from r2 import record
    from r2.report.layer import compare

    runs = [of_run(config, axes(config, build(config["stage"]))) for config in configs]
    found = [record.read(path, run.name) for run in runs if (path := run.directory / "record.json").exists()]
    if found:
        compare(found)


if __name__ == "__main__":
    import r2.run  # as a module, whose functions other processes can import

    cli.main(r2.run.start, r2.run.ready, r2.run.compare)
