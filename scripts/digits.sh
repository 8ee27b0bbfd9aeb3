#!/usr/bin/env bash
# How much results on scikit-learn's digits vary: the first command with ten seeds, by one and by two threads, then every
# network and stage at its defaults. Hours on two cores; what is finished is skipped.
# scripts/pilots.py outputs/digits/1 prints the table. More arguments go to every command.
set -euo pipefail
cd "$(dirname "$0")/.."
sweep() { "${PYTHON:-.venv/bin/python}" -m r2.run -m data=digits "$@"; }
for threads in 1 2; do
  sweep model=mbv2 reg=margin stage=ewgs seed=0,1,2,3,4,5,6,7,8,9 threads=$threads out=outputs/digits/$threads "$@"
done
table() {
  sweep reg=l2,margin seed=0,1 threads=1 out=outputs/digits/1 "$@"
  sweep reg=l2_10x,kure,linf,smm seed=0 threads=1 out=outputs/digits/1 "$@"
}
for model in mbv2 mbv1 rn18; do
  table model=$model stage=none,dfq,adaround,ewgs,lsq,dkm "$@"
done
table model=rn18 stage=pact "$@"
table model=mbv1,mbv2 stage=pact recipe.epochs=150 "$@" # from scratch, depthwise layers need more steps (docs/pilots.md)
