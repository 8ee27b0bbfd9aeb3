"""Compressed layers: a convolution, linear layer or embedding of the trained model that computes with its quantizer.

A method is one `Quantizer`; layers, calibration and training are shared. Layers are changed in place; parameters and
their names do not change.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from r2.config import UserError
from r2.models import Inputs


@dataclass(frozen=True)
class WeightGrid:
    """The integers of a weight: code c stands for (first + stride c - zero_point) scale.

    Attributes:
        low, high: the least and the largest integer.
        scale, zero_point: (), or (output channels,).
    """

    first: int
    stride: int
    low: int
    high: int
    scale: Tensor
    zero_point: Tensor | None = None


@dataclass(frozen=True)
class ActivationGrid:
    """(x - shift) / scale rounded to the integers low .. high; they stand for out_scale times them, plus offset."""

    low: int
    high: int
    scale: Tensor
    out_scale: Tensor | None = None
    shift: Tensor | None = None
    offset: Tensor | None = None


Operation = Callable[[Tensor, Tensor], Tensor]  # of a layer's input and weight, without bias


class Quantizer(nn.Module):
    """What a method does to one layer; each part is the identity unless the method says otherwise.

    The layer computes `operation(act(x), weight(w)) + bias`. A factor that a method puts on the output belongs in
    `weight`: the operation is linear, and a weight has fewer elements to multiply than an output.

    `decode(encode(w), w)` equals `weight(w)` of the finished model bit for bit: that is what makes a packed file exact.
    """

    weight_bits: int

    def initialise(self, inputs: Sequence[Tensor], weight: Tensor, operation: Operation) -> None:
        """Set the parameters from the layer's inputs, one of each call, its weight and its bare operation (no bias)."""

    def weight(self, w: Tensor) -> Tensor:
        return w

    def act(self, x: Tensor) -> Tensor:
        return x

    def encode(self, w: Tensor) -> Tensor:
        """Non-negative integer codes below 2^weight_bits (int32, or uint8), flat."""
        raise NotImplementedError

    def decode(self, codes: Tensor, like: Tensor) -> Tensor:
        """The weight that `codes` stand for, in the shape of `like`."""
        raise NotImplementedError

    def coverage(self, w: Tensor) -> tuple[int, int]:
        """How many codes a weight has, and how many of its weights, the last ones, stay outside them."""
        return w.numel(), 0

    def weight_grid(self) -> WeightGrid:
        """
        Raises:
            UserError: the method has no integers.
        """
        raise UserError("its method has no integers; ewgs, lsq, pact, none, dfq and adaround have")

    def activation_grid(self) -> ActivationGrid | None:
        """None where the input is left as it is."""
        return None

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, plain values."""
        raise NotImplementedError


class _Quantized:
    """What the layers share. A layer read from a packed file holds its `codes` and the weight they stand for."""

    quantizer: Quantizer
    weight: Tensor
    codes: Tensor | None = None

    def operation(self, x: Tensor, weight: Tensor) -> Tensor:
        """The bare operation, without bias."""
        raise NotImplementedError

    def encoded(self) -> Tensor:
        """The weight's codes, flat. The quantizer's `weight_grid` is that of the weight encoded last."""
        return self.quantizer.encode(self.weight) if self.codes is None else self.codes

    def compute(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        if self.codes is None:
            weight = self.quantizer.weight(self.weight)
        else:  # torch.matmul takes another path, with other last bits, for a weight that requires a gradient
            weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        return self.operation(self.quantizer.act(x), weight, *more, **named)

    def forward(self, input: Tensor, *more: Any, **named: Any) -> Tensor:  # PyTorch's name, which a caller may give
        y, bias = self.compute(input, *more, **named), getattr(self, "bias", None)  # an embedding has none
        # Added afterwards, as onnxruntime does: inside the operation the last bits differ, and values round elsewhere.
        return y if bias is None else y + bias.view(-1, *[1] * (self.weight.ndim - 2))


class _Convolution(_Quantized):
    """A convolution of any number of dimensions through a quantizer."""

    def operation(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, None)  # type: ignore[attr-defined]


class _Transposed(_Quantized):
    """A transposed convolution through a quantizer."""

    def operation(self, x: Tensor, weight: Tensor, output_size: list[int] | None = None) -> Tensor:
        layer: Any = self
        dimensions = weight.ndim - 2
        padding = layer._output_padding(x, output_size, layer.stride, layer.padding, layer.kernel_size, dimensions,
                                        layer.dilation)  # fmt: skip
        function = getattr(F, f"conv_transpose{dimensions}d")
        return function(x, weight, None, layer.stride, layer.padding, padding, layer.groups, layer.dilation)


class QuantizedConv1d(_Convolution, nn.Conv1d): ...


class QuantizedConv2d(_Convolution, nn.Conv2d): ...


class QuantizedConv3d(_Convolution, nn.Conv3d): ...


class QuantizedConvTranspose1d(_Transposed, nn.ConvTranspose1d): ...  # type: ignore[misc]


class QuantizedConvTranspose2d(_Transposed, nn.ConvTranspose2d): ...  # type: ignore[misc]


class QuantizedConvTranspose3d(_Transposed, nn.ConvTranspose3d): ...  # type: ignore[misc]


class QuantizedLinear(_Quantized, nn.Linear):
    """A linear layer through a quantizer."""

    def operation(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class QuantizedEmbedding(_Quantized, nn.Embedding):
    """An embedding through a quantizer, which must leave its input, the token numbers, alone."""

    def operation(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight, self.padding_idx)


_TWINS: dict[type[nn.Module], type] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
}
LAYERS = tuple(_TWINS)  # what has a weight to compress
_UNQUANTIZED = ("max_norm", "scale_grad_by_freq", "sparse")  # options of an embedding


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """The layer of PyTorch that a module is, or is a subclass of."""
    return next(kind for kind in type(layer).__mro__ if kind in _TWINS)


def obstacle(layer: nn.Module, parent: nn.Module | None = None) -> str | None:
    """Why a layer with a weight cannot be compressed; None if it can."""
    if "weight" not in layer._parameters:
        return ("its weight is computed from other parameters; make it one, for instance by "
                "torch.nn.utils.parametrize.remove_parametrizations")  # fmt: skip
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"{type(parent).__name__} reads its weight itself"
    kind = kind_of(layer)
    if option := next((name for name in _UNQUANTIZED if getattr(layer, name, None)), None):
        return f"its {option} is not computed through a quantizer"
    computing = ("forward", "_conv_forward")  # of a convolution, the second is what the first calls
    own = [name for name in computing if getattr(type(layer), name, None) is not getattr(kind, name, None)]
    return None if isinstance(layer, _Quantized) or not own else f"{type(layer).__name__} has a {own[0]} of its own"


def obstacles(model: nn.Module) -> dict[str, str]:
    """The layers with a weight that cannot be compressed, by name, and why."""
    parents = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in model.named_modules() if name}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    return {name: why for name, layer in layers.items() if (why := obstacle(layer, parents.get(name)))}


def quantizable(model: nn.Module, skip_first_last: bool = False) -> dict[str, nn.Module]:
    """The convolutions, linear layers and embeddings that can be compressed, by name, in the model's order.

    Raises:
        UserError: there is none.
    """
    blocked = obstacles(model)
    layers: dict[str, nn.Module] = {
        name: m for name, m in model.named_modules() if isinstance(m, LAYERS) and name not in blocked
    }
    if skip_first_last:
        layers = {name: layers[name] for name in list(layers)[1:-1]}
    if not layers:
        raise UserError("the model has no convolution, linear layer or embedding to compress")
    return layers


def layer_bits(names: list[str], overrides: Mapping[str, int] | None) -> dict[str, int]:
    """Bit widths by layer name, of the patterns (`classifier`, `features.1?.*`) in `stage.layer_bits`; the last wins.

    Raises:
        UserError: a pattern fits no layer, or a width is impossible.
    """
    found: dict[str, int] = {}
    for pattern, bits in (overrides or {}).items():
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 32:
            raise UserError(f"stage.layer_bits.{pattern}={bits!r}: bits are 1 to 32")
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            raise UserError(f"stage.layer_bits: no layer fits {pattern!r}; the layers are {', '.join(names)}")
        found |= dict.fromkeys(fitting, bits)
    return found


def swap(layers: Mapping[str, nn.Module], quantizer: Callable[[str], Quantizer]) -> None:
    """Give each layer its twin's class and a quantizer of its own."""
    for name, layer in layers.items():
        layer.__class__ = _TWINS[kind_of(layer)]
        layer.quantizer = quantizer(name).to(layer.weight.device)  # type: ignore[union-attr,arg-type]


