"""The paper's tables from records, in Markdown, CSV and LaTeX.

A cell shows the paper's value only beside a run with the paper's protocol (all of its data, nothing changed). For any
smaller study the paper's table is printed separately, with its own title.
"""

import csv
import io
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from omegaconf import OmegaConf

from r2.config import UserError
from r2.data.facts import FACTS
from r2.hub import TORCHVISION, sha256_of_torchvision
from r2.paths import CONFIGS, PAPER
from r2.record import Record

REGULARIZERS = {
    "l2": "L2",
    "l2_10x": "10x L2",
    "kure": "KURE",
    "linf": "L-inf",
    "margin": "Margin",
    "smm": "SMM",
}
# Keys that are a table's rows, columns and seeds, and keys that change no result.
_AXES = {"data", "model", "model.width_mult", "model.name", "reg", "reg.weight", "recipe", "seed",
         "stage", "stage.bits", "stage.weight_bits", "stage.act_bits", "stage.dim", "stage.skip_first_last",
         "stage.fold_constant"}  # fmt: skip
_PLACES = {"out", "devices", "threads", "force", "tracker", "checkpoint_seconds", "dist_timeout_seconds", "data.root",
           "data.workers", "hydra.searchpath"}  # fmt: skip
# Examples of the paper's data sets, ImageNet read in three ways: fewer of them are another study.
_OF_PAPER = {"imagenet", "imagenet_shards", "imagenet_dali", "qnli"}
_OF_TORCHVISION = ("model.weights=torchvision", f"sha256 {sha256_of_torchvision(TORCHVISION['resnet18'])}")


class Column(NamedTuple):
    """What was done to the pretrained model; the fields are axes of a record, but for `folding`, which is 'aimet' where
    channels that do not vary were not folded to constants."""

    stage: str
    weight_bits: int | None = None
    act_bits: int | None = None
    dim: int | None = None
    quantized_layers: str | None = "all"
    folding: str | None = None

    @property
    def label(self) -> str:
        """`fp32`, `ewgs W2A2`, `dkm 2 bit, dim 1`."""
        if self.weight_bits is None:
            return self.stage
        widths = f"{self.weight_bits} bit, dim {self.dim}" if self.dim else f"W{self.weight_bits}"
        widths += f"A{self.act_bits}" if self.act_bits else ""
        special = " excl. F&L" if self.quantized_layers == "excl_first_last" else ""
        return f"{self.stage} {widths}{special}" + (", AIMET's folding" if self.folding else "")


FP32 = Column("fp32", quantized_layers=None)


class Table(NamedTuple):
    title: str
    columns: list[Column]
    models: tuple[str, ...]  # how their names begin
    data: str = "ImageNet"  # the paper's


_QAT = [Column(stage, bits, bits) for stage in ("pact", "lsq", "ewgs") for bits in (2, 4)]
_IMAGE_MODELS = ("mbv1", "mbv2", "rn18", "resnet18")
TABLES = {
    "1": Table("EWGS at 2 bits without and with the first and last layer",
               [Column("ewgs", 2, 2, quantized_layers="excl_first_last"), Column("ewgs", 2, 2)], ("mbv1",)),
    "2": Table("Post-training quantization, 4-bit weights and 8-bit activations",
               [FP32, *[Column(stage, 4, 8) for stage in ("none", "dfq", "adaround")]], _IMAGE_MODELS),
    "3": Table("EWGS at 2 bits", [FP32, Column("ewgs", 2, 2)], ("mbv1", "mbv2")),
    "4": Table("Quantization-aware training at 2 and 4 bits", [FP32, *_QAT], _IMAGE_MODELS),
    "5": Table("DKM over single weights", [FP32, *[Column("dkm", b, None, 1) for b in (1, 2, 4)]], _IMAGE_MODELS),
    "6": Table("DKM over vectors, 1 bit per weight", [Column("dkm", b, None, b) for b in (2, 4)], _IMAGE_MODELS),
    "7": Table("DKM of MobileBERT on QNLI", [FP32, *[Column("dkm", b, None, 1) for b in (1, 2)]], ("mobilebert",),
               "QNLI"),
}  # fmt: skip


