"""Composition: the command line's words become one checked, plain config. Imports no torch."""

import difflib
import functools
import itertools
import os
from collections.abc import Iterable
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from r2.config import GROUPS, UserError, build, check, check_targets, unknown_key
from r2.paths import CONFIGS

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)


def by_model(table: DictConfig, *, _root_: DictConfig) -> Any:
    """The entry of `table` for the model in use: what the paper sets per model."""
    name = str(_root_.model._target_).rsplit(".", 1)[1]
    if name not in table:
        raise UserError(
            f"this recipe has no value for {name}; choose the model's data or recipe, or set recipe.lr and "
            "recipe.weight_decay"
        )
    return table[name]


def from_environment(name: str, default: Any = None) -> Any:
    """OmegaConf's oc.env for the one variable that configs read, so that no config carries a secret into a record."""
    if name != "R2_DATA":
        raise UserError(f"only R2_DATA is read from the environment; let the shell insert ${name}")
    return os.environ.get(name, default)


OmegaConf.register_new_resolver("by_model", by_model, replace=True)
OmegaConf.register_new_resolver("oc.env", from_environment, replace=True)


def resolve(cfg: DictConfig, choices: dict) -> dict:
    """The composed config as a plain, checked dict; nothing below sees OmegaConf."""
    check_targets({group: cfg[group].get("_target_") for group in GROUPS})  # before an interpolation trips over one
    plain = _compose(*(f"{group}={choices[group]}" for group in GROUPS))
    for group in GROUPS:  # a key and a table's cell hold the option's name, which has to mean what the option says
        option, own, given = choices[group], plain[group]._target_, cfg[group]._target_
        if given != own:
            raise UserError(f"{group}._target_={given}: {group}={option} is {own}; another is an option of its own")
    config: dict = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    config.pop("experiment", None)
    config["choices"] = {group: choices.get(group) for group in GROUPS}
    check(config)
    config["overrides"] = _overrides(cfg, plain, choices)
    return config


def _overrides(cfg: DictConfig, plain: DictConfig, choices: dict) -> list[str]:
    """The fewest overrides that compose the same run, however this one was composed."""
    chosen = [f"{group}={choices[group]}" for group in ("data", "model", "reg", "recipe", "stage")]
    changed = []
    for group in ("data", "model", "reg", "recipe", "stage"):
        theirs, ours = (OmegaConf.to_container(c[group], resolve=False) for c in (plain, cfg))
        solved = OmegaConf.to_container(cfg[group], resolve=True)
        changed += _differences(theirs, ours, solved, f"{group}.")  # type: ignore[arg-type]
    rest = [f"{key}={cfg[key]}" for key in ("seed", "threads") if key == "seed" or cfg[key] != "auto"]
    return [word for word in chosen if word != f"recipe={choices['data']}"] + changed + rest


@functools.cache
def _compose(*overrides: str) -> DictConfig:
    return hydra.compose("config", list(overrides))


def _differences(plain: dict, cfg: dict, solved: dict, prefix: str) -> list[str]:
    found = []
    for key, value in cfg.items():
        if isinstance(value, dict) and isinstance(plain.get(key), dict):
            found += _differences(plain[key], value, solved[key], f"{prefix}{key}.")
        elif key not in plain or value != plain[key]:
            found.append(f"{prefix}{key}={_word(solved[key])}")
    return found


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_word(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_word(v) for v in value) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def sweep_words(words: list[str]) -> list[str]:
    """A fixed key of a swept group as an axis of one value.

    Hydra checks fixed keys once, without the sweep: it would look for stage.batches of `stage=dfq,adaround` in fp32.
    """
    swept = {key for key, _, value in (word.partition("=") for word in words) if "," in value and key in GROUPS}
    pairs = [(word, *word.partition("=")[::2]) for word in words]
    return [
        f"{key}=choice({value})" if key.partition(".")[0] in swept - {key} and value and "," not in value else word
        for word, key, value in pairs
    ]


def check_sweep(words: list[str]) -> None:
    """Compose and check every job of a sweep, before the first one starts.

    Raises:
        UserError: a value that a job does not take.
    """
    parsed = OverridesParser.create().parse_override
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        fixed = [word for word in words if not parsed(word).is_sweep_override()]
        experiment = hydra.compose("config", fixed, return_hydra_config=True).hydra.sweeper.params or {}
        axes = {}
        for word in [*(f"{key}={value}" for key, value in experiment.items()), *words]:
            axis = parsed(word)
            if isinstance(axis.value(), Glob):
                return  # Hydra's sweeper alone knows its options: each job is checked when its turn comes
            key, swept = axis.get_key_element(), axis.is_sweep_override()
            axes[key] = [f"{key}={value}" for value in axis.sweep_string_iterator()] if swept else [word]
        for job in itertools.product(*axes.values()):
            build(composed(job)["stage"])


def composed(overrides: Iterable[str]) -> dict:
    """The checked config of one run; inside an initialized Hydra."""
    cfg = hydra.compose("config", list(overrides), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return resolve(cfg, choices)


def one_line(error: BaseException) -> str:
    """Hydra's message with the options, without its hints about stack traces."""
    cause = error.__cause__
    if cause is not None and getattr(cause, "parent_node", None) is not None:
        parent, prefix = cause.parent_node, str(cause.full_key).rpartition(".")[0]  # type: ignore[attr-defined]
        options = [f"{prefix}.{key}" if prefix else str(key) for key in parent if key not in ("hydra", "_target_")]
        return unknown_key(str(cause.full_key), options)  # type: ignore[attr-defined]
    text = str(error)
    if "Available options in" in text:
        head, _, rest = text.partition("Available options in")
        group, _, names = rest.partition(":")
        options = names.split("Config search path")[0].split()
        wanted = head.strip().rsplit("/", 1)[-1].strip("'")
        if wanted.startswith("submitit_"):
            return "hydra/launcher: Hydra's submitit launcher is not installed; pip install 'r2[cluster]'"
        close = difflib.get_close_matches(wanted, options, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown {group.strip().strip(chr(39))} {wanted!r}: {hint}choose from {', '.join(options)}"
    lines = [line.strip() for line in text.splitlines() if line.strip() and "object_type" not in line]
    return "; ".join(lines[:3])
