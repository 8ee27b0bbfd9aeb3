#!/usr/bin/env bash
# Sets up .venv with the test tools and runs the default tests; more arguments go to pytest (-m slow for the long ones).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh "[test]"
exec .venv/bin/python -m pytest "$@"
