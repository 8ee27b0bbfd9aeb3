"""Trace a model to a torch.export program with dynamic batch size and, for tokens, dynamic length."""

import warnings

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map

from r2.config import UserError, first_line
from r2.models import Inputs


def named(inputs: Inputs) -> dict[str, Tensor]:
    """A network's inputs by the names that they have in a file."""
    return {"images": inputs} if isinstance(inputs, Tensor) else inputs


def axes(inputs: Inputs) -> dict:
    """The dynamic axes, by number, for the one input or for each input by its name."""
    return {0: "batch"} if isinstance(inputs, Tensor) else {name: {0: "batch", 1: "length"} for name in inputs}


def trace(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """The program that computes what `model` does, on the CPU; nothing of `model` but its tensors is in it.

    Args:
        inputs: two or more examples; of images the size is fixed by them.

    Raises:
        UserError: a single example; the model cannot be traced, with torch's reason.
    """
    if any(len(tensor) < 2 for tensor in named(inputs).values()):
        raise UserError("give at least two examples: with one the batch size would be fixed")
    # The two separators and what begins a pair are three tokens; of two, one tensor of MobileBERT has another layout.
    dims = {"batch": Dim("batch"), "length": Dim("length", min=3)}
    shapes = tree_map(dims.get, axes(inputs))
    example = tree_map(lambda tensor: tensor.cpu().contiguous(), inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # about torch's own insides
            return torch.export.export(model, (example,), dynamic_shapes=(shapes,))
    except Exception as error:
        raise UserError(f"the model cannot be exported: torch.export does not trace it ({first_line(error)})") from None
