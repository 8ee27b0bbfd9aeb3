"""Composition: turns command-line arguments into one checked, plain config. Does not import torch."""

import functools
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from r2 import hub
from r2.config import GROUPS, UserError, build, check, check_targets, shell_word, signature, take_weights
from r2.data.facts import FACTS
from r2.hints import unknown_key, unknown_option
from r2.paths import CONFIGS

_SEARCHPATH = "hydra.searchpath="
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


def by_data(table: DictConfig, otherwise: Any, *, _root_: DictConfig) -> Any:
    """The entry of `table` for the data in use: what a model's option sets by the size of the images."""
    return table.get(str(_root_.data._target_).rsplit(".", 1)[1], otherwise)


def weights_of_paper(*, _root_: DictConfig) -> str | None:
    """What `model.weights` is in the paper: of ResNet-18 without a range regularizer torchvision's (section 4.1.1)."""
    network, reg, data = (str(_root_[group]._target_).rsplit(".", 1)[1] for group in ("model", "reg", "data"))
    of_torchvision = network == "resnet18" and _root_.model.width_mult == 1 and reg == "L2" and _root_.reg.factor == 1
    return "torchvision" if of_torchvision and FACTS.get(data) == FACTS["imagenet"] else None


def from_environment(name: str, default: Any = None) -> Any:
    """OmegaConf's oc.env for the one variable that configs read, so that no config carries a secret into a record."""
    if name != "R2_DATA":
        raise UserError(f"only R2_DATA is read from the environment; let the shell insert ${name}")
    return os.environ.get(name, default)


OmegaConf.register_new_resolver("by_model", by_model, replace=True)
OmegaConf.register_new_resolver("by_data", by_data, replace=True)
OmegaConf.register_new_resolver("weights_of_paper", weights_of_paper, replace=True)
OmegaConf.register_new_resolver("oc.env", from_environment, replace=True)


def resolve(cfg: DictConfig, of_hydra: Any) -> dict:
    """The composed config as a plain, checked dict; nothing below sees OmegaConf.

    Args:
        of_hydra: Hydra's own config, which knows what was chosen, and where options of the user's own lie.
    """
    choices = dict(of_hydra.runtime.choices)
    places = [word for word in of_hydra.overrides.hydra if word.startswith(_SEARCHPATH)]
    check_targets({group: cfg[group].get("_target_") for group in GROUPS})  # before an interpolation trips over one
    for group in GROUPS:
        if not isinstance(choices.get(group), str):  # Hydra also takes a list of options
            raise UserError(f"{group}: takes one option, as {group}=NAME; for several runs: -m {group}=ONE,OTHER")
    plain = _compose(*places, *(f"{group}={choices[group]}" for group in GROUPS))
    for group in GROUPS:  # a key and a table's cell hold the option's name, which has to mean what the option says
        option, own, given = choices[group], plain[group]._target_, cfg[group]._target_
        if given != own:
            raise UserError(f"{group}._target_={given}: {group}={option} is {own}; another is an option of its own")
    config: dict = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    config.pop("experiment", None)
    config["choices"] = {group: choices[group] for group in GROUPS}
    given = take_weights(config)
    check(config)
    module, _, library = config["model"]["_target_"].rpartition(".")
    if module == "r2.zoo":
        hub.check_name(library, config["model"]["name"])
    config["weights"] = hub.settle(given, config["model"])
    config["sources"] = hub.contents(config["model"].get("source"), config["data"].get("tokenizer"))
    _check_regularizer(config)
    config["overrides"] = [*places, *_overrides(cfg, plain, choices)]
    return config


def _check_regularizer(config: dict) -> None:
    """Refuse one that nothing applies: tables would show a network under its name that never saw it."""
    taken = config["weights"] is not None and not config["weights"]["trained"]
    scratch = config["stage"].get("from_scratch", False)
    if taken and not scratch and config["reg"] != {"_target_": "r2.regularizers.L2", "factor": 1.0}:
        raise UserError(
            f"reg={config['choices']['reg']}: is not applied to weights that are taken as they are; "
            "add model.finetune=true, or leave reg out"
        )


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
        elif key not in plain or plain[key] not in (value, solved[key]):  # an experiment's ${} may come to the default
            found.append(f"{prefix}{key}={_word(solved[key])}")
    return found