class Protocol(NamedTuple):
    """What the cells of one table share; `changed` are the keys beyond its axes, as key=value."""

    data: str
    recipe: str
    epochs: int
    finetune_epochs: int
    changed: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        extra = "".join(f", {change}" for change in self.changed)
        return f"{self.data}, recipe {self.recipe} ({self.epochs} + {self.finetune_epochs} epochs){extra}"

    @property
    def full(self) -> bool:
        """The paper's own: all of its data, nothing changed."""
        return self.data == self.recipe and self.data in _OF_PAPER and not self.changed


def protocol(record: Record) -> Protocol:
    recipe = record["config"]["recipe"]
    overrides = [word.partition("=") for word in record["overrides"]]
    changed = sorted(f"{key}={value}" for key, _, value in overrides if key not in _AXES | _PLACES)
    data, weights = record["choices"]["data"], record["config"].get("weights")
    if weights:  # a file of the same name may hold others
        changed.append(f"sha256 {weights['sha256'][:8]}")
    if data in _OF_PAPER and row(record) == ("resnet18", "l2"):  # the paper's is torchvision's, as r2.compose has it
        changed = [c for c in changed if c not in _OF_TORCHVISION] if weights else [*changed, "model.weights=null"]
    if data in _OF_PAPER:
        seen = {"training": record.get("train_images"), "validation": record["metrics"]["images"]}
        whole = {"training": FACTS[data].train_images, "validation": FACTS[data].val_images}
        changed += [f"{count} {split} images" for split, count in seen.items() if count != whole[split]]
    finetuning = recipe.get("finetune", {}).get("epochs", 0)  # a recipe of one's own may have none
    return Protocol(data, record["choices"]["recipe"], recipe["epochs"], finetuning, tuple(changed))


def main_study(records: Iterable[Record]) -> Protocol:
    """The one to show first: the paper's own, else one of a recipe as configs/ has it now, else the largest."""
    counts = Counter(map(protocol, records))

    def worth(key: Protocol) -> tuple[bool, bool, int]:
        path = CONFIGS / "recipe" / f"{key.recipe}.yaml"
        recipe: Any = OmegaConf.load(path) if path.exists() else {}
        now = recipe.get("epochs"), recipe.get("finetune", {}).get("epochs")
        return key.full, not key.changed and (key.epochs, key.finetune_epochs) == now, counts[key]

    return max(counts, key=worth)


Row = tuple[str, str]  # model, regularizer: its option, and its weight where that is not the option's own ("linf 0.1")
Cells = dict[tuple[Row, Column], dict[int, float]]  # to an outcome by seed
Outcome = Literal["top1", "sqnr", "crest"]


def column(record: Record) -> Column:
    aimet = "stage.fold_constant=false" in record["overrides"]
    axes: dict[str, Any] = {name: record["axes"].get(name) for name in Column._fields}
    return Column(**{**axes, "folding": "aimet" if aimet else None})


def row(record: Record) -> Row:
    weights = [word.partition("=")[2] for word in record["overrides"] if word.startswith("reg.weight=")]
    return record["axes"]["model"], " ".join([record["axes"]["reg"], *weights])


def reg_label(reg: str) -> str:
    """`L-inf`, `L-inf, weight 0.1`."""
    name, _, weight = reg.partition(" ")
    return REGULARIZERS.get(name, name) + (f", weight {weight}" if weight else "")


def with_weight(cells: Cells, regs: tuple[str, ...], weight: str) -> Cells:
    """The cells in which those of `regs` with this weight stand in the place of their own."""
    renamed = {f"{reg} {weight}": reg for reg in regs}
    return {((model, renamed.get(reg, reg)), c): of for ((model, reg), c), of in cells.items() if reg not in regs}


def _top1(record: Record) -> dict[Column, float]:
    found = {}
    if record["axes"]["stage"] != "fp32":
        found[column(record)] = record["metrics"]["top1"]
    if record["fp32"] and record["axes"].get("dim") in (None, 1):  # a regularizer over vectors is another pretraining
        found[FP32] = record["fp32"]["top1"]
    return found


