"""How BatchNorm folding changes a layer's range, and the effect on rounding its weights to a per-tensor grid.

Folding multiplies each output channel by gamma / sqrt(variance + eps). A channel whose input is always zero has no
variance, so its scale is gamma / sqrt(eps), hundreds of times the others', whatever a regularizer did to the weights.
Runs with stage.fold_constant, which sets such a channel to its constant, are excluded.
"""

import csv
import io
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from r2 import store
from r2.config import build
from r2.record import Record
from r2.report.style import INK, colour, label, ordered
from r2.report.tables import Column, column

NAMES = ("sha256", "layer", "trained", "folded", "variance")
ROUNDED = Column("none", 4, 8)


def spreads(model: nn.Module) -> dict[str, tuple[float, float, float]]:
    """Per convolution with a BatchNorm: the largest channel's largest |w| over the median channel's, as trained and
    folded, and the running variance of the channel that is largest when folded.
    """
    found, last = {}, ("", torch.empty(0))
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and len(last[1]) == module.num_features:  # not one before its convolution
            assert module.running_var is not None
            sizes = last[1]
            folded = sizes * (module.weight / torch.sqrt(module.running_var + module.eps)).abs()
            found[last[0]] = _over_median(sizes), _over_median(folded), module.running_var[folded.argmax()].item()
        elif isinstance(module, nn.Conv2d):
            last = name, module.weight.flatten(1).abs().amax(1)
    return found


def _over_median(sizes: Tensor) -> float:
    return (sizes.max() / sizes.median().clamp(min=1e-12)).item()


@torch.no_grad()
def collect(pretrained: Path, into: Path, records: list[Record]) -> None:
    """Write into/folding.csv: the most uneven folded layer of each pretraining that `records` were made from."""
    configs = {r["sha256"]["pretrained"]: r["config"] for r in records if r["sha256"]["pretrained"]}
    rows = {}
    for directory in sorted(path.parent for path in pretrained.glob("*/model.pt")):
        state = store.load(directory / "model.pt", "model", "info")
        sha256 = state["info"]["sha256"]
        if sha256 not in configs or not any(w.ndim == 4 for w in state["model"].values()):
            continue  # another recipe's, or a network without a convolution
        last = [w for w in state["model"].values() if w.ndim in (2, 4)][-1]  # SqueezeNet ends in a convolution
        model = build(configs[sha256]["model"], num_classes=len(last))
        model.load_state_dict(state["model"])
        if not (found := spreads(model)):
            continue  # without BatchNorm
        name, values = max(found.items(), key=lambda item: item[1][1])
        rows[sha256] = dict(zip(NAMES, (sha256, name, *(f"{v:.4g}" for v in values)), strict=True))
    path = into / "folding.csv"
    kept = {row["sha256"]: row for row in csv.DictReader(path.read_text().splitlines())} if path.exists() else {}
    rows = {sha256: row for sha256, row in (kept | rows).items() if sha256 in configs}
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, NAMES, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[sha256] for sha256 in sorted(rows))
        store.write(store.make_directory(into) / "folding.csv", text.getvalue().encode())


def folding_rows(records: list[Record], weights: Path) -> list[list[Any]]:
    """[model, reg, folded spread, top1] of every run with nearest rounding and AIMET's own folding whose pretraining
    is in folding.csv.
    """
    path = weights / "folding.csv"
    lines = path.read_text().splitlines() if path.exists() else []
    known = {row["sha256"]: float(row["folded"]) for row in csv.DictReader(lines)}
    aimets = (
        r
        for r in records
        if column(r)._replace(folding=None) == ROUNDED and (r.get("details") or {}).get("constant_channels") is None
    )
    return sorted([r["axes"]["model"], r["axes"]["reg"], known[r["sha256"]["pretrained"]], r["metrics"]["top1"]]
                  for r in aimets if r["sha256"]["pretrained"] in known)  # fmt: skip


def accuracy_folding(rows: list[list[Any]]) -> tuple[Figure, str]:
    """Accuracy of nearest rounding against the most uneven folded layer, a mark per pretraining."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    ax = figure.subplots()
    ax.set_xscale("log")
    models = sorted({row[0] for row in rows})
    for model, reg, spread, top1 in rows:
        marker = "osD^"[models.index(model) % 4]
        ax.plot(spread, top1, marker, color=colour(reg), fillstyle="none", markersize=6, markeredgewidth=1.4)
    ax.grid(alpha=0.2, linewidth=0.6)
    ax.set(xlabel="largest over median channel after folding",
           ylabel="top-1 in %, nearest rounding, W4A8")  # fmt: skip
    for reg in ordered({row[1] for row in rows}):
        ax.plot([], [], color=colour(reg), linewidth=3, label=label(reg))
    for i, model in enumerate(models):
        ax.plot([], [], "osD^"[i % 4], color=INK, fillstyle="none", label=model)
    figure.legend(loc="outside upper center", ncols=4, handlelength=1.2, columnspacing=1.2)
    return figure, (
        "Why nearest rounding fails with stage.fold_constant=false: BatchNorm folding multiplies a dead channel "
        "(variance 0) by gamma / sqrt(eps), it alone then sets the range of a per-tensor grid, and the other channels "
        "of its layer round to zero. One mark per pretraining, at its most uneven layer."
    )
