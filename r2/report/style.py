"""The style of all figures: one colour, label and position for each regularizer."""

from collections.abc import Iterable

from r2.report.tables import REGULARIZERS

INK = "#444444"  # text, axes and L2: a page that shows an SVG puts its own text colour in its place
OUTLIER = "#E0202B"
# Okabe and Ito's colours, which colour-blind readers tell apart; margin has the red of the paper's Fig. 1.
COLOURS = {
    "l2": INK,
    "l2_10x": "#CC79A7",
    "kure": "#E69F00",
    "linf": "#009E73",
    "margin": "#D55E00",
    "smm": "#0072B2",
}


def colour(reg: str) -> str:
    """The same in every figure; a regularizer that the paper does not have is grey."""
    return COLOURS.get(reg, "#8C8C8C")


def label(reg: str) -> str:
    return REGULARIZERS.get(reg, reg)


def ordered(regs: Iterable[str]) -> list[str]:
    """In the order of the tables; others last."""
    known = list(REGULARIZERS)
    return sorted(regs, key=lambda reg: (known.index(reg) if reg in known else len(known), reg))
