"""Plots of records: accuracy against bits, and against size on disk.

One function returns the rows of a plot, so that their digest identifies the plot. A plot function returns a matplotlib
figure and a one-sentence caption.
"""

from collections import Counter, defaultdict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from r2.record import Record
from r2.report.style import INK, colour, label, ordered
from r2.report.tables import FP32, TABLES, column

WEIGHT_COLUMNS = [*TABLES["2"].columns, *TABLES["3"].columns[1:]]
POST_TRAINING = ("none", "dfq", "adaround")
MARKERS = {"none": "o", "dfq": "s", "adaround": "^", "pact": "P", "lsq": "v", "ewgs": "D", "dkm": "X"}


def bits_rows(records: list[Record]) -> list[list]:
    """[model, panel, place, text, reg, seed, top1] of every run that compresses all layers, and of full precision.

    A panel is [rank, title]; a place orders the texts under its x axis. Panels of one regularizer are left out beside
    those that compare several.
    """
    # A model regularized over vectors is another one. PACT trains from scratch: its full precision is the others'.
    full = {(*_who(r), r["axes"].get("dim") or 1): r["fp32"]["top1"] for r in records if r["fp32"]}
    rows: dict[tuple, list] = {}
    for record in records:
        axes, place = record["axes"], _place(record["axes"])
        if place is None or axes["quantized_layers"] != "all":
            continue
        model, reg, seed = who = _who(record)
        fp32 = full.get((*who, axes.get("dim") or 1))
        for where, top1 in ((place, record["metrics"]["top1"]), ((*place[:2], 32, "fp32"), fp32)):
            if top1 is not None:
                key = (*who, *where)
                rows[key] = [model, list(where[:2]), *where[2:], reg, seed, top1]
    regs: dict[tuple, set] = defaultdict(set)
    for model, panel, _, _, reg, *_ in rows.values():
        regs[model, panel[1]].add(reg)
    least = min(2, max(map(len, regs.values()), default=0))
    return sorted(row for row in rows.values() if len(regs[row[0], row[1][1]]) >= least)


def _who(record: Record) -> tuple:
    return tuple(record["axes"][key] for key in ("model", "reg", "seed"))


def _place(axes: dict) -> tuple[int, str, int, str] | None:
    """Rank and title of the panel that a run belongs to, its place there and the text under it."""
    stage, bits = axes["stage"], axes["weight_bits"]
    if stage in POST_TRAINING:
        return 0, f"PTQ, W{bits}A{axes['act_bits']}", POST_TRAINING.index(stage), stage
    if stage in ("ewgs", "lsq", "pact"):
        return 1, stage.upper(), bits, f"W{bits}A{axes['act_bits']}"
    if stage == "dkm" and axes["dim"] == 1:
        return 2, "DKM", bits, f"{bits} bit" + "s" * (bits > 1)
    return (3, "vector DKM", bits, f"{bits} bits\ndim {axes['dim']}") if stage == "dkm" else None


def accuracy_bits(rows: list[list]) -> tuple[Figure, str]:
    """Accuracy against bits per weight; small multiples by model and method."""
    return _multiples(rows), (
        "Top-1 accuracy against bits per weight, by model and method; a mark per seed and a dash at their mean, "
        "full precision at the right of each panel."
    )


def weight_rows(records: list[Record]) -> list[list]:
    """[model, panel, weight, text, reg, seed, top1] of the regularizers that were tried with several weights: of full
    precision and of Tables 2 and 3.

    A panel is [rank, title], the text is the weight's.
    """
    rows: dict[tuple, list] = {}
    for record in records:
        model, reg, seed = _who(record)
        weight, scalar = record["config"]["reg"].get("weight"), (record["axes"].get("dim") or 1) == 1
        for done, metrics in ((column(record), record["metrics"]), (FP32, record["fp32"] if scalar else None)):
            if weight is not None and metrics is not None and done in WEIGHT_COLUMNS:
                panel = [WEIGHT_COLUMNS.index(done), done.label]
                rows[model, reg, done, weight, seed] = [model, panel, weight, f"{weight:g}", reg, seed, metrics["top1"]]
    tried = Counter(key[:3] for key in {key[:4] for key in rows})
    return sorted(row for key, row in rows.items() if tried[key[:3]] > 1)


def accuracy_weight(rows: list[list]) -> tuple[Figure, str]:
    """Accuracy against the regularizer's weight; small multiples by model and what was done to it."""
    figure = _multiples(rows)
    figure.supxlabel("weight of the regularizer", fontsize="medium")
    return figure, (
        "Top-1 accuracy against the weight of the regularizer, by what was done to the model; a mark per seed and a "
        "dash at their mean."
    )


