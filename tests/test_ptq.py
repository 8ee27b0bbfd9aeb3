"""Post-training quantization: r2's model against AIMET's simulation, bias correction against measured means."""

import copy
import json
import logging
import warnings

import pytest
import torch
import torchvision
from conftest import SMALL
from torch import nn

from r2 import models, store
from r2.config import UserError
from r2.quantizers.affine import Activation, Affine, quantize_output
from r2.quantizers.layers import compressed, quantizable, swap
from r2.stages import aimet, bias_correction, simulation
from r2.stages.constants import fold_constants
from r2.stages.graph import places, run_by_module, trace
from r2.stages.ptq import DFQ, AdaRound, Nearest

BUILDS = {"rn18": models.resnet18, "mbv1": models.mobilenet_v1, "mbv2": models.mobilenet_v2}
COMMON = {
    "bits": 4, "weight_bits": 4, "act_bits": 8, "layer_bits": None, "skip_first_last": False, "granularity": "tensor",
    "symmetric": True, "scheme": "tf_enhanced", "calibration_batch_size": 32,
}  # fmt: skip
ROUNDING = {
    "iterations": 15, "batches": None, "batch_size": 32, "regularization": 0.01, "beta_start": 20, "beta_end": 2,
    "warm_start": 0.2, "equalize_first": False,
}  # fmt: skip


def images(count=96, seed=0):
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return list((x + 0.5).split(32))


def network(name):
    """An untrained network whose BatchNorms have lively parameters and the statistics of `images()`."""
    torch.manual_seed(1)
    model = BUILDS[name](10, 0.25)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.3, 0.5)
            module.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.cat(images()))
    return model.eval()


def tiny():
    torch.manual_seed(2)
    convolutions = (nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(294, 5)).eval()


@pytest.fixture
def compress(tmp_path, monkeypatch):
    """Run a stage on a model; returns what it returns, and AIMET's simulation of it."""
    seen = {}
    save = simulation.save
    monkeypatch.setattr(simulation, "save", lambda sim, *rest: save(seen.setdefault("sim", sim), *rest))

    def run(stage, model, seed=0, **settings):
        seen.clear()
        options = {**COMMON, **({"bias_correction": "empirical"} if stage is DFQ else {})}
        options |= ROUNDING if stage is AdaRound else {}
        done = stage(**{**options, **settings}).compress(model, images(), tmp_path, "key", seed)
        return done, seen["sim"]

    run.directory = tmp_path
    return run


