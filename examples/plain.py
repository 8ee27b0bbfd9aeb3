"""A model and a loop of your own: range regularization, then LSQ at 4 bits, a packed file, ONNX.

python examples/plain.py          # pip install '.[export]'
"""

import sys

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, interpolate
from torchvision.models import mobilenet_v3_small

import r2

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
torch.manual_seed(0)
digits = load_digits()
images = interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, (32, 32)).repeat(1, 3, 1, 1)
labels = torch.tensor(digits.target)


def train(model, regularizer=None, lr=0.05):
    optimizer = torch.optim.SGD(model.train().parameters(), lr, momentum=0.9)
    for batch in (batch for _ in range(epochs) for batch in torch.randperm(1500).split(50)):
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        if regularizer is not None:
            regularizer.add_gradients()  # in place; behind an all-reduce and GradScaler.unscale_, before clipping
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


model = mobilenet_v3_small(num_classes=10)
train(model, r2.regularizers.LInf(model, weight=0.01))
print(r2.compress(model, "lsq", images[:50], bits=4))
train(model, lr=0.01)
r2.pack.save(model.eval(), "plain.safetensors")
loaded = r2.pack.load("plain.safetensors", model=mobilenet_v3_small(num_classes=10))
r2.export.to_onnx(loaded, "plain.onnx", images[:2])
with torch.no_grad():
    ours = loaded(images[1500:]).argmax(1)
(theirs,) = onnxruntime.InferenceSession("plain.onnx").run(None, {"images": images[1500:].numpy()})
print(f"top-1 {100 * (ours == labels[1500:]).float().mean():.1f} %")
print(f"equal predictions in onnxruntime {100 * (ours.numpy() == theirs.argmax(1)).mean():.1f} %")
