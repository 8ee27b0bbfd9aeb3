"""The command line: runs an entry point under Hydra; every error is one line. Does not import torch."""

import contextlib
import io
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from r2.compose import COMPOSE_ERRORS, check_sweep, one_line, resolve, sweep_words, sweeps, words_of
from r2.config import UserError, last_line, printable
from r2.paths import CONFIGS


def refuse(error: BaseException) -> str:
    """Print a user's mistake as one line and return it."""
    text = printable(one_line(error)) if isinstance(error, COMPOSE_ERRORS) else last_line(error)
    print(f"r2: {text}", file=sys.stderr, flush=True)
    return text


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """A user's mistake inside ends the program with one line and status 2; a closed pipe (| head) is no error.

    Names of files need not be UTF-8: what a terminal cannot show is escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Read when torch loads: how long its threads wait for each other by spinning. By default so long that another busy
    # program slows a run far more than by the core that it takes (scripts/bench/threads.py).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise _reader_gone() from None
    except (UserError, *COMPOSE_ERRORS) as error:
        refuse(error)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # in a training phase Ctrl-C first writes a checkpoint (r2.training.resume)
        print("r2: interrupted; the same command resumes and repeats nothing that is finished", file=sys.stderr)
        raise SystemExit(130) from None


def _unread() -> bool:
    """Whether it is our output that nobody reads; a run has other pipes, whose end is a failure."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return bool(output.poll(0))


def _reader_gone() -> SystemExit:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
    return SystemExit(0)


class JobRefused(Exception):
    """A job of a sweep that a user's mistake has stopped; already reported."""


class JobFailed(Exception):
    """A job has failed and said why."""


def main(start: Callable[[dict], Any], ready: Callable[[list[dict]], None], compare: Callable) -> None:
    """Compose what `start` is called with, under Hydra: one run, or the jobs of a sweep.

    Exits with 2 on a user's mistake, 1 on a failure, 128 + the signal when stopped but resumable.

    Args:
        start: of a module that other processes can import.
        ready: refuses the configs of a sweep whose jobs would all meet the same obstacle; called once.
        compare: gets the configs of a sweep, at its end.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets errors reach this function
    sweep = False
    failures: list[str] = []  # of the jobs that ran in this process
    configs: list[dict] = []  # of the jobs of a sweep

    def job(cfg: DictConfig) -> Any:
        context = HydraConfig.get()
        words = " ".join(map(str, OmegaConf.to_container(context.overrides.task, resolve=False) or ()))
        try:
            if configs:
                print(f"r2: {context.job.num + 1} of {len(configs)}", flush=True)
            return start(resolve(cfg, context))
        except (UserError, OmegaConfBaseException) as error:
            failures.append(f"{words} ({refuse(error)})")
            if context.mode == RunMode.RUN:
                raise SystemExit(2) from None
            raise JobRefused from error
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _unread():
                raise _reader_gone() from None  # Hydra would print an exception
            traceback.print_exc()  # at once: a sweep would show it only at its end
            failures.append(f"{words} ({type(error).__name__}, see above)")
            raise JobFailed from error

    with refusals():
        sys.argv[1:] = words_of(sys.argv[1:])
        try:
            sweep = sweeps(sys.argv[1:])
        except COMPOSE_ERRORS as error:
            raise UserError(one_line(error)) from None
        if sweep:  # Hydra knows the flag only in front of the keys
            sys.argv[1:] = ["-m", *sweep_words([a for a in sys.argv[1:] if a not in ("-m", "--multirun")])]
        if any("_target_" in word and word.lstrip("+").startswith("hydra") for word in sys.argv[1:]):
            raise UserError("hydra's own _target_ is not the command line's to change")
        try:
            if sweep and not any(argument.startswith("--") for argument in sys.argv[1:]):  # --help, --cfg, ...
                configs = check_sweep(sys.argv[2:])
                if not any(word.startswith("hydra/launcher=") for word in sys.argv[1:]):  # else: on other machines
                    ready(configs)
            failed = None
            try:
                hydra.main(config_path=str(CONFIGS), config_name="config", version_base="1.3")(job)()
            except (JobRefused, JobFailed) as error:
                failed = error
            if configs and not configs[0]["check"]:
                compare(configs)
            if failed:
                raise failed
        except (JobRefused, JobFailed) as end:
            _tell(failures if sweep else [])
            raise SystemExit(2 if isinstance(end, JobRefused) else 1) from None
        except BrokenPipeError:
            raise
        except (*COMPOSE_ERRORS, ValueError) as error:  # Hydra's own; the job's do not come here
            raise UserError(one_line(error)) from None
        except OSError as error:  # Hydra makes the folder of a sweep before its first job
            raise UserError(
                f"out: cannot write to {error.filename} ({error.strerror}); choose another with out=DIR"
            ) from None


def _tell(failures: list[str]) -> None:
    for failure in failures:
        print(f"r2: failed: {failure}", file=sys.stderr)
    if failures:
        print("r2: a job of the sweep failed, see above; the same command runs what is missing", file=sys.stderr)
