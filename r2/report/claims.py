"""The paper's claims as comparisons over records, each with its effect, an interval over seeds and a verdict.

A comparison is a sum of terms: the regularizers of a term are averaged, and so are its columns. Seeds are replicates,
not blocks, so regularizers are compared as independent samples within a model (`r2.report.statistics`), and models
are averaged. Columns that share one pretraining are not independent: a seed counts with the sum of its columns.
"""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from r2.record import Record
from r2.report.statistics import Estimate, Sample, contrast, holm, seeds_to_decide
from r2.report.tables import (
    FP32,
    OUTCOMES,
    Cells,
    Column,
    Outcome,
    Protocol,
    main_study,
    markdown_grid,
    measured,
    paper,
    with_weight,
)

ALPHA = 0.05
_ORDER = ("does not hold", "holds", "undecided")
TOLERANCE = 1.0  # points of top-1 that count as no loss, or as no difference


class Term(NamedTuple):
    sign: int
    regs: tuple[str, ...]
    columns: tuple[Column, ...]


class Claim(NamedTuple):
    """`low` and `high`: the claim holds if the comparison is between them; `models`: how their names begin."""

    text: str
    source: str
    tables: tuple[str, ...]
    terms: tuple[Term, ...]
    low: float = 0.0
    high: float = math.inf
    outcome: Outcome = "top1"
    models: tuple[str, ...] = ("",)


class Finding(NamedTuple):
    """What records say of a claim.

    Attributes:
        models: each model's comparison; `pooled` is their mean.
        seeds: of the regularizer with the fewest.
        p: adjusted over the claims of one study by Holm's procedure.
        needed: about how many seeds would decide an undecided claim; None if it is decided, or above 1000.
    """

    pooled: Estimate
    models: dict[str, Estimate]
    seeds: int
    p: float
    verdict: Literal["holds", "does not hold", "undecided"]
    needed: int | None

    @property
    def effect(self) -> float:
        return self.pooled.mean

    @property
    def interval(self) -> tuple[float, float] | None:
        return self.pooled.interval(1 - ALPHA)


