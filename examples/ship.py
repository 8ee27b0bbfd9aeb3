# MobileNet-V3 (BatchNorm: torchvision's momentum of 0.01 lags behind so short a training) to a file of 4 bits and ONNX
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torchvision.models import mobilenet_v3_small

import r2

digits, model = load_digits(), mobilenet_v3_small(num_classes=10, norm_layer=torch.nn.BatchNorm2d)
images, labels = torch.tensor(digits.images / 8 - 1).float()[:, None].repeat(1, 3, 4, 4), torch.tensor(digits.target)
for lr, regularizer in ((2e-3, r2.regularizers.LInf(model)), (5e-4, None)):
    if regularizer is None:
        r2.compress(model, "lsq", images[:100], bits=4)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for batch in torch.randint(1500, (200, 50)):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
        (loss + regularizer() if regularizer else loss).backward()
        optimizer.step()
r2.pack.save(model.eval(), "ship.safetensors")
loaded = r2.pack.load("ship.safetensors", mobilenet_v3_small(num_classes=10, norm_layer=torch.nn.BatchNorm2d))
r2.export.to_onnx(loaded, "ship.onnx", images[:2])
(onnx,) = onnxruntime.InferenceSession("ship.onnx").run(None, {"images": images[1500:].numpy()})
ours, read, theirs = (f.argmax(1) for f in (model(images[1500:]), loaded(images[1500:]), torch.tensor(onnx)))
print(f"top-1 {100 * (read == labels[1500:]).float().mean():.1f} %, equal: {ours.equal(read) and read.equal(theirs)}")