def quantizer_parameters(layers: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    return [p for layer in layers.values() for p in layer.quantizer.parameters() if p.requires_grad]  # type: ignore[union-attr]


@torch.no_grad()
def scalars(layers: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Per compressed layer, the trained numbers of its quantizer: bounds, steps, clips, scales; none per channel."""
    found = {}
    for name, layer in layers.items():
        trained = {key: p for key, p in layer.quantizer.named_parameters() if p.requires_grad and not p.ndim}
        found[name] = {key: float(f"{p.item():.6g}") for key, p in trained.items()}
    return found


def input_of(inputs: tuple[Tensor, ...], named: dict[str, Any]) -> Tensor:
    """What a layer was called with, as a hook sees it."""
    return inputs[0] if inputs else named["input"]


def compressed(model: nn.Module) -> dict[str, Any]:
    """The compressed layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _Quantized)}


@torch.no_grad()
def levels_in_use(layers: Mapping[str, Any]) -> dict[str, int]:
    """Per compressed layer, how many of its 2^bits levels hold at least a thousandth of the weights."""
    found = {}
    for name, layer in layers.items():
        counts = layer.quantizer.encode(layer.weight).flatten().unique(return_counts=True)[1]
        found[name] = int((counts * 1000 >= counts.sum()).sum())
    return found


@torch.no_grad()
def signal_to_noise(model: nn.Module, batch: Inputs, originals: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """Per compressed layer, the signal-to-quantization-noise ratio of its output in dB, its input being the same.

    The signal is the layer's operation on its unquantized input and its latent weight, or the one in `originals`. The
    quantized output is taken times the factor that fits best: training moves the sizes of weights and quantizers
    apart, and BatchNorm behind the layer absorbs a factor. A layer whose output is lost has 0 dB.
    """
    found: dict[str, float] = {}

    def measure(name: str) -> Callable:
        def hook(layer: Any, inputs: tuple[Tensor, ...], named: dict[str, Any], _: Tensor) -> None:
            weight, x = originals[name] if originals else layer.weight, input_of(inputs, named)
            signal, output = layer.operation(x, weight).double(), layer.compute(x).double()
            factor = (signal * output).sum() / output.square().sum().clamp(min=1e-30)
            power = signal.square().sum()
            error = signal.sub_(output.mul_(factor)).square_().sum()  # in place: these are the largest tensors of a run
            found[name] = round(10 * torch.log10(power / error.clamp(min=1e-30)).item(), 3) if power > 0 else 0.0

        return hook

    layers = compressed(model)
    hooks = [layer.register_forward_hook(measure(name), with_kwargs=True) for name, layer in layers.items()]
    model.eval()
    model(batch)
    for hook in hooks:
        hook.remove()
    return found