def _sqnr(record: Record) -> dict[Column, float]:
    """dB of the rounded weights before calibration finds ranges of activations: the mean over layers."""
    layers = (record["details"] or {}).get("weight_sqnr_db") or {}
    values = [value for value in layers.values() if value is not None]
    return {column(record): fmean(values)} if values and record["axes"]["stage"] == "none" else {}


def _crest(record: Record) -> dict[Column, float]:
    """log(max|w| / std) of the pretrained weights: the mean over layers."""
    layers = (record.get("weights") or {}).get("pretrained") or {}
    values = [math.log(of["max_abs"] / of["std"]) for of in layers.values() if of["std"] and of["max_abs"]]
    return {FP32: fmean(values)} if values and FP32 in _top1(record) else {}


OUTCOMES: dict[Outcome, Callable[[Record], dict[Column, float]]] = {"top1": _top1, "sqnr": _sqnr, "crest": _crest}


def measured(records: Iterable[Record], outcome: Outcome = "top1") -> dict[Protocol, Cells]:
    """Every cell's outcome by seed: top-1 in percent, or as its function says.

    Raises:
        UserError: two runs give one cell and seed different values, of which one must be stale; names both.
    """
    found: dict[Protocol, Cells] = defaultdict(lambda: defaultdict(dict))
    names: dict[tuple, str] = {}
    for record in records:
        key, of, seed = protocol(record), row(record), record["axes"]["seed"]
        for place, value in OUTCOMES[outcome](record).items():
            other = names.setdefault((key, of, place, seed), record["name"])
            if found[key][of, place].setdefault(seed, value) != value:
                raise UserError(
                    f"{record['name']} and {other} give {' '.join(of)} {place.label} of seed {seed} different values; "
                    "move the record of one away"
                )
    # By seed, because a sum's last bits follow its order.
    return {key: {place: dict(sorted(by.items())) for place, by in found[key].items()} for key in sorted(found)}


def paper(number: str) -> dict[tuple[Row, Column], float]:
    """The paper's top-1 in percent, of one of its tables."""
    path = PAPER / (f"table{number}.csv" if number != "1" else "table1_accuracy.csv")
    values = {}
    for row in csv.DictReader(path.read_text().splitlines()):
        weight, act, dim = (int(row[name]) if row[name] else None for name in ("weight_bits", "act_bits", "dim"))
        place = Column(row["stage"], weight, act, dim, row["quantized_layers"] or None)
        values[(row["model"], row["reg"]), place] = float(row["top1"])
    return values


def statistics(values: Iterable[float]) -> tuple[float, float, int]:
    """Mean, standard deviation (unbiased; 0 for one value) and count."""
    listed = list(values)
    return fmean(listed), stdev(listed) if len(listed) > 1 else 0.0, len(listed)


def text(by_seed: dict[int, float] | None, of_paper: float | None = None) -> str:
    """`62.10`, `62.10 ± 0.30 (3)` over seeds, with ` [60.00]` the paper's value."""
    if not by_seed:
        return "-"
    mean, std, count = statistics(by_seed.values())
    out = f"{mean:.2f}" + (f" ± {std:.2f} ({count})" if count > 1 else "")
    return out + (f" [{of_paper:.2f}]" if of_paper is not None else "")


class Grid(NamedTuple):
    """A table: its keys, and its text with a header as the first row."""

    number: str
    title: str
    columns: list[Column]
    keys: list[Row]
    rows: list[list[str]]


def ordered(rows: Iterable[Row]) -> list[Row]:
    regs = list(REGULARIZERS)

    def place(of: Row) -> tuple:
        name, _, weight = of[1].partition(" ")
        return of[0], weight and float(weight) or 0.0, regs.index(name) if name in regs else len(regs), name

    return sorted(set(rows), key=place)


def _grid(number: str, title: str, columns: list[Column], rows: list[Row], cell: Callable[[Row, Column], str]) -> Grid:
    body = [[row[0], reg_label(row[1]), *[cell(row, c) for c in columns]] for row in rows]
    return Grid(number, title, columns, rows, [["Model", "Regularizer", *[c.label for c in columns]], *body])