def assert_agree(model, sim, x):
    """Equal but for activations that sit on the edge between two levels; float64 leaves few, on every processor."""
    simulated = copy.deepcopy(sim.model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # AIMET rounds weights at every call: on an edge, in float64 to the other side
        for module in simulated.modules():
            quantizers = getattr(module, "param_quantizers", {})
            if "weight" in quantizers and quantizers["weight"] is not None:
                module.weight.data = quantizers["weight"](module.weight).dequantize()
        ours, theirs = (copy.deepcopy(m).double()(x.double()) for m in (model, simulated))
    off = (ours - theirs).abs() / theirs.std()
    assert (off < 1e-4).float().mean() > 0.8 and off.mean() < 0.01
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() > 0.98


# Where quantizers belong


@pytest.mark.parametrize("name, layers, outputs", [("rn18", 21, 30), ("mbv1", 28, 29), ("mbv2", 53, 65)])
def test_places(name, layers, outputs):
    found = places(BUILDS[name](10, 0.25))
    assert (len(found.weights), len(found.inputs), len(found.outputs)) == (layers, 1, outputs)
    names = tuple(quantizable(BUILDS[name](10, 0.25)))
    fewer = places(BUILDS[name](10, 0.25), (names[0], names[-1]))
    assert (len(fewer.weights), len(fewer.inputs), len(fewer.outputs)) == (layers - 2, 0, outputs - 1)


def test_what_aimet_would_leave_out_silently_is_refused():
    with torch.device("meta"), pytest.raises(UserError, match="'i?add' .* is computed outside a module"):
        Nearest(**COMMON).check(torchvision.models.resnet18(), 8)
    relu = nn.ReLU()
    with pytest.raises(UserError, match="1: is used twice"):
        places(nn.Sequential(nn.Conv2d(3, 4, 1), relu, nn.Conv2d(4, 4, 1), relu))


@pytest.mark.parametrize("settings, expected", [
    ({"weight_bits": 1}, "stage.weight_bits=1"),
    ({"act_bits": 32}, "stage.act_bits=32"),
    ({"layer_bits": {"fc": 1}}, "stage.layer_bits.fc=1"),
    ({"percentile": 101.0}, "50 to 100"),
])  # fmt: skip
def test_mistakes(settings, expected):
    with pytest.raises(UserError, match=expected):
        Nearest(**{**COMMON, **settings})


# Bias correction


def test_mean_after_relu():
    x = torch.randn(200_000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0]), torch.tensor([1.0, 0.3, 2.0, 0.0, 1.0])
    expected = (x * std + mean).relu().mean(0)
    torch.testing.assert_close(bias_correction.mean_after_relu(mean, std), expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_weight_shift(groups):
    layer = nn.Conv2d(6, 12, 3, padding=1, stride=2, groups=groups, bias=False)
    net, mean, x = nn.Sequential(layer), torch.randn(6), torch.randn(4000, 6, 5, 5)
    x += (mean - x.mean((0, 2, 3))).view(1, -1, 1, 1)
    swap({"0": layer}, lambda _: Affine(4))
    error = torch.randn_like(layer.weight)
    found = bias_correction.weight_shift(net[0], error, mean, x.shape)
    torch.testing.assert_close(found.float(), net[0].operation(x, error).mean((0, 2, 3)), atol=0.1, rtol=0.05)


def coarse(net):
    """`net` with its weights on 3 bits and its activations on 4."""
    quantized = copy.deepcopy(net)
    swap(quantizable(quantized), lambda _: Affine(3))
    for layer in compressed(quantized).values():
        layer.quantizer.scale.fill_(layer.weight.abs().max().item() / 3)
        layer.codes = layer.quantizer.encode(layer.weight)
        layer.weight.data = layer.quantizer.decode(layer.codes, layer.weight)
        quantize_output(layer, Activation(4, 0.4, 8))
    return quantized


def test_empirical_correction_leaves_no_shift():
    net, batches = tiny(), images()
    quantized = coarse(net)
    wanted = bias_correction.output_means(net, quantizable(net), batches)
    before = bias_correction.output_means(quantized, compressed(quantized), batches)
    biases = bias_correction.correct(net, quantized, batches)
    after = bias_correction.output_means(quantized, compressed(quantized), batches)
    assert list(biases) == list(wanted)
    for name in wanted:
        assert (before[name] - wanted[name]).abs().max() > 1e-3
        torch.testing.assert_close(after[name], wanted[name], atol=1e-5, rtol=0)


def test_run_by_module_is_a_forward_pass():
    for name in BUILDS:
        model, batches = network(name), images()
        ours = run_by_module(trace(model), model, batches)
        with torch.no_grad():
            assert all(torch.equal(y, model(x)) for y, x in zip(ours, batches, strict=True))


# With AIMET


@pytest.mark.parametrize("stage, name, settings", [
    (Nearest, "mbv2", {"granularity": "channel", "act_bits": 6, "scheme": "min_max"}),
    (Nearest, "rn18", {"symmetric": False, "scheme": "percentile", "skip_first_last": True}),
    (DFQ, "mbv1", {}),
    pytest.param(DFQ, "mbv2", {"bias_correction": "analytic"}, marks=pytest.mark.slow),
    pytest.param(DFQ, "rn18", {"granularity": "channel"}, marks=pytest.mark.slow),
    pytest.param(AdaRound, "mbv1", {"equalize_first": True, "layer_bits": {"classifier": 3}}, marks=pytest.mark.slow),
])  # fmt: skip
def test_model_is_the_simulation_without_aimet(compress, stage, name, settings):
    model = network(name)
    digest, random = store.digest(model.state_dict()), torch.get_rng_state()
    done, sim = compress(stage, model, **settings)
    quantized = done["model"]
    assert store.digest(model.state_dict()) == digest and torch.equal(torch.get_rng_state(), random)
    assert_agree(copy.deepcopy(quantized), sim, torch.cat(images(seed=7)))
    assert not any(type(m).__module__.startswith("aimet") for m in quantized.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in quantized.modules())
    assert quantized.architecture == model.architecture
    written = {"encodings.json", "simulation.pt"} | ({"adaround.encodings"} if stage is AdaRound else set())
    assert {p.name for p in compress.directory.iterdir()} == written
    for layer_name, layer in compressed(quantized).items():
        theirs = sim.model.get_submodule(layer_name)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(layer.weight, theirs.param_quantizers["weight"](theirs.weight).as_subclass(torch.Tensor))
        assert torch.equal(layer.quantizer.decode(layer.codes, layer.weight), layer.weight)
    assert len(compressed(quantized)) == len(done["originals"]) == done["details"]["quantizers"]["weights"]
    encodings = json.loads((compress.directory / "encodings.json").read_text())
    assert len(encodings) == sum(done["details"]["quantizers"].values())
    with pytest.raises(UserError, match="no layer fits 'nothing'"):
        compress(stage, model, layer_bits={"nothing": 4})


def test_widths_and_what_is_left_out(compress):
    done, sim = compress(Nearest, network("mbv1"), skip_first_last=True, layer_bits={"features.1?.*": 2})
    widths = {name: layer.quantizer.weight_bits for name, layer in compressed(done["model"]).items()}
    assert (
        len(widths) == 26 and {widths["features.10.0"], widths["features.19.0"]} == {2} and widths["features.2.0"] == 4
    )
    assert max(layer.codes.max() for name, layer in compressed(done["model"]).items() if widths[name] == 2) <= 3
    assert type(done["model"].classifier) is nn.Linear and not hasattr(done["model"].classifier, "output_quantizer")
    assert_agree(done["model"], sim, torch.cat(images(seed=7)))


def test_simulation_can_be_rebuilt(compress):
    done, sim = compress(Nearest, tiny())
    state = store.load(compress.directory / "simulation.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from aimet_torch import QuantizationSimModel

        config = aimet.write_config(compress.directory / "config.json", "tensor", True)
        again = QuantizationSimModel(tiny(), images()[0], default_param_bw=4, config_file=str(config))
        again.model.load_state_dict(state["model"])
        with torch.no_grad():
            assert torch.equal(again.model(images()[0]), sim.model(images()[0]))


def test_quiet(compress, capfd, tmp_path):
    handler = logging.FileHandler(tmp_path / "log", mode="w")
    logging.getLogger().addHandler(handler)
    handlers = logging.getLogger().handlers[:]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        compress(DFQ, tiny())
    logging.getLogger().warning("still open")
    logging.getLogger().removeHandler(handler)
    handler.close()
    assert logging.getLogger().handlers + [handler] == handlers or logging.getLogger().handlers == handlers[:-1]
    assert (tmp_path / "log").read_text() == "still open\n"
    assert not heard and capfd.readouterr().err.replace("still open\n", "") == ""


@pytest.mark.parametrize("name, pairs, known", [("mbv1", 26, 27), ("mbv2", 34, 52), ("rn18", 8, 8)])
def test_equalization(tmp_path, name, pairs, known):
    model = network(name)
    for module in model.modules():
        if isinstance(module, nn.ReLU6):
            module.max_val = float("inf")
    with aimet.alone(tmp_path, 0) as (_, scratch):
        net, norms = aimet.fold(model, images()[0][:2])
        config = aimet.write_config(scratch / "config.json", "tensor", True)
        work = aimet.Work(net, norms, places(net), {}, 8, "min_max", 99.9, images(), config, tmp_path)
        statistics, used = aimet.equalize(work, False)
        net = aimet.own(net)
    assert used["equalized_pairs"] == pairs and used["largest_equalization_scale"] > 1.1
    assert not any(isinstance(m, nn.ReLU6) for m in net.modules())
    x = torch.cat(images())
    with torch.no_grad():
        before, after = model(x), net(x)
    assert (before - after).std() < 0.02 * before.std()  # folding high biases is exact only within 3 sigma
    expected = bias_correction.expected_inputs(net, statistics)
    assert len(expected) == known
    inputs = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, i, n=n: inputs.setdefault(n, i[0])) for n, m in quantizable(net).items()
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    for layer, mean in expected.items():
        seen = inputs[layer].flatten(2) if inputs[layer].dim() > 2 else inputs[layer][..., None]
        assert (seen.mean((0, 2)) - mean).abs().mean() < 0.2 * seen.std((0, 2)).mean(), layer


def dead(name, variance, channel=3):
    """A network in which one channel of its second BatchNorm has almost no input, as weight decay leaves it."""
    model = network(name)
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    convolutions[1].weight.data[channel] *= 1e-12
    name, norm = norms[1]
    norm.running_mean[channel], norm.running_var[channel] = 0.0, variance
    return model, f"{name}:{channel}"


@pytest.mark.parametrize("variance", [0.0, 5.6e-45, 1e-6])
@pytest.mark.parametrize("name", BUILDS)
def test_a_dead_channel_costs_nothing(compress, name, variance):
    """Its folded scale is hundreds of times the others', which a grid per tensor then rounds to zero."""
    model, channel = dead(name, variance)
    folded = copy.deepcopy(model)
    assert fold_constants(folded, images()) == [channel]
    with torch.no_grad():
        for x in (*images(), *images(seed=5)):  # calibrated on, and not
            logits, others = model(x), folded(x)
            torch.testing.assert_close(others, logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(others.argmax(1), logits.argmax(1))


@pytest.mark.parametrize("stage", [Nearest, DFQ, AdaRound])
def test_a_dead_channel_does_not_set_the_range(compress, stage):
    model, channel = dead("mbv1", 5.6e-45)
    model.get_submodule(channel.split(":")[0]).weight.data[3] = 1.0
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    convolutions[1].weight.data[3] = 0.2  # never reached: the channel before it is dead
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].weight.data[3], norms[0].bias.data[3] = 0.0, -1.0
    norms[1].running_mean[3] = 0.0
    layer = [n for n, m in model.named_modules() if m is convolutions[1]][0]
    errors = {}
    for fold_constant in (True, False):
        done, _ = compress(stage, model, fold_constant=fold_constant)
        others = [c for c in range(len(convolutions[1].weight)) if c != 3]
        ours, wanted = done["model"].get_parameter(f"{layer}.weight")[others], done["originals"][layer][others]
        errors[fold_constant] = ((ours - wanted).norm() / wanted.norm()).item()
        found = done["details"]["constant_channels"]
        assert channel in found if fold_constant else found is None
    assert errors[True] < 0.5 and (stage is DFQ or errors[False] > 0.9), errors


def test_a_channel_that_no_calibration_image_excites_is_kept():
    """What its BatchNorm saw in training varied: another image may excite it."""
    model, channel = dead("mbv1", 0.5)
    assert fold_constants(model, images()) == []
    model.get_submodule(channel.split(":")[0]).weight.data[3] = 1e-10  # whatever excites it, gamma hides it
    assert fold_constants(model, images()) == [channel]


@pytest.mark.parametrize("beta", [-0.4, 1.5])
def test_equalization_leaves_constants_alone(tmp_path, beta):
    """AIMET takes gamma = 1e-10 for a range to equalize, and a constant for a bias to absorb across zero padding."""
    model, scales = network("mbv1"), {}
    for name, channel in (("features.2.1", 3), ("features.3.1", 1), ("features.8.1", 0)):
        norm = model.get_submodule(name)
        norm.weight.data[channel], norm.bias.data[channel] = 1e-10, beta
    for module in model.modules():
        if isinstance(module, nn.ReLU6):
            module.max_val = float("inf")
    for fold in (False, True):
        net = copy.deepcopy(model)
        if fold:
            assert fold_constants(net, images()) == ["features.2.1:3", "features.3.1:1", "features.8.1:0"]
        with aimet.alone(tmp_path, 0) as (_, scratch):
            net, norms = aimet.fold(net, images()[0][:2])
            config = aimet.write_config(scratch / "config.json", "tensor", True)
            work = aimet.Work(net, norms, places(net), {}, 8, "min_max", 99.9, images(), config, tmp_path)
            scales[fold] = aimet.equalize(work, fold)[1]["largest_equalization_scale"]
            net = aimet.own(net)
    assert scales[False] > 1e3 and scales[True] < 100
    with torch.no_grad():
        before, after = model(torch.cat(images())), net(torch.cat(images()))
    assert (before - after).std() < 0.02 * before.std()


@pytest.mark.parametrize("stage", [Nearest, DFQ])
def test_weight_sqnr_is_that_of_the_formula(compress, stage):
    model = network("mbv1")
    done, _ = compress(stage, model, layer_bits={"classifier": 8})
    found = done["details"]["weight_sqnr_db"]
    assert list(found) == list(quantizable(model))
    for name, layer in compressed(done["model"]).items():
        w, q = done["originals"][name].double(), layer.weight.double()
        expected = 10 * torch.log10(w.square().sum() / (w - q).square().sum())
        assert found[name] == pytest.approx(expected.item(), abs=1e-3)
    assert found["classifier"] > 35 > found["features.0.0"] > 10


def test_no_pair_is_an_error(compress):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 5)).eval()
    with pytest.raises(UserError, match="finds no pair"):
        compress(DFQ, model)


