import json
import shlex

import pytest

from r2 import store
from r2.config import UserError
from r2.record import SCHEMA, digest, read, read_all
from r2.report import page, tables
from r2.report.tables import FP32, Column

EWGS = Column("ewgs", 2, 2)


def record(
    reg="linf", seed=0, top1=50.0, data="digits", command="", fp32=60.0, model="mbv1-0.25", column=EWGS, images=50_000,
    train_images=1_281_167, name="a-00000000",
):  # fmt: skip
    """As much of a record as the tables read."""
    overrides = [f"data={data}", f"reg={reg}", f"seed={seed}", *command.split()]
    return {
        "schema": SCHEMA,
        "name": name,
        "train_images": train_images,
        "axes": {"data": data, "model": model, "reg": reg, "seed": seed, **column._asdict()},
        "metrics": {"top1": top1, "images": images},
        "fp32": {"top1": fp32} if fp32 is not None else None,
        "details": {},
        "choices": {"data": data, "recipe": data},
        "config": {"recipe": {"epochs": 3, "finetune": {"epochs": 2}}, "reg": {"weight": 0.01}},
        "command": shlex.join(["python", "-m", "r2.run", *overrides]),
        "overrides": overrides,
    }


def sealed(found):
    """As it lies in a file, with its digest."""
    found = json.loads(json.dumps(found))
    return {**found, "digest": digest(found)}


def test_seeds_give_mean_and_standard_deviation():
    text = tables.markdown([record(seed=0, top1=50.0), record(seed=1, top1=52.0)])
    assert "| mbv1-0.25 | L-inf | 60.00 ± 0.00 (2) | 51.00 ± 1.41 (2) |" in text
    assert "The paper's, on ImageNet" in text and "| mbv1-0.25 | L-inf | 53.48 | 26.04 |" in text


def test_weights_of_another_content_under_one_name_are_another_table():
    found = [record(command="model.weights=a.pth", seed=seed) for seed in (0, 1)]
    for one, sha256 in zip(found, ("1" * 64, "2" * 64), strict=True):
        one["config"]["weights"] = {"sha256": sha256}
    assert [key.changed for key in tables.measured(found)] == [
        ("model.weights=a.pth", "sha256 11111111"), ("model.weights=a.pth", "sha256 22222222")
    ]  # fmt: skip


def test_only_the_full_protocol_stands_beside_the_paper():
    full = record(data="imagenet")
    assert "| 60.00 [53.48] | 50.00 [26.04] |" in tables.markdown([full])  # Table 3
    assert "[53.48]" in tables.latex([full])
    parts = record(data="imagenet", images=1000), record(data="imagenet", train_images=126_689)
    for other in (record(data="imagenet", command="recipe.epochs=3"), record(), *parts):
        assert "[26.04]" not in tables.markdown([other]) + tables.latex([other])


def test_mobilebert_on_qnli_stands_in_table_7():
    common = {"data": "qnli", "images": 5_463, "train_images": 104_743, "fp32": 90.0, "model": "mobilebert"}
    full = record(top1=62.0, column=Column("dkm", 1, None, 1), **common)
    two_bits = record(top1=82.0, column=Column("dkm", 2, None, 1), **common)
    assert "| 90.00 [90.66] | 62.00 [63.17] | 82.00 [82.13] |" in tables.markdown([full, two_bits])
    other = full | {"overrides": ["data=qnli", "model=mobilebert", "model.source=DIR"]}
    assert "[63.17]" not in tables.markdown([other])


def test_a_changed_key_is_another_table():
    ours, changed = record(), record(command="stage.lr=0.1", top1=70.0)
    found = tables.measured([ours, changed])
    assert [key.changed for key in found] == [(), ("stage.lr=0.1",)]
    assert [cells[("mbv1-0.25", "linf"), EWGS][0] for cells in found.values()] == [50.0, 70.0]
    assert "stage.lr=0.1" in tables.markdown([ours, changed])
    elsewhere = record(command="out=there devices=2 threads=1 data.root=x stage.bits=2")
    assert tables.protocol(elsewhere) == tables.protocol(ours)


def test_full_precision_of_a_regularizer_over_vectors_is_left_out():
    vectors = record(column=Column("dkm", 2, None, 2), fp32=40.0)
    (cells,) = tables.measured([record(), vectors]).values()
    assert cells[("mbv1-0.25", "linf"), FP32] == {0: 60.0}


def test_what_is_in_no_table_of_the_paper_is_still_shown():
    text = tables.markdown([record(column=Column("ewgs", 3, 3), top1=12.0)])
    assert "**Other runs**" in text and "| mbv1-0.25 | L-inf | 60.00 | 12.00 |" in text


