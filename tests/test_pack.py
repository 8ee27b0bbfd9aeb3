import copy
import os

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from r2 import pack
from r2.config import UserError
from r2.models import mobilenet_v1, mobilenet_v2, resnet18
from r2.palettize import Palette
from r2.quantizers.affine import Activation, Affine, quantize_input, quantize_output
from r2.quantizers.calibration import calibrate
from r2.quantizers.ewgs import EWGS
from r2.quantizers.layers import compressed, quantizable, swap
from r2.quantizers.lsq import LSQ
from r2.quantizers.pact import PACT
from r2.report import table1

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
METHODS = ("ewgs", "lsq", "pact", "affine", "palette")


def affine(bits, weight):
    quantizer = Affine(bits, len(weight))
    low, high = weight.detach().flatten(1).aminmax(dim=1)
    quantizer.scale.copy_((high - low).clamp(min=1e-6) / (2**bits - 1))
    quantizer.zero_point.copy_((-low / quantizer.scale).round().clamp(0, 2**bits - 1))
    return quantizer


def quantizer_of(method, bits, layer, dim=1):
    return {
        "ewgs": lambda: EWGS(bits, bits),
        "lsq": lambda: LSQ(bits, bits),
        "pact": lambda: PACT(bits, bits if bits > 1 else None),
        "affine": lambda: affine(bits, layer.weight),
        "palette": lambda: Palette(bits, dim),
    }[method]()


def simulated(build, method, bits, channels_last=True, skip=False, dim=1, classes=5, layer_bits=None):
    """A quantized network with random weights, whose BatchNorm fits its activations so that its logits differ."""
    torch.manual_seed(0)
    model = build(classes, 0.25)
    model = model.to(memory_format=torch.channels_last) if channels_last else model
    layers = quantizable(model, skip)
    widths = {name: (layer_bits or {}).get(name, bits) for name in layers}
    swap(layers, lambda name: quantizer_of(method, widths[name], layers[name], dim))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    if method != "affine":
        calibrate(model, layers, images(channels_last))
    with torch.no_grad():
        model.train()(images(channels_last))
    return model.eval()


def images(channels_last):
    return IMAGES.contiguous(memory_format=torch.channels_last) if channels_last else IMAGES


def same_logits(model, loaded):
    with torch.no_grad():
        return all(torch.equal(model(images(cl)), loaded(images(cl))) for cl in (False, True))


