"""The module graph of a network: execution order, inputs of each module, and running it module by module on batches."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from r2.config import UserError, first_line
from r2.models import Add

ACTIVATIONS = (nn.ReLU, nn.ReLU6)
PASSING = (nn.Identity, nn.Dropout)  # what goes in comes out
_ON_GRID = (*PASSING, nn.BatchNorm2d, nn.MaxPool2d, nn.Flatten)  # quantized where their input is; BatchNorm is folded
_RESHAPING = ("flatten", "reshape", "view", torch.flatten, torch.reshape)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None


def trace(model: nn.Module) -> fx.Graph:
    """Its calls in order; a node's `target` is the name of a module without children.

    Raises:
        UserError: the forward pass depends on its data.
    """
    try:
        return _Tracer().trace(model)
    except Exception as error:  # of torch.fx, or of the network's own code, which does not know its proxies
        raise UserError(f"the model's forward pass cannot be traced: {first_line(error)}") from None


@dataclass(frozen=True)
class Places:
    """Where quantizers belong, as names of modules: AIMET 1.x's choice, one quantizer after a layer and its activation.

    Attributes:
        weights: convolutions and linear layers.
        inputs: modules that read the image.
        outputs: modules whose output is computed anew: layers, activations, sums, averages.
    """

    weights: set[str] = field(default_factory=set)
    inputs: set[str] = field(default_factory=set)
    outputs: set[str] = field(default_factory=set)


def places(model: nn.Module, left_out: tuple[str, ...] = ()) -> Places:
    """Where the quantizers of `model` belong. Layers `left_out` keep their weights; image and logits are float then.

    Raises:
        UserError: something is computed where no quantizer can stand, or a module is used twice.
    """
    found, seen = Places(), set()
    for node in trace(model).nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        if node.op != "call_module":
            if node.target not in _RESHAPING:
                name = getattr(node.target, "__name__", node.target)
                raise UserError(
                    f"{name!r} ({node.name}) is computed outside a module and cannot be quantized after training; "
                    "stage=ewgs, lsq, pact and dkm take the network"
                )
            continue
        module = model.get_submodule(node.target)
        if node.target in seen:
            raise UserError(
                f"{node.target}: is used twice but can have only one quantizer; use a separate module for each call"
            )
        seen.add(node.target)
        if isinstance(module, nn.Conv2d | nn.Linear) and node.target not in left_out:
            found.weights.add(node.target)
        if node.all_input_nodes[0].op == "placeholder" and not left_out:
            found.inputs.add(node.target)
        is_logits = any(user.op == "output" for user in readers(node, model))
        if not isinstance(module, _ON_GRID) and not feeds_activation(node, model) and not (is_logits and left_out):
            found.outputs.add(node.target)
    return found


def readers(node: fx.Node, model: nn.Module) -> list[fx.Node]:
    """Who uses the node's value, seen through BatchNorm, dropout and the like."""
    found: list[fx.Node] = []
    for user in node.users:
        through = user.op == "call_module" and isinstance(
            model.get_submodule(str(user.target)), (*PASSING, nn.BatchNorm2d)
        )
        found += readers(user, model) if through else [user]
    return found


def feeds_activation(node: fx.Node, model: nn.Module) -> bool:
    """Whether an activation is all that reads a layer's output or a sum."""
    if not isinstance(model.get_submodule(str(node.target)), (nn.Conv2d, nn.Linear, Add)):
        return False
    users = readers(node, model)
    return bool(users) and all(
        user.op == "call_module" and isinstance(model.get_submodule(str(user.target)), ACTIVATIONS) for user in users
    )


def equalizable(model: nn.Module) -> bool:
    """Whether a convolution alone reads another one's output, or its ReLU's: a pair for cross-layer equalization."""

    def module_of(nodes: list[fx.Node], kinds: tuple[type, ...]) -> bool:
        return len(nodes) == 1 and nodes[0].op == "call_module" and isinstance(
            model.get_submodule(str(nodes[0].target)), kinds
        )  # fmt: skip

    for node in trace(model).nodes:
        if module_of([node], (nn.Conv2d,)):
            users = readers(node, model)
            users = readers(users[0], model) if module_of(users, ACTIVATIONS) else users
            if module_of(users, (nn.Conv2d,)):
                return True
    return False


@torch.no_grad()
def run_by_module(
    graph: fx.Graph,
    model: nn.Module,
    batches: list[Tensor],
    before: Callable[[str, list[tuple]], None] = lambda name, arguments: None,
) -> list[Tensor]:
    """Every module over all batches before the next module; a value lives until its last reader has run.

    Args:
        graph: of `model`, or of one with the same module names.
        before: called with a module's name and its arguments per batch; may change the module.

    Returns:
        the outputs per batch.
    """
    last = {value: node for node in graph.nodes for value in node.all_input_nodes}
    values: dict[fx.Node, list[Any]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = list(batches)
            continue
        arguments = [_at(node.args, values, i) for i in range(len(batches))]
        if node.op == "output":
            return [a[0] for a in arguments]
        if node.op == "call_module":
            before(str(node.target), arguments)
        for value in node.all_input_nodes:
            if last[value] is node:
                del values[value]
        values[node] = []
        while arguments:  # so that an input goes as its output comes
            values[node].append(_call(node, model, arguments.pop(0)))
    raise AssertionError("a traced graph ends in its output")


def _at(arguments: Any, values: dict[fx.Node, list[Any]], i: int) -> Any:
    return fx.node.map_arg(arguments, lambda value: values[value][i])


def _call(node: fx.Node, model: nn.Module, arguments: tuple) -> Any:
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*arguments)
    if node.op == "call_method":
        return getattr(arguments[0], str(node.target))(*arguments[1:], **node.kwargs)
    return node.target(*arguments, **node.kwargs)  # type: ignore[operator]
