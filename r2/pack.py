"""The packed file: bit-packed weight codes, scales or centroids, and the rest in float32, as one safetensors file.

For each compressed layer, the file holds `<layer>.codes` (bits of the codes in sequence, most significant first),
`<layer>.tail` (the weights that a palette leaves out) and `<layer>.bias`. For every other module with state (BatchNorm,
quantizer) it holds one vector of its values in state_dict order. The metadata key `r2` is JSON: format, architecture,
quantizers, the modules that a stage replaced, and a sha256 over everything.
"""

import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor, nn

from r2 import models, store, zoo
from r2.config import UserError, first_line
from r2.hub import need_extra
from r2.palettize import Palette
from r2.quantizers.affine import Activation, Affine, quantize_input, quantize_output
from r2.quantizers.ewgs import EWGS
from r2.quantizers.layers import LAYERS, Quantizer, compressed, quantizable, swap
from r2.quantizers.lsq import LSQ
from r2.quantizers.pact import PACT
from r2.zoo.modular import modular as rewritten

FORMAT = 1


def _mobilebert(num_classes: int, settings: dict[str, Any]) -> nn.Module:
    need_extra()
    from r2.zoo.mobilebert import network

    return network(num_classes, settings)


def _of_zoo(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """By the keys of `architecture`, in which `name` is the library's."""

    def built(network: str, modular: bool = False, **options: Any) -> nn.Module:
        model = build(name=network, **options)
        return rewritten(model) if modular else model

    return built


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": models.resnet18,
    "mobilenet_v1": models.mobilenet_v1,
    "mobilenet_v2": models.mobilenet_v2,
    "mobilebert": _mobilebert,
    "timm": _of_zoo(zoo.timm),
    "torchvision": _of_zoo(zoo.torchvision),
}
_METHODS: dict[str, type[Quantizer]] = {
    method.__name__.lower(): method for method in (EWGS, LSQ, PACT, Affine, Palette)
}
_REPLACEMENTS: dict[str, type[nn.Module]] = {"Identity": nn.Identity, "ReLU": nn.ReLU}
_HOOKS = {"input_quantizer": quantize_input, "output_quantizer": quantize_output}
WIDEST = 16  # bits of a code; a wider weight is stored as it is


def save(model: nn.Module, path: Path | str) -> None:
    """Write a model, compressed or not, atomically.

    A network of r2 is built again by `load`; one of your own has to be given to it.

    Args:
        model: the bare one, without DistributedDataParallel, on any device.
        path: of the file, a safetensors file whatever it is called.

    Raises:
        UserError: the file cannot be written; the model is not in float32.
    """
    tensors, header = _tensors(model), _header(model)
    header["sha256"] = _digest(header, tensors)
    store.write(Path(path), serialise(tensors, {"r2": json.dumps(header, separators=(",", ":"))}))


