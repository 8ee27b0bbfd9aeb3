import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from r2.models import mobilenet_v1
from r2.quantizers import ewgs
from r2.quantizers.calibration import calibrate
from r2.quantizers.hessian import gradient_scales
from r2.quantizers.layers import quantizable, swap


def reference(x, lower, upper, bits, delta, grad):
    """The formula, element by element in float64 (numpy), independent of the code under test."""
    n = 2.0**bits - 1
    z = (x - lower) / (upper - lower)
    inside = (z >= 0) & (z <= 1)
    q = np.rint(np.clip(z, 0, 1) * n) / n
    gz = np.where(inside, grad * (1 + delta * np.sign(grad) * (z - q)), 0)
    width = upper - lower
    return q, gz / width, (gz * (x - upper)).sum() / width**2, -(gz * (x - lower)).sum() / width**2


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("delta", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(6, 7), (3, 16, 12, 12)])
def test_values_and_gradients_against_float64(bits, delta, dtype, tolerance, shape):
    rng = np.random.default_rng(bits)
    lower, upper = -0.75, 1.25
    x = rng.normal(0, 1, shape).astype(np.float32)
    x.flat[:4] = [lower, upper, 2.0, -2.0]  # both bounds belong to the interval
    grad = rng.normal(0, 1, shape).astype(np.float32)
    q, gx, gl, gu = reference(x.astype(np.float64), lower, upper, bits, delta, grad.astype(np.float64))
    t = torch.tensor(x, dtype=dtype, requires_grad=True)
    low, high = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (lower, upper))
    out = ewgs.quantize(t, low, high, bits, delta)
    out.backward(torch.tensor(grad, dtype=dtype))
    # float32 may fall on the other side of a rounding boundary for a few elements
    close = np.isclose(out.detach().double().numpy(), q, atol=1e-6)
    assert close.mean() > (0.999 if dtype == torch.float32 else 0.9999)
    np.testing.assert_allclose(
        t.grad.double().numpy()[close], gx[close], rtol=1e-3 if tolerance > 1e-6 else 1e-9, atol=tolerance
    )
    np.testing.assert_allclose(low.grad.item(), gl, rtol=2e-3 if tolerance > 1e-6 else 1e-9, atol=tolerance * 10)
    np.testing.assert_allclose(high.grad.item(), gu, rtol=2e-3 if tolerance > 1e-6 else 1e-9, atol=tolerance * 10)
    assert t.grad.flatten()[0] != 0 and t.grad.flatten()[1] != 0 and (t.grad.flatten()[2:4] == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=60), st.sampled_from([1, 2, 3, 4, 8]))
def test_levels_monotone_and_idempotent(values, bits):
    x = torch.tensor(sorted(values), dtype=torch.float64)
    low, high = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)
    q = ewgs.quantize(x, low, high, bits)
    assert q.min() >= 0 and q.max() <= 1 and len(q.unique()) <= 2**bits
    assert (q.diff() >= 0).all()
    torch.testing.assert_close(ewgs.quantize(low + q * (high - low), low, high, bits), q)


@pytest.mark.parametrize("bits", [0, 33])
def test_impossible_bits(bits):
    with pytest.raises(ValueError, match="bits"):
        ewgs.quantize(torch.zeros(3), torch.tensor(0.0), torch.tensor(1.0), bits)


@pytest.mark.parametrize("signed", [False, True])
def test_layer_at_8_bits_is_close_to_the_original(signed):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, padding=1)
    x = torch.randn(4, 8, 10, 10)
    x = x if signed else x.relu()
    expected = conv(x)
    layers = quantizable(conv)
    swap(layers, lambda name: ewgs.EWGS(8, 8, 0.0))
    calibrate(conv, layers, x)
    assert bool(conv.quantizer.signed) == signed
    error = (conv(x) - expected).norm() / expected.norm()
    assert error < 0.06


def test_signed_inputs_keep_zero_padding():
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    layers = quantizable(conv)
    swap(layers, lambda name: ewgs.EWGS(4, 3, 0.0))
    calibrate(conv, layers, torch.randn(2, 1, 8, 8))
    q = conv.quantizer
    torch.testing.assert_close(-q.act_lower, q.act_upper)
    # an unsigned-like offset would make zeros and padding differ
    assert q.act(torch.zeros(1)).abs() <= 0.5 / 7 + 1e-6


def test_first_and_last_layer_can_be_left_out():
    model = mobilenet_v1(10, 0.25)
    assert len(quantizable(model)) == 28 and len(quantizable(model, skip_first_last=True)) == 26


def test_hessian_estimate_repeats_and_leaves_the_model_alone():
    """A tiny model: the estimate is finite, not negative, and repeats with its seed; the model is not changed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    layers = quantizable(model)
    swap(layers, lambda name: ewgs.EWGS(2, 2, 0.0))
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(0, 3, (8,))
    calibrate(model, layers, images)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = gradient_scales(model, layers, [(images, labels)], probes=20, seed=1)
    again = gradient_scales(model, layers, [(images, labels)], probes=20, seed=1)
    assert first == again and set(first) == set(layers)
    assert all(np.isfinite(v) and v >= 0 for d in first.values() for v in d.values())
    assert any(v > 0 for d in first.values() for v in d.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_capped_start_leaves_no_level_empty():
    """After range regularization no weight reaches 3 std: under the official start the outer levels stay empty."""
    w = torch.linspace(-1, 1, 4001)
    levels = {}
    for start in ("official", "capped"):
        quantizer = ewgs.EWGS(2, None, weight_init=start)
        quantizer.initialise([torch.randn(4, 4001)], w[None], torch.nn.functional.linear)
        levels[start] = quantizer.encode(w).unique().tolist()
    assert levels == {"official": [1, 2], "capped": [0, 1, 2, 3]}


def test_the_hessian_passes_no_batchnorm_without_a_second_derivative(monkeypatch):
    """PyTorch's SyncBatchNorm has none on a GPU."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    swap(quantizable(model), lambda _: ewgs.EWGS(2, 2, 1e-3))
    calibrate(model, quantizable(model), images)
    expected = gradient_scales(model, ["0", "4"], [(images, labels)], 2, 0)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda *_: pytest.fail("of the replica"))
    assert gradient_scales(synchronised, ["0", "4"], [(images, labels)], 2, 0) == expected
    assert type(synchronised[1]) is nn.SyncBatchNorm
