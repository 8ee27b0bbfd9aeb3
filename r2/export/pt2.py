"""A torch.export program (.pt2): PyTorch's own operators on bit-packed codes, for any machine with PyTorch.

    import torch
    logits = torch.export.load("model.pt2").module()(images)

Every weight is stored as codes, as many per byte as fit, with the method's parameters for decoding. It is decoded in
each call.
"""

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r2 import store
from r2.export.trace import trace
from r2.models import Inputs
from r2.palettize import Palette, unvectorize, vectorize
from r2.quantizers.layers import compressed


def write(model: nn.Module, path: Path, inputs: Inputs, notes: dict[str, Any] | None = None) -> None:
    """Write `model` as a program; `notes` are in its extra files, each as JSON.

    Raises:
        UserError: torch.export does not trace the model.
    """
    plain = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval()
    for layer in compressed(plain).values():
        if layer.quantizer.weight_bits > 16:  # stays as it is, as in a packed file
            weight, codes = layer.weight.detach(), torch.empty(0)
            weight = weight if layer.codes is not None else layer.quantizer.weight(weight)
        else:
            layer.quantizer, codes = _Stored(layer), None
            weight = layer.weight.new_empty([0] * layer.weight.ndim)  # the layer asks how many dimensions it has
        layer.weight, layer.codes = nn.Parameter(weight), codes
    program, buffer = trace(plain, inputs), io.BytesIO()
    for node in program.graph.nodes:  # of a node the file needs no more; the rest names the source files' folders
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    program.example_inputs = None  # two images of ImageNet are larger than many a model
    torch.export.save(program, buffer, extra_files={name: json.dumps(note) for name, note in (notes or {}).items()})
    store.write(path, buffer.getvalue())


def predict(path: Path) -> Callable[[Inputs], Tensor]:
    """Inputs to logits, by PyTorch on the CPU."""
    program = torch.export.load(path).module()

    def logits(inputs: Inputs) -> Tensor:
        return program(inputs.cpu() if isinstance(inputs, Tensor) else {k: v.cpu() for k, v in inputs.items()})

    return logits


class _Stored(nn.Module):
    """A layer's quantizer, whose weight is decoded from its packed codes."""

    packed: Tensor
    tail: Tensor

    def __init__(self, layer: Any):
        super().__init__()
        self.quantizer, weight = layer.quantizer, layer.weight.detach()
        codes = layer.encoded()
        self.bits, self.count = self.quantizer.weight_bits, len(codes)
        self.like = torch.empty_like(weight, device="meta")
        self.register_buffer("packed", pack(codes, self.bits))
        if isinstance(self.quantizer, Palette):
            self.register_buffer("tail", vectorize(weight, self.quantizer.dim)[1].clone())

    def weight(self, _: Tensor) -> Tensor:
        codes = unpack(self.packed, self.bits)[: self.count]
        if isinstance(self.quantizer, Palette):
            return unvectorize(self.quantizer.centroids[codes], self.tail, self.like)
        return self.quantizer.decode(codes, self.like)

    def act(self, x: Tensor) -> Tensor:
        return self.quantizer.act(x)


def _each(bits: int) -> int:
    """The bits that a code takes: the least of 1, 2, 4, 8 and 16."""
    return next(width for width in (1, 2, 4, 8, 16) if bits <= width)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (n,) below 2^bits, as uint8 that holds 8, 4, 2 or 1 of them, the first lowest, or as int16."""
    width = _each(bits)
    if width > 8:
        return codes.to(torch.int16)  # modulo 2^16
    per_byte = 8 // width
    rows = nn.functional.pad(codes.int(), (0, -len(codes) % per_byte)).view(-1, per_byte)
    return (rows << torch.arange(0, 8, width)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`, as int32, with the zeros that fill the last byte."""
    width = _each(bits)
    if width > 8:
        return packed.int() & 0xFFFF
    return (packed.int()[:, None] >> torch.arange(0, 8, width, device=packed.device) & 2**width - 1).flatten()
