"""Figures of records and of trained weights, as SVG and PNG; each file contains the sha256 of its data.

    from r2.report import figures
    figures.collect(Path("outputs/pretrained"), Path("results/weights"), records)
    figures.write(records, Path("results/weights"), Path("results/figures"))

matplotlib and torch are imported inside the functions that need them.
"""

import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2.record import Record
from r2.report.tables import column, main_study, protocol, row
from r2.report.trained import Trained, collect, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["collect", "digest", "stale", "write"]
# Written formats, and the metadata that would make the same drawing differ from day to day.
SUFFIXES: dict[str, dict[str, None]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


@dataclass(frozen=True)
class Planned:
    """A figure whose data are there.

    Attributes:
        inputs: all that it shows, or the sha256 of it.
        draw: returns the drawing and what to say of it.
    """

    name: str
    inputs: list
    draw: Callable[[], tuple["Figure", str]]


def _planned(records: list[Record], weights: Path) -> Iterator[Planned]:
    from r2.report import accuracy, folding, style, verdicts
    from r2.report import weights as drawn

    models: dict[str, dict[str, Trained]] = defaultdict(dict)
    for trained in read(weights):
        models[trained.model][trained.reg] = trained
    # Fig. 1 shows one layer: the one with the farthest outliers, measured in standard deviations, under L2.
    pairs = [
        (regs["l2"], regs["margin" if "margin" in regs else "linf"])
        for regs in models.values()
        if "l2" in regs and ("margin" in regs or "linf" in regs)
    ]
    if pairs:
        l2, regularized = max(pairs, key=lambda pair: drawn.widest_layer(pair[0]))
        yield Planned("figure1", [l2.sha256, regularized.sha256], partial(drawn.three_bins, l2, regularized))
    for model, regs in models.items():
        shown = [regs[reg] for reg in style.ordered(regs)]
        for name, draw in (("figure2", drawn.layers), ("range", drawn.over_epochs)):
            yield Planned(f"{name}_{model}", [trained.sha256 for trained in shown], partial(draw, shown))
    study = main_study(records) if records else None
    weighted = [record for record in records if protocol(record) == study]
    comparable = [record for record in weighted if " " not in row(record)[1] and column(record).folding is None]
    for name, rows, picture in (
        ("claims", verdicts.verdict_rows(weighted), verdicts.verdicts),
        ("accuracy_folding", folding.folding_rows(weighted, weights), folding.accuracy_folding),
        ("accuracy_bits", accuracy.bits_rows(comparable), accuracy.accuracy_bits),
        ("accuracy_weight", accuracy.weight_rows(weighted), accuracy.accuracy_weight),
        ("accuracy_size", accuracy.size_rows(comparable), accuracy.accuracy_size),
    ):
        if rows:
            yield Planned(name, rows, partial(picture, rows))


def digest(planned: Planned) -> str:
    """sha256 of a figure's name and inputs: it changes with what is shown, not with how it is drawn."""
    return hashlib.sha256(json.dumps([planned.name, planned.inputs]).encode()).hexdigest()


def write(records: list[Record], weights: Path, out: Path) -> list[Path]:
    """Draw every figure that has data: claims, figure1, figure2_<model>, range_<model>, accuracy_bits, accuracy_size,
    accuracy_weight and accuracy_folding.

    The data are those of the main study; accuracy_weight adds its runs with other weights of the regularizer. In an
    SVG text, axes and L2 are #444444 on a transparent ground, for a page to put its own colour there; a PNG is white.
    Both hold the figure's digest as `Identifier` and a sentence on it as `Description`.

    Args:
        weights: a folder that `collect` has filled; may be missing.

    Returns:
        the files written, <figure>.svg and <figure>.png.

    Raises:
        UserError: a damaged file in `weights`, or `out` cannot be written.
    """
    import matplotlib

    from r2 import store

    store.make_directory(out)
    paths = []
    for planned in _planned(records, weights):
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update({**_style(), "svg.hashsalt": planned.name})
            figure, sentence = planned.draw()
            for suffix, unwanted in SUFFIXES.items():
                metadata = {"Identifier": f"sha256:{digest(planned)}", "Description": sentence, **unwanted}
                ground = "none" if suffix == "svg" else "white"
                buffer = io.BytesIO()
                figure.savefig(buffer, format=suffix, dpi=180, facecolor=ground, metadata=metadata)
                content = buffer.getvalue()
                path = out / f"{planned.name}.{suffix}"
                store.write(path, re.sub(rb" +\n", b"\n", content) if suffix == "svg" else content)
                paths.append(path)
    return paths


def stale(records: list[Record], weights: Path, out: Path) -> list[str]:
    """The files that `write` would make and that are missing in `out`, or show other data."""
    expected = {f"{p.name}.{suffix}": digest(p) for p in _planned(records, weights) for suffix in SUFFIXES}
    return [name for name, sha256 in expected.items() if not _shows(out / name, sha256)]


def _shows(path: Path, sha256: str) -> bool:
    return path.exists() and f"sha256:{sha256}".encode() in path.read_bytes()


def _style() -> dict[Any, Any]:
    from r2.report.style import INK

    return {
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9.5,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.facecolor": "none",
        "svg.fonttype": "none",  # text stays text: small files, the reader's fonts
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        "grid.color": INK,
    }