def load(path: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The saved model in evaluation mode on the CPU; its logits are the saved one's, bit for bit.

    Args:
        model: of the saved one's architecture and not compressed, where that is none of r2's; it is changed.

    Raises:
        UserError: the file is missing, damaged, or not a packed file of this version; `model` is missing, compressed
            or of another architecture (names the first tensor that does not fit).
    """
    header, tensors = _read(Path(path))
    if model is None and header["architecture"] is None:
        raise UserError(f"{path}: holds a {header['network']} of your own; give one: r2.pack.load(path, model=...)")
    if model is not None and compressed(model):
        raise UserError(f"{path}: the model to load into is compressed already; give a new one")
    try:
        model = _build(header, model)
        _fill(model, tensors, set(header["channels_last"]))
    except (UserError, ImportError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: its parts do not fit together ({reason})") from None
    return model.eval()


def size(model: nn.Module) -> dict[str, float | int | None]:
    """What the compressed model takes, counted without the file's header.

    Returns:
        weights, compressed_weights: those of convolutions, linear layers and embeddings, and of compressed layers.
        bits_per_weight: over the compressed layers, None if there is none; bits_per_weight_all: over all layers.
        float_bytes: kept in float32: biases, BatchNorm, scales, centroids, layers left out. mib: all, in 2^20 bytes.
    """
    tensors, layers = _tensors(model), compressed(model)
    weights = {name: layer.weight.numel() for name, layer in quantizable(model).items()}  # type: ignore[union-attr,operator]
    parts = {name: [f"{name}.{kind}" for kind in ("codes", "tail", "weight")] for name in weights}
    bits = {name: sum(8 * tensors[part].nbytes for part in parts[name] if part in tensors) for name in weights}
    inside = sum(weights[name] for name in layers)
    return {
        "weights": sum(weights.values()),
        "compressed_weights": inside,
        "bits_per_weight": round(sum(bits[name] for name in layers) / inside, 4) if layers else None,
        "bits_per_weight_all": round(sum(bits.values()) / sum(weights.values()), 4),
        "float_bytes": sum(t.nbytes for t in tensors.values() if t.dtype == torch.float32),
        "mib": round(sum(t.nbytes for t in tensors.values()) / 2**20, 4),
    }


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, bits at most 16, to a dense uint8 vector of ceil(n bits / 8)."""
    wide = codes.cpu().numpy().astype(">u2").view(np.uint8).reshape(-1, 2)
    return torch.from_numpy(np.packbits(np.unpackbits(wide, axis=1)[:, 16 - bits :]))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: `count` codes as int32."""
    wide = np.zeros((count, 16), np.uint8)
    wide[:, 16 - bits :] = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits)
    return torch.from_numpy(np.packbits(wide, axis=1).view(">u2").ravel().astype(np.int32))


@torch.no_grad()
def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything the file holds, by name, contiguous on the CPU."""
    found: dict[str, Tensor] = {}
    layers = compressed(model)
    for name, module in model.named_modules():
        if name in layers:
            found |= {f"{name}.{part}": tensor for part, tensor in _parts(module).items()}
        if isinstance(module, LAYERS):
            kept = ("bias",) if name in layers else ("weight", "bias")
            own = {part: module._parameters.get(part) for part in kept}  # an embedding has no bias
            found |= {f"{name}.{part}": tensor.data for part, tensor in own.items() if tensor is not None}
        if state := _state(module):
            found[name] = torch.cat([value.reshape(-1) for value in state.values()])
    for name, tensor in found.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise UserError(f"{name} is {tensor.dtype}, and a packed file holds float32; call model.float() first")
    # Copies, because a safetensors file has no shared or transposed storage.
    return {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}


def _parts(layer: Any) -> dict[str, Tensor]:
    """A compressed layer's weight in the file: codes and tail, or the weight itself where codes would be too wide."""
    quantizer, weight = layer.quantizer, layer.weight
    if quantizer.weight_bits > WIDEST:
        return {"weight": _effective(layer)}
    parts = {"codes": pack_bits(layer.encoded(), quantizer.weight_bits)}
    _, left_out = quantizer.coverage(weight)
    return parts | ({"tail": weight.reshape(-1)[-left_out:]} if left_out else {})


def _effective(layer: Any) -> Tensor:
    """The weight that the layer computes with in evaluation mode."""
    if layer.codes is not None:
        return layer.weight
    training = layer.quantizer.training
    weight = layer.quantizer.eval().weight(layer.weight)
    layer.quantizer.train(training)
    return weight


def _state(module: nn.Module) -> dict[str, Tensor]:
    """A module's own float state, sharing its memory; BatchNorm's counter of batches is left out.

    A layer's weight and bias have tensors of their own in the file; here is what a subclass, weight_norm or pruning
    has added.
    """
    apart = ("weight", "bias") if isinstance(module, LAYERS) else ()
    return {k: v for k, v in module.state_dict().items() if "." not in k and k not in apart and v.is_floating_point()}


def _channels_last(tensor: Tensor) -> bool:
    """By its strides: they, not the values, choose a convolution's kernel and so its last bits, even for 1x1."""
    return tensor.ndim == 4 and tensor.stride() == _formatted(tensor.to("meta"), True).stride()


def _formatted(tensor: Tensor, channels_last: bool) -> Tensor:
    """A copy with exactly the format's strides, which `contiguous` does not give where they are ambiguous."""
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=wanted).copy_(tensor)


@torch.no_grad()
def _header(model: nn.Module) -> dict[str, Any]:
    architecture, layers = _architecture(model), compressed(model)
    fresh = dict(_network(architecture).named_modules()) if architecture else {}
    header: dict[str, Any] = {"format": FORMAT, "architecture": architecture, "channels_last": []}
    if architecture is None:
        header["network"] = type(model).__name__
    groups: dict[str, dict] = {}
    header["activations"], header["replaced"] = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, Activation):
            header["activations"][name] = module.bits
        kind = type(module).__name__
        if name in fresh and kind in _REPLACEMENTS and type(fresh[name]) is not type(module):
            header["replaced"].setdefault(kind, []).append(name)
        if isinstance(module, nn.Conv2d):
            weight = _effective(module) if name in layers else module.weight
            header["channels_last"] += [name] if _channels_last(weight) else []
    for name, layer in layers.items():
        entry = {"method": _name(type(layer.quantizer)), "settings": layer.quantizer.settings()}
        groups.setdefault(json.dumps(entry), {**entry, "layers": []})["layers"].append(name)
    return {**header, "quantizers": list(groups.values())}


