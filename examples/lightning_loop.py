"""Lightning: KURE in `on_before_optimizer_step`, behind the unscaling and before the clipping; then LSQ at 4 bits.

python examples/lightning_loop.py     # pip install lightning
"""

import lightning
import torch
from digits import IMAGES, LABELS, TRAIN, network, save_and_check
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

import r2

DATA = DataLoader(Subset(TensorDataset(IMAGES, LABELS), TRAIN), 50, shuffle=True)
TRAINER = {"max_epochs": 6, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "accelerator": "cpu"}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


class Classifier(lightning.LightningModule):
    def __init__(self, model, lr, regularizer=None):
        super().__init__()
        self.model, self.lr, self.regularizer = model, lr, regularizer

    def training_step(self, batch):
        return cross_entropy(self.model(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer):
        if self.regularizer:
            self.regularizer.add_gradients()

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), self.lr, momentum=0.9)


model = network()
lightning.Trainer(**TRAINER, **QUIET).fit(Classifier(model, 0.05, r2.regularizers.Kurtosis(model, weight=0.1)), DATA)
r2.compress(model, "lsq", IMAGES[:50], bits=4)
lightning.Trainer(**TRAINER, **QUIET).fit(Classifier(model, 0.01), DATA)
save_and_check(model, "lightning.safetensors", network())
