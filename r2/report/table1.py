"""The paper's Table 1, from the sizes of files that it writes.

python -m r2.report.table1
python -m r2.report.table1 --out results/table1.md
"""

import argparse
import csv
import tempfile
from pathlib import Path

import torch

from r2 import models, pack, store
from r2.cli import refusals
from r2.paths import PAPER
from r2.quantizers.calibration import calibrate
from r2.quantizers.ewgs import EWGS
from r2.quantizers.layers import quantizable, swap


def table1(folder: Path) -> dict[tuple[int, bool], float]:
    """MobileNet-V1 1.0 for 1000 classes as files in `folder`: (stored bits, all layers?) to MiB (2^20 bytes).

    Untrained, because a size does not depend on the values.
    """
    sizes = {}
    for bits in (32, 8, 4, 2, 1):
        for everything in (False, True):
            model = models.mobilenet_v1(1000)
            if bits < 32:
                layers = quantizable(model, skip_first_last=not everything)
                swap(layers, lambda _, bits=bits: EWGS(bits, bits))  # type: ignore[misc]
                calibrate(model, layers, torch.randn(2, 3, 32, 32))
            path = folder / f"{bits}-{everything}.safetensors"
            pack.save(model, path)
            sizes[bits, everything] = path.stat().st_size / 2**20
    return sizes


def table1_markdown(sizes: dict[tuple[int, bool], float]) -> str:
    """The paper's rows beside the files of its label's bits and of twice as many."""
    lines = [
        "**Table 1, MobileNet-V1 1.0, 1000 classes: MiB of the file, without first and last layer / all layers**",
        "",
        "| label | paper | stored bits = label | stored bits = 2 x label |",
        "|---|---|---|---|",
    ]
    for row in csv.DictReader((PAPER / "table1.csv").read_text().splitlines()):
        bits = int(row["bits"])
        ours = [
            f"{sizes[n, False]:.1f} / {sizes[n, True]:.1f}" if (n, True) in sizes else "-" for n in (bits, 2 * bits)
        ]
        lines.append(f"| {bits} | {row['size_mb_excl_first_last']} / {row['size_mb_all']} | {' | '.join(ours)} |")
    return "\n".join(lines) + (
        "\n\nThe paper's 4, 2 and 1-bit rows are the sizes of 8, 4 and 2 stored bits: its label is half of what is\n"
        "stored. Its 32-bit row leaves out BatchNorm's running statistics (0.08 MiB), which every file here holds.\n"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m r2.report.table1", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write it to this Markdown file")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        text = table1_markdown(table1(Path(folder)))
    print(text, end="")
    if parsed.out:
        with refusals():
            store.write(parsed.out, text.encode())


if __name__ == "__main__":
    main()
