"""Core ML packages, read back and run here by their own program: Core ML itself is only on macOS."""

import sys
from itertools import cycle

import numpy as np
import pytest
import torch
from test_export import DATA, affine, quantized, small, trained
from torch import nn
from torch.nn import functional as F

from r2 import export, pack
from r2.config import UserError
from r2.dist import World
from r2.models import mobilenet_v1, mobilenet_v2, resnet18
from r2.palettize import Palette
from r2.quantizers.affine import Activation, quantize_output
from r2.quantizers.calibration import calibrate
from r2.quantizers.ewgs import EWGS
from r2.quantizers.layers import compressed, quantizable, swap
from r2.quantizers.lsq import LSQ
from r2.quantizers.pact import PACT

ct = pytest.importorskip("coremltools")
TABLE, LINEAR = "constexpr_lut_to_dense", "constexpr_blockwise_shift_scale"
PALETTES = [(2, 2), *(pytest.param(bits, 1, marks=pytest.mark.slow) for bits in (1, 2, 4, 5))]


def write(model, path, size=16):
    export.TARGETS["coreml"].load().write(model, path, torch.zeros(2, 3, size, size))


def operations(path):
    """Of a package, as Core ML would read it."""
    from coremltools.converters.mil.frontend.milproto.load import load

    package = ct.models.MLModel(str(path), skip_model_load=True)
    spec = package.get_spec()
    (function,) = load(spec, spec.specificationVersion, package.weights_dir).functions.values()
    return function.operations


def weights(path):
    """By the layer's name with `_` for dots: the operation that decodes a weight, and what it gives."""
    found = {}
    for op in operations(path):
        if op.op_type.startswith("constexpr"):
            name = op.outputs[0].name.partition("_weight")[0].removeprefix("var_")  # before a digit
            assert name not in found
            found[name] = op, op.materialized_val_inference()
    return found


def holds_the_weights_of(path, model):
    found = weights(path)
    assert len(found) == len(compressed(model))
    for name, layer in compressed(model).items():
        wanted = layer.quantizer.weight(layer.weight).detach().numpy()
        op, got = found[name.replace(".", "_")]
        # float16 holds 11 bits; a linear weight rounds twice, its scale and the product
        np.testing.assert_allclose(got, wanted, rtol=2**-10, atol=2**-11 * np.abs(wanted).max(), err_msg=name)


def run(path, images):
    """The package's program in float32, by PyTorch."""
    values = {"images": images}

    def value(var):
        if var is None or isinstance(var, list | tuple):
            return None if var is None else [value(each) for each in var]
        found = values.get(var.name, var.val)
        return torch.from_numpy(found).float() if isinstance(found, np.ndarray) and found.ndim else found

    def convolution(x, weight, strides, pad, groups, bias=None, **_):
        assert list(pad[0::2]) == list(pad[1::2])
        strides, pad = ([int(n) for n in each] for each in (strides, pad[0::2]))
        return F.conv2d(x, weight, bias, strides, pad, groups=int(groups))

    def largest(x, kernel_sizes, strides, pad, **_):
        return F.max_pool2d(x, *([int(n) for n in each] for each in (kernel_sizes, strides, pad[0::2])))

    def quantize(input, scale, output_dtype, zero_point=0, **_):
        limits = np.iinfo(output_dtype)
        return (torch.round(input / float(scale)) + float(zero_point or 0)).clamp(limits.min, limits.max)

    functions = {
        "conv": convolution, "max_pool": largest, "quantize": quantize,
        "dequantize": lambda input, scale, zero_point=0, **_: (input - float(zero_point or 0)) * float(scale),
        "batch_norm": lambda x, mean, variance, gamma, beta, epsilon: F.batch_norm(
            x, mean, variance, gamma, beta, eps=float(epsilon)
        ),
        "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
        "relu": lambda x: x.relu(), "relu6": lambda x: x.clamp(0, 6),
        "clip": lambda x, alpha, beta: x.clamp(float(alpha), float(beta)),
        "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
        "reduce_mean": lambda x, axes, keep_dims: x.mean([int(a) for a in axes], bool(keep_dims)),
        "reshape": lambda x, shape: x.reshape(len(x), *[int(n) for n in shape][1:]), "cast": lambda x, dtype: x,
    }  # fmt: skip
    with torch.no_grad():
        for op in operations(path):
            if op.op_type.startswith("constexpr"):
                values[op.outputs[0].name] = op.materialized_val_inference()
            elif op.op_type != "const":
                inputs = {name: value(var) for name, var in op.inputs.items() if var is not None}
                values[op.outputs[0].name] = functions[op.op_type](**inputs)
    return values["logits"]


def palettized(model, bits, dim=1):
    """Calibrated only: what is trained does not matter here."""
    layers = quantizable(model)
    swap(layers, lambda name: Palette(bits, dim))
    calibrate(model, layers, next(DATA.calibration(64, 0))[0])
    return model.eval()


@pytest.mark.parametrize(
    "method, bits, kinds",
    [
        ("ewgs", 2, {TABLE}), ("affine", 4, {LINEAR}),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [
            ("ewgs", 1, {TABLE}), ("ewgs", 4, {LINEAR}), ("ewgs", 8, {LINEAR}), ("lsq", 2, {TABLE}),
            ("lsq", 3, {TABLE}), ("lsq", 8, {LINEAR}), ("pact", 2, {TABLE}), ("pact", 4, {LINEAR}),
            ("affine", 2, {TABLE, LINEAR}), ("affine", 8, {LINEAR}),
        ]),
    ],
)  # fmt: skip
def test_integers(method, bits, kinds, tmp_path):
    torch.manual_seed(0)
    model, path = quantized(trained(small()), method, bits), tmp_path / "model.mlpackage"
    write(model, path)
    holds_the_weights_of(path, model)
    assert {op.op_type for op, _ in weights(path).values()} == kinds
    names = [op.op_type for op in operations(path)]
    layers = len(compressed(model))
    assert names.count("quantize") == names.count("dequantize") == layers + (method == "affine")  # logits too
    images = torch.cat([images for images, _ in DATA.val(250)])
    with torch.no_grad():
        ours, theirs = model(images), run(path, images)
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() >= 0.99


