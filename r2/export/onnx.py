"""ONNX: integer weights and activations behind QuantizeLinear and DequantizeLinear.

Weights are initializers of 4, 8 or 16 bits. An activation is Clip (where its levels are not all of its integer type),
QuantizeLinear and DequantizeLinear. Biases and output scales stay float.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r2 import store
from r2.config import UserError
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


def write(model: nn.Module, path: Path, images: Tensor) -> None:
    """As r2.export.to_onnx."""
    import onnx_ir
    from onnxscript import opset21 as op

    def quantized_weight(values: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(values, scale, zero_point, axis=0)

    def quantized_activation(x: Any, scale: Any, zero_point: Any, out_scale: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), out_scale, zero_point)

    plain, narrow = _exportable(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about the exporter's own insides
        program = torch.onnx.export(
            plain,
            (images.cpu().contiguous(),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            custom_translation_table={
                torch.ops.r2.dequantize.default: quantized_weight,
                torch.ops.r2.requantize.default: quantized_activation,
            },
            verbose=False,
        )
    assert program is not None
    _narrow(program.model, narrow)
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)  # it names the source files' folders
    store.write(path, onnx_ir.to_proto(program.model).SerializeToString())


def predict(path: Path) -> Callable[[Tensor], Tensor]:
    """Images to logits, by onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.cpu().contiguous().numpy()})[0])


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


class _Exported(nn.Module):
    """A layer's quantizer in ONNX's operators; computes what the original does up to float rounding."""

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    output_scale: Tensor | None

    def __init__(self, layer: Any):
        super().__init__()
        values, scale, zero_point, self.narrow = _weight(layer)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        output_scale = getattr(layer.quantizer, "output_scale", None)
        self.register_buffer("output_scale", None if output_scale is None else output_scale.detach().abs())
        self.act = _activation(layer.quantizer)

    def weight(self, _: Tensor) -> Tensor:
        return dequantize(self.values, self.scale, self.zero_point)

    def out(self, y: Tensor) -> Tensor:
        return y if self.output_scale is None else y * self.output_scale


def _integer(low: int, high: int) -> torch.dtype:
    """The smallest integer type of torch that holds low .. high."""
    for dtype in (torch.uint8, torch.int8, torch.uint16, torch.int16):
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return dtype
    raise UserError(f"its levels {low} to {high} do not fit in 16 bits")


@torch.no_grad()
def _weight(layer: Any) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Integers in the weight's shape, their scale, their zero point, and whether 4 bits hold all levels."""
    grid = layer.quantizer.weight_grid()
    dtype = _integer(grid.low, grid.high)
    codes = layer.quantizer.encode(layer.weight) if layer.codes is None else layer.codes
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
        if exported.narrow:
            narrow.add(f"{name}.quantizer.values")
        layer.quantizer, layer.codes = exported, None
    for name, module in list(plain.named_modules()):
        if isinstance(module, Activation):
            plain.set_submodule(name, _Levels(0, 2**module.bits - 1, module.scale, int(module.zero_point)))
    return plain, narrow


def _narrow(graph_model: Any, names: set[str]) -> None:
    """Give the weights `names` and their zero points 4-bit types, which torch does not have."""
    import onnx_ir

    graph = graph_model.graph
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or node.inputs[0].name not in names:
            continue
        for position in (0, 2):
            wide = node.inputs[position].const_value.numpy()
            kind = onnx_ir.DataType.INT4 if wide.dtype.kind == "i" else onnx_ir.DataType.UINT4
            name = f"{node.inputs[0].name}.{('int4', '', 'zero_point')[position]}"
            tensor = onnx_ir.tensor(wide.astype(kind.numpy()), dtype=kind, name=name)
            value = onnx_ir.Value(
                name=name, type=onnx_ir.TensorType(kind), shape=onnx_ir.Shape(wide.shape), const_value=tensor
            )
            graph.register_initializer(value)
            node.replace_input_with(position, value)
    for name in [n for n, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
