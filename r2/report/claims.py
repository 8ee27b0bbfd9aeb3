"""The paper's claims as comparisons over records, each with its effect, an interval over seeds and a verdict.

A comparison is a sum of terms, in points of top-1, taken within one (model, seed): the regularizers of a term are
averaged, and so are its columns. Models are averaged within a seed; the interval is Student's over the seeds.
"""

import math
from collections.abc import Iterable
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from scipy.stats import t as student

from r2.report.tables import FP32, Cells, Column, Protocol, measured, paper

CONFIDENCE = 0.95
TOLERANCE = 1.0  # points of top-1 that count as no loss, or as no difference


class Term(NamedTuple):
    sign: int
    regs: tuple[str, ...]
    columns: tuple[Column, ...]


class Claim(NamedTuple):
    """`kind`: the comparison is above 0; above -TOLERANCE; or within TOLERANCE of 0."""

    text: str
    source: str
    tables: tuple[str, ...]
    terms: tuple[Term, ...]
    kind: Literal["greater", "no loss", "no difference"] = "greater"


class Finding(NamedTuple):
    """What records say of a claim; `interval` is None with fewer than two seeds, `models` has each one's effect."""

    effect: float
    interval: tuple[float, float] | None
    seeds: int
    models: dict[str, float]
    verdict: Literal["holds", "does not hold", "undecided"]


R2 = ("linf", "margin", "smm")
_PTQ = {stage: (Column(stage, 4, 8),) for stage in ("none", "dfq", "adaround")}
_QAT2 = tuple(Column(stage, 2, 2) for stage in ("pact", "lsq", "ewgs"))
_EWGS2 = (Column("ewgs", 2, 2),)
_QAT4 = tuple(Column(stage, 4, 4) for stage in ("lsq", "ewgs"))
_DKM = {bits: (Column("dkm", bits, None, 1),) for bits in (1, 2, 4)}


def _over(better: tuple[str, ...], worse: tuple[str, ...], columns: tuple[Column, ...]) -> tuple[Term, ...]:
    return Term(1, better, columns), Term(-1, worse, columns)


# R2 of a table are the regularizers that the paper's table has.
CLAIMS = [
    Claim("R2 (L-inf, margin) beats L2 in 4-bit post-training quantization with nearest rounding",
          "4.2.1", ("2",), _over(R2[:2], ("l2",), _PTQ["none"])),
    Claim("R2 beats KURE with nearest rounding", "4.2.1", ("2",), _over(R2[:2], ("kure",), _PTQ["none"])),
    Claim("R2 beats 10x L2, which does not remove outliers, with nearest rounding", "4.2.1", ("2",),
          _over(R2[:2], ("l2_10x",), _PTQ["none"])),
    Claim("KURE beats L2 with nearest rounding", "4.2.1", ("2",), _over(("kure",), ("l2",), _PTQ["none"])),
    Claim("R2 beats L2 with DFQ", "4.2.1", ("2",), _over(R2[:2], ("l2",), _PTQ["dfq"])),
    Claim("R2 beats L2 with AdaRound", "4.2.1", ("2",), _over(R2[:2], ("l2",), _PTQ["adaround"])),
    Claim("Cross-layer equalization (DFQ) does not help models trained with KURE and R2", "4.2.1", ("2",),
          (Term(1, ("kure", *R2[:2]), _PTQ["none"]), Term(-1, ("kure", *R2[:2]), _PTQ["dfq"])), "no loss"),
    Claim("R2 (L-inf, margin) beats L2 in 2-bit EWGS of all layers", "4.2.2", ("3",),
          _over(R2[:2], ("l2",), _EWGS2)),
    Claim("R2 beats KURE in 2-bit EWGS of all layers", "4.2.2", ("3",), _over(R2[:2], ("kure",), _EWGS2)),
    Claim("R2 (all three) improves 2-bit training by PACT, LSQ and EWGS over L2", "4.2.2", ("4",),
          _over(R2, ("l2",), _QAT2)),
    Claim("R2 improves 2-bit training by LSQ over L2", "4.2.2", ("4",), _over(R2, ("l2",), (Column("lsq", 2, 2),))),
    Claim("R2 makes little difference in 4-bit training by LSQ and EWGS", "4.2.2", ("4",), _over(R2, ("l2",), _QAT4),
          "no difference"),
    Claim("Soft-min-max is not as good as L-inf and margin for quantization, at 2 bits", "4.2.2", ("4",),
          _over(R2[:2], ("smm",), _QAT2)),
    Claim("R2 improves DKM at 1 bit over L2", "4.3", ("5",), _over(R2, ("l2",), _DKM[1])),
    Claim("R2 improves DKM at 2 bits over L2", "4.3", ("5",), _over(R2, ("l2",), _DKM[2])),
    Claim("R2 makes no significant difference in DKM at 4 bits", "4.3", ("5",), _over(R2, ("l2",), _DKM[4]),
          "no difference"),
    Claim("Soft-min-max helps compression (DKM, 1 bit) more than 2-bit quantization, against L-inf and margin",
          "4.2.2", ("4", "5"),
          (*_over(("smm",), R2[:2], _DKM[1]), *_over(R2[:2], ("smm",), _QAT2))),
    Claim("Soft-min-max improves DKM over vectors, at 1 bit per weight", "4.3", ("6",),
          _over(("smm",), ("l2",), tuple(Column("dkm", b, None, b) for b in (2, 4)))),
    Claim("R2 (L-inf, margin) loses nothing in full precision", "5", ("2", "3"),
          _over(R2[:2], ("l2",), (FP32,)), "no loss"),
    Claim("10x L2 costs accuracy in full precision", "Table 2", ("2",), _over(("l2",), ("l2_10x",), (FP32,))),
]  # fmt: skip


