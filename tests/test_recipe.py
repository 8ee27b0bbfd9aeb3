import math

import pytest
import torch
from torch import nn

from r2.data.memory import fake
from r2.dist import World
from r2.recipe import Recipe, finetuning, learning_rate, optimizer_of
from r2.regularizers import L2, Margin
from r2.training.loop import arithmetic, evaluate, fast_arithmetic

MODEL = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))


def recipe(**changed):
    return Recipe(**{"epochs": 1, "batch_size": 1, "lr": 0.1, "weight_decay": 0.01} | changed)


def test_schedules_start_at_the_learning_rate_and_end_near_0():
    assert [learning_rate(step, 10, 0, "linear") for step in (0, 5, 9)] == pytest.approx([1, 0.5, 0.1])
    assert [learning_rate(step, 12, 2, "linear") for step in (0, 1, 2, 7, 11)] == pytest.approx([0.5, 1, 1, 0.5, 0.1])
    last = (1 + math.cos(0.9 * math.pi)) / 2
    assert [learning_rate(step, 10, 0) for step in (0, 5, 9)] == pytest.approx([1, 0.5, last])


def test_sgd_decays_everything_and_adamw_matrices_alone():
    sgd = optimizer_of(MODEL, recipe(), L2(MODEL, factor=10))
    assert isinstance(sgd, torch.optim.SGD) and [g["weight_decay"] for g in sgd.param_groups] == [0.1]
    adamw = optimizer_of(MODEL, recipe(optimizer="adamw"), Margin(MODEL))
    decays = {id(p): g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert isinstance(adamw, torch.optim.AdamW) and len(decays) == 6 + 1  # with the margins
    assert all(decays[id(p)] == (0.01 if p.ndim == 2 else 0.0) for p in MODEL.parameters())


def test_fine_tuning_keeps_the_optimizer_and_the_schedule():
    kept = finetuning(recipe(optimizer="adamw", schedule="linear", clip_norm=1.0), 2, 8, 0.5, 0.0, clip_norm=None)
    assert (kept.optimizer, kept.schedule, kept.epochs, kept.lr, kept.clip_norm) == ("adamw", "linear", 2, 0.5, None)


@pytest.mark.parametrize("sync_bn, devices, batch_size, accumulate, synchronised", [
    ("auto", 1, 8, 1, False), ("auto", 2, 32, 1, True), ("auto", 2, 34, 1, False), ("auto", 8, 256, 2, True),
    (True, 8, 2048, 1, True), (False, 8, 8, 1, False),
])  # fmt: skip
def test_batchnorm_is_synchronised_where_a_device_has_few_images(
    sync_bn, devices, batch_size, accumulate, synchronised
):
    made = recipe(sync_bn=sync_bn, batch_size=batch_size, accumulate=accumulate)
    assert made.syncs_batchnorm(devices) is synchronised


def flags():
    """TF32 in products and in convolutions, and whether cuDNN times its algorithms."""
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, not cudnn.deterministic


class Flags(nn.Module):
    """Notes how products are computed, and whether for gradients."""

    def forward(self, x):
        self.found = (*flags(), torch.is_grad_enabled())
        return torch.zeros(len(x), 10)


@pytest.mark.parametrize("precision, device, fast", [("bf16", "cuda", True), ("fp16", "cuda", True),
                                                     ("fp32", "cuda", False), ("bf16", "cpu", False)])  # fmt: skip
def test_training_in_16_bits_alone_computes_float32_fast_and_evaluation_never_does(precision, device, fast):
    before, made, model = flags(), recipe(precision=precision), Flags()
    with arithmetic(fast_arithmetic(made, torch.device(device))):
        model(torch.zeros(1))
        assert model.found == (fast, fast, fast, fast, True)
        evaluate(model, fake(val_images=4).to(World()), World(), made)
        assert model.found == (False, False, False, False, False)
        assert flags() == (fast, fast, fast, fast)
    assert flags() == before
