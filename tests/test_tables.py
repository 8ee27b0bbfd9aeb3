import copy
import json
from pathlib import Path

import pytest

from r2 import tables
from r2.config import UserError
from r2.record import SCHEMA, read_all


def record(reg="linf", seed=0, top1=50.0, data="digits", images=50_000, command="python -m r2.run"):
    axes = {"data": data, "model": "mbv1-0.25", "reg": reg, "stage": "ewgs", "seed": seed}
    axes |= {"weight_bits": 2, "act_bits": 2, "quantized_layers": "all"}
    return {
        "schema": SCHEMA,
        "axes": axes,
        "metrics": {"top1": top1, "images": images},
        "fp32": {"top1": 60.0},
        "epochs": {"pretrain": 3, "stage": 2},
        "choices": {"data": data, "recipe": data},
        "command": command,
    }


def test_seeds_give_mean_and_standard_deviation():
    text = tables.markdown([record(seed=0, top1=50.0), record(seed=1, top1=52.0)])
    assert "51.00 ± 1.41 (2)" in text and "[" not in text.split("\n\n[..]")[0]


def test_only_the_full_protocol_stands_beside_the_paper():
    full = record(data="imagenet")
    assert "50.00 [26.04]" in tables.markdown([full])  # Table 3, L-inf, MobileNet-V1 0.25
    assert "[53.48]" in tables.latex([full])
    short = copy.deepcopy(full) | {"command": "python -m r2.run recipe.epochs=3"}
    assert "26.04" not in tables.markdown([short])
    assert "26.04" not in tables.markdown([record()])
    assert "26.04" not in tables.markdown([record(data="imagenet", images=1000)])  # a part of it


def test_mobilebert_on_qnli_stands_in_table_7():
    full = record(data="qnli", images=5_463, top1=62.0) | {"fp32": {"top1": 90.0}}
    full["axes"] |= {"model": "mobilebert", "stage": "dkm", "weight_bits": 1, "act_bits": None, "dim": 1}
    text = tables.markdown([full])
    assert "90.00 [90.66]" in text and "62.00 [63.17]" in text
    other = full | {"command": "python -m r2.run model=mobilebert model.source=DIR"}
    assert "[63.17]" not in tables.markdown([other])


def test_missing_cells_and_csv():
    other = record(reg="l2")
    other["axes"]["weight_bits"] = other["axes"]["act_bits"] = 4
    text = tables.markdown([record(), other])
    assert "| L2 | 60.00 | - | 50.00 |" in text
    assert "digits,3 epochs,mbv1-0.25,linf,ewgs W2A2 (2 epochs),0,50.0," in tables.table_csv([record()])


def test_a_folder_without_records_or_with_others_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no record"):
        read_all(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(UserError, match="x.json"):
        read_all(tmp_path)


def test_every_cell_of_the_paper_has_its_place():
    values = tables.paper_values()
    assert len(values) == 1 + 80 + 48 + 28 + 24 + 8 + 12 - 16  # full precision stands in two or three of the tables
    assert values["mbv1-1.0", "l2", "ewgs", 2, 2, None, "excl_first_last"] == 59.10
    assert values["mbv1-1.0", "l2", "ewgs", 2, 2, None, "all"] == 55.96
    assert values["mbv1-1.0", "smm", "dkm", 4, None, 4, "all"] == 60.05
    assert values["resnet18", "margin", "lsq", 2, 2, None, "all"] == 62.25
    assert values["mbv2-0.25", "margin", "none", 4, 8, None, "all"] == 31.11
    assert values["mobilebert", "smm", "dkm", 2, None, 1, "all"] == 80.87


def test_what_is_generated_is_not_stale():
    """After a change of a record: python -m r2.tables results/records --out results --into README.md"""
    root = Path(__file__).parents[1]
    records = read_all(root / "results" / "records")
    for suffix, render in tables.WRITTEN.items():
        assert (root / "results" / f"tables.{suffix}").read_text() == render(records), suffix
    page = (root / "README.md").read_text()
    assert page == tables.replaced(page, tables.markdown(records))
