"""The loop of timm's train.py, its optimizer, schedule and EMA: L-inf, then DKM at 2 bits of the averaged weights.

python examples/timm_loop.py          # pip install timm
"""

import torch
from digits import IMAGES, LABELS, TRAIN, network, save_and_check
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch.nn.functional import cross_entropy

import r2


def train(model, lr, epochs, regularizer=None):
    optimizer = create_optimizer_v2(model.train(), "sgd", lr, weight_decay=1e-4)
    scheduler = CosineLRScheduler(optimizer, epochs)
    ema = ModelEmaV3(model, decay=0.98)  # as the optimizer, after compress: the quantizers are averaged too
    for epoch in range(epochs):
        for batch in torch.randperm(len(TRAIN)).split(50):
            optimizer.zero_grad()
            cross_entropy(model(IMAGES[batch]), LABELS[batch]).backward()
            if regularizer:
                regularizer.add_gradients()
            dispatch_clip_grad(model.parameters(), 1.0)
            optimizer.step()
            ema.update(model)
        scheduler.step(epoch + 1)
    return ema.module


model = network()
model = train(model, 0.05, 4, r2.regularizers.LInf(model))  # of the averaged model compression starts
r2.compress(model, "dkm", IMAGES[:50], bits=2)
save_and_check(train(model, 0.01, 3), "timm.safetensors", network())
