"""The statistics behind the verdicts, against scipy and against constructed studies."""

import math
import random

import pytest
from scipy import stats
from test_tables import record

from r2.report import claims, tables, verdicts
from r2.report.claims import CLAIMS, OWN, Claim, Term
from r2.report.statistics import Estimate, contrast, holm, seeds_to_decide
from r2.report.tables import FP32, Column

NONE = Column("none", 4, 8)
NONE_CLAIM = CLAIMS[0]  # L-inf and margin against L2


def none(reg, seed, top1, model="mbv1-0.25", **more):
    return record(reg=reg, seed=seed, top1=top1, model=model, column=NONE, **more)


def cells_of(records, outcome="top1"):
    (cells,) = tables.measured(records, outcome).values()
    return cells


def judged(*values):
    """`values`: per seed, the top-1 of l2, L-inf and margin."""
    regs = ("l2", "linf", "margin")
    records = [none(reg, seed, v) for seed, of in enumerate(values) for reg, v in zip(regs, of, strict=True)]
    return claims.judge(NONE_CLAIM, cells_of(records))


def test_the_interval_and_p_are_welchs():
    a, b = [50.1, 56.3, 45.5, 48.7], [69.8, 66.9, 70.5]
    ours = contrast([(1.0, b), (-1.0, a)])
    scipys = stats.ttest_ind(b, a, equal_var=False)
    low, high = scipys.confidence_interval(0.95)
    assert ours.interval(0.95) == pytest.approx((low, high)) and ours.freedom == pytest.approx(scipys.df)
    assert ours.p_value(0.0) == pytest.approx(scipys.pvalue)


def test_holm_is_the_step_down_procedure():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_a_study_without_effects_decides_almost_nothing():
    """Family-wise error: over 300 studies of 12 claims each, Holm's share of studies with a decision stays near 5 %."""
    draw, wrong = random.Random(0), 0
    for _ in range(300):
        pairs = [[[draw.gauss(50, 5) for _ in range(6)] for _ in range(2)] for _ in range(12)]
        adjusted = holm([contrast([(1.0, a), (-1.0, b)]).p_value(0.0) for a, b in pairs])
        wrong += min(adjusted) < 0.05
    assert 0.01 <= wrong / 300 <= 0.09


def test_the_seeds_that_would_decide_do_decide():
    draw = random.Random(1)

    def study(seeds):
        better, worse = ([draw.gauss(mean, 5) for _ in range(seeds)] for mean in (53, 50))
        return contrast([(1.0, better), (-1.0, worse)])

    as_four_seeds_show_it = Estimate(3.0, 5 * math.sqrt(2 / 4), 6.0)
    needed = seeds_to_decide(as_four_seeds_show_it, 4, 3.0, 0.05)
    decided = sum(study(needed).p_value(0.0) < 0.05 for _ in range(400)) / 400
    assert 20 <= needed <= 28 and 0.4 <= decided <= 0.65  # half of the studies of just that size


def test_a_claim_holds_when_the_interval_says_so():
    clear = judged((10, 30, 34), (12, 33, 35), (11, 31, 35))
    assert clear.effect == pytest.approx((22 + 22 + 22) / 3) and clear.verdict == "holds" and clear.seeds == 3
    assert judged((40, 30, 34), (42, 33, 35), (41, 31, 35)).verdict == "does not hold"
    undecided = judged((10, 9, 8), (10, 50, 60), (10, 12, 9))
    assert undecided.verdict == "undecided" and undecided.needed > 3
    assert judged((10, 30, 34)).verdict == "undecided"  # one seed has no interval


def test_regularizers_are_independent_samples():
    """Seeds in another order change nothing, as they would if a seed were a block."""
    values = [(10, 30, 34), (20, 25, 44), (15, 60, 39)]
    shuffled = [(10, 25, 39), (20, 60, 34), (15, 30, 44)]
    assert judged(*values).pooled == pytest.approx(judged(*shuffled).pooled)


def test_columns_of_one_pretraining_stay_together():
    """DFQ minus nearest rounding of the same networks: what the networks share cancels."""
    claim = Claim("", "", (), (Term(1, ("kure",), (Column("dfq", 4, 8),)), Term(-1, ("kure",), (NONE,))))
    records = [none("kure", seed, base) for seed, base in enumerate((10, 50, 80))]
    records += [record(reg="kure", seed=seed, top1=base + 5 + seed / 10, column=Column("dfq", 4, 8))
                for seed, base in enumerate((10, 50, 80))]  # fmt: skip
    found = claims.judge(claim, cells_of(records))
    assert found.effect == pytest.approx(5.1) and found.verdict == "holds"


def test_no_loss_and_no_difference_allow_a_point():
    no_loss = next(c for c in CLAIMS if (c.low, c.high) == (-1.0, math.inf))
    same = next(c for c in CLAIMS if (c.low, c.high) == (-1.0, 1.0))
    sure, unsure = 0.05, 2.0  # standard errors

    def verdict(claim, mean, error):
        estimate = contrast([(1.0, [mean - error, mean + error])])._replace(error=error, freedom=30.0)
        bound = min(claim.low, claim.high, key=lambda bound: abs(mean - bound))
        raw = claims.Finding(estimate, {}, 2, estimate.p_value(bound), "undecided", None)
        return claims._decided(claim, raw).verdict

    for mean, error, loss, difference in [
        (0.5, sure, "holds", "holds"),
        (-0.5, sure, "holds", "holds"),
        (-2.0, sure, "does not hold", "does not hold"),
        (2.0, sure, "holds", "does not hold"),
        (0.0, unsure, "undecided", "undecided"),
    ]:
        assert (verdict(no_loss, mean, error), verdict(same, mean, error)) == (loss, difference)


