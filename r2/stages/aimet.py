"""AIMET for post-training quantization: the only file that imports it, and only inside functions.

AIMET works on a copy of the network. Where 2.42 differs from the 1.x of the paper's time, the 1.x behaviour is restored
here: granularity, ranges, ReLU6, the quantizer between a depthwise convolution and its activation.
"""

import contextlib
import copy
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from r2 import console
from r2.config import UserError
from r2.models import Add, Multiply
from r2.quantizers.layers import quantizable
from r2.stages.graph import Places
from r2.training.small_maps import small_maps


@dataclass(frozen=True)
class Work:
    """What AIMET works on.

    Attributes:
        net: float, BatchNorms folded, additions as AIMET's module.
        norms: the folded BatchNorm of each layer.
        places: where quantizers belong.
        bits: weight width by layer name.
        batches: calibration images (n, 3, h, w).
        config: AIMET's configuration file.
        directory: receives what is kept.
    """

    net: nn.Module
    norms: dict[nn.Module, nn.Module]
    places: Places
    bits: dict[str, int]
    act_bits: int
    scheme: str
    percentile: float
    batches: list[Tensor]
    config: Path
    directory: Path

    @property
    def sample(self) -> Tensor:
        return self.batches[0][:2]

    @property
    def quant_scheme(self) -> Any:
        from aimet_torch.common.defs import QuantScheme

        schemes = {"min_max": QuantScheme.min_max, "percentile": QuantScheme.post_training_percentile}
        return schemes.get(self.scheme, QuantScheme.post_training_tf_enhanced)


@contextlib.contextmanager
def alone(directory: Path, seed: int) -> Iterator[tuple[str, Path]]:
    """Runs AIMET silently: no log lines, no stray files, the random state given back.

    Args:
        directory: where its temporary files live.

    Yields:
        AIMET's version, and a folder that goes with the context.
    """
    assert not torch.distributed.is_initialized(), "AdaRound would wait for the other ranks"
    for left in directory.glob(".aimet-*"):  # of a run that was killed
        shutil.rmtree(left)
    numbers = np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices),
        tempfile.TemporaryDirectory(prefix=".aimet-", dir=directory) as scratch,
        mock.patch.object(tempfile, "tempdir", scratch),  # for AdaRound's copy of the images
    ):
        warnings.simplefilter("ignore")
        # Its import would close every log handler of this process and add its own.
        with mock.patch("logging.config.dictConfig", _silence), mock.patch("logging.info"):
            from aimet_torch.quantization import set_backend
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            with set_backend("torch_builtins"):  # on a GPU it would compile Triton kernels
                yield version("aimet-torch"), Path(scratch)
        finally:
            np.random.set_state(numbers)


def _silence(config: dict) -> None:
    for name in config["loggers"]:
        logging.getLogger(name).setLevel(logging.ERROR)


def write_config(path: Path, granularity: str, symmetric: bool) -> Path:
    """AIMET's configuration: everything is quantized but biases; an activation goes with the layer before it."""
    config = {
        "defaults": {
            "ops": {"is_output_quantized": "True"},
            "params": {"is_quantized": "True", "is_symmetric": str(symmetric)},
            "per_channel_quantization": str(granularity == "channel"),
        },
        "params": {"bias": {"is_quantized": "False"}},
        "op_type": {},
        "supergroups": [{"op_list": [op, act]} for op in ("Conv", "Add", "Gemm") for act in ("Relu", "Clip")],
        "model_input": {"is_input_quantized": "True"},
        "model_output": {"is_output_quantized": "True"},
    }
    path.write_text(json.dumps(config))
    return path


def fold(model: nn.Module, sample: Tensor) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """A copy of `model` as AIMET wants it, and the BatchNorm that was folded into each layer.

    Raises:
        UserError: a BatchNorm follows no layer.
    """
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.nn.modules import custom

    net = copy.deepcopy(model).eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = nn.BatchNorm2d  # AIMET does not know the ones that train over ranks
    _exchange(net, Add, lambda _: custom.Add())
    _exchange(net, Multiply, lambda _: custom.Multiply())
    norms = dict(fold_all_batch_norms(net, None, dummy_input=sample))
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            raise UserError(f"{name}: this BatchNorm follows no layer it can be folded into")
    return net, norms


def own(net: nn.Module) -> nn.Module:
    """A copy of a folded network with r2's modules instead of AIMET's."""
    from aimet_torch.nn.modules import custom

    net = copy.deepcopy(net)
    _exchange(net, custom.Add, lambda _: Add())
    _exchange(net, custom.Multiply, lambda _: Multiply())
    return net


def _exchange(net: nn.Module, old: type, new: Callable[[Any], nn.Module]) -> None:
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if type(child) is old:
                setattr(parent, name, new(child))


