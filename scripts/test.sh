#!/usr/bin/env bash
# Sets up .venv with the test tools and runs the default tests; more arguments go to pytest (-m slow for the long ones).
set -euo pipefail
cd "$(dirname "$0")/.."
command -v g++ > /dev/null || { echo "the tests need a C++ compiler (g++)" >&2; exit 2; }
. scripts/setup.sh "[test]"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # two processes share the cores, not each all of them
exec .venv/bin/python -m pytest -n auto --maxprocesses=4 "$@"