def test_every_cell_of_the_paper_has_its_place():
    values = {number: tables.paper(number) for number in tables.TABLES}
    assert {number: len(v) for number, v in values.items()} == {
        "1": 2, "2": 80, "3": 48, "4": 28, "5": 24, "6": 8, "7": 12,
    }  # fmt: skip
    assert values["1"][("mbv1-1.0", "l2"), Column("ewgs", 2, 2, None, "excl_first_last")] == 59.10
    assert values["6"][("mbv1-1.0", "smm"), Column("dkm", 4, None, 4)] == 60.05
    assert values["2"][("mbv2-0.25", "margin"), Column("none", 4, 8)] == 31.11
    for number, table in tables.TABLES.items():
        wanted = set(table.columns) - ({FP32} if number == "5" else set())  # the paper's Table 5 has none
        assert {column for _, column in values[number]} == wanted, number
        assert all(model.startswith(table.models) for (model, _), _ in values[number])


def test_csv_has_the_axes_of_the_paper_and_one_line_per_seed():
    lines = tables.table_csv([record(seed=0), record(seed=1, top1=51.5)]).splitlines()
    header = (tables.PAPER / "table2.csv").read_text().splitlines()[0].split(",")
    assert set(header) <= set(lines[0].split(","))
    assert sum(",ewgs,2,2,,all," in line for line in lines) == 2


def test_a_missing_cell_is_empty_and_a_twice_measured_one_is_refused():
    """No cell is filled by a stale record, by which of two was read last, or by another row's."""
    two = [record(reg="l2", name="x-1"), record(reg="linf", fp32=None, column=Column("lsq", 2, 2), name="y-2")]
    (cells,) = tables.measured(two).values()
    assert (("mbv1-0.25", "linf"), FP32) not in cells
    other = tables.markdown([*two, *[record(reg="l2", column=c, name=f"{c}") for c in tables.TABLES["4"].columns[2:]]])
    assert "| mbv1-0.25 | L-inf | - | - | - | 50.00 | - | - | - |" in other
    again = [record(name="new-1234abcd"), record(name="new-1234abcd")]  # a run and the copy of its record
    assert tables.markdown(again) == tables.markdown(again[:1])
    stale = record(name="old-deadbeef", top1=51.0)
    with pytest.raises(UserError, match="old-deadbeef and new-1234abcd give mbv1-0.25 linf ewgs W2A2 of seed 0"):
        tables.markdown([again[0], stale])
    with pytest.raises(UserError, match="fp32 of seed 0 different values"):
        tables.markdown([again[0], record(name="old-deadbeef", fp32=61.0, column=Column("lsq", 2, 2))])


def test_bytes_do_not_depend_on_the_order_of_the_records():
    columns = (EWGS, Column("lsq", 2, 2), Column("none", 4, 8), Column("dkm", 2, None, 1))
    top1 = iter(range(1000))
    records = [
        record(reg=reg, seed=seed, column=column, data=data, model=model, top1=next(top1) / 7, name=f"{next(top1)}")
        for reg in ("l2", "margin", "new") for seed in (0, 1, 2) for column in columns
        for data in ("digits", "imagenet") for model in ("mbv1-0.25", "mbv2-0.5")
    ]  # fmt: skip
    for render in tables.WRITTEN.values():
        assert render(records) == render(records[::-1]) == render(sorted(records, key=lambda r: r["command"][::-1]))


def test_tables_of_a_moved_folder_are_the_same(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for run in ("run-0", "run-1"):
        (out / run).mkdir(parents=True)
        store.write_json(out / run / "record.json", sealed(record(reg="l2" if run == "run-0" else "margin")))
    before = [render(read_all(out)) for render in tables.WRITTEN.values()]
    out.rename(elsewhere)
    (elsewhere / "run-0").rename(elsewhere / "z")
    assert [render(read_all(elsewhere)) for render in tables.WRITTEN.values()] == before


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    store.write_json(tmp_path / "a.json", sealed(record()))
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", read_only)  # no permission stops a test that runs as root
        with pytest.raises(UserError, match=r"cannot write to .*digits \(Read-only file system\)"):
            page.write(tmp_path)
    (tmp_path / "digits").rmdir()
    (tmp_path / "digits").write_text("")
    with pytest.raises(UserError, match="cannot write to .*digits"):
        page.write(tmp_path)


def test_a_record_that_was_altered_or_is_anothers_is_named(tmp_path):
    path, found = tmp_path / "record.json", sealed(record(name="a-1"))
    path.write_text(json.dumps(found))
    assert read(path, "a-1") == found
    with pytest.raises(UserError, match="record.json: is the record of a-1"):
        read(path, "b-2")
    found["metrics"]["top1"] = 99.0
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match="record.json: altered after it was written"):
        read(path)
    path.write_text(json.dumps(found)[:100])
    with pytest.raises(UserError, match="record.json: is not a record"):
        read(path)


def test_a_folder_without_records_or_with_others_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no record"):
        read_all(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps({"schema": 0}))
    with pytest.raises(UserError, match="x.json"):
        read_all(tmp_path)


def test_a_foreign_file_beside_collected_records_is_not_read(tmp_path):
    (tmp_path / "records").mkdir()
    store.write_json(tmp_path / "records" / "a.json", sealed(record()))
    (tmp_path / "package.json").write_text("{}")
    assert len(read_all(tmp_path)) == 1


def test_a_recipe_without_finetuning_has_a_table():
    found = record()
    found["config"]["recipe"].pop("finetune")
    (key,) = tables.measured([found])
    assert key.label.endswith("(3 + 0 epochs)")