def effect(claim: Claim, values: dict[tuple[str, Column], float]) -> float | None:
    """The comparison within one model and seed; None where a value is missing."""
    total = 0.0
    for term in claim.terms:
        needed = [(reg, column) for reg in term.regs for column in term.columns]
        if any(key not in values for key in needed):
            return None
        total += term.sign * sum(values[key] for key in needed) / len(needed)
    return total


def interval(effects: list[float]) -> tuple[float, float] | None:
    """Student's confidence interval of the mean; None with fewer than two values."""
    if len(effects) < 2:
        return None
    error = stdev(effects) / math.sqrt(len(effects))
    half = float(student.ppf((1 + CONFIDENCE) / 2, len(effects) - 1)) * error
    return fmean(effects) - half, fmean(effects) + half


def verdict(claim: Claim, found: tuple[float, float] | None) -> Literal["holds", "does not hold", "undecided"]:
    if found is None:
        return "undecided"
    low, high = found
    lowest = {"greater": 0.0, "no loss": -TOLERANCE, "no difference": -TOLERANCE}[claim.kind]
    highest = TOLERANCE if claim.kind == "no difference" else math.inf
    if low > lowest and high < highest:
        return "holds"
    return "does not hold" if high < lowest or low > highest else "undecided"


def judge(claim: Claim, cells: Cells) -> Finding | None:
    """The claim over measured cells, or None where they do not hold the comparison."""
    found_values: dict[str, dict[int, dict]] = {}
    for ((model, reg), column), by_seed in cells.items():
        for seed, top1 in by_seed.items():
            found_values.setdefault(model, {}).setdefault(seed, {})[reg, column] = top1
    effects: dict[int, dict[str, float]] = {}
    for model, seeds in found_values.items():
        for seed, values in seeds.items():
            found = effect(claim, values)
            if found is not None:
                effects.setdefault(seed, {})[model] = found
    models = {model for of_seed in effects.values() for model in of_seed}
    whole = [of_seed for of_seed in effects.values() if set(of_seed) == models]  # the same models in every seed
    if not whole:
        return None
    per_seed = [sum(of_seed.values()) / len(of_seed) for of_seed in whole]
    by_model = {model: sum(of_seed[model] for of_seed in whole) / len(whole) for model in sorted(models)}
    low_high = interval(per_seed)
    return Finding(sum(per_seed) / len(per_seed), low_high, len(per_seed), by_model, verdict(claim, low_high))


def of_paper(claim: Claim) -> float:
    """The comparison in the paper's own numbers, averaged over the models that hold it."""
    values: dict[str, dict] = {}
    for number in claim.tables:
        for ((model, reg), column), top1 in paper(number).items():
            values.setdefault(model, {})[reg, column] = top1
    effects = [found for found in (effect(claim, of_model) for of_model in values.values()) if found is not None]
    return sum(effects) / len(effects)


def findings(records: Iterable[dict]) -> dict[Protocol, list[tuple[Claim, Finding]]]:
    """For each protocol, the claims that its records can be asked about."""
    found = {}
    for key, cells in measured(records).items():
        judged = [(claim, judge(claim, cells)) for claim in CLAIMS]
        if kept := [(claim, finding) for claim, finding in judged if finding is not None]:
            found[key] = kept
    return found


def rows(found: list[tuple[Claim, Finding]]) -> list[list[str]]:
    """Header and one row per claim, as text."""
    header = ["Claim", "Paper's section", "Paper's effect", "Effect", f"{CONFIDENCE:.0%} interval", "Seeds", "By model",
              "Verdict"]  # fmt: skip
    table = [header]
    for claim, finding in found:
        low_high = f"{finding.interval[0]:+.2f} to {finding.interval[1]:+.2f}" if finding.interval else "-"
        table.append([claim.text, claim.source, f"{of_paper(claim):+.2f}", f"{finding.effect:+.2f}", low_high,
                      str(finding.seeds), ", ".join(f"{m} {e:+.2f}" for m, e in finding.models.items()),
                      finding.verdict])  # fmt: skip
    return table


def markdown(records: Iterable[dict]) -> str:
    parts = [
        "# The paper's claims\n\nEffects are points of top-1: the first against the second, averaged over the models "
        "within a seed; the interval is\nStudent's over seeds. A claim *holds* or *does not hold* when the whole "
        f"interval says so ({TOLERANCE:g} point counts as no loss\nand as no difference), else it is *undecided*. "
        "The paper gives one number per cell, so its effects have no interval.\n"
    ]
    for key, found in findings(records).items():
        table = rows(found)
        lines = [f"| {' | '.join(row)} |\n" for row in table]
        parts.append(f"## {key.label}\n\n{lines[0]}|{'---|' * len(table[0])}\n{''.join(lines[1:])}")
    return "\n".join(parts)
