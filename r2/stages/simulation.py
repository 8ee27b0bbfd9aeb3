"""Converts AIMET's simulation to an r2 model, and saves it."""

from typing import Any

import torch
from torch import Tensor, nn

from r2 import store
from r2.quantizers.affine import Activation, Affine, quantize_input, quantize_output
from r2.quantizers.layers import compressed, quantizable, swap
from r2.stages.aimet import Work, own


@torch.no_grad()
def translate(sim: Any, work: Work) -> nn.Module:
    """The simulation as r2's own model: same grids, same rounding, free of AIMET."""
    result = own(work.net)
    rounded: dict[str, Tensor] = {}

    def affine(name: str) -> Affine:
        layer = sim.model.get_submodule(name)
        quantizer = layer.param_quantizers["weight"]
        rounded[name] = quantizer(layer.weight).as_subclass(Tensor)
        scale = quantizer.get_scale().flatten()
        grid = Affine(quantizer.bitwidth, len(scale))
        grid.scale.copy_(scale)
        grid.zero_point.copy_(-(quantizer.get_offset().flatten() + quantizer.qmin))
        return grid

    swap({name: layer for name, layer in quantizable(result).items() if name in work.places.weights}, affine)
    for name, layer in compressed(result).items():
        codes = layer.quantizer.encode(rounded[name])
        layer.weight.copy_(layer.quantizer.decode(codes, layer.weight))
        layer.codes = codes.cpu()  # no buffer, so `to` would leave them where they are
    for name in work.places.inputs:
        quantize_input(result.get_submodule(name), _activation(sim.model.get_submodule(name).input_quantizers[0]))
    for name in work.places.outputs:
        quantize_output(result.get_submodule(name), _activation(sim.model.get_submodule(name).output_quantizers[0]))
    return result


def _activation(quantizer: Any) -> Activation:
    scale, offset = quantizer.get_scale(), quantizer.get_offset()
    return Activation(quantizer.bitwidth, scale.item(), -(offset.item() + quantizer.qmin)).to(scale.device)


def save(sim: Any, quantized: nn.Module, work: Work, key: str) -> None:
    """encodings.json for people and other tools; simulation.pt, from which AIMET's simulation can be rebuilt."""
    found = {}
    for name, module in quantized.named_modules():
        if isinstance(module, Affine | Activation):
            bits = module.weight_bits if isinstance(module, Affine) else module.bits
            grid = {"scale": module.scale.tolist(), "zero_point": module.zero_point.tolist()}
            found[name] = {"bits": bits, **grid}
    store.write_json(work.directory / "encodings.json", found)
    state = {"model": sim.model.state_dict(), "quantizers": sim.quantizer_state_dict()}
    store.save(work.directory / "simulation.pt", {"format": "r2", "key": key, **state})
