"""r2 in a loop of one's own: any model, in place, with a report, to a packed file and back."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_dir
from torch import nn
from torch.nn import functional as F

import r2
from r2.config import UserError
from r2.paths import CONFIGS
from r2.quantizers.layers import compressed


class Padded(nn.Conv2d):
    """With a forward of its own, as in timm."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Named(nn.Linear):
    """A subclass that computes what a linear layer does."""


class Net(nn.Module):
    """Every kind of layer that can be compressed, and every reason why one is not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.padded = Padded(8, 8, 3)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.line = nn.Conv1d(4, 6, 3)
        self.volume = nn.Conv3d(1, 2, 3, padding=1)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(12, 12))
        self.position = nn.Parameter(torch.randn(1, 12))
        self.unused = nn.Linear(12, 12)
        self.dropout = nn.Dropout(0.5)
        self.head = Named(12, 5)

    def forward(self, x):
        x = F.relu(self.padded(self.depthwise(F.relu(self.norm(self.conv(x))))))
        x = self.volume(self.line(self.up(x).flatten(2))[:, None, :, :, None])
        x = F.adaptive_avg_pool1d(x.flatten(1)[:, None], 12) + self.position
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.dropout(F.relu(self.normed(x)))).mean(1)


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SETTINGS = {"ewgs": {"bits": 4}, "lsq": {"bits": 4, "granularity": "channel"}, "pact": {"bits": 4}, "dkm": {"bits": 2}}
TAKEN = {"conv", "depthwise", "up", "line", "volume", "head"}
LEFT = {"padded", "attention.in_proj_weight", "attention.out_proj", "normed", "position"}


def made():
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("method", SETTINGS)
def test_any_model_is_compressed_trained_packed_and_read(method, tmp_path):
    model = made()
    before, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    report = r2.compress(model, method, IMAGES, **SETTINGS[method])
    assert model.training and torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items() if key in before)
    unused = {"unused"} if method != "dkm" else set()  # dkm looks at weights alone
    assert set(report.compressed) == TAKEN | ({"unused"} - unused) and set(report.left_out) == LEFT | unused
    assert all(name in str(report) for name in (*report.compressed, *report.left_out))
    regularizer = r2.regularizers.LInf(model.depthwise)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), torch.tensor([0, 1, 2, 3])).backward()
        regularizer.add_gradients()
        optimizer.step()
    assert all(not torch.equal(before[f"{name}.weight"], model.get_parameter(f"{name}.weight")) for name in TAKEN)
    r2.pack.save(model.eval(), tmp_path / "net.safetensors")
    loaded = r2.pack.load(tmp_path / "net.safetensors", model=Net())
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_the_widths_of_inputs_and_weights_are_those_asked_for():
    model = made()
    r2.compress(model, "lsq", IMAGES, bits=2, layer_bits={"head": 8}, skip_first_last=False)
    levels = {name: len(layer.quantizer.weight(layer.weight).unique()) for name, layer in compressed(model).items()}
    assert levels["depthwise"] <= 4 < levels["head"]
    widths = {name: layer.quantizer.act_bits for name, layer in compressed(model).items()}
    assert (widths["depthwise"], widths["head"]) == (2, 8)


def test_a_file_of_another_model_names_what_does_not_fit(tmp_path):
    path = tmp_path / "net.safetensors"
    model = made()
    r2.compress(model, "lsq", IMAGES, bits=4)
    r2.pack.save(model.eval(), path)
    with pytest.raises(UserError, match=r"holds a Net of your own; give one: r2.pack.load\(path, model=...\)"):
        r2.pack.load(path)
    other = Net()
    other.head = Named(12, 7)
    with pytest.raises(UserError, match=r"head.bias is \(5,\) torch.float32, not \(7,\)"):
        r2.pack.load(path, model=other)
    with pytest.raises(UserError, match="the model has no layer conv"):
        r2.pack.load(path, model=nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UserError, match="compressed already"):
        r2.pack.load(path, model=model)


def test_a_network_of_r2_with_another_head_is_one_of_ones_own(tmp_path):
    from r2 import models

    torch.manual_seed(0)
    model = models.resnet18(10, 0.125)
    model.fc = nn.Linear(model.fc.in_features, 37)
    r2.pack.save(model.eval(), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="of your own"):
        r2.pack.load(tmp_path / "m.safetensors")
    same = models.resnet18(10, 0.125)
    same.fc = nn.Linear(same.fc.in_features, 37)
    loaded = r2.pack.load(tmp_path / "m.safetensors", model=same)
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))


@pytest.mark.parametrize("method, settings, line", [
    ("lsqq", {}, "choose from ewgs, lsq, pact, dkm"),
    ("lsq", {"bits": 99}, "bits"),
    *((method, {"bits": 17}, "bits=17: .* at most 16 bits") for method in ("ewgs", "lsq", "pact")),
    ("lsq", {"bits": 8, "layer_bits": {"conv": 17}}, "layer_bits.conv=17: .* at most 16 bits"),
    ("dkm", {"bits": 17}, "bits=17: .* at most 8 bits"),
    ("dkm", {"layer_bits": {"conv": 9}}, "layer_bits.conv=9: .* at most 8 bits"),
    ("lsq", {"bit": 4}, "bit=4: is no setting of lsq; known are bits"),
    ("lsq", {"lr": 0.1}, "lr=0.1: is no setting of lsq"),
    ("ewgs", {"delta": "hessian"}, "give a number"),
    ("lsq", {"layer_bits": {"nowhere": 4}}, "no layer fits 'nowhere'"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_the_model_as_it_was(method, settings, line):
    model = made()
    with pytest.raises(UserError, match=line) as told:
        r2.compress(model, method, IMAGES, **settings)
    assert "\n" not in str(told.value) and not compressed(model)


def test_it_works_inside_a_program_of_hydras():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert "conv" in r2.compress(made(), "lsq", IMAGES, bits=4).compressed


def test_a_batch_of_the_wrong_shape_and_a_second_time_are_refused():
    model = made()
    with pytest.raises(UserError, match="does not take the batch"):
        r2.compress(model, "lsq", torch.randn(2, 5, 8, 8), bits=4)
    assert not compressed(model) and type(model.conv) is nn.Conv2d and type(model.head) is Named
    r2.compress(model, "lsq", IMAGES, bits=4)
    with pytest.raises(UserError, match="compressed already"):
        r2.compress(model, "dkm", IMAGES, bits=1)
    with pytest.raises(UserError, match="no convolution, linear layer or embedding"):
        r2.compress(nn.Sequential(nn.ReLU()), "lsq", IMAGES)


def test_import_r2_needs_no_torch():
    code = "import sys, r2; assert r2.__version__[0].isdigit() and 'torch' not in sys.modules; r2.compress"
    subprocess.run([sys.executable, "-c", code], check=True)


class Text(nn.Module):
    """Tokens by keyword; an embedding whose weight the head shares, and layers that none of the methods knows."""

    def __init__(self):
        super().__init__()
        self.embedding, self.bag = nn.Embedding(11, 8), nn.EmbeddingBag(11, 8)
        self.table = nn.Embedding(11, 8, max_norm=1.0)
        self.frozen, self.head = nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, tokens, scale):
        x = self.frozen(self.embedding(tokens) + self.table(tokens))
        return scale * self.head(self.lstm(x)[0] + self.bag(tokens)[:, None])


TOKENS = torch.arange(12).view(3, 4) % 11


@pytest.mark.parametrize("batch", [{"tokens": TOKENS, "scale": 2.0}, (TOKENS, 2.0)], ids=["keywords", "positions"])
@pytest.mark.parametrize("method", SETTINGS)
def test_embeddings_shared_and_frozen_weights_of_a_model_with_several_inputs(method, batch, tmp_path):
    torch.manual_seed(0)
    model = Text()
    report = r2.compress(model, method, batch, **SETTINGS[method])
    assert set(report.compressed) == {"embedding", "frozen", "head"} and model.head.weight is model.embedding.weight
    assert method == "dkm" or report.compressed["embedding"] == "weights 4 bits, inputs as they are"
    assert "max_norm" in report.left_out["table"]
    assert set(report.left_out) == {"table", "bag.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1)
    F.cross_entropy(model(TOKENS, 2.0).flatten(0, 1), TOKENS.flatten()).backward()
    r2.regularizers.LInf(model).add_gradients()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "embedding.weight" in moved and not {"frozen.weight", "frozen.bias"} & moved
    r2.pack.save(model.eval(), tmp_path / "text.safetensors")
    with torch.no_grad():
        assert torch.equal(r2.pack.load(tmp_path / "text.safetensors", Text())(TOKENS, 2.0), model(TOKENS, 2.0))


@pytest.mark.parametrize("method", SETTINGS)
def test_what_cannot_be_compressed_is_one_line_for_every_method(method):
    nothing, wrapped = nn.Sequential(nn.ReLU()), nn.DataParallel(nn.Linear(2, 2))
    for model, line in (
        (nothing, "no convolution, linear layer"),
        (wrapped, "is wrapped in DataParallel; compress the"),
    ):
        with pytest.raises(UserError, match=line):
            r2.compress(model, method, torch.randn(4, 2))


# The order in a step


def halves(total=8):
    return torch.randn(total, 6, generator=torch.Generator().manual_seed(2)).split(total // 2)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def one_step(model, regularizer, optimizer, batches, scaler, each=False):
    for batch in batches:
        scaler.scale(model(batch).square().mean() / len(batches)).backward()
        if each:
            regularizer.add_gradients()
    scaler.unscale_(optimizer)
    if not each:
        regularizer.add_gradients()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    return norm


@pytest.mark.parametrize("kind", ["LInf", "Margin", "SoftMinMax", "Kurtosis"])
def test_accumulated_scaled_and_clipped_a_step_is_that_of_the_whole_batch(kind):
    """Called once per update and before clipping: the term counts once, and the clipped norm is of the sum."""

    def after(batches, scaled, **how):
        model = small()
        regularizer = getattr(r2.regularizers, kind)(model, weight=0.3)
        groups = [{"params": model.parameters()}, *regularizer.param_groups(0.1)]
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        norm = one_step(model, regularizer, torch.optim.SGD(groups, 0.1), batches, scaler, **how)
        return norm, torch.cat([p.detach().flatten() for p in (*model.parameters(), *regularizer.parameters())])

    norm, expected = after([torch.cat(halves())], scaled=False)
    assert norm > 0.1  # the clipping has something to do
    found, weights = after(halves(), scaled=True)
    torch.testing.assert_close((found, weights), (norm, expected))
    assert not torch.allclose(after(halves(), scaled=True, each=True)[1], expected)


def _process(rank, folder, method):
    """One of two: its half of every batch; the regularizer before, the compressed model after."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = small()
    trained = nn.parallel.DistributedDataParallel(model)
    regularizer, optimizer = r2.regularizers.LInf(model, weight=0.3), torch.optim.SGD(model.parameters(), 0.1)
    one_step(trained, regularizer, optimizer, [halves()[rank]], torch.amp.GradScaler("cpu"))
    torch.save(model.state_dict(), f"{folder}/{rank}.pth")
    r2.compress(model, method, torch.cat(halves()), **SETTINGS[method])
    trained = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        trained(halves()[rank]).square().mean().backward()
        optimizer.step()
    r2.pack.save(model.eval(), f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("method", SETTINGS)
def test_two_processes_follow_one(method, tmp_path):
    """Behind DDP's all-reduce the term is the same on every rank; compressed models stay the same too."""
    torch.multiprocessing.start_processes(_process, (str(tmp_path), method), nprocs=2, start_method="spawn")
    model = small()
    regularizer, optimizer = r2.regularizers.LInf(model, weight=0.3), torch.optim.SGD(model.parameters(), 0.1)
    one_step(model, regularizer, optimizer, [torch.cat(halves())], torch.amp.GradScaler("cpu"))
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pth"), dict(model.state_dict()))
    first, second = ((tmp_path / f"{rank}.safetensors").read_bytes() for rank in (0, 1))
    assert first == second


@pytest.mark.parametrize("method", SETTINGS)
def test_the_averaged_weights_of_a_compressed_model_are_packed(method, tmp_path):
    """By torch's own EMA, made after compress: the quantizers' parameters are averaged with the weights."""
    model = made()
    r2.compress(model, method, IMAGES, **SETTINGS[method])
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        ema.update_parameters(model)
    r2.pack.save(ema.module.eval(), tmp_path / "ema.safetensors")
    loaded = r2.pack.load(tmp_path / "ema.safetensors", model=Net())
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), ema.module(IMAGES))
        assert not torch.equal(loaded(IMAGES), model.eval()(IMAGES))


