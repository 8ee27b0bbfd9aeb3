"""The pilots' table: top-1 by network, method and setting, mean and range over seeds, and the lowest SQNR, as Markdown.

python scripts/pilots.py outputs/pilots
"""

import sys
from collections import defaultdict
from pathlib import Path

from r2 import record

SETTINGS = ("fold_constant", "weight_init", "temperature_mode", "temperature", "step_limit", "act_init", "alpha")


def main(folder: Path) -> None:
    cells: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    lowest: dict[tuple[str, str], float] = {}
    pretrained = set()  # of which several runs' records tell
    for found in record.find(folder):
        axes, stage = found["axes"], found["config"]["stage"]
        name = f"{axes['model']} {axes['stage']}" + (f" {axes['weight_bits']} bit" if axes["weight_bits"] else "")
        of_reg = ", ".join(word for word in found["overrides"] if word.startswith("reg."))
        setting = ", ".join([*(f"{key}={stage[key]}" for key in SETTINGS if key in stage), *filter(None, [of_reg])])
        cells[name, setting][axes["reg"]].append(found["metrics"]["top1"])
        if found["sqnr_db"]:
            worst = min(value if value is not None else float("-inf") for value in found["sqnr_db"].values())
            lowest[name, setting] = min(worst, lowest.get((name, setting), float("inf")))
        if found["fp32"] and found["sha256"]["pretrained"] not in pretrained:
            pretrained.add(found["sha256"]["pretrained"])
            cells[f"{axes['model']} full precision", of_reg][axes["reg"]].append(found["fp32"]["top1"])
    regs = sorted({reg for row in cells.values() for reg in row})
    print(f"| method | setting | {' | '.join(regs)} | lowest SQNR, dB |\n|---|---|{'---|' * (len(regs) + 1)}")
    for (name, setting), row in sorted(cells.items()):
        values = [row[reg] for reg in regs]
        shown = [f"{sum(v) / len(v):.1f} ({min(v):.1f} to {max(v):.1f}; {len(v)})" if v else "-" for v in values]
        worst = f"{lowest[name, setting]:.1f}" if (name, setting) in lowest else "-"
        print(f"| {name} | {setting} | {' | '.join(shown)} | {worst} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
