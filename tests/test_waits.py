"""The loop that trains queues its steps on a device and never looks at their results, but for the loss now and then."""

import io

import pytest
import torch
from torch import nn
from waits import Waits

from r2 import console, kernels, models, palettize
from r2.clustering import passes
from r2.config import build
from r2.console import Phase
from r2.data.batches import Data
from r2.data.memory import Memory
from r2.data.text import Pairs, Text
from r2.dist import World
from r2.plan.cells import cells_of
from r2.recipe import optimizer_of
from r2.store import Run
from r2.training import loop
from r2.training.timing import Timing

REGULARIZERS = [f"reg={name}" for name in ("l2", "l2_10x", "kure", "linf", "margin", "smm")]
SIZES = [(1, 1), (2, 1), (4, 1), (2, 2), (4, 4)]
DKM = [f"stage=dkm stage.bits={bits} stage.dim={dim} stage.iterations=2" for bits, dim in SIZES]
QAT = ["stage=ewgs", "stage=lsq", "stage=pact reg=margin"]
NETWORKS = {"rn18": lambda: models.resnet18(10, 0.125), "mbv2": lambda: models.mobilenet_v2(10, 0.25)}


def mobilebert():
    pytest.importorskip("transformers", reason="pip install 'r2[nlp]'")
    from r2.zoo.mobilebert import network

    settings = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
        "embedding_size": 16, "intra_bottleneck_size": 32, "max_position_embeddings": 16,
    }  # fmt: skip
    return network(2, settings)


class Watched(Data):
    """Three steps, two of which `waits` sees: from handing out a batch to being asked for the next.

    The third is the last one of its epoch, at which the loss may be looked at.
    """

    num_classes, image_size, train_images, val_images, calibration_images = 2, 32, 12, 2, 4

    def __init__(self, text):
        tokens = torch.randint(0, 64, (12, 16))
        named = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "token_type_ids": tokens % 2}
        self.inputs = named if text else {"": torch.randn(12, 3, 32, 32)}
        self.waits = Waits()

    def _contents(self):
        return (tensor.numpy() for tensor in self.inputs.values())

    def _batches(self, indices, size, seed, epoch, train):
        for at in indices.split(size):
            batch = {name: tensor[at] for name, tensor in self.inputs.items()}
            yield batch.get("", batch), at % 2

    def train(self, *arguments):
        *most, last = super().train(*arguments)
        for batch in most:
            with self.waits:
                yield batch
        yield last


@pytest.fixture
def as_on_a_device(monkeypatch):
    """What runs on a GPU, on the CPU, and without compiled kernels, into which the test could not see."""
    for module in (passes, palettize):
        monkeypatch.setattr(module, "on_host", lambda x: False)
    monkeypatch.setattr(kernels.fused, "__call__", lambda self, *arguments: self.plain(*arguments))
    monkeypatch.setattr(loop, "looks_every", lambda world: 10)
    # k-means, before the first step, takes longer than the steps
    monkeypatch.setattr(palettize, "initial_centroids", lambda v, k, seed: v[torch.linspace(0, len(v) - 1, k).long()])


def twenty_five_steps_of(kind):
    """Batches of 4, the data as they are on a device."""
    labels = torch.arange(100) % 2
    if kind == "text":
        tokens = torch.randint(0, 64, (100, 16), dtype=torch.int32)
        pairs = Pairs(tokens, (tokens % 2).byte(), torch.randint(4, 16, (100,)), labels)
        return Text(pairs, pairs, 2, 4)
    images = torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8)
    return Memory((images, labels), (images[:4], labels[:4]), 2, 4, augment=True, flip=True)


def trained(model, words, folder, data=None):
    """The data, by default `Watched`, after the stage that these words configure, or else after pretraining."""
    text = hasattr(model, "mobilebert")
    group = ["data=qnli", "model=mobilebert"] if text else ["data=fake", "recipe=smoke"]
    small = ["recipe.batch_size=4", "recipe.finetune.batch_size=4", "recipe.epochs=1", "recipe.finetune.epochs=1"]
    config = cells_of([*group, *small, "recipe.clip_norm=1.0", *words])[0].config
    data = (data or Watched(text)).to(World())
    recipe, stage = build(config["recipe"]), build(config["stage"])
    regularizer = build(config["reg"], model)
    run = Run(folder, "key", World(), 0, 1e9, lambda row: None)
    if stage.weight_bits is None:
        loop.train(model, data, recipe, run, "pretrain", [optimizer_of(model, recipe, regularizer)], regularizer)
    else:
        stage(model, data, recipe, run, regularizer)
    return data


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("words", [*REGULARIZERS, *QAT, *DKM])
def test_a_step_waits_for_nothing(words, network, tmp_path, as_on_a_device):
    torch.manual_seed(0)
    waits = trained(NETWORKS[network](), words.split(), tmp_path).waits
    assert waits.seen > 500 and not waits.found


@pytest.mark.parametrize("words", ["reg=linf", "reg=margin", "reg=smm", *DKM])
def test_a_step_of_mobilebert_waits_for_nothing(words, tmp_path, as_on_a_device):
    torch.manual_seed(0)
    waits = trained(mobilebert(), words.split(), tmp_path).waits
    assert waits.seen > 500 and not waits.found


@pytest.mark.parametrize("kind", ["images", "text"])
def test_every_tenth_step_waits_with_data_and_progress_bar(kind, tmp_path, monkeypatch, as_on_a_device):
    monkeypatch.setattr(console, "console", console.Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr(Phase, "due", lambda self: self.live)  # as after a slow step
    waits, steps, waiting = Waits(), [], Timing.waiting

    def watched(timing, batches):
        with waits:
            for batch in waiting(timing, batches):
                yield batch
                steps.append([*waits.found])
                waits.found.clear()

    monkeypatch.setattr(Timing, "waiting", watched)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 30 * 30, 2))
    trained(mobilebert() if kind == "text" else model, ["reg=margin"], tmp_path, twenty_five_steps_of(kind))
    assert len(steps) == 25
    if kind == "text":
        steps[0] = []  # reads the lengths of all pairs, which are on the CPU
    assert {at: found for at, found in enumerate(steps) if found} == dict.fromkeys(
        (9, 19, 24),
        ["_local_scalar_dense", "tolist"],  # the losses since the last look, and at once the bar's numbers
    )


def test_waits_are_seen(tmp_path):
    w = torch.randn(8)
    looks = (lambda: w.sum().item(), lambda: w[w > 0], lambda: w[w.argmax()], lambda: w.nonzero())
    copies = (lambda: w.tolist(), lambda: w.to(w.device), lambda: torch.tensor(1.0, device=w.device))
    for wait in (*looks, *copies):
        with Waits() as waits:
            wait()
        assert waits.found
    with Waits() as waits:
        w[torch.tensor([1])] += w.sum()
    assert not waits.found
    # on a CPU every step looks at its loss
    assert trained(models.mobilenet_v1(10, 0.25), ["reg=l2"], tmp_path).waits.found == 2 * ["_local_scalar_dense"]