# The examples

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name, package, lines, least, said", [
    ("plain", "sklearn", 40, 80, "equal logits: True"),
    ("hf_trainer", "accelerate", 40, 60, "equal logits: True"),
    ("lightning_loop", "lightning", 40, 80, "equal logits: True"),
    ("timm_loop", "timm", 40, 80, "equal logits: True"),
    ("ship", "onnxruntime", 25, 60, "equal: True"),
])  # fmt: skip
def test_an_example_learns_and_its_packed_file_says_the_same(name, package, lines, least, said, tmp_path):
    """Of ten classes, so chance is 10 %."""
    pytest.importorskip(package)
    program = EXAMPLES / f"{name}.py"
    assert len(program.read_text().splitlines()) <= lines
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert float(re.match(r"top-1 (\S+) %", last)[1]) > least and said in last, last


class Unet(nn.Module):
    """Calls a transposed convolution with the size it wants, and a convolution by keyword."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1)

    def forward(self, x):
        return self.up(self.down(input=x), output_size=x.shape[-2:])


@pytest.mark.parametrize("method", SETTINGS)
def test_layers_take_the_arguments_that_pytorchs_do(method):
    torch.manual_seed(0)
    model = Unet()
    report = r2.compress(model, method, IMAGES, **SETTINGS[method])
    assert set(report.compressed) == {"down", "up"} and not report.left_out
    assert model(IMAGES).shape == IMAGES.shape
    assert model.up(torch.randn(1, 4, 5, 5), [10, 10]).shape == (1, 3, 10, 10)


@pytest.mark.parametrize("method", SETTINGS)
def test_two_forwards_of_one_step_have_the_gradients_of_both(method):
    """As in contrastive losses: what DKM's first forward changes, its centroids, must not spoil the backward of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5))
    r2.compress(model, method, IMAGES, **SETTINGS[method])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = torch.randn(4, 3, 8, 8)

    def gradients(*passes):
        """Of the passes' losses, each backward at once, or with all in one tuple after the last forward."""
        model.load_state_dict(state)
        model.zero_grad()
        for batches in passes:
            sum(model(batch).square().mean() for batch in batches).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together, apart = gradients((IMAGES, other)), gradients((IMAGES,), (other,))
    assert len(together) > 6 if method != "dkm" else len(together) == 6
    for one, two in zip(together, apart, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["ewgs", "lsq", "pact"])
def test_silenced_channels_neither_stop_nor_blow_up_a_2_bit_training(method):
    """Without variance BatchNorm multiplies a gradient by 1 / sqrt(eps) = 316, layer after layer."""
    torch.manual_seed(0)
    blocks = [[nn.Conv2d(8 if i else 3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()] for i in range(8)]
    model = nn.Sequential(*(module for block in blocks for module in block), nn.Flatten(), nn.Linear(512, 5))
    for conv, _, _ in blocks:
        conv.weight.data[2:5] = 0.0
    images, labels = torch.randn(32, 3, 8, 8), torch.randint(0, 5, (32,))
    r2.compress(model, method, images, bits=2)
    before = [conv.weight.detach().clone() for conv, _, _ in blocks]
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # the stages' clip_norm
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses[-1] < losses[0]
    assert all(
        (conv.weight[[0, 1, 5, 6, 7]] != w[[0, 1, 5, 6, 7]]).any() for (conv, *_), w in zip(blocks, before, strict=True)
    )
