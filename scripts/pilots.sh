#!/usr/bin/env bash
# The pilots of the methods in docs/pilots.md: MobileNet-V1 0.25 on Fashion-MNIST, three regularizers, seeds 100 to 102,
# which no study uses, with the strides, weight decay and learning rate that came before the study's. What is finished is skipped.
# scripts/pilots.py prints the table. More arguments go to every command.
set -euo pipefail
cd "$(dirname "$0")/.."
sweep() {
  "${PYTHON:-.venv/bin/python}" -m r2.run -m data=fashion_mnist model=mbv1 model.width_mult=0.25 recipe=study recipe.epochs=6 \
    recipe.finetune.epochs=1 recipe.finetune.lr=0.01 recipe.weight_decay=4e-5 model.small_input=false threads=1 \
    reg=l2,linf,margin seed=100,101,102 out=outputs/pilots "$@"
}
sweep stage=none stage.fold_constant=true,false "$@"
sweep stage=ewgs stage.weight_init=capped,official "$@"
sweep stage=dkm stage.bits=1 stage.temperature_mode=relative,absolute "$@"
sweep stage=lsq stage.act_init=fitted,official stage.step_limit=0.1,null "$@"
sweep stage=dfq "$@"
sweep stage=dkm stage.bits=2 stage.temperature_mode=relative,absolute "$@"
sweep stage=dkm stage.bits=4 stage.temperature_mode=relative,absolute "$@"
sweep stage=dkm stage.bits=1 stage.temperature=0.05,0.1,0.2 "$@"
sweep stage=dkm stage.bits=2 stage.temperature=0.05 "$@"
sweep stage=pact stage.alpha=null,8.0 "$@"
sweep stage=lsq reg=smm "$@"
sweep stage=fp32 reg=margin reg.lr_mult=0.1,10 "$@"