def _architecture(model: nn.Module) -> dict[str, Any] | None:
    """What builds the network again; None where it is none of r2's, or no longer is: its head was replaced."""
    architecture = getattr(model, "architecture", None)
    if not isinstance(architecture, dict):
        return None
    fresh, own = (
        {name: layer.get_parameter("weight").shape for name, layer in quantizable(of).items()}
        for of in (_network(architecture), model)
    )
    return architecture if fresh == own else None


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    text = json.dumps({k: v for k, v in header.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256((text + store.digest(dict(sorted(tensors.items())))).encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of an undamaged file."""
    try:
        content = path.read_bytes()  # safetensors itself opens no file whose name is not UTF-8
        tensors = deserialise(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        header = json.loads(metadata.get("r2", "null"))
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read as a packed file ({first_line(error)})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UserError(f"{path}: is not a packed file of this version of r2 (format {FORMAT})")
    if header.get("sha256") != _digest(header, tensors):
        raise UserError(f"{path}: is damaged, its contents do not match its sha256")
    return header, tensors


def _network(architecture: dict[str, Any], device: str = "meta") -> nn.Module:
    """The bare network, with the library's first values, or without memory; no random number is used up."""
    name, options = architecture["name"], {k: v for k, v in architecture.items() if k != "name"}
    if name not in _MODELS:
        raise UserError(f"its network {name!r} is none of {', '.join(_MODELS)}")
    with torch.device(device), torch.random.fork_rng([]):
        return _MODELS[name](**options)


def _name(method: type[Quantizer]) -> str:
    short = method.__name__.lower()
    return short if _METHODS.get(short) is method else f"{method.__module__}.{method.__qualname__}"


def _method(name: str) -> type[Quantizer]:
    """The class of a quantizer: a file may name any class inside r2, and imports nothing else."""
    if name in _METHODS:
        return _METHODS[name]
    module, _, own = name.rpartition(".")
    found = getattr(importlib.import_module(module), own, None) if module.startswith("r2.") else None
    if not (isinstance(found, type) and issubclass(found, Quantizer)):
        raise ValueError(f"{name} is no quantizer of r2")
    return found


def _build(header: dict[str, Any], model: nn.Module | None) -> nn.Module:
    """The network with everything a stage changed in it, its values not yet set."""
    if model is None:
        # With values: the file has none for buffers that are not state or not floats.
        model = _network(header["architecture"], "cpu")
    model.cpu()
    for kind, names in header["replaced"].items():
        for name in names:
            model.set_submodule(name, _REPLACEMENTS[kind]())
    layers = quantizable(model)
    for group in header["quantizers"]:
        if strange := [name for name in group["layers"] if name not in layers]:
            raise ValueError(f"the model has no layer {strange[0]}")
        chosen = {name: layers[name] for name in group["layers"]}
        swap(chosen, lambda _, group=group: _method(group["method"])(**group["settings"]))  # type: ignore[misc]
    for name, bits in header["activations"].items():
        parent, _, side = name.rpartition(".")
        _HOOKS[side](model.get_submodule(parent), Activation(bits))
    return model


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor], channels_last: set[str]) -> None:
    """Set every value of `model`, using up `tensors`."""

    def take(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if name not in tensors:
            raise ValueError(f"it has no {name}")
        tensor = tensors.pop(name)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {shape} {dtype}")
        return tensor

    layers = compressed(model)
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            # a folded BatchNorm leaves a bias, an embedding has none
            if f"{name}.bias" in tensors or getattr(module, "bias", None) is not None:
                own = getattr(module, "bias", None)
                outputs = module.get_parameter("weight").shape[0] if own is None else own.shape[0]
                module.bias = nn.Parameter(take(f"{name}.bias", outputs))
            if name not in layers and "weight" in module._parameters:  # else it is computed from others, set apart
                weight = take(f"{name}.weight", *module.get_parameter("weight").shape)
                module.weight = nn.Parameter(_formatted(weight, name in channels_last))
        if state := _state(module):
            values = take(name, sum(value.numel() for value in state.values()))
            for value, part in zip(state.values(), values.split([v.numel() for v in state.values()]), strict=True):
                value.copy_(part.view_as(value))
    for name, layer in layers.items():  # their quantizers are set by now
        quantizer, shape, bits = layer.quantizer, layer.weight.shape, layer.quantizer.weight_bits
        if bits > WIDEST:
            weight, layer.codes = take(f"{name}.weight", *shape), torch.empty(0, dtype=torch.int32)
        else:
            like = torch.zeros(shape)
            count, left_out = quantizer.coverage(like)
            if left_out:
                like.view(-1)[-left_out:] = take(f"{name}.tail", left_out)
            packed = take(f"{name}.codes", -(-count * bits // 8), dtype=torch.uint8)
            layer.codes = unpack_bits(packed, bits, count)
            weight = quantizer.decode(layer.codes, like)
        layer.weight = nn.Parameter(_formatted(weight, name in channels_last))
    if tensors:
        raise ValueError(f"{next(iter(tensors))} belongs to no module")
