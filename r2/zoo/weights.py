"""A user's checkpoint: read without executing code in it, mapped to the network's names, and compared with it."""

import argparse
import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import URLError

import safetensors.torch
import torch
from torch import Tensor, nn

from r2.config import UserError, first_line
from r2.hub import torchvision_file

# What timm, torchvision, Lightning and r2 put around a state_dict, and wrappers of a module before its names.
_AROUND = ("state_dict", "model", "model_state_dict", "model_ema")
_BEFORE = ("module.", "_orig_mod.", "model.")
_COUNTER = ".num_batches_tracked"  # of BatchNorm; files older than PyTorch 0.4.1 have none, and nothing here reads it


def load(model: nn.Module, config: dict) -> nn.Module:
    """Give `model` the weights that a checked config names, if it names any; a new head keeps its own.

    Raises:
        UserError: as `fitting`.
    """
    if config["weights"] is not None:
        model.load_state_dict(fitting(model, config), strict=False)
    return model


def fitting(model: nn.Module, config: dict) -> dict[str, Tensor]:
    """What `model`, which may be on the meta device, is to load.

    Raises:
        UserError: the file cannot be read, or is of another network; names the first tensor that does not fit.
    """
    weights = config["weights"]
    where, network = f"model.weights={weights['source']}", config["model"].get("name", config["choices"]["model"])
    found, own, head = _read(where, weights, config), model.state_dict(), _head(model)
    if weights["new_head"]:
        if head is None:
            raise UserError(f"model.reset_head=true: {network} has no linear layer to replace")
        found, own = ({k: t for k, t in of.items() if not k.startswith(head)} for of in (found, own))
    strange = next((key for key in found if key not in own), None)
    for key, tensor in own.items():
        if key not in found and not key.endswith(_COUNTER):
            instead = f"; it holds {strange} {_shape(found[strange])}" if strange else ""
            raise UserError(f"{where}: has no {key}, which is {_shape(tensor)} in {network}{instead}")
        if key in found and found[key].shape != tensor.shape:
            line = f"{where}: {key} is {_shape(found[key])} in the file and {_shape(tensor)} in {network}"
            if head and key.startswith(head) and found[key].shape[1:] == tensor.shape[1:]:
                line += f"; the data have {len(tensor)} classes: model.reset_head=true trains a new last layer"
            raise UserError(line)
        if key not in found or key.endswith(_COUNTER):
            continue
        if found[key].is_floating_point() != tensor.is_floating_point() or not found[key].isfinite().all():
            kind = "finite floating-point numbers" if tensor.is_floating_point() else "whole numbers"
            raise UserError(f"{where}: {key} holds values that are no {kind}")
    if strange:
        raise UserError(f"{where}: holds {strange} {_shape(found[strange])}, which {network} does not have")
    return found


def _head(model: nn.Module) -> str | None:
    """How the names of the last linear layer's tensors begin; SqueezeNet has none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return f"{names[-1]}." if names else None


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def path_of(config: dict) -> Path:
    """Where the weights of a checked config lie, or will lie once torchvision's are downloaded."""
    if config["weights"]["file"] is not None:
        return Path(config["weights"]["file"])
    return Path(torch.hub.get_dir(), "checkpoints", torchvision_file(config["model"]))


def _downloaded(where: str, path: Path) -> Path:
    """torchvision's file, in the cache of torch.hub."""
    if not path.exists():
        url = f"https://download.pytorch.org/models/{path.name}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2], progress=False)
        except (OSError, URLError, RuntimeError) as error:
            raise UserError(f"{where}: cannot be downloaded ({error}); put {url} at {path}") from None
    return path


def _read(where: str, weights: dict, config: dict) -> dict[str, Tensor]:
    """The state_dict in the file, by the network's own names."""
    path = path_of(config)
    try:
        content = (path if weights["file"] else _downloaded(where, path)).read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    if not hashlib.sha256(content).hexdigest().startswith(weights["sha256"]):
        raise UserError(f"{where}: {path} has changed: its sha256 does not begin with {weights['sha256'][:8]}")
    state = _unpacked(where, content, path.suffix == ".safetensors")
    kept = next((key for key in _AROUND if isinstance(state, dict) and isinstance(state.get(key), dict)), None)
    state = state[kept] if kept else state
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{where}: holds no state_dict, names with their tensors, but a {type(state).__name__}")
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _bare(key)
        if kept == "model_ema" and name == "n_averaged":  # of AveragedModel
            continue
        if not isinstance(value, Tensor):
            raise UserError(
                f"{where}: holds no state_dict, for {key} is a {type(value).__name__} and no tensor; "
                f"it must be bare, or under {', '.join(_AROUND[:-1])} or {_AROUND[-1]}"
            )
        if name in named:
            raise UserError(f"{where}: holds {name} twice, once as {key}; save the state_dict of one model")
        named[name] = value
    return named


def _unpacked(where: str, content: bytes, safe: bool) -> Any:
    file, zipped = io.BytesIO(content), content.startswith(b"PK")
    if not (safe or zipped or content.startswith(b"\x80")):  # how a pickle begins, in which torch.save wrote once
        raise UserError(f"{where}: is not a checkpoint")
    try:
        if safe:
            return safetensors.torch.load(content)
        if zipped and zipfile.ZipFile(file).testzip():  # torch.load does not look
            raise zipfile.BadZipFile
        file.seek(0)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments in torchvision's checkpoints
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{where}: holds more than tensors and plain values, or is no checkpoint; save its state_dict alone"
        ) from None
    except Exception as error:  # of torch, zipfile or safetensors
        if not zipped or isinstance(error, zipfile.BadZipFile):
            raise UserError(f"{where}: is truncated or damaged; copy it again") from None
        reason = first_line(error)
        raise UserError(f"{where}: cannot be read ({reason})") from None


def _bare(key: str) -> str:
    while prefix := next((p for p in _BEFORE if key.startswith(p)), ""):
        key = key.removeprefix(prefix)
    return key
