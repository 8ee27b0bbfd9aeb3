"""What names a run and its pretraining: the axes of its table, its key, and the two directories."""

import hashlib
import json
from typing import Any

# Keys that say where and how fast, never what comes out.
_NOT_RESULT = {"root", "workers"}


def identity(config: dict, groups: tuple[str, ...] = ("data", "model", "reg", "recipe", "stage")) -> dict:
    """What can change a result, and nothing else: devices, workers, trackers and places are left out."""
    kept: dict = {"seed": config["seed"]}
    for group in groups:
        kept[group] = {k: v for k, v in config[group].items() if k not in _NOT_RESULT}
    kept["recipe"].pop("finetune", None)  # only feeds the stage's keys, which count themselves
    return kept


def fingerprint(identified: dict) -> str:
    """Eight hex digits that name a run's directory."""
    text = json.dumps(identified, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def axes(config: dict, stage: Any) -> dict:
    """The columns of a table that this run fills one cell of; the paper's tables have the same ones."""
    choices = config["choices"]
    return {
        "data": choices["data"],
        "model": model_name(choices["model"], config["model"].get("width_mult")),
        "reg": choices["reg"],
        "stage": choices["stage"],
        "seed": config["seed"],
        **stage.axes(),
    }


def model_name(model: str, width_mult: float | None) -> str:
    """mbv1-0.25; no suffix where there is one width, or the paper's only one: mobilebert, resnet18."""
    if width_mult is None:
        return model
    return "resnet18" if (model, width_mult) == ("rn18", 1.0) else f"{model}-{width_mult}"


def run_name(axes: dict) -> str:
    """Readable and unique up to the hash: digits_mbv1-0.25_margin_ewgs_w2a2_s0."""
    bits = f"_w{axes['weight_bits']}" if axes.get("weight_bits") else ""
    bits += f"a{axes['act_bits']}" if axes.get("act_bits") else ""
    bits += f"d{axes['dim']}" if axes.get("dim") else ""
    return f"{axes['data']}_{axes['model']}_{axes['reg']}_{axes['stage']}{bits}_s{axes['seed']}"
