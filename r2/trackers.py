"""Where curves go besides curve.csv. A tracker has `log(row)` and `close()`, and can never end a run."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r2.config import Positive
from r2.console import say


class Tracker:
    """Calls a backend until it fails, then says so once and stays silent.

    Args:
        start: opens the backend and returns its (log, close) functions.
    """

    def __init__(self, name: str, start: Callable[[], tuple[Callable[[dict], Any], Callable[[], Any]]] | None):
        self.name, self._log, self._close = name, None, None
        if start is None:
            return
        try:
            self._log, self._close = start()
        except Exception as error:
            self._failed(error)

    def log(self, row: dict) -> None:
        self._call(self._log, row)

    def close(self) -> None:
        self._call(self._close)

    def _call(self, function: Callable | None, *args: Any) -> None:
        if function is None:
            return
        try:
            function(*args)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say(f"{self.name} is off for the rest of this run ({reason}); curve.csv goes on")
        self._log = self._close = None


def none(directory: Path, config: dict) -> Tracker:
    """curve.csv alone."""
    return Tracker("csv", None)


def wandb(
    directory: Path,
    config: dict,
    project: str = "r2",
    entity: str | None = None,
    init_timeout_seconds: Positive = 10.0,
) -> Tracker:
    """Weights & Biases; without a network it goes on offline (upload later with `wandb sync`)."""

    def start() -> tuple[Callable, Callable]:
        import wandb as wb

        def init(**mode: Any) -> Any:
            settings = wb.Settings(init_timeout=init_timeout_seconds, console="off")
            return wb.init(
                project=project, entity=entity, dir=str(directory), name=directory.name, id=directory.name[-8:],
                resume="allow", config=config, settings=settings, reinit="finish_previous", **mode,
            )  # fmt: skip

        try:
            run = init()
        except Exception as error:
            if os.environ.get("WANDB_MODE") == "offline":
                raise
            say(f"wandb cannot be reached ({str(error).splitlines()[0]}); going on offline")
            run = init(mode="offline")
        return lambda row: run.log(row), run.finish

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

        return log, writer.close

    return Tracker("tensorboard", start)