def equalize(work: Work, keep_constants: bool) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Any]]:
    """Replace ReLU6 by ReLU, scale pairs of layers to equal ranges, fold high biases; `work.net` is changed.

    Args:
        keep_constants: the bias of a channel whose gamma is 0 stays. Without a deviation all of it would count as high
            and be absorbed by the next layer, which its zero padding makes inexact.

    Returns:
        mean and standard deviation per channel of each layer's output, as BatchNorm knows them; and for the record
        the pairs, the largest factor (or its inverse) and the largest bias: near-dead channels blow these up.

    Raises:
        UserError: no pair of layers is found.
    """
    from aimet_torch.common.cross_layer_equalization import ClsSetInfo
    from aimet_torch.cross_layer_equalization import CrossLayerScaling, HighBiasFold

    _exchange(work.net, nn.ReLU6, lambda old: nn.ReLU(old.inplace))
    sets = CrossLayerScaling.scale_model(work.net, None, dummy_input=work.sample)
    pairs = [pair for found in sets for pair in found.cls_pair_info_list]
    if not pairs:
        raise UserError("cross-layer equalization finds no pair of layers in this model; use stage=none or adaround")
    known: dict[Any, Any] = {layer: (norm.bias.data, norm.weight.data.abs()) for layer, norm in work.norms.items()}  # type: ignore[union-attr,operator]
    norms = dict(work.norms)
    for layer, norm in work.norms.items() if keep_constants else ():
        norms[layer] = norm = copy.deepcopy(norm)
        norm.bias.data[norm.weight == 0] = 0  # type: ignore[union-attr,operator,index]
    extremes = [1.0]
    for pair in pairs:
        scale = torch.as_tensor(pair.scale_factor, device=pair.layer1.weight.device)
        extremes += [scale.max().item(), 1 / scale.min().item()]
        before = pair.layer1.bias.detach().clone()
        HighBiasFold.bias_fold([ClsSetInfo(pair)], norms)
        if pair.layer1 in known:
            mean, std = known[pair.layer1]
            known[pair.layer1] = (mean / scale - (before - pair.layer1.bias.detach()), std / scale)
    layers = quantizable(work.net)
    return {name: known[layer] for name, layer in layers.items() if layer in known}, {
        "equalized_pairs": len(pairs),
        "largest_equalization_scale": max(extremes),
        "largest_bias": max(layer.bias.abs().max().item() for layer in layers.values()),  # type: ignore[union-attr,operator]
    }


def simulate(work: Work, rounded: nn.Module | None = None) -> Any:
    """AIMET's QuantizationSimModel of `work.net`, calibrated.

    Args:
        rounded: its weights are used, on the grids of the weights of `work.net`.
    """
    from aimet_torch import QuantizationSimModel

    sim = QuantizationSimModel(
        work.net,
        work.sample,
        quant_scheme=work.quant_scheme,
        default_output_bw=work.act_bits,
        config_file=str(work.config),
    )
    if work.scheme == "percentile":
        sim.set_percentile_value(work.percentile)
    place(sim, work.places, work.bits)
    if rounded is not None:
        _use_rounded(sim, rounded, work.places)
    sim.compute_encodings(lambda model: [model(batch) for batch in work.batches])
    return sim


def place(sim: Any, wanted: Places, bits: dict[str, int]) -> None:
    """Take away the quantizers of `sim` that AIMET 1.x did not set, give weights their widths, miss none.

    Raises:
        UserError: AIMET has set no quantizer where one belongs.
    """
    modules = dict(sim.named_qmodules())
    kinds = (("input", wanted.inputs), ("output", wanted.outputs))
    for name, module in modules.items():
        if "weight" in module.param_quantizers and name not in wanted.weights:
            module.param_quantizers["weight"] = None
        for kind, names in kinds:
            quantizers = getattr(module, f"{kind}_quantizers")
            for i in range(len(quantizers)):
                if name not in names:
                    quantizers[i] = None
    for name in sorted(wanted.weights):
        if name not in modules or modules[name].param_quantizers["weight"] is None:
            raise UserError(f"{name}: AIMET does not quantize its weight")
        modules[name].param_quantizers["weight"].bitwidth = bits[name]
    for kind, names in kinds:
        for name in sorted(names):
            if name not in modules or getattr(modules[name], f"{kind}_quantizers")[0] is None:
                raise UserError(f"{name}: AIMET does not quantize its {kind}")


@torch.no_grad()
def _use_rounded(sim: Any, rounded: nn.Module, where: Places) -> None:
    for name in where.weights:
        layer = sim.model.get_submodule(name)
        quantizer = layer.param_quantizers["weight"]
        with quantizer.compute_encodings():
            quantizer(layer.weight)
        quantizer.allow_overwrite(False)
        layer.weight.copy_(rounded.get_submodule(name).weight)


def adaround(work: Work, count: int, batch_size: int, **settings: Any) -> nn.Module:
    """`work.net` with the weights that AIMET's AdaRound finds; adaround.encodings is written.

    Args:
        count: calibration batches to use.
        batch_size: images per iteration.
        **settings: of AdaroundParameters.
    """
    from aimet_torch._base.adaround import adaround_optimizer, adaround_weight
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters

    layers = quantizable(work.net)
    parameters = AdaroundParameters(work.batches, count, forward_fn=lambda model, x: model(x), **settings)
    with (
        mock.patch.object(adaround_optimizer, "BATCH_SIZE", batch_size),  # a constant of AIMET's
        mock.patch.object(adaround_weight, "progress_bar", _progress),
        small_maps(),
    ):
        return Adaround.apply_adaround(
            work.net,
            work.sample,
            parameters,
            str(work.directory),
            "adaround",
            param_bw_override_list=[(layers[name], bits) for name, bits in work.bits.items()],
            ignore_quant_ops_list=[layer for name, layer in layers.items() if name not in work.places.weights],
            default_quant_scheme=work.quant_scheme,
            default_config_file=str(work.config),
        )


def _progress(modules: list, **_: Any) -> Iterator:
    with console.Phase("adaround", len(modules)) as phase:
        for i, module in enumerate(modules):
            yield module
            phase.update(i + 1, module[0])
