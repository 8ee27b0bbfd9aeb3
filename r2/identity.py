"""The identity of a run and its pretraining: the axes of its table, its key, and the two directories."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Never in a key: places and speed, what only feeds the stage's keys (which count themselves), and modules, which move.
_LEFT_OUT = {"_target_", "root", "workers", "finetune"}
_CALIBRATION = {"calibration_images", "calibration_examples"}  # a stage reads them, pretraining does not


@dataclass(frozen=True)
class Identity:
    """What names a piece of work.

    Attributes:
        directory: its own; `label` made unique by `key`.
        key: eight hex digits of `values`.
        values: the option names and the values that can change its result, and nothing else. A recipe's name is
            left out: its values say it all.
    """

    directory: Path
    key: str
    values: dict = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.directory.name


def of_run(config: dict, axes: dict) -> Identity:
    """The run of a checked config, and of its axes."""
    return _identity(config, Path(config["out"]), run_name(axes), ("data", "model", "reg", "stage"), set())


def of_pretraining(config: dict) -> Identity:
    """The pretraining that the run of a checked config starts from, if its stage needs one."""
    label = "{data}_{model}_{reg}".format(**config["choices"]) + f"_s{config['seed']}"
    return _identity(config, Path(config["out"], "pretrained"), label, ("data", "model", "reg"), _CALIBRATION)


def _identity(config: dict, parent: Path, label: str, named: tuple[str, ...], unread: set[str]) -> Identity:
    values: dict = {"seed": config["seed"], "choices": {group: config["choices"][group] for group in named}}
    for group in (*named, "recipe"):
        values[group] = {k: v for k, v in config[group].items() if k not in _LEFT_OUT | unread}
    for group, key in (("model", "source"), ("data", "tokenizer")):  # a folder is known by its content
        if (sha256 := config.get("sources", {}).get(values.get(group, {}).get(key))) is not None:
            values[group][key] = sha256
    if values["recipe"].get("sync_bn") == "auto":
        values["recipe"]["sync_bn"] = False  # of the number of devices, which no key holds; false on one device
    if config.get("weights") is not None:  # an older record's config has none
        # Their content and what becomes of it, wherever they lie.
        known = {k: v for k, v in config["weights"].items() if k not in ("source", "file")}
        values["weights"] = {**known, "sha256": known["sha256"][:8]}  # all that is known of torchvision's
    text = json.dumps(values, sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Identity(parent / f"{label}-{key}", key, values)


def trains(config: dict) -> bool:
    """Whether a checked config's pretraining trains; weights of the user's are taken as they are unless told."""
    return config.get("weights") is None or config["weights"]["trained"]


def axes(config: dict, stage: Any) -> dict:
    """The columns of a table that this run fills one cell of; the paper's tables have the same ones."""
    choices = config["choices"]
    return {
        "data": choices["data"],
        "model": model_name(config),
        "reg": choices["reg"],
        "stage": choices["stage"],
        "seed": config["seed"],
        **stage.axes(),
    }


def model_name(config: dict) -> str:
    """mbv1-0.25, timm-resnet34; no suffix where there is one, or the paper's only width: mobilebert, resnet18."""
    model, width_mult = config["choices"]["model"], config["model"].get("width_mult")
    if width_mult is None:
        return f"{model}-{config['model']['name']}" if "name" in config["model"] else model
    return "resnet18" if (model, width_mult) == ("rn18", 1.0) else f"{model}-{width_mult}"


def run_name(axes: dict) -> str:
    """Readable and unique up to the hash: digits_mbv1-0.25_margin_ewgs_w2a2_s0."""
    bits = f"_w{axes['weight_bits']}" if axes.get("weight_bits") else ""
    bits += f"a{axes['act_bits']}" if axes.get("act_bits") else ""
    bits += f"d{axes['dim']}" if axes.get("dim") else ""
    return f"{axes['data']}_{axes['model']}_{axes['reg']}_{axes['stage']}{bits}_s{axes['seed']}"
