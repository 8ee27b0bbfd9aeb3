"""Data of a pretraining for the figures, in two small files: the weights of some layers, and the curve of all."""

import csv
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from r2.config import UserError
from r2.identity import model_name
from r2.record import Record

T = TypeVar("T")


@dataclass(frozen=True)
class Trained:
    """One pretraining.

    Attributes:
        weights: layer name to its weights, flat, in the network's order: 3x3 convolutions and the last linear layer.
        curve: epoch to the (layers, 2) range and kurtosis of every layer of the network.
        sha256: of both files.
    """

    data: str
    model: str
    reg: str
    recipe: dict
    weights: dict[str, np.ndarray]
    curve: dict[int, np.ndarray]
    sha256: str


def collect(pretrained: Path, into: Path, records: list[Record] | None = None) -> None:
    """Keep what the figures show of the finished pretrainings: <model>_<reg>.safetensors and .csv in `into`.

    The weights are those of the 3x3 convolutions and of the last linear layer, the CSV is the curve of all layers.
    Only the lowest seed, and the regularizers as configs/reg has them. Of several data sets, and of several recipes of
    a model, the one with the most pretrainings is kept; of equals the newest.

    Args:
        pretrained: `<out>/pretrained`; its unfinished folders are passed over.
        records: only the pretrainings that these were made from.

    Raises:
        UserError: a damaged checkpoint, or `into` cannot be written.
    """
    from safetensors.torch import save

    from r2 import store

    made_from = {record["sha256"]["pretrained"] for record in records or ()}
    needed = ("config.json", "curve-weights.csv", "model.pt")
    finished = [path for path in pretrained.glob("*") if all((path / name).exists() for name in needed)]
    found = []
    for directory in sorted(finished, key=lambda path: (path / "model.pt").stat().st_mtime):
        described = _described(json.loads((directory / "config.json").read_text()))
        if described is not None:
            state = store.load(directory / "model.pt", "model", "info")
            if records is None or state["info"]["sha256"] in made_from:
                found.append((described, state["model"], directory))
    for described, state, directory in _lowest_seed(_comparable(found, lambda item: item[0])):
        convolutions = {k: w for k, w in state.items() if w.ndim == 4 and w.shape[-2:] == (3, 3)}
        last = [(k, w) for k, w in state.items() if w.ndim == 2][-1:]
        kept = {k: w.float().contiguous() for k, w in (*convolutions.items(), *last)}
        header = json.dumps({**described, "layers": list(kept)})  # a safetensors file does not keep their order
        path = store.make_directory(into) / f"{described['model']}_{described['reg']}.safetensors"
        for target, content in (
            (path, save(kept, {"r2": header})),
            (path.with_suffix(".csv"), (directory / "curve-weights.csv").read_bytes()),
        ):
            if not target.exists() or target.read_bytes() != content:
                store.write(target, content)


def _described(config: dict) -> dict | None:
    """A pretraining by the names of its options; None unless it has the values of configs/reg."""
    choices = config.get("choices")  # an older version wrote none
    if choices is None or config["reg"] != _default(choices["reg"]):
        return None
    names = {"data": choices["data"], "model": model_name(config), "reg": choices["reg"]}
    begun = {"weights": config["weights"]} if "weights" in config else {}  # that training went on from
    recipe = {**config["recipe"], **begun}
    return {**names, "seed": config["seed"], "epochs": recipe["epochs"], "recipe": recipe}


def _lowest_seed(items: list[tuple[dict, dict, Path]]) -> list[tuple[dict, dict, Path]]:
    """One pretraining of each model and regularizer; of equals the newest, which comes last."""
    found = {}
    for item in sorted(items, key=lambda item: -item[0]["seed"]):
        found[item[0]["model"], item[0]["reg"]] = item
    return list(found.values())


def _default(reg: str) -> dict | None:
    """The values of an option of configs/reg; None if there is no such option."""
    from omegaconf import OmegaConf

    from r2.paths import CONFIGS

    path = CONFIGS / "reg" / f"{reg}.yaml"
    option: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True) if path.exists() else None
    return option and {key: value for key, value in option.items() if key != "_target_"}


def _comparable(items: list[T], described: Callable[[T], dict]) -> list[T]:
    """Those of one data set, and of one recipe per model: a recipe may set its learning rate by the model."""
    items = most_common(items, lambda item: described(item)["data"])
    models = sorted({described(item)["model"] for item in items})
    return [
        item
        for model in models
        for item in most_common(
            [item for item in items if described(item)["model"] == model],
            lambda item: json.dumps(described(item)["recipe"], sort_keys=True),
        )
    ]


def most_common(items: list[T], key: Callable[[T], Hashable]) -> list[T]:
    """The items of the key that most of them have; of equals the last."""
    counts = Counter(map(key, items))
    chosen = max(reversed(counts), key=counts.__getitem__, default=None)
    return [item for item in items if key(item) == chosen]


def read(folder: Path) -> list[Trained]:
    """What `collect` has left in a folder; comparable ones only.

    Raises:
        UserError: a damaged file.
    """
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found.append(_read(path))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged, it or its .csv ({error}); delete both") from None
    return _comparable(found, vars)


def _read(path: Path) -> Trained:
    text = path.with_suffix(".csv").read_text()
    curve: dict[int, list[list[float]]] = defaultdict(list)
    for row in csv.DictReader(text.splitlines()):
        curve[int(row["epoch"])].append([float(row["range"]), float(row["kurtosis"])])
    with safe_open(path, "np") as file:
        described = json.loads(file.metadata()["r2"])
        weights = {name: file.get_tensor(name).ravel() for name in described["layers"]}
    sha256 = hashlib.sha256(path.read_bytes() + text.encode()).hexdigest()
    names = {key: described[key] for key in ("data", "model", "reg", "recipe")}
    return Trained(**names, weights=weights, curve={e: np.array(rows) for e, rows in curve.items()}, sha256=sha256)
