import json
import subprocess
import sys

import pytest
import torch
from conftest import ENV, SMALL
from torch import nn
from torch.nn import functional as F

from r2 import export
from r2.config import UserError
from r2.data.memory import fake
from r2.dist import World
from r2.export.__main__ import main
from r2.models import mobilenet_v1, mobilenet_v2, resnet18
from r2.palettize import Palette
from r2.quantizers.affine import Activation, Affine, quantize_input, quantize_output
from r2.quantizers.ewgs import EWGS
from r2.quantizers.layers import calibrate, compressed, quantizable, swap
from r2.quantizers.lsq import LSQ
from r2.quantizers.pact import PACT

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

DATA = fake(val_images=1000, num_classes=5, image_size=16).to(World())
TYPES = onnx.TensorProto


def small():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 64, 5),
    )  # fmt: skip


def trained(model, steps=25, lr=0.02):
    # Quantizers keep what calibration gave them: EWGS's bounds do not train by plain SGD.
    weights = [p for name, p in model.named_parameters() if ".quantizer." not in name]
    optimizer = torch.optim.SGD(weights, lr, momentum=0.9)
    model.train()
    for _, (images, labels) in zip(range(steps), (b for e in range(steps) for b in DATA.train(64, 0, e)), strict=False):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def affine(bits, weight, channels=True):
    quantizer = Affine(bits, len(weight) if channels else 1)
    low, high = weight.detach().reshape(quantizer.channels, -1).aminmax(dim=1)
    quantizer.scale.copy_((high - low) / (2**bits - 1))
    quantizer.zero_point.copy_((-low / quantizer.scale).round())
    return quantizer


QUANTIZERS = {
    "ewgs": lambda layer, bits: EWGS(bits, bits),
    "lsq": lambda layer, bits: LSQ(bits, bits),
    "pact": lambda layer, bits: PACT(bits, bits),
    "affine": lambda layer, bits: affine(bits, layer.weight),
}


def quantized(model, method, bits, first_bits=8, steps=10):
    """The trained model after a short fine-tuning through `method`; activations of affine by observed ranges."""
    layers = quantizable(model)
    first = next(iter(layers))
    images = next(DATA.calibration(64, 0))[0]
    if method == "affine":
        add_activations(model, images, bits)
    swap(layers, lambda name: QUANTIZERS[method](layers[name], bits))
    if method == "affine":
        return model.eval()
    layers[first].quantizer.act_bits = first_bits
    calibrate(model, layers, images)
    return trained(model, steps, lr=0.002)


@torch.no_grad()
def add_activations(model, images, bits):
    seen = {}
    modules = [m for m in model.modules() if isinstance(m, nn.ReLU | nn.ReLU6 | nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, _, out: seen.update({m: out.aminmax()})) for m in modules]
    model(images)
    for hook in hooks:
        hook.remove()
    for module, (low, high) in {**seen, next(iter(quantizable(model).values())): images.aminmax()}.items():
        scale = (high.clamp(min=0) - low.clamp(max=0)).item() / (2**bits - 1)
        place = quantize_output if module in seen else quantize_input
        place(module, Activation(bits, scale, round(-min(low.item(), 0) / scale)))


def graph_of(path):
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model.graph


def weight_types(graph):
    types = {i.name: i.data_type for i in graph.initializer}
    return {types[n.input[0]] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in types}


@pytest.mark.parametrize(
    "method, bits, weights",
    [
        ("ewgs", 1, TYPES.INT4), ("ewgs", 4, TYPES.INT8), ("ewgs", 8, TYPES.INT16),
        ("lsq", 2, TYPES.INT4), ("lsq", 8, TYPES.INT8), ("pact", 2, TYPES.INT4),
        ("affine", 4, TYPES.UINT4), ("affine", 10, TYPES.UINT16),
    ],
)  # fmt: skip
def test_same_predictions_as_torch(method, bits, weights, tmp_path):
    torch.manual_seed(0)  # the type of affine's zero points follows the weights
    model, path = quantized(trained(small()), method, bits), tmp_path / "model.onnx"
    export.to_onnx(model, path, next(DATA.val(2))[0])
    graph = graph_of(path)
    assert weight_types(graph) == {weights}
    operators = [node.op_type for node in graph.node]
    layers = len(compressed(model))
    assert operators.count("QuantizeLinear") == layers + (method == "affine")  # logits too
    assert operators.count("DequantizeLinear") == operators.count("QuantizeLinear") + layers
    # no Clip where the integer type has exactly the levels; the first layer has 8 bits, and PACT's are symmetric
    clips = {"ewgs": layers - 1, "lsq": layers - 1, "pact": layers, "affine": layers + 1}[method]
    assert operators.count("Clip") == (0 if bits == 8 else clips)
    found = export.check(model, path, DATA, World())
    assert found["images"] == 1000 and found["torch_top1"] > 50
    assert found["equal_predictions"] >= 99.9
    assert abs(found["torch_top1"] - found["onnx_top1"]) <= 0.1


