"""The config: names of its types, the check of every key before any work, and `build`.

Nothing here imports torch: `--help`, `--cfg job` and a config error answer at once. A config node holds the
keyword arguments of the callable it names in `_target_`, so that callable's signature *is* the schema. It is
read from the source text, without importing the module.
"""

import ast
import difflib
import functools
import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ConfigDict, ValidationError, create_model


class UserError(Exception):
    """A mistake of the user's, told in one line and without a traceback."""


def last_line(error: BaseException) -> str:
    """What a UserError says. One that was raised in a data loader's worker carries its traceback in the message."""
    return str(error).strip().splitlines()[-1].removeprefix("r2.config.UserError: ")


Count = Annotated[int, Ge(1)]
CountOrZero = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Bits = Annotated[int, Ge(1), Le(32)]
Width = Annotated[float, Gt(0), Le(8)]
Seed = Annotated[int, Ge(0), Lt(2**63)]
Place = Annotated[str, MinLen(1)]


class Root:
    """The keys outside the groups; none but `seed` can change a result."""

    def __init__(self, out: Place, seed: Seed, devices: Literal["auto"] | Count, threads: Literal["auto"] | Count,
                 force: bool, check: bool, checkpoint_seconds: NonNegative,
                 dist_timeout_seconds: Positive): ...  # fmt: skip


GROUPS = ("data", "model", "reg", "recipe", "stage", "tracker")
_TYPES: dict[str, Any] = {
    "Optional": Optional, "Union": Union, "Literal": Literal, "Annotated": Annotated, "Any": Any,
    "Count": Count, "CountOrZero": CountOrZero, "Positive": Positive, "NonNegative": NonNegative,
    "Fraction": Fraction, "Bits": Bits, "Width": Width, "Seed": Seed, "Place": Place,
}  # fmt: skip


def check(config: dict) -> None:
    """Compare every key of a resolved config with the signature it ends in.

    Raises:
        UserError: in one line, with the key, what is wrong with it and what may stand there.
    """
    _check_node({k: config[k] for k in config if k not in (*GROUPS, "choices", "overrides")}, f"{__name__}.Root", "")
    for group in GROUPS:
        node = dict(config[group])
        _check_node(node, node.pop("_target_"), f"{group}.")


def check_targets(targets: dict[str, Any]) -> None:
    """Only callables of r2 may be named by a config."""
    for group, target in targets.items():
        if not isinstance(target, str) or not target.startswith("r2."):
            raise UserError(f"{group}._target_={target!r}: must name something in r2")


def _check_node(node: dict, target: str, prefix: str) -> None:
    annotations = signature(target)
    for key in node:
        if key not in annotations:
            raise UserError(unknown_key(prefix + key, [prefix + name for name in annotations]))
    fields: dict[str, Any] = {key: (_evaluate(annotations[key]), ...) for key in node}
    for key, value in node.items():
        if "_target_" in repr(value):  # Hydra would call what it names
            raise UserError(f"{prefix}{key}={value!r}: only a whole group names a callable")
    model = create_model("Node", __config__=ConfigDict(extra="forbid", allow_inf_nan=False, strict=True), **fields)
    try:
        model(**node)
    except ValidationError as error:
        found = error.errors()
        key = str(found[0]["loc"][0])
        wrong = dict.fromkeys(one["msg"] for one in found if one["loc"][0] == key)  # each part of a union has its own
        raise UserError(f"{prefix}{key}={node.get(key)!r}: {', or: '.join(wrong)}") from None


def unknown_key(key: str, options: list[str]) -> str:
    close = difflib.get_close_matches(key, options, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown key {key!r}: {hint}known are {', '.join(sorted(options))}"


def _evaluate(annotation: ast.expr | None) -> Any:
    if annotation is None:
        return Any
    return eval(compile(ast.Expression(annotation), "<annotation>", "eval"), _TYPES)


@functools.cache
def signature(target: str) -> dict[str, ast.expr | None]:
    """Parameter names and annotations of a function or class of r2, read without importing its module."""
    module, name = target.rsplit(".", 1)
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(f"{target}: there is no module {module}")
    tree = ast.parse(Path(spec.origin).read_text())
    definitions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    while name in definitions:
        node = definitions[name]
        if isinstance(node, ast.FunctionDef):
            return _parameters(node)
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            fields = {f.target.id: f.annotation for f in node.body
                      if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)}  # fmt: skip
            bases = [ast.unparse(base) for base in node.bases if ast.unparse(base) in definitions]
            return {**(signature(f"{module}.{bases[0]}") if bases else {}), **fields}
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                return _parameters(item)
        name = ast.unparse(node.bases[0]) if node.bases else ""
    raise UserError(f"{target}: {module} defines no such name")


def _parameters(function: ast.FunctionDef) -> dict[str, ast.expr | None]:
    arguments = [*function.args.args, *function.args.kwonlyargs]
    return {a.arg: a.annotation for a in arguments if a.arg != "self"}


def build(node: dict, *args: Any, **kwargs: Any) -> Any:
    """Call what a config node names; the one place where Hydra instantiates, and only inside r2.

    Args:
        node: `_target_` and keyword arguments.
        *args, **kwargs: what the config cannot hold (a model, a data set).
    """
    if not str(node.get("_target_", "")).startswith("r2."):
        raise UserError(f"_target_={node.get('_target_')!r}: only targets inside r2 are built")
    _check_node({k: v for k, v in node.items() if k != "_target_"}, node["_target_"], "")  # a record's may be anybody's
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, *args, _convert_="all", _recursive_=False, **kwargs)
    except InstantiationException as error:
        if error.__cause__ is not None:  # what went wrong, without Hydra's wrapping
            raise error.__cause__ from None
        raise
