"""Rewrites a network so that every operation is a separate module, as post-training quantization needs it.

r2's own networks are written that way. In others, additions, products, activations and averages are functions, one ReLU
is used in several places, and timm's BatchNorm includes its activation. In evaluation mode the rewritten network
computes the same up to float rounding. Parameters keep their names, and layers are in the order in which they run.
"""

import copy
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY as PRESERVED
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

from r2.config import UserError, first_line
from r2.models import Add, Multiply

_OF_TWO: dict[Any, type[nn.Module]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), Add),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), Multiply),
}
_OF_ONE: dict[Any, type[nn.Module]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu", "relu_"), nn.ReLU),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"), nn.Sigmoid),
    F.relu6: nn.ReLU6,
    F.silu: nn.SiLU,
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
}
_NOTHING = (F.dropout, stochastic_depth)  # in evaluation mode


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _carries_activation(m) or super().is_leaf_module(m, module_qualified_name)


def modular(model: nn.Module) -> nn.Module:
    """A copy of the network in evaluation mode, rewritten unless it is one of r2's.

    A function that has no module here stays one; `r2.stages.graph.places` refuses it by its name.

    Raises:
        UserError: the forward pass depends on its data.
    """
    model = copy.deepcopy(model).eval()
    architecture: Any = getattr(model, "architecture", {})
    if "network" not in architecture or "modular" in architecture:
        return model
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # of torch.fx, or of the network's own code, which does not know its proxies
        reason = first_line(error)
        raise UserError(f"{architecture['network']}: its forward pass cannot be traced ({reason})") from None
    called: set[str] = set()
    for node in list(graph.nodes):
        if node.op == "call_module":
            _call_once(graph, node, model, called)
        elif node.op in ("call_function", "call_method"):
            _call_module(graph, node, model)
    rewritten = fx.GraphModule(model, graph)
    rewritten.graph.eliminate_dead_code()  # what only assertions read
    rewritten.recompile()
    # So that a copy of it keeps it, too.
    rewritten.meta[PRESERVED] = {"architecture": {**architecture, "modular": True}}
    rewritten.architecture = rewritten.meta[PRESERVED]["architecture"]
    return rewritten.eval()


def _carries_activation(module: nn.Module) -> bool:
    """timm's BatchNormAct2d, or what it becomes over ranks."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and hasattr(module, "act")


def _call_once(graph: fx.Graph, node: fx.Node, model: nn.Module, called: set[str]) -> None:
    """BatchNorm and its activation one after the other; a further use of a module without state as one of its own."""
    module = model.get_submodule(str(node.target))
    if _carries_activation(module):
        norm: Any = nn.BatchNorm2d(module.num_features, module.eps, device="meta")  # type: ignore[arg-type]
        norm._parameters, norm._buffers = module._parameters, module._buffers
        model.set_submodule(str(node.target), norm.eval())
        _insert(graph, node, model, f"{node.target}_act", module.act)  # type: ignore[arg-type]
    elif node.target in called and not module.state_dict():
        node.target = name = f"{node.target}_{len(called)}"
        model.set_submodule(name, copy.deepcopy(module))
    called.add(str(node.target))


def _call_module(graph: fx.Graph, node: fx.Node, model: nn.Module) -> None:
    """A module in place of a function, where there is one that computes the same."""
    target = node.target
    keys = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    if getattr(target, "__name__", target) == "_assert":
        graph.erase_node(node)
    elif target in _NOTHING:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
    elif target in _OF_TWO and not node.kwargs and all(map(_computed, node.args)):
        _replace(graph, node, model, _OF_TWO[target]())
    elif target in _OF_ONE:
        _replace(graph, node, model, _OF_ONE[target]())
    elif target is F.adaptive_avg_pool2d:
        _replace(graph, node, model, nn.AdaptiveAvgPool2d(*node.args[1:], **node.kwargs))  # type: ignore[arg-type]
    elif target in ("mean", torch.mean) and keys.get("dim") in ((2, 3), [2, 3], (-2, -1), [-2, -1]):
        pooled = _replace(graph, node, model, nn.AdaptiveAvgPool2d(1))
        if not keys.get("keepdim"):
            _insert(graph, pooled, model, f"{pooled.target}_flat", nn.Flatten(1))


def _computed(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op != "get_attr"


def _replace(graph: fx.Graph, node: fx.Node, model: nn.Module, module: nn.Module) -> fx.Node:
    name = node.name
    while hasattr(model, name):
        name += "_"
    model.add_module(name, module)
    inputs = tuple(a for a in node.args if isinstance(a, fx.Node))
    with graph.inserting_after(node):
        new = graph.call_module(name, inputs)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _insert(graph: fx.Graph, node: fx.Node, model: nn.Module, name: str, module: nn.Module) -> None:
    """`module` after the node, for all its readers."""
    model.set_submodule(name, module)
    with graph.inserting_after(node):
        new = graph.call_module(name)
    node.replace_all_uses_with(new)
    new.args = (node,)