def test_a_zero_point_outside_the_levels(tmp_path):
    model, path = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten()), tmp_path / "model.onnx"
    model[0].weight.data.abs_().add_(1)
    swap(quantizable(model), lambda name: affine(3, model[0].weight))
    assert model[0].quantizer.zero_point.max() < 0
    quantize_output(model[1], Activation(4, 0.5, 20.0))
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    export.to_onnx(model, path, images)
    logits = ort.InferenceSession(str(path)).run(None, {"images": images.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(logits), model(images).detach())


def test_float_layers_and_any_batch_size(tmp_path):
    model, path = trained(small(), 2), tmp_path / "model.onnx"
    layers = quantizable(model, skip_first_last=True)
    swap(layers, lambda name: LSQ(4, None))
    calibrate(model, layers, next(DATA.calibration(64, 0))[0])
    model.eval()
    export.to_onnx(model, path, torch.zeros(2, 3, 16, 16))
    assert b"/site-packages/" not in path.read_bytes() and b"tests" not in path.read_bytes()
    session = ort.InferenceSession(str(path))
    for count in (1, 7):
        images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
        logits = session.run(None, {"images": images.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(logits), model(images).detach(), atol=1e-4, rtol=1e-4)


def test_exporting_leaves_the_model_alone(tmp_path):
    model = quantized(trained(small(), 2), "ewgs", 4, steps=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export.to_onnx(model, tmp_path / "model.onnx", torch.zeros(2, 3, 16, 16))
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "quantizer, message",
    [
        (lambda: Palette(2, 1), r"0 \(palette, 2 bits\).*has no integers"),
        (lambda: EWGS(16, 8), r"0 \(ewgs, 16 bits\).*do not fit in 16 bits"),
        (lambda: EWGS(8, 17), r"0 \(ewgs, 8 bits\).*do not fit in 16 bits"),
        (lambda: PACT(32, None), r"0 \(pact, 32 bits\).*do not fit in 16 bits"),
    ],
)
def test_what_has_no_integer_form_is_named(quantizer, message, tmp_path):
    model = small()
    swap(quantizable(model), lambda name: quantizer())
    with pytest.raises(UserError, match=message):
        export.to_onnx(model, tmp_path / "model.onnx", torch.zeros(2, 3, 16, 16))
    assert not (tmp_path / "model.onnx").exists()


def test_command_line_errors_are_one_line(tmp_path, capsys, monkeypatch):
    def told(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([*arguments])
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1
        return lines[0]

    assert "model.safetensors: cannot be read" in told(str(tmp_path))
    from r2 import pack

    pack.save(resnet18(5, 0.25), tmp_path / "model.safetensors")
    assert "record.json" in told(str(tmp_path))
    assert told(str(tmp_path), "--to", "tflite") == "r2: --to tflite: no such target; there are onnx"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert told(str(tmp_path)) == "r2: ONNX export needs onnxruntime: pip install 'r2[export]'"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ewgs", "lsq", "pact", "affine"])
@pytest.mark.parametrize("build", [mobilenet_v1, mobilenet_v2, resnet18])
def test_whole_networks(build, method, tmp_path):
    torch.manual_seed(0)
    model = quantized(trained(build(5, 0.25), 150), method, 8, steps=80)
    export.to_onnx(model, tmp_path / "model.onnx", next(DATA.val(2))[0])
    graph_of(tmp_path / "model.onnx")
    found = export.check(model, tmp_path / "model.onnx", DATA, World())
    assert found["torch_top1"] > 50
    assert found["equal_predictions"] >= 99.9


@pytest.mark.slow
def test_a_run_is_exported_by_its_folder(r2, tmp_path):
    run = r2(*SMALL, "model=mbv1", "stage=ewgs", "stage.bits=4")
    assert run.returncode == 0, run.stderr
    folder = next(r2.out.glob("*/model.safetensors")).parent
    command = [sys.executable, "-m", "r2.export", str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=ENV)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    top1 = json.loads((folder / "record.json").read_text())["metrics"]["top1"]
    assert lines[2].startswith(f"top-1               torch {top1:.2f} %") and len(lines) == 5
    assert (folder / "model.onnx").exists()
