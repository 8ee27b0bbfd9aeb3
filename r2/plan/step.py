"""One training step of a config: its speed on this machine, and its memory on any machine."""

import json
import time

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from r2.config import build, height_and_width
from r2.data.facts import facts
from r2.dist import keep_freed_memory
from r2.hub import need_extra
from r2.models import Inputs
from r2.training.loop import arithmetic
from r2.training.small_maps import fast_on_small_maps


def measure(config: dict, device: str) -> float:
    """Examples/s of bare training steps of the config's model, on random images of its size or texts of full length.

    On a CPU the batch grows until a step takes a quarter of a second or has the recipe's batch: few images of a large
    network tell its speed, few of a small one only what an operation costs to call.
    """
    largest = config["recipe"]["batch_size"]
    batch = max(2, min(256 if device == "cuda" else 4, largest))  # BatchNorm has no variance over one
    keep_freed_memory()
    while True:
        model, inputs, labels = example(config, batch, device)
        seconds = []
        with arithmetic(device == "cuda" and config["recipe"]["precision"] != "fp32"):
            for _ in range(3):  # the first sets up and is not counted
                began = time.perf_counter()
                loss = loss_of(config, model, inputs, labels)
                loss.backward()
                loss.item()
                seconds.append(time.perf_counter() - began)
        if device == "cuda" or batch >= largest or min(seconds[1:]) >= 0.25:
            return batch / min(seconds[1:])
        batch = min(4 * batch, largest)


def memory(config: dict, examples: int) -> tuple[float, float]:
    """GiB that training the float network takes on a device with `examples` at once, at the recipe's precision.

    The first is what backward keeps of the examples, counted by saved_tensors_hooks on tensors without values, so that
    a CPU tells it of a GPU: half as much in bf16 and fp16. The second is weights, gradients and the optimizer's
    moments, float32 at any precision. The libraries' workspaces and, during backward, a few gradients of activations
    come on top; torch.compile may keep less.
    """
    known, recipe = facts(config), config["recipe"]
    size = known.image_size, known.num_classes, config["data"].get("max_length")
    key = json.dumps([config["model"], size, recipe["precision"], recipe.get("optimizer"), examples])
    if key not in _counted:  # the runs of a table are of few networks
        _counted[key] = _memory(config, examples)
    return _counted[key]


_counted: dict[str, tuple[float, float]] = {}


def _memory(config: dict, examples: int) -> tuple[float, float]:
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # holding it keeps its address from being used again
        return tensor

    with FakeTensorMode():
        model, inputs, labels = example(config, examples, "cpu")
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_of(config, model, inputs, labels)
    for tensor in (*model.parameters(), *model.buffers()):
        kept.pop(tensor.untyped_storage()._cdata, None)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    moments = 2 if config["recipe"].get("optimizer") == "adamw" else 1
    return sum(storage.nbytes() for storage in kept.values()) / 2**30, (2 + moments) * weights / 2**30


def example(config: dict, batch: int, device: str) -> tuple[nn.Module, Inputs, Tensor]:
    """The config's model in training mode, with inputs and labels of a batch."""
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    if "max_length" in config["data"]:
        need_extra()
        from r2.zoo.mobilebert import network

        with torch.device(device):
            model = network(2, {"classifier_activation": False})  # the published one; a plan downloads nothing
        ones = torch.ones(batch, config["data"]["max_length"], dtype=torch.long, device=device)
        return model.train(), {"input_ids": ones, "attention_mask": ones, "token_type_ids": ones}, labels
    known = facts(config)
    size = height_and_width(known.image_size or 224)
    with torch.device(device):
        model = build(config["model"], num_classes=known.num_classes or 1000)  # where unknown: it hardly counts
    images = torch.randn(batch, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
    return model.train(), images, labels


def loss_of(config: dict, model: nn.Module, inputs: Inputs, labels: Tensor) -> Tensor:
    # bf16 stands for fp16, which is as large and as fast, and which not every operation of a CPU knows.
    with torch.autocast(labels.device.type, dtype=torch.bfloat16, enabled=config["recipe"]["precision"] != "fp32"):
        return F.cross_entropy(fast_on_small_maps(model, labels.device)(inputs), labels)