@pytest.mark.parametrize("bits, dim", PALETTES)
def test_palettes(bits, dim, tmp_path):
    torch.manual_seed(0)
    model, path = small(), tmp_path / "model.mlpackage"
    model[-1] = nn.Linear(16 * 64, 6)  # 5 outputs have no vectors of 2
    write(palettized(model, bits, dim), path)
    holds_the_weights_of(path, model)
    assert {op.op_type for op, _ in weights(path).values()} == {TABLE}
    images = next(DATA.val(100))[0]
    torch.testing.assert_close(run(path, images), model(images).detach(), atol=0.02, rtol=0.02)


def test_a_palette_that_leaves_channels_out_is_kept_in_float16(tmp_path):
    model, path = palettized(small(), 2, 2), tmp_path / "model.mlpackage"
    assert model[-1].quantizer.tail(model[-1].weight)
    write(model, path)
    assert len(weights(path)) == len(compressed(model)) - 1
    images = next(DATA.val(100))[0]
    torch.testing.assert_close(run(path, images), model(images).detach(), atol=0.02, rtol=0.02)


@pytest.mark.slow
def test_codes_take_their_own_bits(tmp_path):
    path, sizes = tmp_path / "model.mlpackage", {}
    for bits in (1, 2, 3, 4):
        model = nn.Sequential(nn.Conv2d(3, 256, 1), nn.ReLU(), nn.Conv2d(256, 512, 3))
        swap(quantizable(model), lambda name, bits=bits: EWGS(bits, None))
        write(model.eval(), path, 4)
        sizes[bits] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        pack.save(model, tmp_path / "model.safetensors")
        assert sizes[bits] < 1.03 * (tmp_path / "model.safetensors").stat().st_size + 12_000
    count = 256 * 512 * 9
    assert [sizes[bits] - sizes[1] for bits in (2, 3, 4)] == pytest.approx([count / 8 * n for n in (1, 2, 3)], rel=0.02)


@pytest.mark.parametrize(
    "quantizer, message",
    [
        (lambda: EWGS(9, 8), r"0 \(ewgs, 9 bits\).*weights have more than 8 bits"),
        (lambda: LSQ(8, 9), r"0 \(lsq, 8 bits\).*activation has more than 8 bits"),
    ],
)
def test_what_core_ml_does_not_have_is_named(quantizer, message, tmp_path):
    model = small()
    swap(quantizable(model), lambda name: quantizer())
    with pytest.raises(UserError, match=message):
        write(model, tmp_path / "model.mlpackage")
    model = small()
    quantize_output(model[2], Activation(10))
    with pytest.raises(UserError, match="2 cannot be exported to Core ML: its activation has more than 8 bits"):
        write(model, tmp_path / "model.mlpackage")
    assert not list(tmp_path.iterdir())


def test_a_package_is_replaced_whole(tmp_path):
    path = tmp_path / "model.mlpackage"
    path.mkdir()
    (path / "left.txt").write_text("of an earlier one")
    write(palettized(small(), 1), path)
    assert not (path / "left.txt").exists() and [p.name for p in tmp_path.iterdir()] == ["model.mlpackage"]
    mode = (tmp_path / "of a new file").touch() or (tmp_path / "of a new file").stat().st_mode
    for file in path.rglob("*"):  # nothing of the exporter's traces, which name source files
        assert not file.is_file() or (b"site-packages" not in file.read_bytes() and file.stat().st_mode == mode)
    with pytest.raises(UserError, match="ends in .mlpackage"):
        write(small(), tmp_path / "model.coreml")
    with pytest.raises(UserError, match="nowhere is no folder"):
        write(small(), tmp_path / "nowhere" / "model.mlpackage")


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is here")
def test_nothing_here_predicts(tmp_path):
    assert export.check(small(), tmp_path / "model.mlpackage", DATA, World()) is None


@pytest.mark.slow
@pytest.mark.parametrize("build", [mobilenet_v1, mobilenet_v2, resnet18])
def test_whole_networks(build, tmp_path):
    """Each layer by the next of all methods."""
    torch.manual_seed(0)
    model, path = build(10, 0.25), tmp_path / "model.mlpackage"
    layers = quantizable(model)
    methods = cycle([
        lambda w: EWGS(2, 8), lambda w: Palette(1), lambda w: LSQ(4, 8), lambda w: Palette(2, 2), lambda w: PACT(3, 8),
        lambda w: affine(4, w, channels=False), lambda w: Palette(4), lambda w: affine(4, w), lambda w: EWGS(8, 8),
        lambda w: Palette(2), lambda w: PACT(1, 8), lambda w: LSQ(2, 8, channels=len(w)), lambda w: EWGS(1, 8),
    ])  # fmt: skip
    swap(layers, lambda name: next(methods)(layers[name].weight))
    calibrate(model, layers, torch.randn(16, 3, 64, 64))  # which leaves affine's grids as they are
    write(model.eval(), path, 64)
    holds_the_weights_of(path, model)
    if build is mobilenet_v1:
        return  # untrained, at so few bits, nothing reaches its logits
    images = torch.randn(32, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = model(images), run(path, images)
    assert (ours - theirs).norm() < 0.05 * ours.norm()
