"""The plot of a run: the weights of one layer of its float model; for a sweep, one plot per regularizer.

That model is the pretrained one, or the trained one of a run that began from scratch.
"""

import hashlib
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from r2 import console, store
from r2.identity import of_pretraining
from r2.record import Record
from r2.report.style import colour, label


def _kind(record: Record) -> str:
    """Which of the record's models is drawn."""
    return "pretrained" if record["fp32"] else "final"


def widest(record: Record) -> str:
    """The layer whose range is the largest multiple of its standard deviation."""
    layers = {name: w for name, w in record["weights"][_kind(record)].items() if w["std"]}
    return max(layers, key=lambda name: layers[name]["range"] / layers[name]["std"])


def weights(record: Record, layer: str) -> np.ndarray | None:
    """A layer's weights; None if the checkpoint is gone.

    Raises:
        UserError: the checkpoint is damaged.
    """
    config = {**record["config"], "choices": record["choices"]}
    folder = of_pretraining(config).directory if record["fp32"] else Path(config["out"], record["name"])
    if not (folder / "model.pt").exists():
        return None
    return store.load(folder / "model.pt", "model")["model"][layer].float().numpy().ravel()


def _setting(record: Record) -> tuple[str, ...]:
    """The regularizer and what was changed of it."""
    return record["axes"]["reg"], *(word for word in record["overrides"] if word.startswith("reg."))


def write(records: list[Record], path: Path) -> bool:
    """Draw the first record's widest layer, a histogram for each regularizer; False where there is nothing to draw."""
    first, layer = records[0], widest(records[0])
    alike = [r for r in records if (r["axes"]["model"], _kind(r)) == (first["axes"]["model"], _kind(first))]
    of_reg = {_setting(record): record for record in reversed(alike)}
    shown = {reg: w for reg, record in reversed(of_reg.items()) if (w := weights(record, layer)) is not None}
    if not shown:
        return False
    figure = Figure(figsize=(5.2, 1.0 + 1.4 * len(shown)), layout="constrained")
    limit = max(np.abs(w).max() for w in shown.values())
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False).ravel()
    for ax, (reg, w) in zip(axes, shown.items(), strict=True):
        found = of_reg[reg]["weights"][_kind(first)][layer]
        name, *settings = reg
        ax.hist(w, bins=np.linspace(-limit, limit, 81), color=colour(name))
        ax.set_title(
            f"{' '.join([label(name), *settings])}: range {found['range']:.2f}, kurtosis {found['kurtosis']:.1f}",
            loc="left",
        )
        ax.set(yticks=[], xlim=(-1.02 * limit, 1.02 * limit))
        ax.spines[["left", "top", "right"]].set_visible(False)
    training = "pretraining" if first["fp32"] else f"{first['axes']['stage']} from scratch"
    axes[-1].set_xlabel(f"weights of {layer.removesuffix('.weight')}, {first['axes']['model']}, after {training}")
    figure.savefig(path, dpi=150)
    return True


def beside(records: list[Record], path: Path) -> None:
    """`write`, unless it has been; no run fails for its picture."""
    try:
        if path.exists() or write(records, path):
            console.say(f"weights of one layer: {path}")
    except Exception as error:  # of matplotlib, of the disk, of a checkpoint that another process replaces
        console.say(f"{path}: not drawn ({type(error).__name__}: {error})")


def compare(records: list[Record]) -> None:
    """The end of a sweep: a table of its runs, and one layer under each of their regularizers."""
    console.comparison(records)
    if len({record["axes"]["reg"] for record in records}) > 1:
        runs = hashlib.sha256(" ".join(sorted(record["name"] for record in records)).encode()).hexdigest()[:8]
        path = Path(records[0]["config"]["out"]) / f"weights-{runs}.png"  # another sweep keeps its own
        path.unlink(missing_ok=True)  # of the same one, before some run was repeated
        beside(records, path)
