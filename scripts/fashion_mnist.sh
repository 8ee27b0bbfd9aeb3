#!/usr/bin/env bash
# The small study: MobileNet-V1 0.25 on Fashion-MNIST, every regularizer, 2-bit EWGS; about half an hour on two cores.
# Copies the records to results/records and writes the tables; what is finished is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)
"$python" -m r2.run -m data=fashion_mnist model=mbv1 model.width_mult=0.25 \
  reg=l2,l2_10x,kure,linf,margin,smm stage=ewgs stage.bits=2 "$@"
for record in outputs/fashion_mnist_mbv1-0.25_*_ewgs_w2a2_*/record.json; do
  cp "$record" "results/records/$(basename "$(dirname "$record")").json"
done
"$python" -m r2.tables results/records --out results
