#!/usr/bin/env bash
# The study in results/: the paper's claims on Fashion-MNIST by configs/recipe/study.yaml, frozen in
# results/fashion_mnist/protocol.md. Many hours on one core; what is finished is not repeated, and records=results/records
# runs only what the repository lacks. Arguments are passed to r2.reproduce; plan=true prints the plan.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)
all=l2,l2_10x,kure,linf,margin,smm
three=10,11,12
five=$three,13,14
ten=$five,15,16,17,18,19
reproduce() {
  "$python" -m r2.reproduce data=fashion_mnist recipe=study model.width_mult=0.25 threads=1 "$@"
}
# The gate: spread and failures of three seeds of L2 and L-inf, before anything else.
reproduce table=3 model=mbv1 reg=l2,linf seeds=$three "$@"
reproduce table=2 model=mbv1 reg=l2,linf seeds=$three stage=none "$@"
# MobileNet-V1: Tables 2, 3 and 5.
for seeds in $three $five $ten; do
  reproduce table=3 model=mbv1 reg=$all seeds=$seeds "$@"
  reproduce table=2 model=mbv1 reg=$all seeds=$seeds stage=none,dfq "$@"
  reproduce table=2 model=mbv1 reg=$all seeds=$seeds stage=none stage.fold_constant=false "$@"
done
reproduce table=5 model=mbv1 reg=l2,linf,margin,smm seeds=$ten "$@"
reproduce table=2 model=mbv1 reg=$all seeds=$ten stage=adaround "$@"
# R2 in proportion to the shorter training: ten times the paper's weight.
reproduce table=3 model=mbv1 reg=linf,margin,smm reg.weight=0.1 seeds=$five "$@"
reproduce table=2 model=mbv1 reg=linf,margin,smm reg.weight=0.1 seeds=$five stage=none,dfq "$@"
# ResNet-18: Tables 4 and 5.
reproduce table=4 model=rn18 reg=l2,linf,margin,smm seeds=$five "$@"
reproduce table=5 model=rn18 reg=l2,linf,margin,smm seeds=$five "$@"
# Table 6, Table 1's pair, and MobileNet-V2 in Tables 2 and 3.
reproduce table=6 model=mbv1 reg=l2,linf,margin,smm seeds=$five "$@"
reproduce table=1 model=mbv1 seeds=$ten "$@"
reproduce table=3 model=mbv2 reg=$all seeds=$five "$@"
reproduce table=2 model=mbv2 reg=$all seeds=$five stage=none,dfq "$@"
