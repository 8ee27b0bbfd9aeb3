"""Hugging Face's Trainer: L-inf by a callback, then LSQ at 4 bits of a small ViT.

python examples/hf_trainer.py         # pip install transformers accelerate
"""

from digits import IMAGES, LABELS, TRAIN, save_and_check
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

import r2

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = ViTConfig(**SIZES, image_size=8, patch_size=2, num_channels=1, num_labels=10)
SETTINGS = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}


class Range(TrainerCallback):
    """Behind the all-reduce, the unscaling and the clipping, so that only the loss's gradient is clipped."""

    def __init__(self, regularizer):
        self.regularizer = regularizer

    def on_pre_optimizer_step(self, *_, **__):
        self.regularizer.add_gradients()


def train(model, lr, epochs, *callbacks):
    batches = {"per_device_train_batch_size": 25, "gradient_accumulation_steps": 2, "num_train_epochs": epochs}
    arguments = TrainingArguments("hf", learning_rate=lr, **batches, **SETTINGS)
    data = [{"pixel_values": IMAGES[i], "labels": LABELS[i]} for i in TRAIN]
    Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks)).train()


model = ViTForImageClassification(CONFIG)
train(model, 2e-3, 12, Range(r2.regularizers.LInf(model)))
print(r2.compress(model, "lsq", IMAGES[:50], bits=4))
train(model, 5e-4, 4)
save_and_check(model, "hf.safetensors", ViTForImageClassification(CONFIG), lambda output: output.logits)
