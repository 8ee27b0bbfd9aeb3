"""Generates the report from records: tables, figures, claims, the README's results block and one HTML page.

python -m r2.report             # results/ of this repository
python -m r2.report outputs     # any folder of runs

Writes <folder>/<data>/tables.{md,csv,tex} and figures/, <folder>/claims.md and <folder>/report.html; for results/, also
the README's block, which is not changed for any other folder. <folder>/<data>/notes.md is written by hand and shown on
the page.
"""

import argparse
from pathlib import Path

from r2.cli import refusals
from r2.paths import RESULTS
from r2.report.page import write


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m r2.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="results (default), or an out=DIR")
    folder = parser.parse_args(arguments).folder
    with refusals():
        for path in write(folder, folder / "pretrained"):
            print(f"written: {path}")


if __name__ == "__main__":
    main()
