import json
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ENV, SMALL
from PIL import Image
from torch import nn
from torch.nn import functional as F

from r2 import export, pack, store
from r2.config import UserError
from r2.data.batches import IGNORED
from r2.data.facts import FACTS
from r2.data.memory import digits, fake
from r2.dist import World
from r2.export import TARGETS
from r2.export.__main__ import _preprocessing, _write, main
from r2.export.pt2 import pack as pack_codes
from r2.export.pt2 import unpack
from r2.models import mobilenet_v1, mobilenet_v2, resnet18
from r2.palettize import Palette
from r2.quantizers.affine import Activation, Affine, quantize_input, quantize_output
from r2.quantizers.calibration import calibrate
from r2.quantizers.ewgs import EWGS
from r2.quantizers.layers import compressed, quantizable, swap
from r2.quantizers.lsq import LSQ
from r2.quantizers.pact import PACT
from r2.record import SCHEMA, digest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
numpy_helper = pytest.importorskip("onnx.numpy_helper")

DATA = fake(val_images=1000, num_classes=5, image_size=16).to(World())
TYPES = onnx.TensorProto


def small():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 64, 5),
    )  # fmt: skip


def odd():
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(7, 7, 3, padding=1, groups=7, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 512), nn.ReLU(), nn.Linear(512, 48), nn.Linear(48, 2),
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


def palettized(model, bits, dim):
    swap(quantizable(model), lambda name: Palette(bits, dim))
    for layer in compressed(model).values():
        layer.quantizer.initialise(None, layer.weight, layer.operation)
    return model.eval()


QUANTIZERS = {
    "ewgs": lambda layer, bits, act_bits: EWGS(bits, act_bits),
    "lsq": lambda layer, bits, act_bits: LSQ(bits, act_bits),
    "pact": lambda layer, bits, act_bits: PACT(bits, act_bits),
    "affine": lambda layer, bits, act_bits: affine(bits, layer.weight),
}


def quantized(model, method, bits, first_bits=8, steps=10):
    """The trained model after a short fine-tuning through `method`; activations of affine by observed ranges."""
    layers = quantizable(model)
    first = next(iter(layers))
    images = next(DATA.calibration(64, 0))[0]
    if method == "affine":
        add_activations(model, images, bits)
    swap(layers, lambda name: QUANTIZERS[method](layers[name], bits, first_bits if name == first else bits))
    if method == "affine":
        return model.eval()
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


# bits, dim; bits that the file stores per weight: four codes of 1 bit or two of 2 bits are one 4-bit integer
PALETTES = [(1, 1, 1), (2, 1, 2), (4, 1, 4), (2, 2, 1), (4, 4, 1), (3, 1, 4), (8, 3, 8 / 3)]


@pytest.mark.parametrize("bits, dim, stored", PALETTES)
def test_a_palette_is_packed_codes_and_a_table(bits, dim, stored, tmp_path):
    """With depthwise layers, a tail (no dim but 1 divides 7 channels) and a layer of fewer channels than dim."""
    torch.manual_seed(0)
    model, path = palettized(odd(), bits, dim), tmp_path / "model.onnx"
    export.to_onnx(model, path, torch.zeros(2, 3, 16, 16))
    graph = graph_of(path)
    types = {i.name: (i.data_type, numpy_helper.to_array(i).size) for i in graph.initializer}
    codes = {types[n.input[0]] for n in graph.node if n.op_type == "Cast" and n.input[0] in types}
    assert {kind for kind, _ in codes} == {TYPES.UINT4 if bits <= 4 else TYPES.UINT8}
    assert any(round(count * (4 if bits <= 4 else 8)) == round(stored * 512 * 48) for _, count in codes)
    size = pack.size(model)
    assert path.stat().st_size < size["compressed_weights"] * stored / 8 + size["float_bytes"] + 10 * 1024  # the graph
    for count in (1, 7):
        images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
        logits = TARGETS["onnx"].load().predict(path)(images)
        torch.testing.assert_close(logits, model(images).detach())


def test_onnxruntime_leaves_a_palette_packed_where_it_is_told_to(tmp_path):
    """Its constant folding, on by default, makes float weights in memory; docs/export.md names the switch."""
    torch.manual_seed(0)
    model, path, kept = palettized(odd(), 2, 1), tmp_path / "model.onnx", tmp_path / "kept.onnx"
    export.to_onnx(model, path, torch.zeros(2, 3, 16, 16))
    sizes = {}
    for switch in ([], ["ConstantFolding"]):
        options = ort.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(kept), 3
        session = ort.InferenceSession(str(path), options, disabled_optimizers=switch)
        images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        torch.testing.assert_close(logits, model(images).detach())
        sizes[bool(switch)] = kept.stat().st_size
    assert sizes[True] < 1.5 * path.stat().st_size and sizes[False] > 512 * 48 * 4


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


