"""Records to tables: Markdown, CSV and LaTeX, the paper's value beside a measured one where the protocols match.

python -m r2.tables outputs                       # any folder of records; writes tables.{md,csv,tex} into it
python -m r2.tables results/records --out results --into README.md
"""

import argparse
import csv
import io
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from r2.config import UserError
from r2.record import read_all

PAPER = Path(__file__).parents[1] / "results" / "paper"
IMAGENET = ("imagenet", "imagenet_shards", "imagenet_dali")  # three ways to read the same images
REGULARIZERS = {
    "l2": "L2",
    "l2_10x": "10x L2",
    "kure": "KURE",
    "linf": "L-inf",
    "margin": "Margin",
    "smm": "SMM",
}


def full_protocol(record: dict) -> bool:
    """Whether a record may stand beside the paper's value: ImageNet with the unchanged recipe and stage."""
    changed = ("recipe.", "data.image_size", "reg.", "stage.hessian", "stage.lr", "stage.epochs")
    choices = record["choices"]
    known = choices["data"] in IMAGENET and choices["recipe"] in IMAGENET
    return known and not any(key in record["command"] for key in changed)


def paper_values() -> dict[tuple, float]:
    """(model, reg, stage, weight bits, activation bits, dim, layers) to the paper's top-1 in percent."""
    values = {}
    for path in (PAPER / name for name in ("table1_accuracy.csv", *(f"table{n}.csv" for n in range(2, 7)))):
        for row in csv.DictReader(path.read_text().splitlines()):
            row |= {k: row["bits"] for k in ("weight_bits",) if "bits" in row}
            row |= {"activation_bits": row["bits"]} if row["stage"] == "ewgs" and "bits" in row else {}
            widths = (int(row[k]) if row.get(k) else None for k in ("weight_bits", "activation_bits", "dim"))
            layers = row.get("quantized_layers") or ("all" if row["stage"] != "fp32" else None)
            key = (row["model"], row.get("reg", "l2"), row["stage"], *widths, layers)
            values[key] = float(row["top1"])
    return values


def cells(records: list[dict]) -> dict[tuple, dict[tuple, dict]]:
    """(data, recipe, model) to (reg, stage label) to a cell: measured values over seeds, full precision, paper."""
    paper = paper_values()
    tables: dict[tuple, dict[tuple, dict]] = defaultdict(dict)
    for record in records:
        axes, epochs = record["axes"], record["epochs"]["pretrain"]
        table = tables[axes["data"], f"{epochs} epochs", axes["model"]]
        entries = [("fp32", record["fp32"]["top1"], ("fp32", None, None, None, None))] if record["fp32"] else []
        if axes["stage"] != "fp32":
            found = tuple(axes.get(k) for k in ("stage", "weight_bits", "act_bits", "dim", "quantized_layers"))
            entries.append((stage_label(record), record["metrics"]["top1"], found))
        for label, top1, found in entries:
            cell = table.setdefault((axes["reg"], label), {"seeds": {}, "paper": None})
            cell["seeds"][axes["seed"]] = top1
            if full_protocol(record):
                cell["paper"] = paper.get((axes["model"], axes["reg"], *found))
    return tables


def stage_label(record: dict) -> str:
    """`ewgs W2A2 (10 epochs)`, `dkm 2 bits, dim 1 (10 epochs)`."""
    axes, epochs = record["axes"], record["epochs"]["stage"]
    widths = f"{axes['weight_bits']} bits, dim {axes['dim']}" if axes.get("dim") else f"W{axes['weight_bits']}"
    widths += f"A{axes['act_bits']}" if axes["act_bits"] else ""
    extra = " excl. F&L" if axes["quantized_layers"] == "excl_first_last" else ""
    return f"{axes['stage']} {widths}" + (f" ({epochs} epochs)" if epochs else "") + extra


