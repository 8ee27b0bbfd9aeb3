"""Core ML: an .mlpackage for iOS 18 and macOS 15 whose weights stay low-bit codes, which Core ML decodes.

A palette is a table and its indices (constexpr_lut_to_dense). Integers are linear (constexpr_blockwise_shift_scale),
for which Core ML has 4 and 8 bits, or a table of levels with indices of 1, 2, 3 or 6 bits where that is smaller. An
activation is quantize and dequantize, after a clip if it does not use all levels of its integer type. Everything else
is float16, Core ML's default and the Neural Engine's only type.

The batch size is 1, because the Neural Engine runs only fixed sizes; Core ML itself predicts lists of images. Files can
be written on every system; predictions need macOS.
"""

import contextlib
import copy
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil import register_torch_op
from coremltools.converters.mil.mil import types
from torch import Tensor, nn

from r2.config import UserError, first_line
from r2.export.onnx import _activation, _Levels
from r2.models import Inputs
from r2.palettize import Palette
from r2.quantizers.affine import Activation
from r2.quantizers.layers import compressed

TARGET = ct.target.iOS18  # the first with indices of 3 bits, vectors, integers of 4 bits and tables by channel
_WIDTHS = (1, 2, 3, 4, 6, 8)  # bits of an index


@torch.library.custom_op("r2::coreml_linear", mutates_args=())
def linear(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, name: str) -> Tensor:
    """scale (codes - offset); both of the codes' rank, one value or one per output channel; codes take `bits`."""
    return scale * (codes.float() - offset)


@torch.library.custom_op("r2::coreml_table", mutates_args=())
def table(codes: Tensor, levels: Tensor, name: str) -> Tensor:
    """Each code's vector of `levels` (tables, 2^bits, dim), along axis 0 of the codes (out / dim, ...).

    One table, or one per output channel.
    """
    own = torch.arange(len(levels)).view(-1, *[1] * (codes.ndim - 1))
    return levels[own, codes.long()].movedim(-1, 1).flatten(0, 1)


def _table_shape(codes: Tensor, levels: Tensor, name: str) -> Tensor:
    return levels.new_empty((len(codes) * levels.shape[2], *codes.shape[1:]))


linear.register_fake(lambda codes, scale, offset, bits, name: torch.empty_like(codes, dtype=torch.float32))
table.register_fake(_table_shape)


def write(model: nn.Module, path: Path, images: Inputs, notes: dict[str, Any] | None = None) -> None:
    """Write `model` as a Core ML package for one image at a time, input `images` and output `logits`.

    Args:
        path: a folder, ending in .mlpackage; one that stands there is replaced.
        images: one or more of the size that the network is to take.
        notes: for the package's metadata, each as JSON.

    Raises:
        UserError: a layer has no form in Core ML (more than 8 bits), named; Core ML does not take the model, with
            coremltools' reason; the package cannot be written.
    """
    if not isinstance(images, Tensor):
        raise UserError("Core ML export takes models of images; --to onnx and --to pt2 take models of text too")
    if path.suffix != ".mlpackage":
        raise UserError(f"{path}: the name of a Core ML package ends in .mlpackage")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder; make it first")
    plain, image = _exportable(model), images[:1].cpu().contiguous()
    try:
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
            warnings.simplefilter("ignore")  # about the exporters' own insides
            package = ct.convert(
                torch.export.export(plain, (image,)).run_decompositions({}),
                inputs=[ct.TensorType("images", tuple(image.shape))],
                outputs=[ct.TensorType("logits", dtype=np.float32)],
                minimum_deployment_target=TARGET,
                skip_model_load=True,
            )
    except Exception as error:
        raise UserError(f"the model cannot be exported: Core ML does not take it ({first_line(error)})") from None
    for name, note in (notes or {}).items():
        package.user_defined_metadata[name] = json.dumps(note)
    with tempfile.TemporaryDirectory() as folder:
        package.save(whole := str(Path(folder) / path.name))  # with the notes, which the one that convert made lacks
        _replace(Path(whole), path)


def predict(path: Path) -> Callable[[Tensor], Tensor] | None:
    """Images to logits, by Core ML; None on other systems than macOS, which do not have it."""
    if sys.platform != "darwin":
        return None
    model = ct.models.MLModel(str(path))

    def logits(images: Tensor) -> Tensor:
        found = model.predict([{"images": image[None].numpy()} for image in images.cpu().contiguous()])
        return torch.cat([torch.from_numpy(each["logits"]) for each in found])

    return logits


@register_torch_op(torch_alias=["r2::coreml_linear"], override=True)
def coreml_linear(context: Any, node: Any) -> None:
    *inputs, bits, name = node.inputs
    codes, scale, offset = (context[each].val for each in inputs)
    kind = _unsigned(bits)
    if np.array_equal(offset, offset.astype(np.uint8)) and offset.max() < 2**bits:
        offset = offset.astype(kind)  # else float: the middle of an even number of levels, or outside of them
    weight = mb.constexpr_blockwise_shift_scale(data=codes.astype(kind), scale=scale, offset=offset, name=name)
    context.add(weight, node.name)


@register_torch_op(torch_alias=["r2::coreml_table"], override=True)
def coreml_table(context: Any, node: Any) -> None:
    *inputs, name = node.inputs
    codes, levels = (context[each].val for each in inputs)
    tables, size, dim = levels.shape
    options = {
        "indices": codes.astype(_unsigned(size.bit_length() - 1)),
        "lut": levels.reshape(tables, *[1] * (codes.ndim - 1), size, dim),
    }
    if dim > 1:
        options["vector_axis"] = np.int32(0)
    context.add(mb.constexpr_lut_to_dense(**options, name=name), node.name)