def test_what_no_target_writes_is_not_checked():
    with pytest.raises(UserError, match=r"model.pb: no target writes such a file; theirs end in \.onnx"):
        export.check(nn.Identity(), "model.pb", DATA, World())


def test_importing_the_package_imports_no_torch():
    code = "import sys, r2; r2.export.TARGETS; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_a_single_example_is_refused(to, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with pytest.raises(UserError, match="give at least two examples: with one the batch size would be fixed"):
        TARGETS[to].load().write(model, tmp_path / f"model.{to}", torch.zeros(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


class Control(nn.Module):
    def forward(self, x):
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class Unknown(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x.flatten(1))


@pytest.mark.parametrize(
    "to, head, message",
    [
        ("onnx", Control(), "torch.export does not trace it"),
        ("pt2", Control(), "torch.export does not trace it"),
        ("onnx", Unknown(), "cannot be exported to ONNX: .*bessel_j0"),
    ],
)
def test_an_operation_that_a_target_does_not_take_is_named(to, head, message, tmp_path):
    model, path = nn.Sequential(nn.Conv2d(3, 4, 3), head), tmp_path / f"model.{to}"
    with pytest.raises(UserError, match=message) as error:
        TARGETS[to].load().write(model, path, torch.zeros(2, 3, 8, 8))
    assert len(str(error.value).splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8, 9, 16])
def test_codes_of_a_program_are_packed_and_come_back(bits):
    codes = torch.randint(0, 2**bits, (101,), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    packed = pack_codes(codes, bits)
    assert packed.nbytes == {1: 13, 2: 26, 3: 51, 4: 51, 7: 101, 8: 101}.get(bits, 202)
    assert torch.equal(unpack(packed, bits)[:101], codes)


WITHOUT_R2 = """
import sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "r2":
            raise ModuleNotFoundError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
torch.set_num_threads(int(sys.argv[1]))
for name in sys.argv[2:]:
    images, one, all_five = torch.load(name + ".pt")
    program = torch.export.load(name + ".pt2").module()
    assert torch.equal(program(images[:1]), one) and torch.equal(program(images), all_five), name
assert not [name for name in sys.modules if name.partition(".")[0] == "r2"]
print("equal")
"""


def test_a_program_runs_without_r2_and_gives_the_same_logits(tmp_path):
    torch.manual_seed(0)
    cases = {method: (method, bits) for method, bits in (("ewgs", 4), ("lsq", 2), ("pact", 1), ("affine", 10))}
    models = {name: quantized(trained(small(), 2), *case, steps=1) for name, case in cases.items()}
    models |= {"palette": palettized(odd(), 2, 4), "wide": palettized(odd(), 2, 1)}
    layer = models["wide"][0]
    layer.quantizer = PACT(32, None)  # a weight of more than 16 bits stays float
    images = torch.randn(5, 3, 16, 16)
    for name, model in models.items():
        path = tmp_path / f"{name}.pt2"
        TARGETS["pt2"].load().write(model.eval(), path, images[:2])
        with torch.no_grad():
            torch.save((images, model(images[:1]), model(images)), tmp_path / f"{name}.pt")
        with zipfile.ZipFile(path) as archive:
            texts = {one: archive.read(one).decode() for one in archive.namelist() if one.endswith("model.json")}
            parts = [one.file_size for one in archive.infolist() if "/weights/weight_" in one.filename]
        assert texts and not any(word in text for text in texts.values() for word in ("r2::", "r2/", "site-packages"))
        if name == "palette":  # the largest layer's weights at 2 / 4 of a bit; nothing is larger than its bias
            assert 512 * 48 // 16 in parts and max(parts) == 512 * 4
    threads = str(torch.get_num_threads())  # another number may round otherwise
    command = [sys.executable, "-I", "-c", WITHOUT_R2, threads, *(str(tmp_path / name) for name in models)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr


def told(capsys, *arguments):
    """The one line of a refused command."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def test_command_line_errors_are_one_line(tmp_path, capsys, monkeypatch):
    assert f"{tmp_path}: is not finished; start its command again" in told(capsys, tmp_path)
    packed = tmp_path / "model.safetensors"
    pack.save(resnet18(5, 0.25), packed)
    assert "is not finished" in told(capsys, tmp_path)
    assert "no: there is no such run or file" in told(capsys, tmp_path / "no")
    (tmp_path / "outputs" / "one").mkdir(parents=True)
    (tmp_path / "outputs" / "one" / "record.json").touch()
    assert "outputs: holds runs; name one of them, such as " in told(capsys, tmp_path / "outputs")
    assert told(capsys, tmp_path, "--to", "tflite").startswith("r2: --to tflite: no such target; there are onnx, ")
    assert "--out a.pb: the name of a file for ONNX ends in .onnx" in told(capsys, tmp_path, "--out", "a.pb")
    assert "there is no folder" in told(capsys, tmp_path, "--out", tmp_path / "no" / "a.onnx")
    assert "is for a packed file alone" in told(capsys, tmp_path, "--image-size", 32)
    assert "a packed file alone is not checked" in told(capsys, packed, "data.root=x")
    packed.write_bytes(packed.read_bytes()[:-1])
    assert "cannot be read as a packed file" in told(capsys, packed)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert told(capsys, tmp_path) == "r2: ONNX export needs onnxruntime: pip install 'r2[export]'"
    assert not list(tmp_path.glob("*.onnx"))


def test_a_packed_file_alone_is_exported_unchecked(tmp_path, capsys):
    model = palettized(mobilenet_v1(5, 0.25), 2, 1)
    pack.save(model, tmp_path / "model.safetensors")
    main([str(tmp_path / "model.safetensors"), "--to", "pt2", "--image-size", "48"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "inputs              images (batch, 3, 48, 48)" and lines[2].startswith("not checked")
    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    logits = TARGETS["pt2"].load().predict(tmp_path / "model.pt2")(images)
    torch.testing.assert_close(logits, model(images).detach(), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("bits, dim, stored", PALETTES[:5])
@pytest.mark.parametrize("build", [mobilenet_v1, resnet18])
def test_whole_networks_of_palettes(build, bits, dim, stored, tmp_path):
    torch.manual_seed(0)
    model, path = palettized(build(5, 0.5), bits, dim), tmp_path / "model.onnx"
    export.to_onnx(model, path, next(DATA.val(2))[0])
    graph_of(path)
    found = export.check(model, path, DATA, World())
    assert found["images"] == 1000 and found["equal_predictions"] >= 99.9 and found["largest_difference"] < 1e-3
    pack.save(model, tmp_path / "model.safetensors")
    assert path.stat().st_size < (tmp_path / "model.safetensors").stat().st_size + 64 * 1024


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


@pytest.mark.parametrize("target", TARGETS)
def test_a_file_says_how_images_are_normalised(tmp_path, target):
    notes = {"image_size": [8, 8], "mean": [0.5, 0.25, 0.125]}
    model, path = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), tmp_path / f"model{TARGETS[target].suffix}"
    if target == "coreml":
        ct = pytest.importorskip("coremltools")
    _write(TARGETS[target], model, path, torch.zeros(2, 3, 8, 8), notes)
    if target == "onnx":
        found = {one.key: one.value for one in onnx.load(path).metadata_props}
    elif target == "pt2":
        torch.export.load(path, extra_files=(found := dict.fromkeys(notes, "")))
    else:
        said = ct.models.MLModel(str(path), skip_model_load=True).user_defined_metadata
        found = {name: said[name] for name in notes}
    assert {name: json.loads(text) for name, text in found.items()} == notes


def test_small_data_are_normalised_by_their_own_mean():
    with_one_channel, known = digits(), FACTS["digits"]
    found = _preprocessing(torch.zeros(2, 3, 32, 32), known, with_one_channel)
    assert found["image_size"] == [32, 32] and len(set(found["mean"])) == 1
    assert found["mean"] == pytest.approx([with_one_channel.mean.item()] * 3, abs=1e-5)
    assert found["std"] == pytest.approx([with_one_channel.std.item()] * 3, abs=1e-5)
    assert _preprocessing(torch.zeros(2, 3, 32, 32), known) == {"image_size": [32, 32]}  # its data are not read


@pytest.mark.slow
def test_a_run_is_exported_by_its_folder(r2, tmp_path):
    run = r2(*SMALL, "model=mbv1", "stage=ewgs", "stage.bits=4")
    assert run.returncode == 0, run.stderr
    folder = next(r2.out.glob("*/model.safetensors")).parent
    top1 = json.loads((folder / "record.json").read_text())["metrics"]["top1"]
    for to, runtime in (("onnx", "onnxruntime"), ("pt2", "torch.export")):
        command = [sys.executable, "-m", "r2.export", str(folder), "--to", to]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=ENV)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[3].startswith(f"top-1               torch {top1:.2f} %, {runtime} ") and len(lines) == 7
        assert (folder / f"model.{to}").exists()
    files = json.loads((folder / "model_card.json").read_text())["files"]
    assert list(files) == ["model.onnx", "model.pt2"] and files["model.pt2"]["equal_predictions"] >= 99
    assert "# fake_mbv1" in (folder / "README.md").read_text()


def record_of(folder, data, model):
    """A record beside a packed model, of a run that read `data` on another machine."""
    pack.save(model, folder / "model.safetensors")
    found = {
        "schema": SCHEMA, "name": folder.name, "choices": {"data": "folder"}, "config": {"data": data, "model": {}},
        "axes": {"data": "folder", "model": "mbv1-0.25", "reg": "l2", "stage": "dkm", "weight_bits": 2, "dim": 1},
        "metrics": {"top1": 50.0, "images": 6}, "fp32": None, "size": {"bits_per_weight_all": 2.0},
        "command": "python -m r2.run data=folder", "commit": None, "versions": {},
        "sha256": {"packed": store.sha256_of(folder / "model.safetensors")},
    }  # fmt: skip
    (folder / "record.json").write_text(json.dumps({**found, "digest": digest(found)}))


def test_data_of_another_machine_are_named_or_left_out(tmp_path, capsys):
    torch.manual_seed(0)
    run, here = tmp_path / "run", tmp_path / "here"
    run.mkdir()
    for split, count in (("train", 2), ("val", 3)):
        for name in ("a", "b"):
            (here / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (40 * i, 90, 200 if name == "a" else 10)).save(
                    here / split / name / f"{i}.png"
                )
    data = {
        "_target_": "r2.data.folder.folder", "root": "/no/such/place", "image_size": 32, "val_fraction": 0.2,
        "split_seed": 0, "workers": 0, "on_bad_image": "error", "calibration_images": 4,
    }  # fmt: skip
    record_of(run, data, palettized(mobilenet_v1(2, 0.25), 2, 1))
    line = told(capsys, run)
    assert "data.root=/no/such/place" in line and line.endswith("data.root=DIR, or --no-check to leave it out")
    assert "is fixed by the run's record; only data.root can be given" in told(capsys, run, "data.image_size=64")
    assert not (run / "model.onnx").exists()
    main([str(run), "--to", "pt2", f"data.root={here}", "--out", str(tmp_path / "checked.pt2")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5:2] == ["images              6", "equal predictions   100.00 %"]
    main([str(run), "--to", "pt2", "--no-check"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["inputs              images (batch, 3, 32, 32)", "not checked         by --no-check"]
    assert json.loads((run / "model_card.json").read_text())["files"]["model.pt2"]["top1"] is None
    imagenet = {"image_size": [32, 32], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert json.loads((run / "model_card.json").read_text())["preprocessing"] == imagenet
    pytest.importorskip("coremltools")
    main([str(run), "--to", "coreml", "--no-check"])
    assert capsys.readouterr().out.splitlines()[1] == "inputs              images (1, 3, 32, 32)"
    assert (run / "model.pt2").exists()


def test_a_model_that_was_never_packed_is_exported_with_the_weights_it_computes_with(tmp_path):
    """PACT's size of 1-bit weights is known once they are encoded, which packing does and an export alone must too."""
    torch.manual_seed(0)
    model = trained(small())
    swap(quantizable(model), lambda name: PACT(1, 8))
    calibrate(model, compressed(model), next(DATA.val(64))[0])
    export.to_onnx(model, tmp_path / "model.onnx", next(DATA.val(2))[0])
    assert export.check(model, tmp_path / "model.onnx", DATA, World())["equal_predictions"] >= 99.9


def test_a_folder_of_images_that_cannot_be_decoded_checks_nothing(tmp_path, monkeypatch):
    model = small().eval()
    export.to_onnx(model, tmp_path / "model.onnx", next(DATA.val(2))[0])
    unread = fake(val_images=8, num_classes=5, image_size=16).to(World())
    unread._val[1][:] = IGNORED
    with pytest.raises(UserError, match="no validation image can be decoded"):
        export.check(model, tmp_path / "model.onnx", unread, World())


def test_a_packed_file_alone_takes_the_image_size_that_it_is_given(tmp_path, capsys):
    pack.save(mobilenet_v1(4, 0.25).eval(), tmp_path / "model.safetensors")
    main([str(tmp_path / "model.safetensors"), "--image-size", "40", "72"])
    shape = graph_of(tmp_path / "model.onnx").input[0].type.tensor_type.shape.dim
    assert [axis.dim_value for axis in shape][1:] == [3, 40, 72]
