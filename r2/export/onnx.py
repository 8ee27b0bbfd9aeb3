"""ONNX: integer weights and activations with QuantizeLinear and DequantizeLinear, palettes with Gather.

Integer weights are initializers of 4, 8 or 16 bits. A palette is codes, stored as 4- or 8-bit integers, and a table of
centroids; one 4-bit integer holds two 2-bit codes or four 1-bit codes and selects a row of two or four centroids. An
activation is QuantizeLinear and DequantizeLinear, after a Clip if it does not use all levels of its integer type.
Biases stay float.
"""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r2 import store
from r2.config import UserError, first_line
from r2.export.trace import axes, named, trace
from r2.models import Inputs
from r2.palettize import Palette, unvectorize, vectorize
from r2.quantizers.affine import Activation
from r2.quantizers.layers import compressed

OPSET = 21  # the first that has 4-bit integers


@torch.library.custom_op("r2::dequantize", mutates_args=())
def dequantize(values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """DequantizeLinear along axis 0: (values - zero_point) scale; scale and zero_point (), or (channels,)."""
    shape = (-1, *[1] * (values.ndim - 1)) if scale.ndim else ()
    return (values.float() - zero_point.float().view(shape)) * scale.view(shape)


@torch.library.custom_op("r2::requantize", mutates_args=())
def requantize(x: Tensor, scale: Tensor, zero_point: Tensor, out_scale: Tensor) -> Tensor:
    """QuantizeLinear into the type of `zero_point`, which saturates, then DequantizeLinear by `out_scale`; all ()."""
    limits, zero = torch.iinfo(zero_point.dtype), zero_point.float()
    return ((torch.round(x / scale) + zero).clamp(limits.min, limits.max) - zero) * out_scale


dequantize.register_fake(lambda values, scale, zero_point: torch.empty_like(values, dtype=torch.float32))
requantize.register_fake(lambda x, scale, zero_point, out_scale: torch.empty_like(x))


def write(model: nn.Module, path: Path, inputs: Inputs, notes: dict[str, Any] | None = None) -> None:
    """As r2.export.to_onnx; `notes` go into the file's metadata_props, each as JSON."""
    import onnx_ir
    import onnxscript
    from onnxscript import opset21 as op

    def quantized_weight(values: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(values, scale, zero_point, axis=0)

    def quantized_activation(x: Any, scale: Any, zero_point: Any, out_scale: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), out_scale, zero_point)

    plain, narrow = _exportable(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about the exporter's own insides
        try:
            program = torch.onnx.export(
                trace(plain, inputs),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(named(inputs)),
                output_names=["logits"],
                dynamic_shapes=(axes(inputs),),  # their names
                custom_translation_table={
                    torch.ops.r2.dequantize.default: quantized_weight,
                    torch.ops.r2.requantize.default: quantized_activation,
                },
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f"the model cannot be exported to ONNX: {_reason(error)}") from None
    assert program is not None
    # What the exporter itself calls, but that would fold the codes of a small palette into the weights they stand for.
    onnxscript.optimizer.optimize_ir(program.model, should_fold=lambda node: False if _decodes(node) else None)
    graph = program.model.graph
    _narrow(graph, narrow)
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)  # it names the source files' folders
    program.model.metadata_props.update({name: json.dumps(note) for name, note in (notes or {}).items()})
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        value.metadata_props.clear()
        if not (value.is_graph_input() or value.is_graph_output()):
            value.shape = value.type = None  # a runtime infers them, and in a small file they would be a fifth
    store.write(path, onnx_ir.to_proto(program.model).SerializeToString())


def predict(path: Path) -> Callable[[Inputs], Tensor]:
    """Inputs to logits, by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    def logits(inputs: Inputs) -> Tensor:
        feeds = {name: tensor.cpu().contiguous().numpy() for name, tensor in named(inputs).items()}
        return torch.from_numpy(session.run(None, feeds)[0])

    return logits


class _Levels(nn.Module):
    """An activation: (x - shift) to the integers low .. high of one scale; those, by another scale, plus an offset."""

    scale: Tensor
    out_scale: Tensor
    zero_point: Tensor
    shift: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        low: int,
        high: int,
        scale: Tensor,
        zero_point: int = 0,
        out_scale: Tensor | None = None,
        shift: Tensor | None = None,
        offset: Tensor | None = None,
    ):
        super().__init__()
        dtype = _integer(min(low, zero_point), max(high, zero_point))
        limits = torch.iinfo(dtype)
        everything = (low, high) == (limits.min, limits.max)
        self.clip = None if everything else sorted((bound - zero_point) * scale.item() for bound in (low, high))
        tensors = {"scale": scale, "out_scale": scale if out_scale is None else out_scale}
        tensors |= {"shift": shift, "offset": offset, "zero_point": torch.tensor(zero_point, dtype=dtype)}  # type: ignore[dict-item]
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.shift is None else x - self.shift
        if self.clip is not None:
            x = x.clamp(*self.clip)
        x = requantize(x, self.scale, self.zero_point, self.out_scale)
        return x if self.offset is None else x + self.offset


class _Integers(nn.Module):
    """A weight as integers of one scale, or of one per output channel."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, layer: Any):
        super().__init__()
        values, scale, zero_point, self.narrow = _weight(layer)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self) -> Tensor:
        return dequantize(self.values, self.scale, self.zero_point)