def text(cell: dict | None) -> str:
    """`62.10`, `62.10 ± 0.30 (3)` over seeds, with ` [60.00]` the paper's value."""
    if cell is None:
        return "-"
    values = list(cell["seeds"].values())
    mean = sum(values) / len(values)
    out = f"{mean:.2f}"
    if len(values) > 1:
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        out += f" ± {std:.2f} ({len(values)})"
    return out + (f" [{cell['paper']:.2f}]" if cell["paper"] is not None else "")


def grids(records: list[dict]) -> list[tuple[str, list[list[str]]]]:
    """(title, rows) of each table; the first row is its header."""
    out = []
    for (data, recipe, model), table in sorted(cells(records).items()):
        stages = sorted({stage for _, stage in table}, key=lambda s: (s != "fp32", s))
        regs = sorted({reg for reg, _ in table}, key=lambda r: list(REGULARIZERS).index(r) if r in REGULARIZERS else 99)
        rows = [["Regularizer", *stages]]
        rows += [[REGULARIZERS.get(reg, reg), *[text(table.get((reg, stage))) for stage in stages]] for reg in regs]
        out.append((f"{data}, {model}, pretrained {recipe}: top-1 in %", rows))
    return out


def markdown(records: list[dict]) -> str:
    parts = []
    for title, rows in grids(records):
        lines = [" | ".join(row) for row in rows]
        parts.append(
            f"**{title}**\n\n| {lines[0]} |\n|{'---|' * len(rows[0])}\n" + "".join(f"| {x} |\n" for x in lines[1:])
        )
    commands = "".join(f"    {c}\n" for c in sorted({record["command"] for record in records}))
    return "\n".join(parts) + "\n[..] is the paper's value, ± over seeds. The runs:\n\n" + commands


def latex(records: list[dict]) -> str:
    parts = []
    for title, rows in grids(records):
        body = [" & ".join(_escape(value) for value in row) + r" \\" for row in rows]
        head = f"% {title}\n\\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}\n\\hline\n{body[0]}\n\\hline\n"
        parts.append(head + "\n".join(body[1:]) + "\n\\hline\n\\end{tabular}\n")
    return "\n".join(parts)


def _escape(value: str) -> str:
    return value.replace("&", r"\&").replace("%", r"\%").replace("_", r"\_").replace("±", r"$\pm$")


def table_csv(records: list[dict]) -> str:
    """One line per cell and seed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["data", "recipe", "model", "reg", "stage", "seed", "top1", "paper_top1"])
    for key, table in sorted(cells(records).items()):
        for (reg, stage), cell in sorted(table.items()):
            for seed, top1 in sorted(cell["seeds"].items()):
                writer.writerow([*key, reg, stage, seed, top1, "" if cell["paper"] is None else cell["paper"]])
    return out.getvalue()


WRITTEN: dict[str, Callable[[list[dict]], str]] = {"md": markdown, "csv": table_csv, "tex": latex}
MARKS = "<!-- tables: generated by python -m r2.tables -->", "<!-- end of tables -->"


def replaced(page: str, tables: str) -> str:
    """`page` with `tables` between its marks."""
    head, _, rest = page.partition(MARKS[0])
    return f"{head}{MARKS[0]}\n{tables}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m r2.tables", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", type=Path, help="a folder of runs, or of record files")
    parser.add_argument("--out", type=Path, help="where to write; the folder itself by default")
    parser.add_argument("--into", type=Path, help="a Markdown file: replaces what stands between its table marks")
    parsed = parser.parse_args(arguments)
    try:
        records = read_all(parsed.records)
    except UserError as error:
        print(f"r2: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    out = parsed.out or parsed.records
    out.mkdir(parents=True, exist_ok=True)
    for suffix, render in WRITTEN.items():
        (out / f"tables.{suffix}").write_text(render(records))
    if parsed.into:
        parsed.into.write_text(replaced(parsed.into.read_text(), markdown(records)))
    print(markdown(records))


if __name__ == "__main__":
    main()
