"""The command line: Hydra composes, `check` refuses, every mistake is one line. Imports no torch."""

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from r2.config import GROUPS, UserError, check, check_targets, unknown_key

_here = Path(__file__).parent
CONFIGS = str(_here / "configs" if (_here / "configs").is_dir() else _here.parent / "configs")


def by_model(table: DictConfig, *, _root_: DictConfig) -> Any:
    """The entry of `table` for the model in use: what the paper sets per model."""
    name = str(_root_.model._target_).rsplit(".", 1)[1]
    if name not in table:
        raise UserError(
            f"this recipe has no value for {name}; choose the model's data or recipe, or set recipe.lr and "
            "recipe.weight_decay"
        )
    return table[name]


OmegaConf.register_new_resolver("by_model", by_model, replace=True)


def resolve(cfg: DictConfig, choices: dict, overrides: list[str]) -> dict:
    """The composed config as a plain, checked dict; nothing below sees OmegaConf."""
    check_targets({group: cfg[group].get("_target_") for group in GROUPS})  # before an interpolation trips over one
    config: dict = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    config.pop("experiment", None)
    config["choices"] = {group: choices.get(group) for group in GROUPS}
    config["overrides"] = overrides
    check(config)
    return config


def _job(cfg: DictConfig) -> Any:
    context = HydraConfig.get()
    try:
        config = resolve(cfg, dict(context.runtime.choices), list(context.overrides.task))
        return importlib.import_module("r2.run").start(config)
    except (UserError, OmegaConfBaseException) as error:
        text = _last_line(error) if isinstance(error, UserError) else _one_line(error)
        print(f"r2: {text}", file=sys.stderr, flush=True)
        if context.mode == RunMode.RUN:
            raise SystemExit(2) from None
        raise UserError(text) from None
    except Exception as error:
        traceback.print_exc()  # at once: a sweep would show it only at its end
        raise JobFailed from error


class JobFailed(Exception):
    """A job has failed and said why."""


def main(program: str) -> None:
    """Run under Hydra; exits with 2 on a user's mistake, 1 on a failure, 143 when stopped but resumable."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets errors reach this function
    from yaml import YAMLError

    sweep = any(argument in ("-m", "--multirun") for argument in sys.argv[1:])
    if sweep:  # Hydra knows the flag only in front of the keys
        sys.argv[1:] = ["-m", *[a for a in sys.argv[1:] if a not in ("-m", "--multirun")]]
    try:
        hydra.main(config_path=CONFIGS, config_name="config", version_base="1.3")(_job)()
    except UserError:
        raise SystemExit(2) from None  # said where it happened
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        print(f"r2: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:  # Hydra makes the folder of a sweep before its first job
        print(
            f"r2: out: cannot write to {error.filename} ({error.strerror}); choose another with out=DIR",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except JobFailed:
        if sweep:
            print(
                "r2: a job of the sweep failed, see above; the same command runs what is missing",
                file=sys.stderr,
            )
        raise SystemExit(1) from None


def _one_line(error: BaseException) -> str:
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
        return f"unknown {group.strip().strip(chr(39))} {wanted!r}: choose from {', '.join(options)}"
    lines = [line.strip() for line in text.splitlines() if line.strip() and "object_type" not in line]
    return "; ".join(lines[:3])


def _last_line(error: BaseException) -> str:
    # An error raised in a data loader's worker carries its traceback in the message.
    return str(error).strip().splitlines()[-1].removeprefix("r2.config.UserError: ")
