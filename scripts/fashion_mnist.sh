#!/usr/bin/env bash
# The study in results/: Tables 2 to 6 on Fashion-MNIST with MobileNet-V1 and V2 at width 0.25, three seeds, by
# configs/recipe/study.yaml. A few hours on two cores; what is finished is not repeated. Arguments go on to r2.reproduce:
# plan=true says what would be done, records=results/records runs only what the repository lacks.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)
reproduce() {
  "$python" -m r2.reproduce data=fashion_mnist recipe=study model.width_mult=0.25 seeds=0,1,2 jobs=2 threads=1 "$@"
}
reproduce table=2,3 model=mbv1,mbv2 reg=l2,l2_10x,kure,linf,margin,smm "$@"
reproduce table=5,6 model=mbv1 "$@"
# The second part: other weights of the regularizers than the paper's 0.01.
weights() { reproduce model=mbv1 reg=linf,margin,smm reg.weight=0.001,0.1 "$@"; }
weights table=3 "$@"
weights table=2 stage=none,dfq "$@"
# Last, because one of these runs diverges (PACT, 2 bits, margin, seed 1), which ends the script with status 1.
reproduce table=4 model=mbv1 "$@"
