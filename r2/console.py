"""Terminal output: one progress bar per phase, plain lines without a terminal, a summary table at the end."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """A reader that has gone (| head) is no failure: r2.cli ends the program with 0, rich would with 1."""
        raise BrokenPipeError


console = _Console(highlight=False, soft_wrap=True)
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 160  # of a log; its reader scrolls


def say(text: str) -> None:
    console.print(f"r2: {text}", markup=False)


class Phase:
    """The progress of one phase, in steps; silent on every rank but 0."""

    def __init__(self, name: str, steps: int, done: int = 0, show: bool = True):
        self.name, self.show, self.live = name, show, show and console.is_terminal
        if self.live:
            columns = (TextColumn(name), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._progress = Progress(*columns, console=console, refresh_per_second=4)
            self._task = self._progress.add_task("", total=steps, completed=done)
        self._shown = 0.0

    def __enter__(self) -> "Phase":
        if self.live:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self._progress.stop()

    def due(self) -> bool:
        """Whether reading the running metrics for the bar is worth it now."""
        return self.live and time.monotonic() - self._shown > 0.5

    def update(self, done: int, text: str) -> None:
        if self.live:
            self._shown = time.monotonic()
            self._progress.update(self._task, completed=done, description=text)

    def epoch(self, text: str) -> None:
        """One line per epoch, which stays above the bar where there is one."""
        if self.live:
            self._progress.console.print(f"{self.name}: {text}", markup=False)
        elif self.show:
            print(f"{self.name}: {text}", file=sys.stdout, flush=True)


_AXES = {"data", "model", "model.width_mult", "model.name", "reg", "seed", "stage", "stage.bits", "stage.weight_bits",
         "stage.act_bits", "stage.dim"}  # fmt: skip


def comparison(records: Sequence[Mapping[str, Any]]) -> None:
    """The closing table of a sweep: a row per pretrained model, a column per stage with its accuracy and file."""
    rows: dict[tuple, dict[str, str]] = {}
    swept = [[word for word in r["overrides"] if word.partition("=")[0] not in _AXES] for r in records]
    common_words = set.intersection(*map(set, swept))
    for record, words in zip(records, swept, strict=True):
        settings = [word for word in words if word not in common_words]
        of_stage = "".join("\n" + word.removeprefix("stage.") for word in settings if word.startswith("stage."))
        others = " ".join(word for word in settings if not word.startswith("stage."))
        axes, size = record["axes"], record["size"]["file_mib"]
        bits = "".join(f"{letter}{axes[key]}" for letter, key in (("W", "weight_bits"), ("A", "act_bits"), ("d", "dim"))
                       if axes.get(key))  # fmt: skip
        cell = f"{record['metrics']['top1']:.2f} %" + (f"\n{size:.2f} MiB" if size else "")
        kept = (axes["data"], axes["model"], axes["reg"], axes["seed"], others)
        row = rows.setdefault(kept, {"full\nprecision": "-"})
        if record["fp32"]:
            row["full\nprecision"] = f"{record['fp32']['top1']:.2f} %"
        for name, key in (("largest\nweight", "max_abs"), ("kurtosis", "kurtosis")):
            if record["fp32"] or name not in row:  # of a run from scratch where no other has its row
                row[name] = f"{record['weights_summary'][key]:.2f}"
        if axes["stage"] != "fp32":
            row[f"{axes['stage']}\n{bits}{of_stage}"] = cell
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    names = ("data", "model", "regularizer", "seed", "settings")
    differ = [i for i, values in enumerate(zip(*rows, strict=True)) if len(set(values)) > 1]
    common = [
        f"{name} {value}"
        for i, (name, value) in enumerate(zip(names, next(iter(rows)), strict=True))
        if i not in differ and value != ""
    ]
    table = Table(title="the sweep: " + ", ".join(common or ["its runs"]), title_justify="left")
    for i in differ:
        table.add_column(names[i], no_wrap=True)
    for name in columns:
        table.add_column(name, overflow="fold")
    for kept, row in rows.items():
        table.add_row(*(str(kept[i]) for i in differ), *(row.get(name, "-") for name in columns))
    console.print(table)


def _noteworthy(details: dict) -> list[tuple[str, Any]]:
    """Channels that folding made constants, and layers whose output is as much noise as signal: how many, and some."""
    kinds = (("constant channels", "constant_channels"), ("SQNR below 1 dB", "below_1_db"))
    found = [(title, details[key]) for title, key in kinds if details.get(key)]
    return [(title, f"{len(names)}: {', '.join(names[:5])}" + ", ..." * (len(names) > 5)) for title, names in found]


def summary(record: Mapping[str, Any], directory: Path) -> None:
    """The closing table of one run."""
    table = Table(title=record["name"], title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    metrics = record["metrics"]
    given = record["config"].get("weights")  # an earlier version wrote none
    beginning = given["source"] if given else "scratch"
    rows: list[tuple[str, Any]] = [
        ("top-1", f"{metrics['top1']:.2f} %  (top-5 {metrics['top5']:.2f} %, loss {metrics['loss']:.3f})"),
        ("full precision", f"{record['fp32']['top1']:.2f} %" if record["fp32"] else f"trained from {beginning}"),
        ("weights", f"largest {record['weights_summary']['max_abs']:.3f}, "
                    f"mean kurtosis {record['weights_summary']['kurtosis']:.2f} "
                    f"after {'pretraining' if record['fp32'] else 'training'}"),
        ("file", f"{record['size']['file_mib']:.3f} MiB, {record['size']['bits_per_weight'] or 32:g} bits per weight"),
        *_noteworthy(record.get("details") or {}),
        ("seconds", ", ".join(f"{k} {v:.0f}" for k, v in record["seconds"].items())),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)
    for name in ("record.json", "model.safetensors"):  # under the table, whose columns would break a path
        if (directory / name).exists():
            console.print(str(directory / name), markup=False)
