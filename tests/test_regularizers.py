import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from waits import Waits

from r2 import regularizers as R
from r2.config import UserError
from r2.kernels import fused
from r2.models import mobilenet_v1
from r2.regularizers import kure, ranges

CLASSES = [R.LInf, R.Margin, R.SoftMinMax, R.Kurtosis]


def set_fuse_from(elements, monkeypatch):
    """From how many elements the regularizers' kernels are compiled."""
    for kernel in [*vars(ranges).values(), *vars(kure).values()]:
        if isinstance(kernel, fused):
            monkeypatch.setattr(kernel, "at_least", elements)


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize("kind", [*CLASSES, R.L2])
def test_a_model_without_weights_is_refused(kind):
    with pytest.raises(UserError, match="no convolution, linear layer or embedding"):
        kind(nn.ReLU())


def test_equations_by_hand():
    w = torch.tensor([0.1, -0.5, 0.3, 0.2], dtype=torch.float64)
    assert R.l_inf(w) == 0.5
    # |M| + (0.5 - 0.25) + (0.3 - 0.25)
    torch.testing.assert_close(R.margin(w, torch.tensor(-0.25)), torch.tensor(0.55, dtype=torch.float64))
    e = torch.exp(2 * w)
    expected = (w * e).sum() / e.sum() - (w / e).sum() / (1 / e).sum() + torch.exp(torch.tensor(-2.0)).double()
    torch.testing.assert_close(R.soft_min_max(w, torch.tensor(2.0, dtype=torch.float64)), expected)
    z = (w - w.mean()) / w.std(unbiased=True)
    torch.testing.assert_close(R.kurtosis(w), ((z**4).mean() - 1.8) ** 2)


def test_soft_min_max_does_not_overflow():
    assert torch.isfinite(R.soft_min_max(torch.tensor([-100.0, 100.0]), torch.tensor(1e4)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=4, max_size=30, unique=True), st.randoms(), st.integers(3, 75))
def test_function_gradients_against_finite_differences(sizes, random, second):
    """Where they exist: no two weights of one size, none at the margin, and not all alike."""
    w = torch.tensor([random.choice((-1, 1)) * size / 50 for size in sizes], dtype=torch.float64)
    second = second / 50 + 0.01
    m = torch.tensor(second, dtype=torch.float64, requires_grad=True)
    w.requires_grad_()
    assert torch.autograd.gradcheck(R.l_inf, (w,))
    assert torch.autograd.gradcheck(R.margin, (w, m))
    assert torch.autograd.gradcheck(R.soft_min_max, (w, m))
    assert torch.autograd.gradcheck(R.kurtosis, (w,), atol=1e-3)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_add_gradients_equals_autograd(kind, dim, channels_last):
    model = small_model()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    reg = kind(model, dim=dim)
    value = reg()
    value.backward()
    expected = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    own = [p.grad.clone() for p in reg.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for p in reg.parameters():
        p.grad = None
    torch.testing.assert_close(reg.add_gradients(), value.detach())
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e, atol=1e-6, rtol=1e-4)
    for p, e in zip(reg.parameters(), own, strict=True):
        if kind is R.Margin:  # documented: clipped, in units of the larger of the margin and the weights
            sizes = torch.stack([w[j::dim].abs().amax() for w in R.weights_of(model).values() for j in range(dim)])
            e = (e / reg.weight).round().clamp(-1, 1) * reg.weight * torch.maximum(sizes.view_as(p), p).detach()
        torch.testing.assert_close(p.grad, e, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("kind", CLASSES)
def test_fused_kernels_equal_plain_ones(kind, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 48))
    found = {}
    for threshold in (0, 1 << 30):
        set_fuse_from(threshold, monkeypatch)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        value = kind(model).add_gradients()
        found[threshold] = [value, *[p.grad.clone() for p in model.parameters()]]
    for a, b in zip(found[0], found[1 << 30], strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-4)


def test_every_conv_and_linear_weight_is_covered():
    model = mobilenet_v1(10, 0.25)
    assert len(R.weights_of(model)) == 28
    assert sum(w.numel() for w in R.weights_of(model).values()) == 463_600 - 256 * 990


@pytest.mark.parametrize("dim", [1, 4])
@pytest.mark.parametrize("value", [0.0, 0.5, 1e-30, 1e6])
@pytest.mark.parametrize("shape", [(8, 8), (1, 8), (1, 1)])  # the last two have fewer channels than a vector
def test_odd_weights_have_finite_terms(shape, value, dim):
    model = nn.Linear(*reversed(shape))
    nn.init.constant_(model.weight, value)
    for kind in CLASSES:
        reg = kind(model, dim=dim)
        model.weight.grad = torch.zeros_like(model.weight)
        assert torch.isfinite(reg.add_gradients()) and torch.isfinite(model.weight.grad).all()
        assert torch.isfinite(reg()) and all(torch.isfinite(p.grad).all() for p in reg.parameters())


