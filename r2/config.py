"""The config: its types, the check of every key before any work, and `build`.

Nothing here imports torch, so `--help`, `--cfg job` and config errors are fast. A config node holds the keyword
arguments of the callable that it names in `_target_`, so the callable's signature *is* the schema. The signature is
read from the source text, without importing the module.
"""

import ast
import copy
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import AfterValidator, ConfigDict, ValidationError, create_model
from pydantic_core import PydanticCustomError

from r2.hints import unknown_key


class UserError(Exception):
    """A user's mistake, reported in one line without a traceback."""


class Diverged(UserError):
    """A training with a non-finite loss or weights: a result of the run, counted at chance accuracy."""


def last_line(error: BaseException) -> str:
    """What a UserError says. One that was raised in a data loader's worker carries its traceback in the message."""
    return printable(str(error).strip().rpartition("\nr2.config.UserError: ")[2])


def first_line(error: BaseException) -> str:
    """The first line, cut to 200 characters, of another library's error; its type where it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def printable(text: str) -> str:
    """A line of text whatever is in it: the name of a file may hold line breaks and bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shell_word(word: str) -> str:
    """A word quoted for a shell; where a character cannot be printed, such as a byte of a name that is not UTF-8, as
    bash and zsh write it: $'caf\\351'.
    """
    if word.isprintable():
        return shlex.quote(word)
    written = (c if c.isprintable() else "".join(f"\\{byte:03o}" for byte in os.fsencode(c)) for c in word)
    return "$'" + "".join(f"\\{c}" if c in ("\\", "'") else c for c in written) + "'"


Count = Annotated[int, Ge(1)]
CountOrZero = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Bits = Annotated[int, Ge(1), Le(32)]
Width = Annotated[float, Gt(0), Le(8)]
Seed = Annotated[int, Ge(0), Lt(2**63)]
ImageSize = Count | Annotated[list[Count], Len(2, 2)]  # of a square, or [height, width]


def _named(place: str) -> str:
    if not place:
        raise PydanticCustomError("place", "must not be empty")
    return place


Place = Annotated[str, AfterValidator(_named)]  # not MinLen, which refuses a name that is not UTF-8


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Of an image of a checked config."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class Root:
    """The keys outside the groups; but for `seed`, they change a result by rounding at most."""

    def __init__(self, out: Place, seed: Seed, devices: Literal["auto"] | Count, threads: Literal["auto"] | Count,
                 force: bool, check: bool, images_per_second: Positive | None, checkpoint_seconds: NonNegative,
                 dist_timeout_seconds: Positive): ...  # fmt: skip


class Weights:
    """Keys of `model` that say where a network's values come from; they are none of the network itself."""

    def __init__(self, weights: Place | None = None, finetune: bool = False, reset_head: bool = False): ...


GROUPS = ("data", "model", "reg", "recipe", "stage", "tracker")
SETTLED = ("choices", "weights", "sources", "overrides")  # what composition adds


def check(config: dict) -> None:
    """Compare every key of a resolved config with the signature it ends in.

    Raises:
        UserError: in one line, with the key, what is wrong with it and what may stand there.
    """
    _check_node({k: config[k] for k in config if k not in (*GROUPS, *SETTLED)}, f"{__name__}.Root", "")
    for group in GROUPS:
        node = dict(config[group])
        _check_node(node, node.pop("_target_"), f"{group}.")
    if config["images_per_second"] is not None and not config["check"]:
        raise UserError(f"images_per_second={config['images_per_second']:g}: only a plan uses it; add check=true")


def take_weights(config: dict) -> dict:
    """The keys of `Weights`, checked and taken out of a resolved config's model: what is left is the network's own.

    Raises:
        UserError: as `check`.
    """
    target = f"{__name__}.Weights"
    found = {key: config["model"].pop(key) for key in signature(target) if key in config["model"]}
    _check_node(found, target, "model.")
    return {"weights": None, "finetune": False, "reset_head": False, **found}


def check_targets(targets: dict[str, Any]) -> None:
    """Only callables of r2 may be named by a config."""
    for group, target in targets.items():
        if not isinstance(target, str) or not target.startswith("r2."):
            raise UserError(f"{group}._target_={target!r}: must name something in r2")


