"""Export a run's packed model for other programs, and check it on the run's data.

python -m r2.export outputs/<run>                    # ONNX, to <run>/model.onnx
python -m r2.export outputs/<run> --to pt2           # a torch.export program, to <run>/model.pt2
python -m r2.export outputs/<run> --to coreml        # Core ML, to <run>/model.mlpackage
python -m r2.export outputs/<run> data.root=DIR      # if the data are at another path than for the run
python -m r2.export model.safetensors                # a packed file alone, to model.onnx beside it, unchecked
"""

import argparse
import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from r2 import export, pack, record
from r2.cli import refusals
from r2.config import UserError, build, height_and_width, shell_word
from r2.data.batches import Data
from r2.data.facts import Facts, facts
from r2.data.memory import Memory
from r2.dist import World
from r2.export import card
from r2.export.trace import named
from r2.models import Inputs

_PLACES = ("root", "tokenizer")  # what may differ from the record: the same data, elsewhere


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m r2.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder, or a packed file alone")
    parser.add_argument("places", nargs="*", metavar="data.root=DIR", help="where the run's data lie on this machine")
    parser.add_argument("--to", default="onnx", help=f"the kind of file: {', '.join(export.TARGETS)}; onnx by default")
    parser.add_argument("--out", type=Path, help="the file; model.onnx and so forth beside the packed one by default")
    parser.add_argument("--no-check", action="store_true", help="do not run the file on the run's data")
    parser.add_argument("--image-size", type=int, nargs="+", help="of a packed file alone: N, or HEIGHT WIDTH")
    parsed = parser.parse_intermixed_args(arguments)
    with refusals():
        target, alone = export.target(parsed.to), parsed.run.is_file()
        out = parsed.out or (parsed.run.parent if alone else parsed.run) / f"model{target.suffix}"
        if out.suffix != target.suffix:
            raise UserError(f"--out {out}: the name of a file for {target.title} ends in {target.suffix}")
        if parsed.out and not out.parent.is_dir():
            raise UserError(f"--out {out}: there is no folder {out.parent}")
        if alone:
            if parsed.places:
                raise UserError(f"{parsed.places[0]}: a packed file alone is not checked; export its run's folder")
            export_packed(parsed.run, out, parsed.to, parsed.image_size)
        else:
            if parsed.image_size is not None:
                raise UserError("--image-size is for a packed file alone; a run's record says it")
            export_run(parsed.run, out, parsed.to, parsed.places, check=not parsed.no_check)


def export_run(run: Path, out: Path, to: str = "onnx", places: Iterable[str] = (), check: bool = True) -> None:
    """Write a run's packed model, and compare the file with it on the run's data, found at `places` (data.KEY=VALUE).

    Raises:
        UserError: the record or the packed file is missing or altered, the data are not there, or the target does not
            take the model; nothing has been written then.
    """
    target = export.target(to)
    target.load()
    _check_finished(run)
    model = pack.load(run / "model.safetensors")
    found = record.read(run / "record.json")
    record.check_packed(found, run / "model.safetensors")
    config = _placed(found["config"]["data"], places)
    known = facts({**found["config"], "choices": found["choices"]})
    card.read(out.parent)  # refused before anything is written
    if not check:
        inputs = _examples(model, known.image_size)
        preprocessing = _preprocessing(inputs, known)
        _write(target, model, out, inputs, preprocessing)
        print("not checked         by --no-check")
        _describe(run, out, to, places, found, None, preprocessing)
        return
    world = World()
    with contextlib.closing(_data(config).to(world)) as data:
        inputs = _examples(model, known.image_size or getattr(data, "image_size", None))
        preprocessing = _preprocessing(inputs, known, data)
        _write(target, model, out, inputs, preprocessing)
        checked = export.check(model, out, data, world)
    if checked is None:
        print(f"not checked         {target.runtime} does not run on this system")
        _describe(run, out, to, places, found, None, preprocessing)
        return
    print(f"images              {checked['images']}")
    print(f"top-1               torch {checked['torch_top1']:.2f} %, {target.runtime} {checked[f'{to}_top1']:.2f} %")
    print(f"equal predictions   {checked['equal_predictions']:.2f} %")
    print(f"largest difference  {checked['largest_difference']:.2g} of a logit")
    _describe(run, out, to, places, found, checked, preprocessing)