@register_torch_op(torch_alias=["r2::requantize"], override=True)
def requantize(context: Any, node: Any) -> None:
    x, scale, zero_point, out_scale = (context[each] for each in node.inputs)
    zero = zero_point.val[()]
    integers = mb.quantize(input=x, scale=scale.val, zero_point=zero, output_dtype=str(zero.dtype))
    context.add(mb.dequantize(input=integers, scale=out_scale.val, zero_point=zero, name=node.name))


def _unsigned(bits: int) -> Any:
    return types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}"))


class _Exported(nn.Module):
    """A layer's quantizer in Core ML's operations; computes what the original does up to float rounding.

    A weight is codes and the levels of a table, or codes, scale and offset; or values, where a palette leaves channels
    out, for which Core ML has no form.
    """

    codes: Tensor
    levels: Tensor
    scale: Tensor
    offset: Tensor
    values: Tensor

    @torch.no_grad()
    def __init__(self, name: str, layer: Any):
        super().__init__()
        self.name = f"{name}.weight"
        quantizer, weight = layer.quantizer, layer.weight
        if quantizer.weight_bits > 8:
            raise UserError("its weights have more than 8 bits")
        codes = layer.encoded().to(torch.uint8)
        tensors, self.bits = (_palette if isinstance(quantizer, Palette) else _integers)(quantizer, codes, weight)
        for part, tensor in tensors.items():
            self.register_buffer(part, tensor.detach().clone())
        self.act = _activation(quantizer)
        _check(self.act)

    def weight(self, w: Tensor) -> Tensor:
        if hasattr(self, "levels"):
            return table(self.codes, self.levels, self.name)
        if hasattr(self, "scale"):
            return linear(self.codes, self.scale, self.offset, self.bits, self.name)
        return self.values


def _width(bits: int) -> int:
    return next(width for width in _WIDTHS if width >= bits)


def _palette(quantizer: Palette, codes: Tensor, weight: Tensor) -> tuple[dict[str, Tensor], int]:
    if quantizer.tail(weight):
        return {"values": quantizer.decode(codes, weight)}, 0
    if quantizer.dim == 1:
        codes = codes.view(weight.shape)
    else:  # vectorize's order: its vectors of channels are the last axis but one of (..., out / dim, dim)
        shape = [weight.shape[-1], *weight.shape[1:-1], len(weight) // quantizer.dim]
        codes = codes.view(shape).transpose(0, -1)
    bits = _width(quantizer.weight_bits)
    levels = torch.zeros(1, 2**bits, quantizer.dim)
    levels[0, : len(quantizer.centroids)] = quantizer.centroids
    return {"codes": codes, "levels": levels}, bits


def _integers(quantizer: Any, codes: Tensor, weight: Tensor) -> tuple[dict[str, Tensor], int]:
    """As a table or linear, whichever takes fewer bytes."""
    grid = quantizer.weight_grid()  # code c is (first + stride c - zero_point) scale
    zero_point = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    scale, offset = (grid.stride * grid.scale).view(-1), ((zero_point - grid.first) / grid.stride).view(-1)
    bits, width = (4 if quantizer.weight_bits <= 4 else 8), _width(quantizer.weight_bits)
    codes = codes.view(weight.shape)
    if weight.numel() * width / 8 + 2 * len(scale) * 2**width < weight.numel() * bits / 8 + 4 * len(scale):
        levels = scale[:, None] * (torch.arange(2**width) - offset[:, None])
        return {"codes": codes, "levels": levels[:, :, None]}, width
    shape = (-1, *[1] * (weight.ndim - 1))
    return {"codes": codes, "scale": scale.view(shape), "offset": offset.view(shape)}, bits


def _check(activation: nn.Module) -> None:
    if isinstance(activation, _Levels) and activation.zero_point.dtype not in (torch.uint8, torch.int8):
        raise UserError("its activation has more than 8 bits")


def _exportable(model: nn.Module) -> nn.Module:
    """A copy whose quantizers are Core ML's operations."""
    plain = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval()
    for name, layer in compressed(plain).items():
        try:
            layer.quantizer, layer.codes = _Exported(name, layer), None
        except UserError as error:
            method, bits = type(layer.quantizer).__name__.lower(), layer.quantizer.weight_bits
            raise UserError(f"{name} ({method}, {bits} bits) cannot be exported to Core ML: {error}") from None
    for name, module in list(plain.named_modules()):
        if isinstance(module, Activation):
            levels = _Levels(0, 2**module.bits - 1, module.scale, int(module.zero_point))
            try:
                _check(levels)
            except UserError as error:
                raise UserError(f"{name.rpartition('.')[0]} cannot be exported to Core ML: {error}") from None
            plain.set_submodule(name, levels)
    return plain


def _replace(package: Path, path: Path) -> None:
    """Put a copy of the folder `package` at `path`, whole or not at all."""
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        shutil.copytree(package, part, copy_function=shutil.copyfile)
        for folder in (part, *(item for item in part.rglob("*") if item.is_dir())):
            shutil.copymode(path.parent, folder)  # a package made in a temporary folder is nobody else's to read
        if path.exists():
            old = path.with_name(f".{os.getpid()}.old.{path.name}")
            path.rename(old)
            part.rename(path)
            shutil.rmtree(old)
        else:
            part.rename(path)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"cannot write {path} ({error.strerror})") from None
