"""The plot of the claims: each comparison with its interval, beside the paper's."""

import textwrap

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from r2.record import Record
from r2.report import claims
from r2.report.style import INK

COLOURS = {"holds": "#009E73", "does not hold": "#D55E00", "undecided": "#8C8C8C"}


def verdict_rows(records: list[Record]) -> list[list]:
    """[claim, the paper's effect, effect, low, high, verdict] of the comparisons of top-1 in one study."""
    (of_study,) = claims.findings(records).values() or ({},)
    return [
        [claim.text, claims.of_paper(claim), found.effect, *found.interval, found.verdict]
        for claim, found in of_study.get("", [])
        if claim.outcome == "top1" and found.interval
    ]


def verdicts(rows: list[list]) -> tuple[Figure, str]:
    """One line per claim, from the first of r2.report.claims down."""
    figure = Figure(figsize=(5.2, 0.9 + 0.46 * len(rows)), layout="constrained")
    ax = figure.subplots()
    ax.set_xscale("symlog", linthresh=1.0)
    ax.axvline(0, color=INK, linewidth=0.7, alpha=0.5)
    for place, (text, of_paper, effect, low, high, verdict) in enumerate(rows):
        color = COLOURS[verdict]
        ax.hlines(-place, low, high, color=color, linewidth=1.8)
        ax.plot(effect, -place, "o", color=color, markersize=5)
        if of_paper is not None:
            ax.plot(of_paper, -place, "D", color=INK, fillstyle="none", markersize=4.5)
        ax.text(0, -place + 0.18, "\n".join(textwrap.wrap(text, 84)), fontsize=6.5, ha="left", va="bottom",
                transform=ax.get_yaxis_transform(), linespacing=0.95)  # fmt: skip
    ticks = [-50, -20, -5, -1, 0, 1, 5, 20, 50]
    ax.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    ax.minorticks_off()
    ax.set(yticks=[], ylim=(-len(rows) + 0.4, 0.9), xlabel="difference in points of top-1")
    ax.spines["left"].set_visible(False)
    marks = [Line2D([], [], color=color, marker="o", label=name) for name, color in COLOURS.items()]
    marks.append(Line2D([], [], color=INK, marker="D", fillstyle="none", linestyle="", markersize=5, label="the paper"))
    figure.legend(handles=marks, loc="outside upper center", ncols=4, handlelength=1.4, columnspacing=1.2)
    return figure, (
        "Each claim as a difference in points of top-1 with its 95 % interval over seeds, coloured by its verdict "
        "after Holm's correction, beside the paper's difference on ImageNet. The axis is linear within a point and "
        "logarithmic beyond."
    )