def _names_callable(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(map(_names_callable, value.values()))
    return isinstance(value, list) and any(map(_names_callable, value))


def _check_node(node: dict, target: str, prefix: str) -> None:
    annotations = signature(target)
    for key in node:
        if key not in annotations:
            raise UserError(unknown_key(prefix + key, [prefix + name for name in annotations], target))
    fields: dict[str, Any] = {key: (annotations[key], ...) for key in node}
    for key, value in node.items():
        if _names_callable(value):
            raise UserError(f"{prefix}{key}={value!r}: only a whole group names a callable")
    model = create_model("Node", __config__=ConfigDict(extra="forbid", allow_inf_nan=False, strict=True), **fields)
    try:
        model(**node)
    except ValidationError as error:
        found = error.errors()
        key = str(found[0]["loc"][0])
        wrong = dict.fromkeys(one["msg"] for one in found if one["loc"][0] == key)  # each part of a union has its own
        raise UserError(f"{prefix}{key}={node.get(key)!r}: {', or: '.join(wrong)}") from None


@functools.cache
def signature(target: str) -> dict[str, Any]:
    """Parameter names and types of a function or class of r2, read without importing its module.

    Bases and imported names are followed through the modules of r2. Types are made of builtins, typing's names and
    those above; what else an annotation says is Any here, and the callable's to check.

    Raises:
        UserError: there is no such callable.
    """
    module, _, name = target.rpartition(".")
    found = _find(module, name)
    if found is None:
        raise UserError(f"{target}: {module} defines no such name")
    source, node = found
    return source.parameters(node) if isinstance(node, ast.FunctionDef) else _init(source, node) or {}


class _Source:
    """The text of a module of r2: what it defines, and the full names of what it imports."""

    def __init__(self, module: str):
        spec = _find_spec(module)
        if spec is None or spec.origin is None:
            raise UserError(f"there is no module {module}")
        self.module, tree = module, ast.parse(Path(spec.origin).read_text())
        self.defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        self.imported: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self.imported |= {one.asname or one.name: one.name for one in node.names}
            elif isinstance(node, ast.ImportFrom):
                origin = importlib.util.resolve_name("." * node.level + (node.module or ""), spec.parent)
                self.imported |= {one.asname or one.name: f"{origin}.{one.name}" for one in node.names}
        names = {name: full.rpartition(".") for name, full in self.imported.items()}
        known = {name: getattr(importlib.import_module(origin), own, Any)
                 for name, (origin, _, own) in names.items() if origin in ("typing", __name__)}  # fmt: skip
        self.types = globals() if module == __name__ else known

    def type_of(self, annotation: ast.expr | None) -> Any:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):  # a quoted one
            annotation = ast.parse(annotation.value, mode="eval").body
        try:
            return eval(compile(ast.Expression(annotation), "<annotation>", "eval"), self.types) if annotation else Any
        except (NameError, AttributeError, TypeError):  # of names that only an import could explain
            return Any

    def parameters(self, function: ast.FunctionDef) -> dict[str, Any]:
        arguments = [*function.args.args, *function.args.kwonlyargs]
        return {a.arg: self.type_of(a.annotation) for a in arguments if a.arg != "self"}

    def fields(self, node: ast.ClassDef) -> dict[str, Any]:
        """What a dataclass adds to its bases' fields."""
        found = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
        fixed = [f for f in found if "ClassVar" in ast.unparse(f.annotation) or "init=False" in ast.unparse(f)]
        return {ast.unparse(f.target): self.type_of(f.annotation) for f in found if f not in fixed}

    def bases(self, node: ast.ClassDef) -> Iterator[tuple["_Source", ast.ClassDef]]:
        """Those of r2: torch's and Python's have no keys."""
        for base in node.bases:
            head, _, rest = ast.unparse(base.value if isinstance(base, ast.Subscript) else base).partition(".")
            origin = self.imported.get(head, head if head == "r2" else f"{self.module}.{head}")
            module, _, name = f"{origin}.{rest}".strip(".").rpartition(".")
            found = _find(module, name) if module.startswith("r2.") else None
            if found is not None and isinstance(found[1], ast.ClassDef):
                yield found[0], found[1]


_source = functools.cache(_Source)


def _find_spec(module: str) -> Any:
    """As importlib.util.find_spec, which would import the packages around a module, and torch with them."""
    first, *inner = module.split(".")
    spec, name, places = None, first, cast(Any, sys.modules["r2"].__path__)
    for part in inner if first == "r2" else ():
        name = f"{name}.{part}"
        spec = places and importlib.machinery.PathFinder.find_spec(name, places)
        places = spec and spec.submodule_search_locations
    return spec


def _find(module: str, name: str) -> tuple[_Source, ast.FunctionDef | ast.ClassDef] | None:
    """Where a name is defined, be it imported by the module that is asked."""
    source = _source(module)
    if name in source.defined:
        return source, source.defined[name]
    origin, _, own = source.imported.get(name, "").rpartition(".")
    return _find(origin, own) if origin.startswith("r2.") else None


def _init(source: _Source, node: ast.ClassDef) -> dict[str, Any] | None:
    """The parameters that a class is called with; None if nothing in r2 says them."""
    inherited = (found for base in source.bases(node) if (found := _init(*base)) is not None)
    own = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    if own is not None:
        passed_on = next(inherited, {}) if own.args.kwarg else {}
        return {**passed_on, **source.parameters(own)}
    return _fields(source, node) if _is_dataclass(node) else next(inherited, None)


def _fields(source: _Source, node: ast.ClassDef) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in reversed(list(source.bases(node))):
        found |= _fields(*base)
    return found | (source.fields(node) if _is_dataclass(node) else {})


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def build(node: dict, *args: Any, **kwargs: Any) -> Any:
    """Call what a config node names; the one place where a config calls anything, and only inside r2.

    Args:
        node: `_target_` and keyword arguments.
        *args, **kwargs: what the config cannot hold (a model, a data set).
    """
    if not str(node.get("_target_", "")).startswith("r2."):
        raise UserError(f"_target_={node.get('_target_')!r}: only targets inside r2 are built")
    _check_node({k: v for k, v in node.items() if k != "_target_"}, node["_target_"], "")  # a record's may be anybody's
    # Not by Hydra's instantiate: it would read the resolved values once more, and a ${...} that is text as a reference.
    values = {key: copy.deepcopy(value) for key, value in node.items() if key != "_target_"}
    module, _, name = node["_target_"].rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise UserError(f"{node['_target_']} needs {error.name}: pip install {error.name}") from None
    try:
        inspect.signature(target).bind(*args, **values, **kwargs)
    except TypeError as error:
        raise UserError(f"{node['_target_']}: {error}; the config must have this key") from None
    return target(*args, **values, **kwargs)