R2 = ("linf", "margin", "smm")
_PTQ = {stage: (Column(stage, 4, 8),) for stage in ("none", "dfq", "adaround")}
_AIMET = (Column("none", 4, 8, folding="aimet"),)
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
    Claim("R2 beats 10x L2 with nearest rounding", "4.2.1", ("2",),
          _over(R2[:2], ("l2_10x",), _PTQ["none"])),
    Claim("KURE beats L2 with nearest rounding", "4.2.1", ("2",), _over(("kure",), ("l2",), _PTQ["none"])),
    Claim("R2 beats L2 with DFQ", "4.2.1", ("2",), _over(R2[:2], ("l2",), _PTQ["dfq"])),
    Claim("R2 beats L2 with AdaRound", "4.2.1", ("2",), _over(R2[:2], ("l2",), _PTQ["adaround"])),
    Claim("Cross-layer equalization (DFQ) does not help models trained with KURE and R2", "4.2.1", ("2",),
          (Term(1, ("kure", *R2[:2]), _PTQ["none"]), Term(-1, ("kure", *R2[:2]), _PTQ["dfq"])), low=-TOLERANCE),
    Claim("R2 (L-inf, margin) beats L2 in 2-bit EWGS of all layers", "4.2.2", ("3",),
          _over(R2[:2], ("l2",), _EWGS2)),
    Claim("R2 beats KURE in 2-bit EWGS of all layers", "4.2.2", ("3",), _over(R2[:2], ("kure",), _EWGS2)),
    Claim("R2 (all three) improves 2-bit training by PACT, LSQ and EWGS over L2", "4.2.2", ("4",),
          _over(R2, ("l2",), _QAT2)),
    Claim("R2 improves 2-bit training by LSQ over L2", "4.2.2", ("4",), _over(R2, ("l2",), (Column("lsq", 2, 2),))),
    Claim("R2 makes little difference in 4-bit training by LSQ and EWGS", "4.2.2", ("4",), _over(R2, ("l2",), _QAT4),
          low=-TOLERANCE, high=TOLERANCE),
    Claim("Soft-min-max is not as good as L-inf and margin for quantization, at 2 bits", "4.2.2", ("4",),
          _over(R2[:2], ("smm",), _QAT2)),
    Claim("R2 improves DKM at 1 bit over L2", "4.3", ("5",), _over(R2, ("l2",), _DKM[1])),
    Claim("R2 improves DKM at 2 bits over L2", "4.3", ("5",), _over(R2, ("l2",), _DKM[2])),
    Claim("R2 makes no significant difference in DKM at 4 bits", "4.3", ("5",), _over(R2, ("l2",), _DKM[4]),
          low=-TOLERANCE, high=TOLERANCE),
    Claim("Soft-min-max helps compression (DKM, 1 bit) more than 2-bit quantization, against L-inf and margin",
          "4.2.2", ("4", "5"), (*_over(("smm",), R2[:2], _DKM[1]), *_over(R2[:2], ("smm",), _QAT2))),
    Claim("Soft-min-max improves DKM over vectors, at 1 bit per weight", "4.3", ("6",),
          _over(("smm",), ("l2",), tuple(Column("dkm", b, None, b) for b in (2, 4)))),
    Claim("R2 (L-inf, margin) loses nothing in full precision", "5", ("2", "3"),
          _over(R2[:2], ("l2",), (FP32,)), low=-TOLERANCE),
    Claim("R2 raises ResNet-18's accuracy in full precision over L2", "Table 4", ("4",), _over(R2, ("l2",), (FP32,)),
          models=("rn18", "resnet18")),
    Claim("10x L2 costs accuracy in full precision", "Table 2", ("2",), _over(("l2",), ("l2_10x",), (FP32,))),
    Claim("Quantizing the first and the last layer too costs accuracy in 2-bit EWGS under L2", "Table 1", ("1",),
          (Term(1, ("l2",), (Column("ewgs", 2, 2, quantized_layers="excl_first_last"),)), Term(-1, ("l2",), _EWGS2)),
          models=("mbv1",)),
    Claim("R2 (L-inf, margin) narrows the weights: a lower crest than L2's", "Fig. 2", (),
          _over(("l2",), R2[:2], (FP32,)), outcome="crest"),
    Claim("KURE lowers the crest of the weights", "Fig. 2", (), _over(("l2",), ("kure",), (FP32,)), outcome="crest"),
    Claim("10x L2, which removes no outliers, keeps the crest within 10 % of L2's", "4.1", (),
          _over(("l2_10x",), ("l2",), (FP32,)), low=-0.1, high=0.1, outcome="crest"),
]  # fmt: skip
# Not the paper's: what this project asks of the same runs.
OWN = [
    Claim("R2 (L-inf, margin) raises the SQNR of 4-bit nearest rounding over L2", "", (),
          _over(R2[:2], ("l2",), _PTQ["none"]), outcome="sqnr"),
    Claim("R2 raises the SQNR of 4-bit nearest rounding over KURE", "", (),
          _over(R2[:2], ("kure",), _PTQ["none"]), outcome="sqnr"),
    Claim("Folding channels that do not vary to constants helps nearest rounding (L2, L-inf, margin)", "", (),
          (Term(1, ("l2", *R2[:2]), _PTQ["none"]), Term(-1, ("l2", *R2[:2]), _AIMET))),
]  # fmt: skip


def coefficients(claim: Claim) -> dict[str, dict[Column, float]]:
    """The comparison as a sum over regularizers and columns."""
    found: dict[str, dict[Column, float]] = {}
    for term in claim.terms:
        for reg in term.regs:
            for column in term.columns:
                of_reg = found.setdefault(reg, {})
                of_reg[column] = of_reg.get(column, 0.0) + term.sign / (len(term.regs) * len(term.columns))
    return found