def _word(value: Any) -> str:
    """A value as the command line takes it, quoted where Hydra would read something else."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_escaped(str(key))}: {_word(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_word(v) for v in value) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if not isinstance(value, str):
        return str(value)
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # OmegaConf's escape of what looks like an interpolation
    try:
        plain = OverridesParser.create().parse_override(f"key=[{text}]").value() == [value]
    except HydraException:
        plain = False
    return text if plain else QuotedString(text, Quote.single).with_quotes()


def _escaped(key: str) -> str:
    """A key inside braces, where Hydra takes no quotes."""
    return re.sub(r"[\\()\[\]{}:=, \t]", r"\\\g<0>", key)


def words_of(arguments: list[str]) -> list[str]:
    """The command line with `--config-dir DIR` as a key, which a record can hold and a plan takes, and with ~ expanded.

    Flags come first: argparse takes no key between two of them.

    Raises:
        UserError: there is no such folder, or a word is a key as other programs take it.
    """
    flags: list[str] = []
    words: list[str] = []
    for word, before, after in zip(arguments, ["", *arguments], [*arguments[1:], ""], strict=False):
        _refuse_flag(word, before, after)
    rest = iter(arguments)
    for word in rest:
        flag, equals, folder = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            folder = folder if equals else next(rest, "")
            if not Path(folder).expanduser().is_dir() or not folder:
                raise UserError(f"--config-dir {folder}: there is no such folder")
            words.append(_SEARCHPATH + _word([f"file://{Path(folder).expanduser().resolve()}"]))
        elif flag in ("--config-path", "-cp", "--config-name", "-cn"):
            raise UserError(
                f"{flag}: r2 has its own config; put options in DIR/<group>/<name>.yaml, with --config-dir DIR"
            )
        elif flag in ("--cfg", "-c", "--package", "-p", "--experimental-rerun"):
            flags += [word] if equals else [word, *itertools.islice(rest, 1)]
        elif word.startswith("-"):
            flags.append(word)
        elif equals and folder.startswith("~"):
            words.append(f"{flag}={_word(os.path.expanduser(folder))}")
        else:
            words.append(word)
    return [*flags, *words]


def _refuse_flag(word: str, before: str, after: str) -> None:
    """Refuse `--stage ewgs` and `stage ewgs`, of which Hydra's argparse and parser say much and nothing clear."""
    flag, equals, value = word.partition("=")
    key = flag.lstrip("-")
    ours = key.partition(".")[0] in (*GROUPS, *signature("r2.config.Root"))
    if not word.startswith("-"):
        wrong = ours and not equals and not before.startswith("-")  # of --cfg job and such, it is the value
    else:
        of_hydra = any(option.startswith(flag) for option in get_args_parser()._option_string_actions)
        wrong = bool(key) and not of_hydra and (ours or word.startswith("--"))
    if not wrong:
        return
    follows = bool(after) and not equals and "=" not in after and not after.startswith("-")
    written = value or (after if follows else "true" if key in ("check", "force", "plan") else "VALUE")
    raise UserError(f"{word}{f' {after}' * (follows and word != key)}: write {key}={written}")


def grid(words: Iterable[str]) -> dict[str, list[str]]:
    """Key to its words, one of each value, as Hydra's sweeper takes them: the last word of a key counts.

    Inside an initialized Hydra.
    """
    parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(list(words))
    keys = [(axis.get_key_element(), axis) for axis in parsed]
    return {
        key: [f"{key}={value}" for value in axis.sweep_string_iterator()] if axis.is_sweep_override()
        else [str(axis.input_line)]
        for key, axis in keys
    }  # fmt: skip


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


def sweeps(words: list[str]) -> bool:
    """Whether the words make a sweep: by -m, or by an experiment that sweeps by itself."""
    chosen = [word for word in words if word.startswith("experiment=") and "," not in word]
    places = [word for word in words if word.startswith(_SEARCHPATH)]
    if "-m" in words or "--multirun" in words or not chosen:
        return "-m" in words or "--multirun" in words
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("config", [*places, *chosen], return_hydra_config=True).hydra.mode == RunMode.MULTIRUN


def check_sweep(words: list[str]) -> list[dict]:
    """Compose and check every job of a sweep, before the first one starts.

    Raises:
        UserError: a value that a job does not take.
    """
    configs = []
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        fixed = [word for of_key in grid(words).values() for word in of_key if word in words]
        experiment = hydra.compose("config", fixed, return_hydra_config=True).hydra.sweeper.params or {}
        for job in itertools.product(*grid([*(f"{k}={v}" for k, v in experiment.items()), *words]).values()):
            configs.append(composed(job))
            build(configs[-1]["stage"])
    return configs


def composed(overrides: Iterable[str]) -> dict:
    """The checked config of one run; inside an initialized Hydra."""
    cfg = hydra.compose("config", list(overrides), return_hydra_config=True)
    OmegaConf.set_struct(cfg, False)
    return resolve(cfg, cfg.pop("hydra"))


def one_line(error: BaseException) -> str:
    """Hydra's message with the options, without its hints about stack traces."""
    cause = error.__cause__
    if cause is not None and getattr(cause, "parent_node", None) is not None:
        parent, prefix = cause.parent_node, str(cause.full_key).rpartition(".")[0]  # type: ignore[attr-defined]
        options = [f"{prefix}.{key}" if prefix else str(key) for key in parent if key not in ("hydra", "_target_")]
        return unknown_key(str(cause.full_key), options, parent.get("_target_"))  # type: ignore[attr-defined]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        missing = error.missing_cfg_file
        group, _, wanted = missing.rpartition("/") if missing.startswith("hydra/") else missing.partition("/")
        if wanted.startswith("submitit_"):
            return "hydra/launcher: Hydra's submitit launcher is not installed; pip install 'r2[cluster]'"
        return unknown_option(group, wanted, list(error.options))
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        if not equals:
            return f"{error.override}: expected key=value, such as reg=margin"
        if value.endswith(","):
            return f"{error.override}: ends in a comma"
        message = error.message.replace(error.override, "")  # which may have lines of its own
        lines = [line for line in message.splitlines() if not line.startswith(("Lexer", "Error", "See", " "))]
        why = f" ({re.sub(r'^HydraException while evaluating .*?: ', '', lines[0])})" if lines else ""
        return f"{error.override}: Hydra does not read this{why}; {_quoted(key, value)}"
    text = str(error)
    if several := re.match(r"Ambiguous value for argument '(.*)'$|Sweep parameters '(.*)' requires", text, re.M):
        word = several[1] or several[2]
        quoted = f"; {_quoted(*word.split('=', 1))}" if "/" in word else ""
        return f"{word}: several values make a sweep: add -m{quoted}"
    lines = [line.strip() for line in text.splitlines() if line.strip() and "object_type" not in line]
    return "; ".join(lines[:3])


def _quoted(key: str, value: str) -> str:
    """How a value is written that Hydra should take as a text."""
    quoted = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    legible = quoted.isprintable() and not set(quoted) & set('"$`\\!')
    return "a text with special characters is quoted: " + (f'"{quoted}"' if legible else shell_word(quoted))