class _Table(nn.Module):
    """A weight as rows of a table of centroids, and the tail that a palette leaves out.

    Attributes:
        values: (m,) uint8, the row of each m; below 16 where `narrow`.
        table: (rows, centroids of a row times dim).
    """

    values: Tensor
    table: Tensor
    tail: Tensor

    def __init__(self, layer: Any):
        super().__init__()
        palette, weight = layer.quantizer, layer.weight.detach()
        codes, table = layer.encoded().byte(), palette.centroids
        self.count, self.dim = len(codes), palette.dim
        while len(table) ** 2 <= 16:  # two codes as one of twice the bits, whose row is both their centroids
            first, second = F.pad(codes, (0, len(codes) % 2)).view(-1, 2).unbind(1)
            codes, rows = first * len(table) + second, torch.arange(len(table))
            table = table[torch.cartesian_prod(rows, rows)].flatten(1)
        self.narrow = len(table) <= 16
        self.like = torch.empty_like(weight, device="meta")
        self.register_buffer("values", codes)
        self.register_buffer("table", table.clone())
        self.register_buffer("tail", vectorize(weight, palette.dim)[1].clone())

    def forward(self) -> Tensor:
        if not self.count:
            return self.tail
        vectors = F.embedding(self.values.int(), self.table).view(-1, self.dim)[: self.count]
        return unvectorize(vectors, self.tail, self.like)


class _Exported(nn.Module):
    """A layer's quantizer in ONNX's operators; computes what the original does up to float rounding."""

    def __init__(self, layer: Any):
        super().__init__()
        self.stored = _Table(layer) if isinstance(layer.quantizer, Palette) else _Integers(layer)
        self.act = _activation(layer.quantizer)

    def weight(self, _: Tensor) -> Tensor:
        return self.stored()


def _integer(low: int, high: int) -> torch.dtype:
    """The smallest integer type of torch that holds low .. high."""
    for dtype in (torch.uint8, torch.int8, torch.uint16, torch.int16):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return dtype
    raise UserError(f"its levels {low} to {high} do not fit in 16 bits")


@torch.no_grad()
def _weight(layer: Any) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Integers in the weight's shape, their scale, their zero point, and whether 4 bits hold all levels."""
    codes, grid = layer.encoded(), layer.quantizer.weight_grid()
    dtype = _integer(grid.low, grid.high)
    integers = (grid.first + grid.stride * codes.long()).to(dtype).view(layer.weight.shape)
    zero_point = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    narrow = grid.high <= (15 if grid.low == 0 else 7) and grid.low >= -8
    return integers, grid.scale.detach().clone(), zero_point.to(dtype), narrow


def _activation(quantizer: Any) -> nn.Module:
    grid = quantizer.activation_grid()
    if grid is None:
        return nn.Identity()
    return _Levels(grid.low, grid.high, grid.scale, out_scale=grid.out_scale, shift=grid.shift, offset=grid.offset)


def _exportable(model: nn.Module) -> tuple[nn.Module, set[str]]:
    """A copy whose quantizers are ONNX's operators, and the names of the weights that fit in 4 bits."""
    plain = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval()
    narrow = set()
    for name, layer in compressed(plain).items():
        try:
            exported = _Exported(layer)
        except UserError as error:
            method, bits = type(layer.quantizer).__name__.lower(), layer.quantizer.weight_bits
            raise UserError(f"{name} ({method}, {bits} bits) cannot be exported: {error}") from None
        if exported.stored.narrow:
            narrow.add(f"{name}.quantizer.stored.values".lstrip("."))  # the model itself has no name
        layer.quantizer, layer.codes = exported, None
    for name, module in list(plain.named_modules()):
        if isinstance(module, Activation):
            plain.set_submodule(name, _Levels(0, 2**module.bits - 1, module.scale, int(module.zero_point)))
    return plain, narrow


def _decodes(node: Any) -> bool:
    """Whether a node of the graph is the first that reads the codes of a palette."""
    return node.op_type == "Cast" and (node.inputs[0].name or "").endswith("quantizer.stored.values")


def _narrow(graph: Any, names: set[str]) -> None:
    """Give the weights `names` and their zero points 4-bit types, which torch does not have."""
    import onnx_ir

    places = {"DequantizeLinear": {0: "int4", 2: "zero_point"}, "Cast": {0: "int4"}}
    for node in list(graph):
        if node.op_type not in places or node.inputs[0].name not in names:
            continue
        for position, ending in places[node.op_type].items():
            wide = node.inputs[position].const_value.numpy()
            kind = onnx_ir.DataType.INT4 if wide.dtype.kind == "i" else onnx_ir.DataType.UINT4
            name = f"{node.inputs[0].name}.{ending}"
            tensor = onnx_ir.tensor(wide.astype(kind.numpy()), dtype=kind, name=name)
            value = onnx_ir.Value(
                name=name, type=onnx_ir.TensorType(kind), shape=onnx_ir.Shape(wide.shape), const_value=tensor
            )
            graph.register_initializer(value)
            node.replace_input_with(position, value)
    for name in [n for n, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


def _reason(error: BaseException) -> str:
    """What the innermost cause says: the exporter wraps it in pages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