def samples(claim: Claim, cells: Cells) -> dict[str, list[Sample]]:
    """Each model's independent samples, one per regularizer; only models that have all of them."""
    wanted, found = coefficients(claim), {}
    for model in sorted({row[0] for row, _ in cells if row[0].startswith(claim.models)}):
        of_model: list[Sample] = []
        for reg, factors in wanted.items():
            by_column = [cells.get(((model, reg), column), {}) for column in factors]
            seeds = sorted(set.intersection(*map(set, by_column)))
            sums = zip(*([factor * of[seed] for seed in seeds] for factor, of in
                         zip(factors.values(), by_column, strict=True)), strict=True)  # fmt: skip
            of_model.append((1.0, [sum(parts) for parts in sums]))
        if all(values for _, values in of_model):
            found[model] = of_model
    return found


def judge(claim: Claim, cells: Cells) -> Finding | None:
    """The claim alone over measured cells, or None if they do not contain the comparison."""
    found = _compared(claim, cells, 1)
    return found and _decided(claim, found)


def judge_all(cells: dict[Outcome, Cells], asked: Iterable[Claim]) -> list[tuple[Claim, Finding]]:
    """The claims that a study can be asked, with p values adjusted over them: what contradicts the paper first, what is
    undecided last."""
    askable = [claim for claim in asked if samples(claim, cells[claim.outcome])]
    alone = [(claim, _compared(claim, cells[claim.outcome], len(askable))) for claim in askable]
    found = [(claim, finding) for claim, finding in alone if finding is not None]
    adjusted = holm([finding.p for _, finding in found])
    judged = [(claim, _decided(claim, one._replace(p=p))) for (claim, one), p in zip(found, adjusted, strict=True)]
    return sorted(judged, key=lambda one: _ORDER.index(one[1].verdict))


def _compared(claim: Claim, cells: Cells, claims: int) -> Finding | None:
    """Not judged yet; `claims` of the study, for how many seeds would decide it."""
    of_models = samples(claim, cells)
    if not of_models:
        return None
    share = 1 / len(of_models)
    pooled = contrast([(share * factor, values) for of in of_models.values() for factor, values in of])
    models = {model: contrast(of) for model, of in of_models.items()}
    seeds = min(len(values) for of in of_models.values() for _, values in of)
    bound = min(claim.low, claim.high, key=lambda bound: abs(pooled.mean - bound))
    needed = seeds_to_decide(pooled, seeds, abs(pooled.mean - bound), ALPHA / claims)
    return Finding(pooled, models, seeds, pooled.p_value(bound), "undecided", needed)


def _decided(claim: Claim, found: Finding) -> Finding:
    if found.p >= ALPHA:
        return found
    holds = claim.low < found.effect < claim.high
    return found._replace(verdict="holds" if holds else "does not hold", needed=None)


def of_paper(claim: Claim) -> float | None:
    """The comparison in the paper's own numbers, averaged over the models that hold it; None if it prints none."""
    values: dict = {}
    for number in claim.tables:
        for (row, column), top1 in paper(number).items():
            values[row, column] = {0: top1}
    found = judge(claim, values)
    return found.effect if found else None


def findings(records: Iterable[Record]) -> dict[Protocol, dict[str, list[tuple[Claim, Finding]]]]:
    """For each protocol the claims that its records can be asked about: with the regularizers' own weights, under '',
    and for each other weight of R2 those that compare it, under that weight."""
    listed = list(records)
    by_outcome = {outcome: measured(listed, outcome) for outcome in OUTCOMES}
    found: dict[Protocol, dict[str, list[tuple[Claim, Finding]]]] = {}
    for key in by_outcome["top1"]:
        cells = {outcome: by_outcome[outcome].get(key, {}) for outcome in OUTCOMES}
        weights = sorted({row[1].partition(" ")[2] for row, _ in cells["top1"]} - {""}, key=float)
        of_study = {"": judge_all(cells, [*CLAIMS, *OWN])}
        for weight in weights:
            reweighted = {outcome: with_weight(of, R2, weight) for outcome, of in cells.items()}
            comparing = [c for c in CLAIMS + OWN if set(coefficients(c)) & set(R2) and set(coefficients(c)) - set(R2)]
            of_study[weight] = judge_all(reweighted, comparing)
        if kept := {weight: judged for weight, judged in of_study.items() if judged}:
            found[key] = kept
    return found


