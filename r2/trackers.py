"""Trackers of curves besides the curve-<phase>.csv files.

A tracker has `log(row)` and is closed by its `with` block; it can neither end nor block a run.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r2.config import Positive, first_line
from r2.console import say

PATIENCE = 30.0  # seconds for one call of a backend


class Tracker:
    """Calls a backend until it fails or does not answer, then says so once and stays silent.

    Args:
        start: opens the backend and returns its functions log(row) and close(failed).
    """

    def __init__(self, name: str, start: Callable[[], tuple[Callable[[dict], Any], Callable[[bool], Any]]] | None):
        self.name, self._log, self._close = name, None, None
        if start is None:
            return
        if (opened := self._call(start)) is not None:
            self._log, self._close = opened

    def log(self, row: dict) -> None:
        self._call(self._log, row)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._call(self._close, kind is not None)

    def _call(self, function: Callable | None, *args: Any) -> Any:
        if function is None:
            return None
        results: list = []
        errors: list[Exception] = []

        def call() -> None:
            try:
                results.append(function(*args))
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=call, daemon=True)  # one that hangs does not outlive the run
        thread.start()
        thread.join(PATIENCE)
        if results:
            return results[0]
        self._failed(errors[0] if errors else TimeoutError(f"no answer for {PATIENCE:g} s"))
        return None

    def _failed(self, error: Exception) -> None:
        reason = first_line(error)
        say(f"{self.name} is off for the rest of this run ({reason}); the curve-*.csv files are still written")
        self._log = self._close = None


def none(directory: Path, config: dict) -> Tracker:
    """The curve-<phase>.csv files alone."""
    return Tracker("csv", None)


def wandb(
    directory: Path,
    config: dict,
    project: str = "r2",
    entity: str | None = None,
    init_timeout_seconds: Positive = 10.0,
) -> Tracker:
    """Weights & Biases; without a network it continues offline (upload later with `wandb sync`)."""

    def start() -> tuple[Callable, Callable]:
        import wandb as wb

        def init(**mode: Any) -> Any:
            settings = wb.Settings(init_timeout=init_timeout_seconds, finish_timeout=PATIENCE / 2, console="off")
            return wb.init(
                project=project, entity=entity, dir=str(directory), name=directory.name, id=directory.name[-8:],
                resume="allow", config=config, settings=settings, reinit="finish_previous", **mode,
            )  # fmt: skip

        try:
            run = init()
        except Exception as error:
            if os.environ.get("WANDB_MODE") == "offline":
                raise
            say(f"wandb cannot be reached ({first_line(error)}); going on offline")
            wb.teardown()  # forgets the run that could not start, whose name would be taken
            run = init(mode="offline")
        return lambda row: run.log(row), lambda failed: run.finish(exit_code=int(failed))

    return Tracker("wandb", start)


def tensorboard(directory: Path, config: dict) -> Tracker:
    """TensorBoard event files beside the record (pip install 'r2[tensorboard]')."""

    def start() -> tuple[Callable, Callable]:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(directory))

        def log(row: dict) -> None:
            for key, value in row.items():
                if isinstance(value, int | float):
                    writer.add_scalar(f"{row['phase']}/{key}", value, row["epoch"])

        return log, lambda failed: writer.close()

    return Tracker("tensorboard", start)