def test_dfq_takes_the_shift_of_the_logits_away(compress):
    model, x = network("mbv1"), torch.cat(images())
    shifts, counts = {}, {}
    for correction in ("none", "empirical", "analytic"):
        done, _ = compress(DFQ, model, bias_correction=correction, scheme="min_max")
        with torch.no_grad():
            shifts[correction] = (done["model"](x) - model(x)).mean(0).norm()
        counts[correction] = done["details"].get("corrected_empirically"), done["details"].get("corrected_analytically")
    assert counts == {"none": (None, None), "empirical": (28, 0), "analytic": (1, 27)}
    assert shifts["empirical"] < 0.15 * shifts["none"] and shifts["analytic"] < 0.8 * shifts["none"]


def test_a_missing_quantizer_is_named(tmp_path):
    with aimet.alone(tmp_path, 0) as (_, scratch):
        from aimet_torch import QuantizationSimModel

        config = aimet.write_config(scratch / "config.json", "tensor", True)
        sim = QuantizationSimModel(tiny(), images()[0], config_file=str(config))
        bits = dict.fromkeys(quantizable(tiny()), 4)
        aimet.place(sim, places(tiny()), bits)
        sim.model.get_submodule("5").output_quantizers[0] = None
        with pytest.raises(UserError, match="5: AIMET does not quantize its output"):
            aimet.place(sim, places(tiny()), bits)