def _descend(reg, model, lr, steps, exact=False):
    optimizer = torch.optim.SGD(
        [{"params": list(model.parameters())}, *reg.param_groups(lr)], lr, momentum=0.9, nesterov=True
    )
    sizes = []
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for p in reg.parameters():
            p.grad = None
        if exact:
            reg().backward()
        else:
            reg.add_gradients()
        optimizer.step()
        sizes.append(next(reg.parameters()).detach().abs().max().item())
    return sizes


def test_margin_runs_away_under_the_exact_gradient_and_not_in_training():
    """The trap: dL/dM is of order N. Clipped, M stays where the weights are."""
    torch.manual_seed(0)
    model = nn.Linear(1000, 100, bias=False)
    frozen = copy.deepcopy(model)
    largest = model.weight.abs().max().item()
    assert max(_descend(R.Margin(frozen), frozen, 0.4, 3, exact=True)) > 10 * largest
    model.weight.data.normal_(0, 0.03)
    sizes = _descend(R.Margin(model), model, 0.4, 200)
    assert all(0 < s < 10 * 0.15 for s in sizes)


def _margins(reg, w, lr, steps):
    """|M| after each step of SGD on M alone: the weights stand still."""
    optimizer = torch.optim.SGD(reg.param_groups(lr), lr, momentum=0.9, nesterov=True)
    sizes = []
    for _ in range(steps):
        w.grad = torch.zeros_like(w)
        optimizer.zero_grad()
        reg.add_gradients()
        optimizer.step()
        sizes.append(reg.margin.abs().item())
    return torch.tensor(sizes)


SMALL_RATE = pytest.param(0.05, marks=pytest.mark.slow)  # tens of thousands of steps


