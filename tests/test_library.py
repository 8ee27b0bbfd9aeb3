"""r2 in a loop of one's own: any model, in place, with a report, to a packed file and back."""

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


def test_the_range_of_inputs_and_levels_are_those_asked_for():
    model = made()
    r2.compress(model, "lsq", IMAGES, bits=2, layer_bits={"head": 8}, skip_first_last=False)
    levels = {name: len(layer.quantizer.weight(layer.weight).unique()) for name, layer in compressed(model).items()}
    assert levels["depthwise"] <= 4 < levels["head"]


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


@pytest.mark.slow
def test_the_example_of_a_loop_runs(tmp_path):
    pytest.importorskip("onnxruntime")
    program = Path(__file__).parents[1] / "examples" / "plain.py"
    done = subprocess.run([sys.executable, program, "1"], cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "equal predictions in onnxruntime 100.0 %" in done.stdout, done.stderr
    assert len(program.read_text().splitlines()) <= 50