def test_adaround_is_repeatable_and_stays_on_its_grid(compress):
    nearest = compress(Nearest, tiny())[0]["model"]

    def run(seed=0, **settings):
        done, sim = compress(AdaRound, tiny(), seed=seed, **{"iterations": 100, "regularization": 0.1, **settings})
        assert_agree(done["model"], sim, torch.cat(images(seed=7)))
        return done["model"]

    found, same, other, smaller = run(), run(), run(seed=1), run(batch_size=4)
    theirs = json.loads((compress.directory / "adaround.encodings").read_text())["param_encodings"]
    differs = False
    for name, layer in compressed(found).items():
        codes = [compressed(m)[name].codes for m in (nearest, same, other, smaller)]
        assert (layer.codes - codes[0]).abs().max() <= 1
        assert torch.equal(layer.codes, codes[1])
        assert torch.equal(layer.quantizer.scale, compressed(nearest)[name].quantizer.scale)
        assert theirs[f"{name}.weight"][0]["scale"] == pytest.approx(layer.quantizer.scale.item(), rel=1e-6)
        differs |= not torch.equal(layer.codes, codes[2]) and not torch.equal(layer.codes, codes[3])
    assert differs
    with pytest.raises(UserError, match="stage.batches=9: there are 3"):
        run(batches=9)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("stage", [Nearest, DFQ, AdaRound])