def _multiples(rows: list[list]) -> Figure:
    """A panel per model and title, a place on its x axis per text, the regularizers side by side there.

    Args:
        rows: [model, [rank, title], place, text, reg, seed, top1].
    """
    panels: dict[tuple, list[list]] = defaultdict(list)
    for model, (rank, title), *row in rows:
        panels[model, rank, title].append(row)
    regs = ordered({row[4] for row in rows})
    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(5.2, 0.6 + 1.9 * lines), layout="constrained")
    axes = figure.subplots(lines, 2, squeeze=False).ravel()
    for ax, ((model, _, title), found) in zip(axes, panels.items(), strict=False):
        places = sorted({(place, text) for place, text, *_ in found})
        here = [reg for reg in regs if any(row[2] == reg for row in found)]
        for i, reg in enumerate(here):
            values = [[row[-1] for row in found if row[2] == reg and row[1] == text] for _, text in places]
            _seeds(ax, values, 0.72 * ((i + 0.5) / len(here) - 0.5), colour(reg))
        ax.set_xticks(range(len(places)), [text for _, text in places])
        ax.set_xlim(-0.6, len(places) - 0.4)
        ax.grid(axis="y", alpha=0.2, linewidth=0.6)
        ax.set_title(f"{model}, {title}")
    _same_axis([(ax, title) for ax, (_, _, title) in zip(axes, panels, strict=False)])
    for ax in axes[len(panels) :]:
        ax.remove()
    _legend(figure, regs)
    figure.supylabel("top-1 accuracy in %", fontsize="medium")
    return figure


def _seeds(ax: Axes, values: list[list[float]], offset: float, color: str) -> None:
    """A mark per seed and a dash at their mean, at each place that has values, beside the other regularizers'."""
    for i, seeds in enumerate(values):
        ax.plot([i + offset] * len(seeds), seeds, "o", color=color, markersize=3.2, alpha=0.55, markeredgewidth=0)
        if seeds:
            ax.hlines(float(np.mean(seeds)), i + offset - 0.05, i + offset + 0.05, color=color, linewidth=2)


def _same_axis(panels: list[tuple[Axes, str]]) -> None:
    """Panels of one title show one thing of several networks, and so have one y axis."""
    for title in {title for _, title in panels}:
        of_title = [ax for ax, its in panels if its == title]
        low, high = min(ax.get_ylim()[0] for ax in of_title), max(ax.get_ylim()[1] for ax in of_title)
        for ax in of_title:
            ax.set_ylim(low, high)


def size_rows(records: list[Record]) -> list[list]:
    """[model, reg, stage, MiB of the compressed file, top1] of every run that wrote one."""
    found = ([*_who(r)[:2], r["axes"]["stage"], r["size"]["file_mib"], r["metrics"]["top1"]] for r in records)
    return sorted(row for row in found if row[3] is not None)


def accuracy_size(rows: list[list]) -> tuple[Figure, str]:
    """Accuracy against size on disk, a panel per network and a mark per run."""
    networks = sorted({_network(row[0]) for row in rows})
    regs, stages = ordered({row[1] for row in rows}), [s for s in MARKERS if any(row[2] == s for row in rows)]
    figure = Figure(figsize=(5.2, 0.9 + 2.6 * len(networks)), layout="constrained")
    axes = figure.subplots(len(networks), 1, sharex=True, squeeze=False)[:, 0]
    for ax, network in zip(axes, networks, strict=True):
        ax.set_xscale("log")
        here = [row for row in rows if _network(row[0]) == network]
        for _, reg, stage, mib, top1 in here:
            ax.plot(mib, top1, MARKERS.get(stage, "*"), color=colour(reg), fillstyle="none", markersize=5)
        ax.margins(x=0.15)
        ax.autoscale_view()
        ax.grid(axis="y", alpha=0.2, linewidth=0.6)
        ax.set(title=", ".join(sorted({row[0] for row in here})), ylabel="top-1 accuracy in %")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("compressed file in MiB")
    _legend(figure, regs)
    marks = [Line2D([], [], color=INK, marker=MARKERS[s], fillstyle="none", linestyle="", markersize=5) for s in stages]
    figure.legend(marks, stages, loc="outside lower center", ncols=4, handletextpad=0.2)
    return figure, (
        "Top-1 accuracy against the size of the compressed file on disk, one mark per run; files of as many "
        "bits are of one size, whatever the stage."
    )


def _network(model: str) -> str:
    """A network of several widths shares a panel."""
    return model.partition("-")[0]


def _legend(figure: Figure, regs: list[str]) -> None:
    lines = [Line2D([], [], color=colour(reg), linewidth=3) for reg in regs]
    labels = [label(reg) for reg in regs]
    figure.legend(lines, labels, loc="outside upper center", ncols=6, handlelength=1.2, columnspacing=1.2)
