#!/usr/bin/env bash
# The small study on Fashion-MNIST, MobileNet-V1 0.25, one seed: every regularizer with 2-bit EWGS, and every stage
# with l2 and margin. About an hour on two cores; what is finished is not repeated. Copies the records to
# results/records and writes the tables.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)
run() { "$python" -m r2.run -m data=fashion_mnist model=mbv1 model.width_mult=0.25 "$@"; }
run reg=l2,l2_10x,kure,linf,margin,smm stage=ewgs stage.bits=2
run reg=l2,margin stage=none,dfq,adaround,lsq,pact,dkm
mkdir -p results/records
for record in outputs/fashion_mnist_mbv1-0.25_*_s0-*/record.json; do
  cp "$record" "results/records/$(basename "$(dirname "$record")").json"
done
"$python" -m r2.tables results/records --out results --into README.md