def test_odd_weights_stay_finite(compress, stage, granularity):
    """A dead channel, a constant one, an outlier, and a whole layer of zeros."""
    model = tiny()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1], model[0].weight[2] = 0, 0, 0.3
        model[2].weight.zero_()
        model[5].weight[0, 0] = 1e3
    done, _ = compress(stage, model, granularity=granularity)
    assert torch.isfinite(done["model"](images()[0])).all()
    for layer in compressed(done["model"]).values():
        rows = layer.weight.flatten(1) if granularity == "channel" else layer.weight.reshape(1, -1)
        assert torch.isfinite(layer.weight).all() and all(len(row.unique()) <= 16 for row in rows)
    with torch.no_grad():
        model[2].weight[0] = float("nan")
    with pytest.raises(UserError, match="2: its weight is not finite"):
        compress(stage, model, granularity=granularity)


# On the command line


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["none", "dfq", "adaround"])
def test_command(r2, stage):
    done = r2(*SMALL, "model=mbv2", f"stage={stage}", "stage.layer_bits={classifier.1: 8}")
    assert done.returncode == 0 and not done.stderr, done.stderr
    (path,) = r2.out.glob("*/record.json")
    record = json.loads(path.read_text())
    assert record["axes"]["weight_bits"] == 4 and record["axes"]["act_bits"] == 8
    assert {p.name for p in path.parent.iterdir()} >= {"encodings.json", "simulation.pt", "model.pt"}
    assert not list(path.parent.glob(".aimet*")) and sorted(p.name for p in r2.out.parent.iterdir()) == ["out"]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(r2):
    digests = []
    for devices in (1, 2):
        done = r2(*SMALL, "stage=adaround", "stage.iterations=20", f"devices={devices}", "force=true")
        assert done.returncode == 0, done.stderr
        (path,) = r2.out.glob("*/record.json")
        record = json.loads(path.read_text())
        digests.append(record["sha256"]["final"])
        assert record["processes"] == devices
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_a_mistake_on_two_processes_is_reported_once(r2):
    done = r2(*SMALL, "stage=adaround", "stage.batches=1000", "devices=2")
    assert done.returncode == 2 and done.stderr.count("r2: stage.batches=1000") == 1 and "Traceback" not in done.stderr