def export_packed(packed: Path, out: Path, to: str = "onnx", image_size: list[int] | None = None) -> None:
    """Write the model of a packed file that has no run beside it; nothing says then what to compare it on.

    Raises:
        UserError: the packed file is damaged or holds a model of one's own, or the target does not take the model.
    """
    if image_size is not None and not (len(image_size) <= 2 and min(image_size) > 0):
        raise UserError(f"--image-size {' '.join(map(str, image_size))}: expected one number, or a height and a width")
    target = export.target(to)
    target.load()
    model = pack.load(packed)
    _write(target, model, out, _examples(model, image_size[0] if image_size and len(image_size) == 1 else image_size))
    print("not checked         a packed file has no data to check on; export its run's folder instead")


def _check_finished(run: Path) -> None:
    """
    Raises:
        UserError: `run` is no folder of a finished run.
    """
    if not run.is_dir():
        raise UserError(f"{run}: there is no such run or file")
    if not (run / "record.json").exists():  # written last
        if runs := sorted(path.parent.name for path in run.glob("*/record.json")):
            raise UserError(f"{run}: holds runs; name one of them, such as {run / runs[0]}")
        raise UserError(f"{run}: is not finished; start its command again")


def _describe(
    run: Path,
    out: Path,
    to: str,
    places: Iterable[str],
    found: record.Record,
    checked: dict[str, float] | None,
    preprocessing: dict[str, Any] | None,
) -> None:
    """Enter the file into the card of its folder."""
    words = ["python", "-m", "r2.export", str(run), *places, "--to", to, "--out", str(out)]
    command = " ".join(map(shell_word, words))
    written = card.write(out, to, export.target(to).runtime, found, checked, command, preprocessing)
    kept = "" if written else "; README.md there is not r2's and stays"
    print(f"model card          {out.parent / 'model_card.json'}{kept}")


def _placed(config: dict[str, Any], places: Iterable[str]) -> dict[str, Any]:
    """A record's config of its data, with the places of this machine."""
    config = dict(config)
    for word in places:
        key, equals, value = word.partition("=")
        name = key.removeprefix("data.")
        known = [f"data.{place}" for place in _PLACES if place in config]
        if not equals or f"data.{name}" not in known or not key.startswith("data."):
            may = f"only {' and '.join(known)} can" if known else "its data need no path, so nothing can"
            raise UserError(f"{word}: is fixed by the run's record; {may} be given here")
        config[name] = os.path.expanduser(value)
    return config


def _data(config: dict[str, Any]) -> Data:
    try:
        return build(config)
    except UserError as error:
        raise UserError(f"{error}; the check reads them: data.root=DIR, or --no-check to leave it out") from None


def _examples(model: nn.Module, image_size: int | list[int] | None) -> Inputs:
    """Two of what a network of r2 takes."""
    architecture: Any = model.architecture
    if architecture["name"] == "mobilebert":
        tokens = torch.ones(2, min(16, architecture["settings"]["max_position_embeddings"]), dtype=torch.long)
        return {"input_ids": tokens, "attention_mask": tokens, "token_type_ids": torch.zeros_like(tokens)}
    size = image_size or (32 if architecture.get("small_input") else 224)
    return torch.zeros(2, 3, *height_and_width(size))


def _preprocessing(inputs: Inputs, known: Facts, data: Data | None = None) -> dict[str, Any] | None:
    """Size of an image, and mean and std of its pixels in 0..1 where they are known; None for tokens."""
    if isinstance(inputs, dict):
        return None
    found: dict[str, Any] = {"image_size": list(inputs.shape[2:])}
    if isinstance(data, Memory):  # by its own images, so only they say it
        rows = [row.flatten().expand(3).tolist() for row in (data.mean, data.std)]
    elif known.mean_and_std:
        rows = [list(row) for row in known.mean_and_std]
    else:
        return found
    mean, std = ([round(value, 6) for value in row] for row in rows)
    return {**found, "mean": mean, "std": std}


def _write(
    target: export.Target, model: nn.Module, out: Path, inputs: Inputs, preprocessing: dict[str, Any] | None = None
) -> None:
    target.load().write(model, out, inputs, preprocessing)
    print(f"file                {out}, {card.size(out) / 2**20:.3f} MiB")
    shape = ("batch", "length") if isinstance(inputs, dict) else (target.batch or "batch", *inputs.shape[1:])
    sizes = ", ".join(map(str, shape))
    print(f"inputs              {', '.join(named(inputs))} ({sizes})")


if __name__ == "__main__":
    main()
