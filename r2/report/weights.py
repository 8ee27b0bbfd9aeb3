"""Plots of trained weights: the paper's Fig. 1 and Fig. 2, and range and kurtosis over pretraining.

Every function returns a matplotlib figure and a one-sentence caption.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cbook import boxplot_stats
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from r2.report.style import INK, OUTLIER, colour, label
from r2.report.trained import Trained


def zero_bin(w: np.ndarray) -> float:
    """The share of `w` that three bins on its own symmetric range, around -m, 0 and m = max |w|, round to 0."""
    return float((np.abs(w) < np.abs(w).max() / 2).mean())


def widest_layer(trained: Trained) -> tuple[float, str]:
    """The largest ratio of range to standard deviation among the layers, and the layer that has it."""
    return max((float(np.ptp(w) / w.std()), name) for name, w in trained.weights.items() if w.std() > 0)


def three_bins(l2: Trained, regularized: Trained) -> tuple[Figure, str]:
    """Fig. 1: one layer's weights under L2 and under a range regularizer, above the three bins of each."""
    ratio, layer = widest_layer(l2)
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
    limit = max(np.abs(trained.weights[layer]).max() for trained in (l2, regularized))
    edges = np.linspace(-limit, limit, 2 * round(4 * limit / l2.weights[layer].std()) + 2)  # a quarter of its deviation
    for row, trained in enumerate((l2, regularized)):
        w = trained.weights[layer]
        top.stairs(np.histogram(w, edges, density=True)[0], edges, color=colour(trained.reg), linewidth=1.5)
        _bins(below, trained, w, -row)
    name = f"{layer.removesuffix('.weight')} of {l2.model}"
    top.set(yticks=[], ylabel="density", title=name)
    top.spines["left"].set_visible(False)
    top.legend(top.patches, [label(l2.reg), label(regularized.reg)], loc="upper right")
    below.set(yticks=[0, -1], yticklabels=[label(l2.reg), label(regularized.reg)], ylim=(-1.75, 0.4), xlabel="weight")
    below.set_xlim(-1.03 * limit, 1.03 * limit)
    below.tick_params(axis="y", length=0)
    below.spines["left"].set_visible(False)
    shares = [f"{zero_bin(t.weights[layer]):.1%} with {label(t.reg)}" for t in (l2, regularized)]
    return figure, (
        f"Weights of {name}, of all layers the one whose range is the largest multiple of its standard deviation under "
        f"L2 ({ratio:.0f}). Three bins on a distribution's own range round {' and '.join(shares)} to zero; dots are "
        "outliers."
    )


def _bins(ax: Axes, trained: Trained, w: np.ndarray, y: float) -> None:
    largest = np.abs(w).max()
    bounds = np.array([-1, -0.5, 0.5, 1]) * largest
    for left, right, alpha in zip(bounds, bounds[1:], (0.2, 0.5, 0.2), strict=False):
        ax.barh(y, right - left, 0.42, left, color=colour(trained.reg), alpha=alpha, linewidth=0)
    ax.vlines(bounds, y - 0.21, y + 0.21, color=colour(trained.reg), linewidth=1)
    outliers = _apart(boxplot_stats(w)[0]["fliers"], largest)
    ax.plot(outliers, np.full(len(outliers), y), ".", color=OUTLIER, markersize=3)
    ax.text(0, y - 0.29, f"{zero_bin(w):.1%} round to 0", ha="center", va="top")


