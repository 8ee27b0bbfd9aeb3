"""Export: writes a compressed model as a file for other programs, and checks that file against the model.

TARGETS names the file types. Each is a module with

    write(model, path, inputs, notes=None)      writes the file; `inputs` are at least two examples of the network's
                                                input size, `notes` a dictionary that the file carries
    predict(path)                   a function from inputs to logits, or None if nothing on this system runs the file

Its packages are an extra of r2. The command is `python -m r2.export` (r2.export.__main__).
"""

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2.config import UserError

if TYPE_CHECKING:
    from torch import nn

    from r2.data.batches import Data
    from r2.dist import World
    from r2.models import Inputs


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        module: what writes and runs it.
        suffix: of its files.
        title, runtime: what it is called, and what runs it.
        packages, extra: what it needs beyond r2's own dependencies, and the extra that brings them.
        batch: the size of a batch that its files take, where that is one number.
    """

    module: str
    suffix: str
    title: str
    runtime: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    batch: int | None = None

    def load(self) -> Any:
        """Its module.

        Raises:
            UserError: a package is missing; names the extra.
        """
        try:
            for package in self.packages:
                logging.getLogger(package).setLevel(logging.ERROR)  # coremltools warns of all that is not on Linux
                importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"{self.title} export needs {error.name}: pip install 'r2[{self.extra}]'") from None
        return importlib.import_module(self.module)


TARGETS = {
    "onnx": Target("r2.export.onnx", ".onnx", "ONNX", "onnxruntime", ("onnx", "onnxruntime", "onnxscript"), "export"),
    "pt2": Target("r2.export.pt2", ".pt2", "torch.export", "torch.export"),
    "coreml": Target("r2.export.coreml", ".mlpackage", "Core ML", "Core ML", ("coremltools",), "coreml", batch=1),
}


def target(name: str) -> Target:
    """
    Raises:
        UserError: there is no such target; lists them.
    """
    if name not in TARGETS:
        raise UserError(f"--to {name}: no such target; there are {', '.join(TARGETS)}")
    return TARGETS[name]


def to_onnx(model: "nn.Module", path: Path | str, images: "Inputs") -> None:
    """Write `model` as ONNX with any batch size, input `images` (or an input per name of tokens) and output `logits`.

    Args:
        images: two or more of the size that the network is to take.

    Raises:
        UserError: a layer has no form in ONNX (more than 16 bits); names the layer.
    """
    TARGETS["onnx"].load().write(model, Path(path), images)


def check(model: "nn.Module", path: Path | str, data: "Data", world: "World") -> dict[str, float] | None:
    """Run the file, of the target of its suffix, on this rank's validation images and compare it with `model`.

    Returns:
        images; torch_top1, onnx_top1 (by the target's name), equal_predictions in percent; largest_difference of any
        logit. None where nothing on this system runs the file.

    Raises:
        UserError: no target has the suffix of `path`; a package is missing.
    """
    import torch

    from r2.data.batches import IGNORED
    from r2.training.loop import best

    name = next((name for name, target in TARGETS.items() if target.suffix == Path(path).suffix), None)
    if name is None:
        suffixes = ", ".join(target.suffix for target in TARGETS.values())
        raise UserError(f"{path}: no target writes such a file; theirs end in {suffixes}")
    predict = TARGETS[name].load().predict(Path(path))
    if predict is None:
        return None
    model = model.to(world.device).eval()
    sums, largest = torch.zeros(4), 0.0
    with torch.no_grad():
        for inputs, labels in data.to(world).val(256):
            ours, theirs, labels = model(inputs).cpu(), predict(inputs), labels.cpu()
            predictions, others, known = best(ours)[:, 0], best(theirs)[:, 0], labels != IGNORED
            counts = [known, known & (predictions == labels), known & (others == labels)]
            sums += torch.stack([*counts, known & (predictions == others)]).sum(1)
            largest = max(largest, (ours - theirs).abs().max().item())
    images_seen, *correct = sums.tolist()
    names = ("torch_top1", f"{name}_top1", "equal_predictions")
    if not images_seen:
        raise UserError("no validation image can be decoded; look at the data folder")
    shares = {key: round(100 * count / images_seen, 4) for key, count in zip(names, correct, strict=True)}
    return {"images": int(images_seen), **shares, "largest_difference": largest}
