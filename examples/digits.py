"""What the examples share: scikit-learn's digits, a small network, and what is asked of a packed file."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import r2

_digits = load_digits()
IMAGES = torch.tensor(_digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
LABELS = torch.tensor(_digits.target)
TRAIN, TEST = range(1500), range(1500, 1797)
torch.manual_seed(0)


def network():
    layers = [nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))


@torch.no_grad()
def save_and_check(model, path, fresh, logits=lambda output: output):
    """Pack `model`, read the file into the new network `fresh`, and compare the two on the test images."""
    r2.pack.save(model.eval(), path)
    ours, theirs = (logits(net(IMAGES[TEST])) for net in (model, r2.pack.load(path, fresh)))
    print(f"top-1 {100 * (theirs.argmax(1) == LABELS[TEST]).float().mean():.1f} %, equal logits: {ours.equal(theirs)}")
