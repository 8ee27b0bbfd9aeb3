#!/usr/bin/env bash
# Sets up .venv (6.6 GB, mostly PyTorch) and runs the main job on the embedded digits, then the same with L2 and with rounding
# alone: about a quarter of an hour. The closing table and the picture compare the weights: their largest, their kurtosis.
# Accuracy on digits differs little; results/ has it on real images. More arguments go to every run.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh ""
.venv/bin/python -m r2.run model=mbv2 reg=margin stage=ewgs "$@"
.venv/bin/python -m r2.run -m model=mbv2 reg=margin,l2 stage=none,ewgs "$@"
