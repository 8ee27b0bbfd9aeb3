"""A loop of your own with AMP, accumulation and clipping: margin regularization, then LSQ at 4 bits.

python examples/plain.py
"""

import torch
from digits import IMAGES, LABELS, TRAIN, network, save_and_check
from torch.nn.functional import cross_entropy

import r2


def train(model, lr, regularizer=None):
    groups = regularizer.param_groups(lr) if regularizer else []  # a margin per layer is learned too
    optimizer = torch.optim.SGD([{"params": model.train().parameters()}, *groups], lr, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    for halves in (batch.split(25) for _ in range(3) for batch in torch.randperm(len(TRAIN)).split(50)):
        optimizer.zero_grad()
        for half in halves:
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(model(IMAGES[half]), LABELS[half]) / len(halves)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if regularizer:
            regularizer.add_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


model = network()
train(model, 0.05, r2.regularizers.Margin(model))
print(r2.compress(model, "lsq", IMAGES[:50], bits=4))
train(model, 0.01)
save_and_check(model, "plain.safetensors", network())
