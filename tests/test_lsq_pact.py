"""LSQ, PACT and DoReFa against their formulas, element by element in float64 (numpy)."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_security import composed
from torch import nn

from r2.config import UserError, build
from r2.models import mobilenet_v1
from r2.quantizers import lsq, pact
from r2.quantizers.calibration import best_clip, calibrate
from r2.quantizers.ewgs import EWGS
from r2.quantizers.layers import layer_bits, quantizable, signal_to_noise, swap
from r2.stages import qat

DTYPES = [(torch.float64, 1e-10), (torch.float32, 2e-4)]
SHAPES = [(6, 7), (3, 16, 12, 12)]


def tensors(x, grad, dtype, *scalars):
    leaf = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (x, *scalars)]
    return leaf, torch.tensor(grad, dtype=dtype)


def samples(shape, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(0, scale, shape).astype(np.float32).astype(np.float64) for _ in range(2))


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits, signed", [(1, False), (2, True), (2, False), (4, True), (8, True), (8, False)])
def test_lsq(bits, signed, shape, dtype, tolerance):
    low, high = lsq.bounds(bits, signed)
    x, g = samples(shape, bits)
    step = 0.25
    x.flat[:3] = [high * step, low * step, (high + 0.4) * step]  # the closed interval, and rounding does not widen it
    z = x / step
    inside = (z >= low) & (z <= high)
    slope = np.where(inside, np.rint(z) - z, np.where(z < low, low, high))
    expected = np.rint(np.clip(z, low, high)) * step
    (t, s), grad = tensors(x, g, dtype, step)
    y = lsq.quantize(t, s, low, high)
    y.backward(grad)
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=tolerance)
    np.testing.assert_allclose(t.grad.numpy(), np.where(inside, g, 0), atol=tolerance)
    np.testing.assert_allclose(s.grad.item(), (g * slope).sum() / np.sqrt(x.size * high), rtol=tolerance * 10)


def test_lsq_at_one_bit_signed_is_refused_with_the_reason():
    with pytest.raises(UserError, match="1 bit signed is not defined"):
        lsq.LSQ(1, 2)
    with pytest.raises(ValueError, match="quant_max"):
        lsq.quantize(torch.zeros(3), torch.tensor(1.0), -1, 0)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_pact_activation(bits, signed, shape, dtype, tolerance):
    if signed and bits == 1:
        with pytest.raises(ValueError, match="between 2"):
            pact.quantize_activation(torch.zeros(2), torch.tensor(1.0), 1, signed=True)
        return
    x, g = samples(shape, bits)
    alpha = 0.75
    low, levels = (-alpha, 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    x.flat[:4] = [alpha, low, 2.0, -2.0]
    expected = np.rint(np.clip(x, low, alpha) * levels / alpha) * alpha / levels
    gx = np.where((x >= low) & (x <= alpha), g, 0)
    ga = g[x >= alpha].sum() - (g[x <= low].sum() if signed else 0)
    (t, a), grad = tensors(x, g, dtype, alpha)
    y = pact.quantize_activation(t, a, bits, signed)
    y.backward(grad)
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=tolerance)
    np.testing.assert_allclose(t.grad.numpy(), gx, atol=tolerance)
    np.testing.assert_allclose(a.grad.item(), ga, atol=tolerance * 100)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dorefa_weight(bits, shape, channels_last, dtype, tolerance):
    w, g = samples(shape, bits, 0.5)
    t = np.tanh(w)
    m, n = np.abs(t).max(), 2.0**bits - 1
    if bits == 1:
        expected, gw = np.where(w >= 0, 1, -1) * np.abs(w).mean(), g
    else:
        expected = 2 * (np.rint((t / (2 * m) + 0.5) * n) / n) - 1
        top = np.zeros_like(w)
        top.flat[np.abs(t).argmax()] = 1
        gw = (g / m - top * np.sign(t) * (g * t).sum() / m**2) * (1 - t * t)
    (leaf,), grad = tensors(w, g, dtype)
    x = leaf.to(memory_format=torch.channels_last) if channels_last and leaf.ndim == 4 else leaf
    y = pact.quantize_weight(x, bits)
    y.backward(grad)
    close = np.isclose(y.detach().numpy(), expected, atol=tolerance)  # float32 may round across a boundary
    assert close.mean() > (0.999 if dtype == torch.float32 else 0.99999)
    np.testing.assert_allclose(leaf.grad.numpy(), gw, rtol=1e-3, atol=tolerance)


def test_dorefa_at_32_bits_is_the_weight():
    w = torch.randn(5)
    assert pact.quantize_weight(w, 32) is w
    with pytest.raises(ValueError, match="bits"):
        pact.quantize_weight(w, 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=60), st.sampled_from([2, 3, 4, 8]))
def test_levels_monotone_and_idempotent(values, bits):
    x = torch.tensor(sorted(values), dtype=torch.float64)
    step, alpha = torch.tensor(0.3, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)
    for quantizer in (
        lambda v: lsq.quantize(v, step, *lsq.bounds(bits, True)),
        lambda v: pact.quantize_activation(v, alpha, bits),
        lambda v: pact.quantize_activation(v, alpha, bits, signed=True),
    ):
        y = quantizer(x)
        assert len(y.unique()) <= 2**bits and (y.diff() >= 0).all()
        torch.testing.assert_close(quantizer(y), y)
        assert quantizer(torch.zeros(1, dtype=torch.float64)) == 0  # zero padding stays zero
    if (x != 0).any():
        assert len(pact.quantize_weight(x, bits).unique()) <= 2**bits


@pytest.mark.parametrize("kind", [lsq.LSQ, pact.PACT, EWGS])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_give_the_weight_back_bit_for_bit(kind, bits):
    if kind is lsq.LSQ and bits == 1:
        return
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(4, 8, 10, 10)
    layers = quantizable(conv)
    swap(layers, lambda name: kind(bits, 8))
    calibrate(conv, layers, x)
    codes = conv.quantizer.encode(conv.weight)
    assert codes.min() >= 0 and codes.max() < 2**bits and codes.shape == (conv.weight.numel(),)
    with torch.no_grad():
        assert torch.equal(conv.quantizer.decode(codes, conv.weight), conv.quantizer.weight(conv.weight))


@pytest.mark.parametrize("kind", [lsq.LSQ, pact.PACT, EWGS])
def test_signal_to_noise_grows_with_bits(kind):
    torch.manual_seed(0)
    found = []
    for bits in (2, 4, 8):
        model = mobilenet_v1(10, 0.25)
        layers = quantizable(model)
        swap(layers, lambda name, bits=bits: kind(bits, 8))
        images = torch.randn(8, 3, 32, 32)
        calibrate(model, layers, images)
        ratio = signal_to_noise(model, images)
        assert set(ratio) == set(layers)
        found.append(sum(ratio.values()) / len(ratio))
    assert found[0] < found[1] < found[2]


def test_bits_by_layer_pattern():
    names = ["conv1", "features.0", "features.1", "classifier"]
    assert layer_bits(names, {"features.*": 4, "features.1": 8}) == {"features.0": 4, "features.1": 8}
    with pytest.raises(UserError, match="no layer fits 'fc'"):
        layer_bits(names, {"fc": 8})
    with pytest.raises(UserError, match="1 to 32"):
        layer_bits(names, {"conv1": 0})


def test_one_step_per_output_channel_is_lsq_of_every_channel():
    torch.manual_seed(0)
    w = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    step = (torch.rand(6, 1, 1, 1, dtype=torch.float64) + 0.2).requires_grad_()
    grad = torch.randn_like(w)
    lsq.quantize(w, step, -2, 1).backward(grad)
    for channel in range(6):
        x, s = (t.detach()[channel].clone().requires_grad_() for t in (w, step))
        lsq.quantize(x, s.view(()), -2, 1).backward(grad[channel])
        torch.testing.assert_close(w.grad[channel], x.grad)
        torch.testing.assert_close(step.grad[channel].view(()), s.grad.view(()))


def test_a_step_s_gradient_is_bounded_by_the_step():
    steps = [torch.nn.Parameter(torch.tensor(0.5)), torch.nn.Parameter(torch.tensor([2.0, -0.1]))]
    steps.append(torch.nn.Parameter(torch.tensor(1.0)))  # not used in this step
    steps[0].grad, steps[1].grad = torch.tensor(-15660.0), torch.tensor([0.3, 9.0])
    lsq.bound_gradients(steps)
    assert steps[0].grad.item() == -0.5 and steps[2].grad is None
    torch.testing.assert_close(steps[1].grad, torch.tensor([0.3, 0.1]))


@pytest.mark.parametrize("features", [512, 768])
def test_the_clip_is_chosen_by_every_feature(features):
    """Values at equal distances would be of every fourth feature here."""
    torch.manual_seed(0)
    x = torch.randn(4096, features) * torch.where(torch.arange(features) % 2 == 1, 20.0, 1.0)
    clip = best_clip(x, lambda x, clip: lsq.quantize(x, clip, -2, 1))
    losses = {k: (lsq.quantize(x, torch.tensor(float(k)), -2, 1) - x).square().mean() for k in range(2, 60, 2)}
    assert (lsq.quantize(x, clip, -2, 1) - x).square().mean() < 1.05 * min(losses.values())
    assert best_clip((x * 1e-4).half(), lambda x, clip: lsq.quantize(x, clip, -2, 1)) < 0.02  # and in float16


def test_one_signed_bit_is_refused():
    with pytest.raises(UserError, match="1 bit cannot sign"):
        lsq.LSQ(2, 1).initialise([torch.randn(4, 8)], torch.randn(3, 8), torch.nn.functional.linear)


def test_an_update_changes_a_step_by_a_part_of_itself():
    """Momentum from the time when a step was larger carried it through zero: a loss that is not finite at epoch 6."""
    step, other = torch.nn.Parameter(torch.tensor([1.0, -1.0, 1.0])), torch.nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([step, other], 0.1, momentum=0.9)
    lsq.bound_updates(optimizer, [step], 0.1)
    for update in range(1, 101):
        step.grad, other.grad = torch.tensor([1.0, -1.0, 0.0]), torch.tensor(1.0)
        lsq.bound_gradients([step])
        optimizer.step()
        expected = torch.tensor([0.9**update, -(0.9**update), 1.0])
        torch.testing.assert_close(step.detach(), expected)
    assert other < -1  # what is not a step moves freely


@pytest.mark.parametrize(("limit", "least"), [("0.1", 0.89), ("null", -10.0)])
def test_the_stage_bounds_its_updates_as_its_key_says(limit, least):
    config = composed("stage=lsq", f"stage.step_limit={limit}")
    stage, recipe = build(config["stage"]), build(config["recipe"])
    model, step = nn.Linear(2, 2), nn.Parameter(torch.tensor(1.0))
    (optimizer,) = stage.optimizers(model, [step], recipe, None)
    step.grad = torch.tensor(15660.0)
    if before := stage.before_update([step]):
        before()
    optimizer.step()
    assert step < 0.91 and (step > least) == (limit != "null")


def test_a_limit_that_lets_a_step_become_zero_is_refused():
    with pytest.raises(UserError, match=r"stage.step_limit=1.0: must be below 1"):
        build(composed("stage=lsq", "stage.step_limit=1.0")["stage"])


def test_clips_start_in_the_first_batch_and_have_a_gradient():
    """A clip above every value gets none: 28 clips that started at 8 ended at 8."""
    torch.manual_seed(0)
    for signed in (False, True):
        x = torch.randn(64, 32) if signed else torch.randn(64, 32).relu()
        quantizer = pact.PACT(2, 2)
        quantizer.initialise([x], torch.randn(8, 32), torch.nn.functional.linear)
        assert 0 < quantizer.alpha < x.abs().max()
        quantizer.act(x).square().sum().backward()
        assert quantizer.alpha.grad.abs() > 0


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_first_clip_suits_the_number_of_levels(bits, signed):
    """Three root mean squares, for every number of levels, would round 87 % of a signed layer's inputs to zero."""
    torch.manual_seed(0)
    x = torch.randn(4096) if signed else torch.randn(4096).relu()
    quantizer = pact.PACT(bits, bits)
    quantizer.initialise([x], torch.randn(8, 4096), torch.nn.functional.linear)
    rms = x.square().mean().sqrt()
    losses = [(pact.quantize_activation(x, rms * k / 10, bits, signed) - x).square().mean() for k in range(3, 60)]
    assert (quantizer.act(x) - x).square().mean() <= 1.05 * min(losses)
    assert (quantizer.act(x) != 0).float().mean() > 0.3


