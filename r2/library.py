"""r2 in your own training loop: `r2.compress` replaces a model's layers in place and calibrates them."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from r2.config import UserError, build, first_line
from r2.models import Inputs
from r2.paths import CONFIGS
from r2.quantizers.calibration import calibrate
from r2.quantizers.layers import LAYERS, compressed, obstacles
from r2.stages.dkm import DKM
from r2.stages.qat import QAT

METHODS = ("ewgs", "lsq", "pact", "dkm")
# Keys of configs/stage that r2's own training reads; a loop of one's own decides them itself.
_OF_THE_LOOP = {
    "epochs", "batch_size", "lr", "quantizer_lr", "weight_decay", "alpha_decay", "clip_norm", "batchnorm",
    "from_scratch", "step_limit", "hessian_interval", "hessian_batches", "hessian_batch_size", "hessian_probes",
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What was compressed and what was not.

    Attributes:
        compressed: layer to its widths.
        left_out: layer, or parameter of more than one dimension, to the reason.
    """

    compressed: dict[str, str]
    left_out: dict[str, str]

    def __str__(self) -> str:
        rows = [*self.compressed.items(), *((name, f"left out: {why}") for name, why in self.left_out.items())]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def compress(model: nn.Module, method: str, batch: Inputs | tuple, **settings: Any) -> Report:
    """Compress the layers of any model in place; afterwards train it as before, then `r2.pack.save` it.

    Convolutions, transposed convolutions, linear layers and embeddings become quantized (ewgs, lsq, pact: weights and
    inputs) or palettized (dkm: weights), and are calibrated on `batch`. Mode, BatchNorm's statistics and the random
    numbers stay as they were. The quantizers' parameters are new: make the optimizer after this call.

    Args:
        model: on its device.
        method: ewgs, lsq, pact or dkm.
        batch: what the model is called with, of the size and kind that it is trained on, on its device: a tensor, e.g.
            images (n, channels, height, width), a tuple of positional arguments, or a dict of keyword arguments. dkm
            looks at weights alone and does not call the model.
        settings: the keys of configs/stage/<method>.yaml but those of training, e.g. bits=4, skip_first_last=True,
            layer_bits={"head": 8}.

    Returns:
        what was compressed and what was left out, with the reason.

    Raises:
        UserError: an unknown method or setting, a value out of range, a model without layers or compressed already, a
            batch that the model does not take. The model is as it was then.
    """
    if compressed(model):
        raise UserError("the model is compressed already; compress a new one")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) or hasattr(model, "_orig_mod"):
        raise UserError(f"the model is wrapped in {type(model).__name__}; compress the bare one, then wrap it")
    stage = _stage(method, settings)
    left_out = _left_out(model)
    before = {name: (module, type(module)) for name, module in model.named_modules() if isinstance(module, LAYERS)}
    try:
        idle = _prepare(model, stage, batch)
    except Exception as error:
        for module, kind in before.values():
            _restore(module, kind)
        if isinstance(error, UserError):
            raise
        reason = first_line(error)
        raise UserError(f"the model does not take the batch ({reason})") from None
    for name in idle:
        _restore(*before[name])
        left_out[name] = "it was not called with the batch"
    return Report({name: _widths(layer.quantizer) for name, layer in compressed(model).items()}, left_out)


def _stage(method: str, settings: dict[str, Any]) -> QAT | DKM:
    """The method with the defaults of configs/stage and these settings, checked as on the command line.

    Without Hydra, which a loop of one's own may be running under.
    """
    if method not in METHODS:
        raise UserError(f"method={method!r}: choose from {', '.join(METHODS)}")
    options = {"stage": CONFIGS / "stage" / f"{method}.yaml", "recipe": CONFIGS / "recipe" / "folder.yaml"}
    config = OmegaConf.create({group: OmegaConf.load(path) for group, path in options.items()})
    default: Any = OmegaConf.to_container(config.stage, resolve=True)
    known = [key for key in default if key != "_target_" and key not in _OF_THE_LOOP]
    for key in settings:
        if key not in known:
            raise UserError(f"{key}={settings[key]!r}: is no setting of {method}; known are {', '.join(known)}")
    if settings.get("delta") == "hessian":
        raise UserError("delta='hessian': is estimated by r2's own training between epochs; give a number")
    widths = {key: settings["bits"] for key in ("weight_bits", "act_bits") if "bits" in settings and key in default}
    return build({**default, **widths, **settings})


class _Called(nn.Module):
    """The model called with a whole batch: a tuple's arguments, a dict's keywords where its forward takes them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Inputs | tuple) -> Any:
        if isinstance(batch, Mapping) and _takes(self.model, batch):
            return self.model(**batch)
        return self.model(*batch) if isinstance(batch, tuple) else self.model(batch)


def _takes(model: nn.Module, keywords: Mapping) -> bool:
    try:
        inspect.signature(model.forward).bind(**keywords)
    except TypeError:
        return False
    return True


def _prepare(model: nn.Module, stage: QAT | DKM, batch: Inputs | tuple) -> list[str]:
    """Swap and calibrate; returns the layers that the batch did not reach."""
    if isinstance(stage, DKM):
        stage.cluster(model, seed=0)
        return []
    layers = stage.prepare(model)
    called: set[str] = set()
    hooks = [layer.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, layer in layers.items()]
    try:
        calibrate(_Called(model), layers, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in layers if name not in called]


def _restore(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
    if "quantizer" in module._modules:
        del module.quantizer


def _left_out(model: nn.Module) -> dict[str, str]:
    """Layers that cannot be compressed, and parameters with more than one dimension that belong to no layer."""
    found = obstacles(model)
    for name, module in model.named_modules():
        if not isinstance(module, (*LAYERS, nn.utils.parametrize.ParametrizationList)):  # which its layer names
            for key, parameter in module.named_parameters(prefix=name, recurse=False):
                if parameter.ndim > 1:
                    found[key] = f"{type(module).__name__} is none of the layers that are compressed"
    return found


def _widths(quantizer: Any) -> str:
    if hasattr(quantizer, "dim"):
        return f"{2**quantizer.weight_bits} centroids of {quantizer.dim}"
    inputs = f"{quantizer.act_bits} bits" if quantizer.act_bits else "as they are"
    return f"weights {quantizer.weight_bits} bits, inputs {inputs}"