def test_models_are_averaged_and_a_model_that_lacks_a_regularizer_is_left_out():
    values = {"l2": 10, "linf": 20, "margin": 30}
    records = [none(reg, seed, top1 + seed, model) for model in ("mbv1-0.25", "mbv2-0.25") for seed in (0, 1)
               for reg, top1 in values.items()]  # fmt: skip
    records += [none("l2", seed, 90, "rn18-0.25") for seed in (0, 1)]
    found = claims.judge(NONE_CLAIM, cells_of(records))
    assert {model: estimate.mean for model, estimate in found.models.items()} == {"mbv1-0.25": 15, "mbv2-0.25": 15}
    assert found.seeds == 2 and found.effect == 15


def test_another_weight_of_the_regularizer_is_a_row_and_a_table_of_claims():
    records = [none(reg, seed, top1 + seed) for reg, top1 in {"l2": 10, "linf": 20, "margin": 30}.items()
               for seed in (0, 1, 2)]  # fmt: skip
    records += [none(reg, seed, 60 + seed, command="reg.weight=0.1") for reg in ("linf", "margin") for seed in (0, 1)]
    (found,) = claims.findings(records).values()
    assert found[""][0][1].effect == pytest.approx(15) and found["0.1"][0][1].effect == pytest.approx(49.5)
    text = tables.markdown(records)
    assert "| mbv1-0.25 | L-inf, weight 0.1 |" in text and "| mbv1-0.25 | L-inf |" in text


def test_rounding_also_counts_in_db_and_weights_in_crest():
    def of(reg, seed, db, ratio):
        layers = {"a": {"max_abs": ratio, "std": 1.0}, "b": {"max_abs": ratio, "std": 1.0}}
        return {**none(reg, seed, 10.0), "details": {"weight_sqnr_db": {"a": db, "b": db + 2, "c": None}},
                "weights": {"pretrained": layers}}  # fmt: skip

    records = [of("l2", seed, 17.0 + seed / 10, math.e**2) for seed in (0, 1)]
    records += [of(reg, seed, 20.0 + seed / 10, math.e) for reg in ("linf", "margin") for seed in (0, 1)]
    sqnr, crest = cells_of(records, "sqnr"), cells_of(records, "crest")
    assert sqnr[("mbv1-0.25", "l2"), NONE] == {0: 18.0, 1: 18.1}
    assert crest[("mbv1-0.25", "l2"), FP32][0] == pytest.approx(2.0)
    judged = claims.judge_all({"top1": {}, "sqnr": sqnr, "crest": crest}, [*CLAIMS, *OWN])
    found = {claim.text: finding for claim, finding in judged}
    assert found[OWN[0].text].effect == pytest.approx(3.0) and found[OWN[0].text].verdict == "holds"


def test_aimets_folding_is_a_column_of_its_own():
    records = [none("l2", seed, top1, command=command) for seed in (0, 1)
               for top1, command in ((60 + seed, ""), (10 + seed, "stage.fold_constant=false"))]  # fmt: skip
    cells = cells_of(records)
    assert cells[("mbv1-0.25", "l2"), NONE] == {0: 60, 1: 61}
    assert cells[("mbv1-0.25", "l2"), NONE._replace(folding="aimet")] == {0: 10, 1: 11}


def test_what_contradicts_the_paper_comes_first_and_what_is_undecided_last():
    values = {
        "l2": (60, 61, 62),
        "kure": (10, 11, 12),
        "linf": (80, 20, 50),
        "margin": (80, 20, 50),
        "l2_10x": (0, 1, 2),
    }
    records = [none(reg, seed, top1) for reg, of_reg in values.items() for seed, top1 in enumerate(of_reg)]
    (found,) = claims.findings(records).values()
    told = [finding.verdict for _, finding in found[""]]
    assert len(set(told)) > 1
    assert told == sorted(told, key=["does not hold", "holds", "undecided"].index)


def test_every_claim_of_a_table_can_be_asked_of_the_paper():
    effects = {claim.text: claims.of_paper(claim) for claim in CLAIMS if claim.tables}
    assert None not in effects.values()
    r2, l2 = (13.30 + 27.72 + 61.73 + 61.66 + 13.08 + 31.11 + 59.95 + 60.03) / 8, (0.41 + 2.67 + 0.73 + 2.57) / 4
    assert effects[NONE_CLAIM.text] == pytest.approx(r2 - l2)
    assert all(claims.of_paper(claim) is None for claim in OWN)


def test_the_drawing_of_the_claims_shows_every_comparison_once():
    records = [none(reg, seed, top1 + seed) for reg, top1 in {"l2": 10, "linf": 20, "margin": 30}.items()
               for seed in (0, 1, 2)]  # fmt: skip
    rows = verdicts.verdict_rows(records)
    (found,) = claims.findings(records).values()
    assert [row[0] for row in rows] == [claim.text for claim, _ in found[""]]
    assert rows[0][2] == 15 and rows[0][3] < 15 < rows[0][4]
    figure, sentence = verdicts.verdicts(rows)
    shown = {text.get_text().replace("\n", " ") for text in figure.axes[0].texts}
    assert shown == {row[0] for row in rows} and "interval" in sentence