def _shown(cells: Cells, table: Table) -> list[Row]:
    """Rows of the models that fill most of the table's columns."""
    wanted = [c for c in table.columns if c != FP32]
    models = {row[0] for row, _ in cells if row[0].startswith(table.models)}
    full = {m for m in models if sum(any((r, c) in cells for r, _ in cells if r[0] == m) for c in wanted)
            > len(wanted) / 2}  # fmt: skip
    return ordered(row for row, c in cells if row[0] in full and c in wanted)


def grids(key: Protocol, cells: Cells) -> list[Grid]:
    """The paper's tables as far as they are measured, and what is in none of them."""
    found, placed = [], set()
    for number, table in TABLES.items():
        rows = _shown(cells, table)
        placed |= {(row, c) for row in rows for c in table.columns}
        values = paper(number) if key.full else {}
        if rows:
            found.append(_grid(number, table.title, table.columns, rows,
                               lambda r, c, values=values: text(cells.get((r, c)), values.get((r, c)))))  # type: ignore[misc] # fmt: skip
    rest = {place: v for place, v in cells.items() if place not in placed}
    if any(c != FP32 for _, c in rest) or (rest and not found):
        columns = sorted({c for _, c in rest} | {FP32}, key=lambda c: (c != FP32, c.label))
        rows = ordered(row for row, _ in rest)
        found.append(_grid("", "Other runs", columns, rows, lambda r, c: text(cells.get((r, c)))))
    return found


def paper_grid(number: str) -> Grid:
    values = paper(number)
    return _grid(number, TABLES[number].title, TABLES[number].columns, ordered(row for row, _ in values),
                 lambda r, c: f"{values[r, c]:.2f}" if (r, c) in values else "-")  # fmt: skip


def markdown_grid(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |\n" for row in rows]
    return lines[0] + f"|{'---|' * len(rows[0])}\n" + "".join(lines[1:])


def heading(grid: Grid) -> str:
    return f"Table {grid.number}: {grid.title}" if grid.number else grid.title


def markdown(records: list[Record]) -> str:
    parts = []
    main = main_study(records) if records else None
    for key, cells in sorted(measured(records).items(), key=lambda study: study[0] != main):
        parts.append(f"## {key.label}\n\nTop-1 in %; mean ± standard deviation (seeds)"
                     + ("; [..] the paper's value.\n" if key.full else ".\n"))  # fmt: skip
        for grid in grids(key, cells):
            parts.append(f"**{heading(grid)}**\n\n{markdown_grid(grid.rows)}")
            if grid.number and not key.full:
                of_paper = markdown_grid(paper_grid(grid.number).rows)
                parts.append(f"The paper's, on {TABLES[grid.number].data}:\n\n{of_paper}")
    commands = "".join(f"    {command}\n" for command in sorted({record["command"] for record in records}))
    return "\n".join(parts) + "\n## The runs\n\n" + commands


def latex(records: list[Record]) -> str:
    parts = []
    for key, cells in measured(records).items():
        for grid in grids(key, cells):
            body = [" & ".join(_escape(value) for value in row) + r" \\" for row in grid.rows]
            parts.append(
                f"% {heading(grid)}; {key.label}\n\\begin{{tabular}}{{ll{'r' * (len(grid.rows[0]) - 2)}}}\n\\hline\n"
                f"{body[0]}\n\\hline\n" + "\n".join(body[1:]) + "\n\\hline\n\\end{tabular}\n"
            )
    return "\n".join(parts)


def _escape(value: str) -> str:
    for character in "&%_":
        value = value.replace(character, f"\\{character}")
    return value.replace("±", r"$\pm$")


def table_csv(records: list[Record]) -> str:
    """One line per cell and seed, with the axes of the records and of results/paper."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*Protocol._fields, "model", "reg", *Column._fields, "seed", "top1"])
    for key, cells in measured(records).items():
        for (row, c), by_seed in sorted(cells.items(), key=lambda item: (item[0][0], item[0][1].label)):
            for seed, top1 in sorted(by_seed.items()):
                writer.writerow([*key[:-1], " ".join(key.changed), *row, *c, seed, top1])
    return out.getvalue()


WRITTEN: dict[str, Callable[[list[Record]], str]] = {"md": markdown, "csv": table_csv, "tex": latex}
