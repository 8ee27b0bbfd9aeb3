"""Runs every stage at smoke scale and prints the sha256 of its weights, for changes that must not change them.

python scripts/hashes.py > before.txt        # and again after the change, on the same machine
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

STAGES = "fp32,none,dfq,adaround,ewgs,lsq,pact,dkm"


def main() -> None:
    with tempfile.TemporaryDirectory() as out:
        words = [
            "data=fake",
            "recipe=smoke",
            "model=rn18,mbv1,mbv2",
            "model.width_mult=0.25",
            "threads=1",
            "reg=margin",
        ]
        command = [sys.executable, "-m", "r2.run", "-m", *words, f"stage={STAGES}", f"out={out}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        for path in sorted(Path(out).glob("*/record.json")):
            record = json.loads(path.read_text())
            sums = (record["sha256"][kind] or "-" for kind in ("pretrained", "final", "packed"))
            print(path.parent.name.rpartition("-")[0], *(sha256[:12] for sha256 in sums))


if __name__ == "__main__":
    main()