def round_trip(model, path):
    """Saves, loads, and checks what every model owes: exact logits and weights, and the same bytes again."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pack.save(model, path)
    known = {name: value for name, value in model.state_dict().items() if not name.endswith(".weight_size")}
    assert all(torch.equal(value, before[name]) for name, value in known.items())  # PACT knows its scale by encoding
    loaded = pack.load(path)
    assert same_logits(model, loaded)
    layers = compressed(model)
    for name, layer in compressed(loaded).items():
        expected = pack._effective(layers[name])
        assert torch.equal(layer.weight, expected) and layer.weight.stride() == expected.stride()
    again = path.with_name("again.safetensors")
    pack.save(loaded, again)
    assert path.read_bytes() == again.read_bytes()
    assert pack.size(model) == pack.size(loaded)
    return loaded


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_round_trip_is_exact(method, bits, tmp_path):
    if (method, bits) in (("lsq", 1), ("palette", 8)):
        pytest.skip("not defined, or slow to compile")
    loaded = round_trip(simulated(mobilenet_v1, method, bits), tmp_path / "a.safetensors")
    assert not loaded.training
    assert pack.size(loaded)["bits_per_weight"] == pack.size(loaded)["bits_per_weight_all"] == pytest.approx(bits, 1e-2)


@pytest.mark.parametrize(
    "build, method, bits, options",
    [
        (mobilenet_v2, "ewgs", 4, {}),
        (mobilenet_v2, "affine", 8, {"channels_last": False}),
        (resnet18, "pact", 2, {}),
        (resnet18, "lsq", 4, {"channels_last": False}),
        (mobilenet_v1, "ewgs", 2, {"channels_last": False, "skip": True}),
        (mobilenet_v1, "ewgs", 12, {}),
        (mobilenet_v1, "pact", 32, {}),
        (mobilenet_v1, "ewgs", 2, {"layer_bits": {"classifier": 8, "features.3.0": 3, "features.4.0": 20}}),
        (resnet18, "palette", 2, {"dim": 3, "skip": True}),
        (mobilenet_v1, "palette", 1, {"dim": 6}),  # the last layer, of five classes, has no whole vector
    ],
)
def test_networks_and_options(build, method, bits, options, tmp_path):
    loaded = round_trip(simulated(build, method, bits, **options), tmp_path / "a.safetensors")
    if options.get("skip"):
        counted = pack.size(loaded)
        assert counted["compressed_weights"] < counted["weights"]
        assert len(compressed(loaded)) == len(quantizable(loaded)) - 2


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [mobilenet_v1, mobilenet_v2, resnet18])
def test_every_combination(build, method, bits, channels_last, tmp_path):
    if (method, bits) in (("lsq", 1), ("palette", 16)):
        pytest.skip("not defined")
    round_trip(simulated(build, method, bits, channels_last), tmp_path / "a.safetensors")


def folded(bits):
    """As post-training methods leave it: BatchNorm folded, ReLU6 replaced, codes set, activations quantized."""
    model = simulated(mobilenet_v2, "affine", bits)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            layer = model.get_submodule(f"{name.rpartition('.')[0]}.{int(name.rpartition('.')[2]) - 1}")
            layer.bias = nn.Parameter(torch.randn(layer.weight.shape[0]))
            model.set_submodule(name, nn.Identity())
        if isinstance(module, nn.ReLU6):
            model.set_submodule(name, nn.ReLU())
            quantize_output(model.get_submodule(name), Activation(bits, 0.05, 3.0))
    for layer in compressed(model).values():
        layer.codes = layer.quantizer.encode(layer.weight)
        layer.weight = nn.Parameter(layer.quantizer.decode(layer.codes, layer.weight))
    quantize_input(model.features[0][0], Activation(8, 0.02, 128.0))
    return model


def test_what_post_training_changes_comes_back(tmp_path):
    loaded = round_trip(folded(4), tmp_path / "a.safetensors")
    kinds = [type(module).__name__ for module in loaded.modules()]
    assert "BatchNorm2d" not in kinds and "ReLU6" not in kinds
    assert kinds.count("Activation") == kinds.count("ReLU") + 1


def test_a_network_without_compression(tmp_path):
    model = resnet18(5, 0.25).eval()
    loaded = round_trip(model, tmp_path / "a.safetensors")
    assert pack.size(loaded)["bits_per_weight"] is None and pack.size(loaded)["bits_per_weight_all"] == 32


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9\n")
    folder.mkdir()
    round_trip(resnet18(5, 0.25).eval(), folder / "a.safetensors")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="x.safetensors: there is no folder .*missing; make it first"):
        pack.save(nn.Linear(2, 2), tmp_path / "missing" / "x.safetensors")


def test_loading_leaves_the_random_state_alone(tmp_path):
    pack.save(resnet18(5, 0.25), tmp_path / "a.safetensors")
    before = torch.get_rng_state()
    pack.load(tmp_path / "a.safetensors")
    assert torch.equal(before, torch.get_rng_state())


def test_saving_in_training_mode_does_not_train(tmp_path):
    model = simulated(mobilenet_v1, "palette", 2)
    pack.save(model, tmp_path / "a.safetensors")
    expected = (tmp_path / "a.safetensors").read_bytes()
    pack.save(model.train(), tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == expected
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_file_size(bits, tmp_path):
    path = tmp_path / "a.safetensors"
    model = simulated(mobilenet_v1, "ewgs", bits, classes=1000)
    pack.save(model, path)
    layers = compressed(model).values()
    codes = sum(-(-layer.weight.numel() * bits // 8) for layer in layers)
    norms = 4 * sum(4 * m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    rest = norms + 4 * 8 * len(layers) + 4 * 1000  # five scales, two deltas and a sign per layer; the last bias
    counted = pack.size(model)
    assert counted["float_bytes"] == rest and counted["weights"] == counted["compressed_weights"] == 463_600
    assert counted["mib"] == round((codes + rest) / 2**20, 4)
    assert 0 < path.stat().st_size - codes - rest < 8500  # the header


@pytest.mark.parametrize("bits, dim", [(1, 1), (2, 2)])
def test_file_size_of_palettes(bits, dim, tmp_path):
    """bits n / (8 dim) + centroids + the rest in float32 + header, to 2 percent."""
    path = tmp_path / "a.safetensors"
    model = simulated(mobilenet_v1, "palette", bits, dim=dim, classes=1000)
    pack.save(model, path)
    layers = [(layer.weight.numel(), layer.quantizer.tail(layer.weight)) for layer in compressed(model).values()]
    codes = sum(bits * (count - left) / dim / 8 for count, left in layers)
    tables = 4 * len(layers) * (2**bits * dim + 1) + 4 * sum(left for _, left in layers)  # with the temperature
    norms = 4 * sum(4 * m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size <= 1.02 * (codes + tables + norms + 4 * 1000 + header) and header < 9000


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [0, 1, 7, 1001])
def test_bits_are_dense_and_come_back(bits, count):
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.int32)
    packed = pack.pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
    assert torch.equal(pack.unpack_bits(packed, bits, count), codes)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "a.safetensors"
    pack.save(simulated(mobilenet_v1, "ewgs", 4), path)
    return path.read_bytes()


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: flipped(data, len(data) - 1),  # codes
        lambda data: data.replace(b"weight_bits", b"weight_bitz", 1),
        lambda data: data.replace(b'num_classes\\":5', b'num_classes\\":6', 1),
        lambda data: data.replace(b'"classifier.bias"', b'"classifier.bain"', 1),
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: data + b"x",
        lambda data: b"PK\x03\x04 a pickle in a zip, perhaps",
    ],
)
def test_damage_is_refused(damage, tmp_path, intact):
    path = tmp_path / "a.safetensors"
    assert damage(intact) != intact
    path.write_bytes(damage(intact))
    with pytest.raises(UserError, match="a.safetensors") as error:
        pack.load(path)
    assert "\n" not in str(error.value)


def test_what_is_not_a_packed_file_is_refused(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="cannot be read"):
        pack.load(tmp_path / "missing.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not a packed file"):
        pack.load(tmp_path / "other.safetensors")
    pack.save(nn.Linear(2, 2), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="holds a Linear of your own"):
        pack.load(tmp_path / "x.safetensors")
    model = resnet18(5, 0.25)
    pack.save(model, tmp_path / "later.safetensors")
    with monkeypatch.context() as patch:
        patch.delitem(pack._MODELS, "resnet18")
        with pytest.raises(UserError, match="later.safetensors: .*'resnet18' is none of"):
            pack.load(tmp_path / "later.safetensors")
    monkeypatch.setattr(pack, "FORMAT", 2)
    with pytest.raises(UserError, match="not a packed file of this version"):
        pack.load(tmp_path / "later.safetensors")


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    model = simulated(mobilenet_v1, "ewgs", 4)
    wrong = copy.deepcopy(model)
    wrong.classifier.bias = nn.Parameter(torch.zeros(4))
    pack.save(wrong, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"classifier.bias is \(4,\) torch.float32, not \(5,\)"):
        pack.load(tmp_path / "a.safetensors")
    model.extra = nn.Linear(2, 2)
    pack.save(model, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="holds a MobileNetV1 of your own"):
        pack.load(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="extra.* belongs to no module"):
        pack.load(
            tmp_path / "a.safetensors",
            model=mobilenet_v1(**{k: v for k, v in model.architecture.items() if k != "name"}),
        )


def test_table_1_is_the_paper_s_at_twice_its_labels(tmp_path, capsys):
    table1.main(["--out", str(tmp_path / "table1.md")])
    text = (tmp_path / "table1.md").read_text()
    assert capsys.readouterr().out == text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["32", "4", "2", "1"]
    for _, paper, at_label, at_twice in rows[1:]:
        assert paper == at_twice != at_label  # six numbers, to the printed digit
    assert rows[1][1] == "7.1 / 4.2" and rows[0][2] == "16.2 / 16.2"


def test_table_1_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(table1, "table1", lambda folder: {(b, a): 1.0 for b in (32, 8, 4, 2, 1) for a in (False, True)})
    with pytest.raises(SystemExit) as stop:
        table1.main(["--out", str(tmp_path / "no" / "table1.md")])
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


class Gained(nn.Conv2d):
    """With a parameter and a forward of its own, as timm's ScaledStdConv2d."""

    def __init__(self):
        super().__init__(4, 4, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.gain


def with_more(kind):
    torch.manual_seed(0)
    last = {"gain": Gained, "weight_norm": lambda: nn.utils.weight_norm(nn.Conv2d(4, 4, 3)),
            "pruned": lambda: prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5)}[kind]  # fmt: skip
    return nn.Sequential(nn.Conv2d(3, 4, 3), last())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["gain", "weight_norm", "pruned"])
def test_what_a_layer_has_besides_its_weight_and_bias_is_packed(kind, tmp_path):
    model = with_more(kind)
    with torch.no_grad():
        for name, parameter in model[1].named_parameters():
            parameter.add_(0.25 * torch.randn_like(parameter)) if name != "bias" else None
    layers = {"0": model[0]}
    swap(layers, lambda name: LSQ(4, 4))
    calibrate(model, layers, IMAGES)
    pack.save(model.eval(), tmp_path / "m.safetensors")
    loaded = pack.load(tmp_path / "m.safetensors", with_more(kind))
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
        assert not torch.equal(with_more(kind)(IMAGES), model(IMAGES))


def test_a_model_in_half_precision_is_refused_when_it_is_saved(tmp_path):
    with pytest.raises(
        UserError, match=r"0.weight is torch.float16, and a packed file holds float32; call model.float"
    ):
        pack.save(nn.Sequential(nn.Conv2d(3, 4, 3)).half(), tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()