def layers(models: list[Trained]) -> tuple[Figure, str]:
    """Fig. 2: box plots of every layer's weights, a panel per regularizer, outliers in red."""
    rows, count = -(-len(models) // 2), len(models[0].weights)
    figure = Figure(figsize=(5.2, 0.5 + 1.75 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
    stats = [boxplot_stats(list(trained.weights.values())) for trained in models]
    # One scale for all panels, and few weights must not flatten every box: values beyond it are marked at the edge.
    sizes = [np.abs(w).max() for trained in models for w in trained.weights.values()]
    usual = 1.5 * np.quantile(sizes, 0.9)
    limit = max(sizes) if max(sizes) < 1.5 * usual else usual
    for ax, trained, boxes in zip(axes, models, stats, strict=False):
        line = {"color": INK, "linewidth": 0.8}
        ax.bxp(boxes, showfliers=False, widths=0.6, showcaps=False, boxprops=line, medianprops=line, whiskerprops=line)
        dots = [_apart(box["fliers"], limit) for box in boxes]
        x = np.repeat(np.arange(1, count + 1), [len(y) for y in dots])
        ax.plot(x, np.concatenate(dots), ".", color=OUTLIER, markersize=3, markeredgewidth=0)
        ax.set_title(label(trained.reg))
        ax.set_ylim(-1.08 * limit, 1.08 * limit)
        _beyond(ax, trained, limit)
    numbers = [n for n in range(1, count) if n == 1 or (n % 5 == 0 and n < count - 1)]
    axes[0].set_xticks([*numbers, count], [*map(str, numbers), "last"])
    axes[len(models) - 2].tick_params(labelbottom=True)  # the lowest of its column, with an odd number of panels too
    for ax in axes[len(models) :]:
        ax.remove()
    figure.supylabel("weight", fontsize="medium")
    figure.supxlabel(f"3x3 convolutions of {models[0].model} and its last layer", fontsize="medium")
    return figure, (
        f"Weights of the 3x3 convolutions and the last layer of {models[0].model}, a panel per regularizer, one scale: "
        "quartiles, whiskers to 1.5 quartile ranges, in red the outliers beyond them; triangles are weights beyond the "
        "scale, with the largest of them."
    )


def _apart(values: np.ndarray, limit: float) -> np.ndarray:
    """`values` within the scale, without those drawn on top of another: a large layer has tens of thousands."""
    values = values[np.abs(values) <= limit]
    return values[np.unique((values / limit * 50).round(), return_index=True)[1]]


def _beyond(ax: Axes, trained: Trained, limit: float) -> None:
    """Triangles at the edge for layers with weights beyond `limit`, and the value of the farthest."""
    for sign, marker in ((1, "^"), (-1, "v")):
        farthest = [float((sign * w).max()) for w in trained.weights.values()]
        outside = [x for x, value in enumerate(farthest, 1) if value > limit]
        ax.plot(outside, [sign * limit] * len(outside), marker, color=OUTLIER, markersize=4, markeredgewidth=0)
        if outside:
            x = int(np.argmax(farthest)) + 1
            right = x < len(farthest) / 2
            text = f"{sign * max(farthest):.1f}".replace("-", "\N{MINUS SIGN}")
            ax.text(x + (0.6 if right else -0.6), sign * limit, text, ha="left" if right else "right", va="center")


def over_epochs(models: list[Trained]) -> tuple[Figure, str]:
    """Range and kurtosis of the layers at every epoch: median and quartiles, a row per regularizer."""
    figure = Figure(figsize=(5.2, 0.6 + 1.05 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 2, sharex=True, sharey="col", squeeze=False)
    for column, title in enumerate(("range (max - min)", "kurtosis")):
        curves = [[np.nanquantile(v[:, column], [0.25, 0.5, 0.75]) for v in t.curve.values()] for t in models]
        for ax, trained, curve in zip(axes[:, column], models, curves, strict=True):
            for other, another in zip(models, curves, strict=True):
                ax.plot(list(other.curve), [q[1] for q in another], color=INK, alpha=0.25, linewidth=0.7)
            low, middle, high = np.array(curve).T
            ax.fill_between(list(trained.curve), low, high, color=colour(trained.reg), alpha=0.25, linewidth=0)
            ax.plot(list(trained.curve), middle, color=colour(trained.reg), linewidth=1.8)
            ax.set_yscale("log")
        decades = np.log10(np.divide(*axes[0, column].get_ylim()[::-1]))
        axes[0, column].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 3)))
        axes[0, column].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes[0, column].yaxis.set_minor_locator(NullLocator())
        axes[0, column].set_title(title)
        axes[-1, column].set_xlabel("epochs")
    for ax, trained in zip(axes[:, 0], models, strict=True):
        ax.set_ylabel(label(trained.reg))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, (
        f"Range and kurtosis of all layers of {models[0].model} over pretraining, a row per regularizer: median (line) "
        "and quartiles (band) over the layers; thin lines are the medians of the others."
    )