@pytest.mark.parametrize("lr", [SMALL_RATE, 0.4, 1.0])
@pytest.mark.parametrize("count", [10, 1000, 100_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("start", [0.0, 0.01, 3.0])  # of max |w|: 0 and 0.01 leave most weights outside, 3 none
def test_margin_comes_to_the_largest_weight_from_either_side(count, lr, start):
    torch.manual_seed(0)
    model = nn.Linear(count, 1, bias=False)
    model.weight.data.normal_(0, 0.03)
    largest = model.weight.abs().max().item()
    reg = R.Margin(model)
    reg.margin.data.fill_(start * largest)
    sizes = _margins(reg, model.weight, lr, round(200 / lr)) / largest
    assert sizes.isfinite().all() and sizes.max() <= 3.01
    moved = (sizes[1:] - sizes[:-1]).abs() / sizes[1:].clamp(min=1)
    assert moved.max() <= 0.2 * lr  # a small fraction of its size at every step
    assert (sizes[0] > start) if start < 1 else (sizes[0] < start)
    assert 0.3 < sizes[-50:].min() and sizes[-50:].max() < 1.7


@pytest.mark.parametrize("lr", [SMALL_RATE, 1.0])
def test_margin_follows_weights_that_change_their_size(lr):
    torch.manual_seed(0)
    model = nn.Linear(1000, 1, bias=False)
    reg = R.Margin(model)
    for size in (1e-3, 1.0):  # a thousandth, and back
        model.weight.data.uniform_(-size, size)
        sizes = _margins(reg, model.weight, lr, round(1000 / lr))
        assert 0.3 * size < sizes[-1] < 2 * size


def test_soft_min_max_temperature_stalls_where_theory_says():
    """The trap: alpha stops near -ln(Var_p + Var_q) however long it is trained, as Eq. 3 is written."""
    torch.manual_seed(0)
    model = nn.Linear(100, 50, bias=False)
    model.weight.data.normal_(0, 0.1)
    reg = R.SoftMinMax(model, weight=1.0)
    for _ in range(3000):
        model.weight.grad = torch.zeros_like(model.weight)
        reg.temperature.grad = None
        reg.add_gradients()
        reg.temperature.data -= reg.temperature.grad
    alpha = reg.temperature.item()
    w = model.weight.flatten()
    spread = sum(
        (torch.softmax(s * alpha * w, 0) * w**2).sum() - (torch.softmax(s * alpha * w, 0) * w).sum() ** 2
        for s in (1, -1)
    )
    assert 3.0 < alpha < 5.0  # -ln(2 * 0.1^2) = 3.9: far from a hard maximum
    assert abs(alpha + torch.log(spread).item()) < 0.05


def test_parameters_have_their_own_group_without_weight_decay():
    reg = R.Margin(small_model(), lr_mult=0.5)
    (group,) = reg.param_groups(0.4)
    assert group["weight_decay"] == 0 and group["lr"] == 0.2
    assert R.LInf(small_model()).param_groups(0.4) == []


def _zero_gradients(model):
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


@pytest.mark.parametrize("kind", CLASSES)
def test_frozen_and_unused_weights_are_left_out(kind):
    """Both ways of leaving a layer out give what the other layers give alone."""
    model = small_model()
    alone = kind(model[4])
    expected = alone().item()
    model[4].weight.grad = torch.zeros_like(model[4].weight)
    alone.add_gradients()
    gradient = model[4].weight.grad.clone()
    model[0].weight.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    reg = kind(model)
    _zero_gradients(model[4])
    assert reg().item() == pytest.approx(expected)
    assert reg.add_gradients().item() == pytest.approx(expected)
    assert model[0].weight.grad is None
    torch.testing.assert_close(model[4].weight.grad, gradient)

    model[0].weight.requires_grad_(True)  # trained again, and not used by this step
    _zero_gradients(model[4])
    share = 2 if kind is R.Kurtosis else 1  # a mean over the trained layers
    assert reg.add_gradients().item() == pytest.approx(expected / share)
    torch.testing.assert_close(model[4].weight.grad, gradient / share)


@pytest.mark.parametrize("kind", CLASSES)
def test_without_any_gradient_the_order_is_wrong_and_without_trained_weights_the_term_is_zero(kind):
    model = small_model()
    with pytest.raises(UserError, match=r"after loss.backward\(\)"):
        kind(model).add_gradients()
    reg = kind(model.requires_grad_(False))
    assert reg.add_gradients() == 0 and reg() == 0


@pytest.mark.parametrize("kind", CLASSES)
def test_a_tied_weight_counts_once(kind):
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    tied[1].weight = tied[0].weight
    single = nn.Sequential(copy.deepcopy(tied[0]))
    found = []
    for model in (tied, single):
        _zero_gradients(model)
        reg = kind(model)
        assert reg().item() == pytest.approx(reg.add_gradients().item())
        found.append([reg(), model[0].weight.grad, *[p.grad for p in reg.parameters()]])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("fuse_from", [0, 1 << 30])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_weights_are_summed_in_float32(kind, dim, fuse_from, dtype, tolerance, monkeypatch):
    """Against float64 autograd at the same values; an outlier, so that sums of powers in float16 would be off."""
    set_fuse_from(fuse_from, monkeypatch)
    torch.manual_seed(0)
    half = nn.Linear(256, 256, bias=False)
    half.weight.data.normal_(0, 0.005)
    half.weight.data[0, 0] = 0.1
    half = half.to(dtype)
    exact = copy.deepcopy(half).double()
    # soft-min-max's pull on one of 65,536 weights is below float16's range at weight 0.01
    weight = 1e4 if kind is R.SoftMinMax else 0.01
    half_reg, exact_reg = kind(half, weight, dim=dim), kind(exact, weight, dim=dim)
    _zero_gradients(half)
    exact_reg().backward()
    value = half_reg.add_gradients()
    assert value.dtype == torch.float32 and all(p.dtype == torch.float32 for p in half_reg.parameters())
    assert value.item() == pytest.approx(exact_reg().item(), rel=tolerance / 10)
    assert half_reg().item() == pytest.approx(value.item(), rel=tolerance / 10)
    error = (half.weight.grad.double() - exact.weight.grad).norm() / exact.weight.grad.norm()
    assert error <= tolerance
    if kind is R.SoftMinMax:
        torch.testing.assert_close(half_reg.temperature.grad, exact_reg.temperature.grad.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("kind", CLASSES)
def test_gradients_equal_float64_autograd_for_every_kind_of_layer(kind, dim):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.Conv3d(2, 4, 2), nn.ConvTranspose1d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.ConvTranspose3d(2, 3, 2), nn.Embedding(9, 5), nn.Linear(7, 4),
    )  # fmt: skip
    assert len(R.weights_of(model)) == 7
    exact = copy.deepcopy(model).double()
    reg = kind(model, dim=dim)
    exact_reg = kind(exact, dim=dim)
    exact_reg().backward()
    _zero_gradients(model)
    assert reg.add_gradients().item() == pytest.approx(exact_reg().item(), rel=1e-5)
    for w, e in zip(R.weights_of(model).values(), R.weights_of(exact).values(), strict=True):
        torch.testing.assert_close(w.grad.double(), e.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("change", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_a_parametrized_weight_passes_the_term_on_to_its_originals(kind, change):
    torch.manual_seed(0)
    model = small_model()
    change(model[4])
    exact, images = copy.deepcopy(model), torch.randn(4, 3, 5, 5)
    reg, exact_reg = kind(model), kind(exact)
    for _ in range(2):  # the second computes the weight from the originals that the first has changed
        model.zero_grad()
        exact.zero_grad()
        model(images).square().mean().backward()
        value = reg.add_gradients()
        loss = exact_reg()
        (exact(images).square().mean() + loss).backward()
        assert value.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
        for (name, p), e in zip(model.named_parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(p.grad, e.grad, rtol=1e-4, atol=1e-6, msg=name)
            p.data -= 0.1 * p.grad
            e.data.copy_(p.data)


@pytest.mark.parametrize("change", [torch.nn.utils.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_computed_by_a_hook_is_one_clear_error(change):
    model = small_model()
    change(model[4])
    with pytest.raises(UserError, match=r"^4\.weight is computed .*torch.nn.utils.parametrizations"):
        R.Margin(model)


@pytest.mark.parametrize("kind", CLASSES)
def test_with_a_grad_scaler_the_term_comes_after_unscaling(kind):
    """The order of the module's docstring gives one step without a scaler; without `unscale_` it does not."""
    found = {}
    for order in ("plain", "documented", "wrong"):
        model = small_model()
        reg = kind(model, weight=1.0)
        optimizer = torch.optim.SGD([{"params": model.parameters()}, *reg.param_groups(0.05)], 0.05)
        scaler = torch.amp.GradScaler("cpu", enabled=order != "plain")
        torch.manual_seed(1)
        scaler.scale(model(torch.randn(4, 3, 5, 5)).square().sum()).backward()
        if order != "wrong":
            scaler.unscale_(optimizer)
        reg.add_gradients()
        scaler.step(optimizer)
        scaler.update()
        found[order] = torch.cat([p.detach().flatten() for p in (*model.parameters(), *reg.parameters())])
    torch.testing.assert_close(found["documented"], found["plain"])
    assert (found["wrong"] - found["plain"]).abs().max() > 1e-3


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("kind", [*CLASSES, R.L2])
def test_the_host_never_waits_for_the_device(kind, dim):
    model = small_model()
    reg = kind(model) if kind is R.L2 else kind(model, dim=dim)
    _zero_gradients(model)
    with Waits() as waits:
        reg.add_gradients()
    assert not waits.found


class OfItsTermAlone(R.Regularizer):
    """As docs/extending.md teaches it, with a parameter of its own."""

    def __init__(self, model, weight=0.3, dim=1):
        super().__init__(model, weight, dim)
        self.power = nn.Parameter(torch.tensor(1.5))

    def term(self, w, layer, column):
        return ((w.abs() + 0.1) ** self.power).mean() * (layer + 1)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_term_alone_is_enough(dim, channels_last):
    model = small_model().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    regularizer = OfItsTermAlone(model, dim=dim)
    tensors = [*model.parameters(), regularizer.power]
    expected = torch.autograd.grad(total := regularizer(), tensors, allow_unused=True, materialize_grads=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.testing.assert_close(regularizer.add_gradients(), total.detach())
    for p, gradient in zip(model.parameters(), expected, strict=False):
        torch.testing.assert_close(p.grad, 1 + gradient)
    torch.testing.assert_close(regularizer.power.grad, expected[-1])


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("layout", ["transposed", "channels_last_3d"])
def test_a_weight_of_any_layout_gets_its_gradient(kind, layout):
    torch.manual_seed(0)
    if layout == "transposed":
        model = nn.Linear(5, 7)
        model.weight = nn.Parameter(torch.randn(5, 7).t())
    else:
        model = nn.Conv3d(3, 4, 3).to(memory_format=torch.channels_last_3d)
        nn.init.normal_(model.weight)
    regularizer = kind(model)
    expected = torch.autograd.grad(regularizer(), model.weight)[0]
    assert expected.abs().sum() > 0
    model.weight.grad = torch.zeros_like(model.weight)
    regularizer.add_gradients()
    torch.testing.assert_close(model.weight.grad, expected)


def test_a_parametrized_weight_is_computed_once_when_weights_are_listed():
    calls = []

    class Counted(nn.Module):
        def forward(self, w):
            calls.append(1)
            return w

    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)])
    for layer in model:
        nn.utils.parametrize.register_parametrization(layer, "weight", Counted())
    calls.clear()
    assert len(R.weights_of(model)) == 4 and len(calls) == 4
