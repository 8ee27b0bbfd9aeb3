#!/usr/bin/env bash
# Hard cases for LSQ at 2 bits: every network on digits, three regularizers, three seeds, and for the narrow networks both
# initial step sizes. What is finished is skipped; scripts/pilots.py outputs/lsq prints the table, with the lowest SQNR of any layer.
# More arguments go to every command.
set -euo pipefail
cd "$(dirname "$0")/.."
sweep() {
  "${PYTHON:-.venv/bin/python}" -m r2.run -m data=digits stage=lsq threads=1 reg=l2,margin,smm seed=100,101,102 \
    out=outputs/lsq "$@"
}
sweep model=mbv1,mbv2 model.width_mult=0.25 stage.act_init=fitted,official "$@"
sweep model=mbv1 model.width_mult=1.0 "$@"
sweep model=mbv2 model.width_mult=1.0 "$@"
sweep model=rn18 "$@"