@pytest.mark.parametrize("kept", [0.5, 0.1])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_first_step_of_an_input_fits_sparse_inputs_too(bits, signed, kept):
    """2 mean|x| / sqrt(q_max) clips most of the others where most inputs are zero."""
    torch.manual_seed(0)
    x = (torch.randn(4096) if signed else torch.randn(4096).relu()) * (torch.rand(4096) < kept)
    low, high = lsq.bounds(bits, signed)

    def loss(step):
        return (lsq.quantize(x, step, low, high) - x).square().mean()

    quantizer = lsq.LSQ(bits, bits, act_init="fitted")
    quantizer.initialise([x], torch.randn(8, 4096), torch.nn.functional.linear)
    best = min(loss(x.abs().max() / high * k / 100) for k in range(1, 101))
    assert loss(quantizer.act_step) <= 1.25 * best  # the clips tried are 12 % apart
    if bits == 2 and not signed and kept == 0.1:
        official = lsq.LSQ(bits, bits)
        official.initialise([x], torch.randn(8, 4096), torch.nn.functional.linear)
        assert loss(official.act_step) > 2 * best


@pytest.mark.parametrize(("words", "said"), [
    (["model=mbv2"], 1), (["model=mbv1"], 1), (["model=rn18"], 0), (["model=mbv2", "stage.bits=4"], 0),
    (["model=mbv2", "stage.from_scratch=false"], 0), (["model=mbv2", "recipe.epochs=114"], 0),
])  # fmt: skip
def test_a_training_that_ends_before_it_leaves_chance_is_reported_before_it_begins(words, said, monkeypatch):
    monkeypatch.setattr(qat.QAT, "__call__", lambda *_: None)  # the training itself
    config, lines = composed("stage=pact", *words), []
    data, run = SimpleNamespace(steps=lambda batch: 22), SimpleNamespace(say=lines.append)
    model = build(config["model"], num_classes=10)
    build(config["stage"])(model, data, build(config["recipe"]), run, None)
    assert len(lines) == said
    assert all("this one has 660; set recipe.epochs to 114 or more" in line for line in lines)
