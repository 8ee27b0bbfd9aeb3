#!/usr/bin/env bash
# Sets up .venv and runs the main job on the embedded digits; more arguments go to r2.run.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh ""
exec .venv/bin/python -m r2.run model=mbv2 reg=margin stage=ewgs "$@"