UNITS: dict[Outcome, str] = {"top1": "", "sqnr": " dB", "crest": " in log"}
HEADER = ["Claim", "Paper's section", "Paper's effect", "Holds if", "Effect", f"{1 - ALPHA:.0%} interval", "p (Holm)",
          "Seeds", "By model", "Verdict"]  # fmt: skip


def rows(found: list[tuple[Claim, Finding]]) -> list[list[str]]:
    """Header and one row per claim, as text; by model only where there are several."""
    table = [HEADER, *[_row(claim, finding) for claim, finding in found]]
    if any(len(finding.models) > 1 for _, finding in found):
        return table
    column = HEADER.index("By model")
    return [[*row[:column], *row[column + 1 :]] for row in table]


def _row(claim: Claim, finding: Finding) -> list[str]:
    paper_effect, unit = of_paper(claim), UNITS[claim.outcome]
    low_high = f"{finding.interval[0]:+.2f} to {finding.interval[1]:+.2f}" if finding.interval else "-"
    models = ", ".join(f"{model} {estimate.mean:+.2f}" for model, estimate in finding.models.items())
    return [claim.text, claim.source or "ours", "-" if paper_effect is None else f"{paper_effect:+.2f}", asked(claim),
            f"{finding.effect:+.2f}{unit}", low_high, f"{finding.p:.3f}" if finding.p >= 0.001 else "< 0.001",
            str(finding.seeds), models, verdict_text(finding)]  # fmt: skip


def asked(claim: Claim) -> str:
    """The effects with which the claim holds."""
    return f"above {claim.low:g}" if claim.high == math.inf else f"{claim.low:+g} to {claim.high:+g}"


def verdict_text(finding: Finding) -> str:
    if finding.verdict != "undecided":
        return finding.verdict
    return "undecided" + (f" (about {finding.needed} seeds would decide)" if finding.needed else "")


def heading(key: Protocol, weight: str) -> str:
    return key.label + (f"; R2 with a weight of {weight}" if weight else "")


_DEFINITIONS = f"""# The paper's claims

- **Effect**: a difference between regularizers or stages, positive in the direction that the claim names; where it
  names none, the first minus the second. It is in points of top-1; in dB of the SQNR of the weights rounded to 4 bits,
  averaged over layers; or, "in log", in the mean over layers of log(max|w| / std), the crest. Models are averaged.
- **R2**: the mean over the regularizers of the paper's table, L-inf and margin, for PACT, LSQ and DKM also
  soft-min-max, unless the claim names them.
- **Paper's effect**: over the paper's networks. It gives one number per cell, so there is no interval. *Ours* are
  claims that this project added.
- **Interval**: Welch's, with Satterthwaite's degrees of freedom. Regularizers are independent samples over seeds. It is
  not adjusted for the number of claims, so it may exclude zero beside an undecided claim.
- **p**: of the difference between the effect and the nearest bound of *holds if*, adjusted by Holm's method over the
  claims of one table.
- **Verdict**: where p is below {ALPHA:g}, *holds* if the effect is within *holds if*, else *does not hold*. The number
  of seeds that would decide a claim assumes this effect and this spread, at {ALPHA:g} divided by the number of claims.
- **Seeds**: of the regularizer with the fewest. A comparison of two stages takes the seeds that have both.

[report.html](report.html) has the command of every run, `tables.csv` in each data set's folder top-1 by seed, and
`records/` everything by run. The claims and their statistics are in `r2/report/claims.py` and `statistics.py`.
"""


def markdown(records: Iterable[Record]) -> str:
    parts = [_DEFINITIONS]
    listed = list(records)
    main, of_studies = main_study(listed), findings(listed)
    for key in sorted(of_studies, key=lambda key: key != main):
        for weight, found in of_studies[key].items():
            table = rows(found)
            title = ("" if key == main else "Appendix: ") + heading(key, weight)
            parts.append(f"## {title}\n\n{markdown_grid(table)}")
    return "\n".join(parts)
