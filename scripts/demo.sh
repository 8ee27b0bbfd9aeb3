#!/usr/bin/env bash
# Sets up .venv and runs the main job on the embedded digits, then the same with L2 and with rounding alone: the closing
# table shows what range regularization does, the picture why. More arguments go to every run.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh ""
.venv/bin/python -m r2.run model=mbv2 reg=margin stage=ewgs "$@"
.venv/bin/python -m r2.run -m model=mbv2 reg=margin,l2 stage=none,ewgs "$@"
