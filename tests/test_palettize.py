import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from r2 import models, palettize
from r2.clustering import passes
from r2.palettize import Palette, dkm, hard, initial_centroids, relative_temperature, unvectorize, vectorize
from r2.regularizers import weights_of

compiled = pytest.mark.skipif(os.environ.get("TORCH_COMPILE_DISABLE") == "1", reason="kernels are switched off")


def dense(w, c, temperature, iterations):
    """The equation written out, for autograd."""
    for _ in range(iterations):
        A = torch.softmax(-(w[:, None] - c[None]).square().sum(2) / temperature, 1)
        c = A.t() @ w / A.sum(0)[:, None]
    return A @ c, c


def problem(n, k, d, seed=0, std=0.02):
    generator = torch.Generator().manual_seed(seed)
    w = std * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return w, w[:: n // k][:k] * 1.1, torch.randn(n, d, generator=generator, dtype=torch.float64)


def compare(n, k, d, temperature, iterations, dtype, value, gradient):
    """Errors are those of W~ and C in units of the weights, and of the gradients relative to their largest."""
    w, c, g = problem(n, k, d)
    w.requires_grad_(), c.requires_grad_()
    expected, centroids = dense(w, c, temperature, iterations)
    exact = torch.autograd.grad(expected, [w, c], g)
    w2, c2 = (x.detach().to(dtype).requires_grad_() for x in (w, c))
    soft, new = dkm(w2, c2, temperature, iterations, tolerance=0)
    assert soft.dtype == new.dtype == dtype and not new.requires_grad
    found = torch.autograd.grad(soft, [w2, c2], g.to(dtype))
    torch.testing.assert_close(soft.double(), expected, atol=value, rtol=0)
    torch.testing.assert_close(new.double(), centroids, atol=value, rtol=0)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=gradient * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize("temperature", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("bits, dim", list(itertools.product((1, 2, 4), (1, 2, 4))))
def test_float64_equals_autograd_through_the_dense_formula(bits, dim, temperature):
    for iterations in (1, 3):
        compare(300, 2**bits, dim, temperature, iterations, torch.float64, 1e-14, 1e-9)


def test_plain_float32(monkeypatch):
    monkeypatch.setattr(passes, "NATIVE_FROM", 1 << 60)
    for k, d in ((2, 1), (16, 1), (16, 4)):
        compare(3000, k, d, 1e-4, 3, torch.float32, 2e-7, 1e-5)


@compiled
@pytest.mark.parametrize("k, d", [(2, 1), (4, 2), (16, 1), (16, 4)])
def test_kernels(k, d):
    # 5003: no whole number of registers, and more than one piece
    w, c, _ = problem(5003, k, d)
    assert type(passes.passes_over(w.float().t()[None].contiguous(), c.float(), 1e-4)) is passes.Native
    compare(5003, k, d, 1e-4, 3, torch.float32, 2e-7, 1e-5)
    compare(5003, k, d, 1e-3, 1, torch.float32, 2e-7, 1e-5)


@compiled
@pytest.mark.parametrize("temperature", [1e-4, 1e-5, 2e-6])
def test_grid_keeps_its_bound(temperature):
    n, k, iterations = 100_001, 16, 2
    w, c, g = problem(n, k, 1)
    c = initial_centroids(w, k) * 1.02
    grid = passes.passes_over(w.float().view(1, 1, -1), c.float(), temperature)
    assert type(grid) is passes.Grid and grid.size <= n / 4
    gap = c.sort(0).values.diff(dim=0).max().item()
    r = 2 / grid.scale * max(gap, 4 * temperature**0.5) / temperature
    assert r <= 1 / 8
    w.requires_grad_()
    expected, centroids = dense(w, c, temperature, iterations)
    (exact,) = torch.autograd.grad(expected, w, g)
    w2 = w.detach().float().requires_grad_()
    soft, new = dkm(w2, c.float(), temperature, iterations, tolerance=0)
    (found,) = torch.autograd.grad(soft, w2, g.float())
    # the bound of the interpolation, and the rounding of float32: an error of 1e-9 in a weight or centroid counts
    # gap^2 / temperature times in the output
    rounding = 2e-8 + 4e-9 * gap**2 / temperature
    assert (soft - expected).abs().max() <= 0.13 * 0.0235 * r**4 * gap + 0.1 * r**2 / 8 * gap + rounding
    assert (new - centroids).abs().max() <= 0.1 * r**2 / 8 * gap + 1e-7
    assert (found - exact).norm() / exact.norm() <= 1e-4


@compiled
def test_grid_equals_one_by_one(monkeypatch):
    w, c, g = (x.float() for x in problem(70_000, 16, 1))
    results = []
    for least in (1 << 16, 1 << 60):
        monkeypatch.setattr(passes, "GRID_FROM", least)
        w2 = w.clone().requires_grad_()
        soft, new = dkm(w2, c, 1e-4, 3, tolerance=0)
        soft.backward(g)
        results.append((soft.detach(), new, w2.grad / w2.grad.abs().max()))
    for a, b, atol in zip(*results, (2e-7, 2e-7, 2e-5), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_no_grid_where_it_would_be_inaccurate():
    w = torch.randn(1, 1, 1 << 16) * 0.02
    assert passes.Grid.of(w, torch.tensor([[-0.02], [0.02]]), 1e-9) is None
    w[..., 0] = float("inf")
    assert passes.Grid.of(w, torch.tensor([[-0.02], [0.02]]), 1e-4) is None


def test_stops_early():
    w, c, _ = problem(500, 4, 1)
    _, moved = dense(w, c, 1e-4, 1)
    shift = (moved - c).abs().max().item()
    torch.testing.assert_close(dkm(w, c, 1e-4, 5, tolerance=2 * shift)[1], moved)
    torch.testing.assert_close(dkm(w, c, 1e-4, 5, tolerance=0)[1], dense(w, c, 1e-4, 5)[1])
    _, second = dense(w, c, 1e-4, 2)
    middle = (shift + (second - moved).abs().max().item()) / 2
    torch.testing.assert_close(dkm(w, c, 1e-4, 5, tolerance=middle)[1], second)


@pytest.mark.parametrize("n", [500, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-12, 1e-10])
def test_small_temperature_is_hard_k_means(n, dtype, temperature):
    for d in (1, 2):
        w, c, _ = (x.to(dtype) for x in problem(n, 4, d))
        soft, new = dkm(w, c, temperature, 1)
        codes = hard(w, c).long()
        means = torch.stack([w[codes == j].mean(0) for j in range(4)])
        torch.testing.assert_close(new, means, atol=1e-7, rtol=1e-5)
        torch.testing.assert_close(soft, means[codes], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(40, 20, 3, 3), (64, 128, 3, 3)])
@pytest.mark.parametrize("bits, dim", [(2, 1), (4, 1), (2, 2), (4, 4)])
def test_saves_at_most_twice_the_weights(bits, dim, shape):
    w = torch.randn(shape).mul_(0.02).requires_grad_()
    palette = Palette(bits, dim, tolerance=0)
    palette.initialise(None, w, None)
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        soft = palette.weight(w)
    node = soft.grad_fn
    while not hasattr(node, "passes"):
        node = node.next_functions[0][0]
    # what the kernels keep beside autograd: the grid
    held = sum(x.nbytes for x in vars(node.passes).values() if isinstance(x, torch.Tensor) and x.numel())
    assert sum(sizes.values()) + held <= 2 * w.nbytes + 8192


def test_a_change_between_forward_and_backward_is_noticed():
    w, c, g = problem(50, 2, 1)
    w.requires_grad_()
    soft, _ = dkm(w, c, 1e-4)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        soft.backward(g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-12, 1e-4, 1.0])
@pytest.mark.parametrize("n", [1, 40, 5000, 70_000])
def test_odd_weights_stay_finite(n, temperature, dtype):
    constant = torch.full((n, 1), 0.3, dtype=dtype)
    few = torch.arange(n, dtype=dtype).remainder(3)[:, None] * 0.1
    outlier = 0.02 * torch.randn(n, 1, dtype=dtype, generator=torch.Generator().manual_seed(0))
    outlier[0] = 1e4
    for w in (constant, few, outlier, outlier * 0):
        c = initial_centroids(w, 4)
        assert c.shape == (4, 1) and torch.isfinite(c).all()
        w = w.clone().requires_grad_()
        soft, new = dkm(w, c, temperature, 3, tolerance=0)
        soft.sum().backward()
        assert torch.isfinite(soft).all() and torch.isfinite(new).all() and torch.isfinite(w.grad).all()
    torch.testing.assert_close(dkm(constant, initial_centroids(constant, 4), temperature)[0], constant)


@pytest.mark.parametrize("n", [50, 5000])
def test_a_cluster_without_weight_keeps_its_centroid(n):
    w, c, g = (x.float() for x in problem(n, 4, 1))
    c[3] = 50.0
    w.requires_grad_(), c.requires_grad_()
    soft, new = dkm(w, c, 1e-4, 3, tolerance=0)
    soft.backward(g)
    assert new[3] == 50.0 and torch.isfinite(w.grad).all() and torch.isfinite(c.grad).all()


def test_bad_arguments():
    w = torch.zeros(4, 2)
    for arguments in ((torch.zeros(2, 1), 1e-4), (torch.zeros(2, 2), 0.0), (torch.zeros(2, 2), 1e-4, 0)):
        with pytest.raises(ValueError):
            dkm(w, *arguments)
    with pytest.raises(ValueError):
        Palette(9)


# ------------------------------------------------------------------------------------------------ k-means


def inertia(w, c):
    return (w - c[hard(w, c).long()]).double().square().sum().item()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=9), st.sampled_from([2, 4]))
def test_few_weights_are_clustered_at_best(values, k):
    w = torch.tensor(sorted(values), dtype=torch.float64)[:, None]
    c = initial_centroids(w, k)
    best = float("inf")
    for cuts in itertools.combinations_with_replacement(range(len(w) + 1), k - 1):
        parts = [w[i:j] for i, j in itertools.pairwise((0, *cuts, len(w))) if j > i]
        best = min(best, sum((p - p.mean()).square().sum().item() for p in parts))
    assert c.shape == (k, 1) and torch.isfinite(c).all()
    assert inertia(w, c) <= best + 1e-12


def test_many_weights_reach_the_optimum():
    w = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    # the distortion of the optimal 4-bit quantizer of a Gaussian (Max 1960) is 0.009497
    assert inertia(w, initial_centroids(w, 16)) / w.numel() == pytest.approx(0.0095, rel=0.01)
    w[:5] += 30.0
    assert inertia(w, initial_centroids(w, 16)) / w.numel() < 0.0115


def test_vectors_are_clustered_and_the_same_every_time():
    centres = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    w = (centres[:, None] + 0.01 * torch.randn(16, 1500, 4, generator=torch.Generator().manual_seed(1))).reshape(-1, 4)
    c = initial_centroids(w, 16, seed=3)
    assert inertia(w, c) / len(w) == pytest.approx(4e-4, rel=0.05)
    assert torch.equal(c, initial_centroids(w, 16, seed=3))
    assert torch.isfinite(initial_centroids(w[:3], 16)).all()


# ------------------------------------------------------------------------------------------------ layout and palette


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans())
def test_layout_round_trip(channels, inputs, dim, convolution, last):
    w = torch.arange(channels * inputs * (6 if convolution else 1)).float()
    w = w.view(channels, inputs, 2, 3) if convolution else w.view(channels, inputs)
    if convolution and last:
        w = w.contiguous(memory_format=torch.channels_last)
    vectors, tail = vectorize(w, dim)
    assert len(tail) == channels % dim and vectors.numel() + tail.numel() == w.numel()
    back = unvectorize(vectors, tail, w)
    assert torch.equal(back, w)
    # a dimension of length 1 has any stride
    assert not (convolution and last and channels > 1 and inputs > 1) or back.stride() == w.stride()
    if len(vectors) and dim > 1:
        # consecutive output channels at one place; places with the last axis outermost
        assert torch.equal(vectors[0], w.flatten(1)[:dim, 0])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(1, 11), st.booleans())
def test_codes(bits, dim, channels, last):
    w = torch.randn(channels, 3, 2, 2, generator=torch.Generator().manual_seed(channels))
    if last:
        w = w.contiguous(memory_format=torch.channels_last)
    palette = Palette(bits, dim).eval()
    palette.initialise(None, w, None)
    codes = palette.encode(w)
    found = palette.weight(w)
    assert codes.dtype == torch.uint8 and codes.numel() * dim + palette.tail(w) == w.numel()
    assert len(codes) == 0 or codes.max() < 2**bits
    assert torch.equal(found, palette.decode(codes, w)) and found.shape == w.shape
    assert torch.equal(palette.decode(palette.encode(found), found), found)
    whole = channels - channels % dim
    assert torch.equal(found[whole:], w[whole:])
    assert len(vectorize(found, dim)[0].unique(dim=0)) <= 2**bits


def test_the_nearest_centroid():
    w, c, _ = problem(2000, 16, 3)
    assert torch.equal(hard(w, c).long(), (w[:, None] - c[None]).square().sum(2).argmin(1))
    w, c, _ = problem(2000, 16, 1)
    assert torch.equal(hard(w, c).long(), (w - c.t()).abs().argmin(1))
    assert hard(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [2.0], [1.0], [2.0]])).tolist() == [0, 1]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(10, 6, 3, 3), (10, 40, 3, 3), (10, 300)])
@pytest.mark.parametrize("dim", [1, 2, 4])
def test_training_weight(dim, shape, last):
    w = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if last and len(shape) == 4:
        w = w.contiguous(memory_format=torch.channels_last)
    w.requires_grad_()
    palette = Palette(2, dim)
    palette.initialise(None, w, None)
    start = palette.centroids.clone()
    soft = palette.weight(w)
    vectors, tail = vectorize(w.detach(), dim)
    expected, new = dkm(vectors, start, 1e-4)
    torch.testing.assert_close(soft, unvectorize(expected, tail, w), atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(palette.centroids, new, atol=1e-7, rtol=1e-4)
    assert soft.stride() == w.stride()
    soft.square().sum().backward()
    assert w.grad.stride() == w.stride()
    assert palette.tail(w) == shape[0] % dim * w[0].numel()


def test_state_and_settings():
    w = 0.5 * torch.randn(8, 8)
    palette = Palette(2, 2, temperature=0.01, relative=True, iterations=3, tolerance=0.0)
    palette.initialise(None, w, None)
    assert palette.layer_temperature == pytest.approx(0.01 * w.var().item())
    other = Palette(**palette.settings())
    other.load_state_dict(palette.state_dict())
    assert set(palette.state_dict()) == {"centroids", "layer_temperature"} and palette.weight_bits == 2
    assert torch.equal(other.eval().weight(w), palette.eval().weight(w))
    x = torch.randn(3)
    assert palette.act(x) is x


def test_equal_centroids_part():
    w = torch.zeros(4, 50)
    palette = Palette(2)
    palette.initialise(None, w, None)
    assert torch.equal(palette.weight(w), w)
    w = nn.init.normal_(w, std=0.05)
    for _ in range(20):
        palette.weight(w)
    assert len(palette.centroids.unique()) == 4 and palette.centroids.std() > 0.01


def drawn(shape, of, std):
    """Weights of a distribution with the standard deviation `std`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if of == "normal":
            return std * torch.randn(shape)
        if of == "laplace":
            return std * torch.distributions.Laplace(0.0, 0.5**0.5).sample(shape)
        return std * 3**0.5 * (2 * torch.rand(shape) - 1)


@pytest.mark.parametrize("std", [0.01, 0.5])
@pytest.mark.parametrize("of", ["normal", "laplace", "uniform"])
@pytest.mark.parametrize("bits, dim", [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 4)])
def test_the_default_temperature_leaves_weights_soft_and_centroids_apart(bits, dim, of, std):
    w = drawn((64, 256), of, std)
    palette = Palette(bits, dim, relative_temperature(bits, dim), relative=True)
    palette.initialise(None, w, None)
    vectors, _ = vectorize(w, dim)
    best = inertia(vectors, palette.centroids)
    for _ in range(10):
        palette.weight(w)
    assert 0.03 < palette.soft_share(w) < 0.5
    assert len(hard(vectors, palette.centroids).unique()) == 2**bits
    assert inertia(vectors, palette.centroids) < 1.1 * best


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v1", "mobilenet_v2"])
def test_every_layer_of_every_network_stays_soft_with_the_default_temperature(name, bits):
    torch.manual_seed(0)
    for layer, w in weights_of(getattr(models, name)(10, width_mult=0.25)).items():
        palette = Palette(bits, 1, relative_temperature(bits), relative=True)
        palette.initialise(None, w.detach(), None)
        palette.weight(w)
        # At 1 bit about 5 % of the weights lie between the centroids: of the 72 of a depthwise layer perhaps none.
        assert (0.01 if w.numel() > 500 else 0.0) <= palette.soft_share(w) < 0.5, layer


def test_the_absolute_temperature_is_hard_clustering_of_wide_weights():
    w = drawn((64, 256), "normal", 0.5)
    palette = Palette(1)
    palette.initialise(None, w, None)
    assert palette.soft_share(w) < 0.003
    c, attended = palette.centroids.flatten().double(), w.flatten().double()
    attention = torch.softmax(-(attended[:, None] - c).square() / 1e-4, 1).amax(1)
    assert palette.soft_share(w) == pytest.approx((attention < 0.99).double().mean().item(), abs=1e-4)
    assert Palette(1, 4).soft_share(torch.zeros(3, 2)) is None  # no vector


# ------------------------------------------------------------------------------------------------ no wait for a device


@pytest.fixture
def as_on_a_device(monkeypatch):
    """What runs on a GPU, on the CPU."""
    for module in (passes, palettize):
        monkeypatch.setattr(module, "on_host", lambda x: False)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rows", [8, 9])
def test_one_block_of_vectors_is_as_good_as_several(memory_format, rows, request):
    w = torch.randn(rows, 32, 3, 3).to(memory_format=memory_format)
    palette, grad, found = Palette(2, 2, 0.05, iterations=3, tolerance=0.0), torch.randn(rows, 32, 3, 3), []
    for where in ("host", "device"):
        if where == "device":
            request.getfixturevalue("as_on_a_device")
        palette.centroids.copy_(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
        v = w.clone().requires_grad_()
        soft = palette.weight(v)
        soft.backward(grad)
        found.append((soft.detach(), v.grad, palette.centroids.clone(), len(palettize._blocks(w[:8], 2))))
    torch.testing.assert_close(found[1][:3], found[0][:3], atol=2e-5, rtol=1e-4)
    assert [blocks for *_, blocks in found] == [4, 1]


@pytest.mark.parametrize("rank", [0, 1, 3, 4])
@pytest.mark.parametrize("bits, dim", [(1, 1), (4, 1), (4, 2)])
def test_repeating_the_last_iteration_is_stopping_there(bits, dim, rank, as_on_a_device):
    """Values and gradients in float64, against autograd through as many iterations as the tolerance asks for."""
    w, c, g = problem(300, 2**bits, dim)
    shifts = [(dense(w, c, 1e-4, i + 1)[1] - (dense(w, c, 1e-4, i)[1] if i else c)).abs().max() for i in range(5)]
    tolerance = sorted(shifts, reverse=True)[rank].item() * 1.0001
    needed = next(i + 1 for i, shift in enumerate(shifts) if shift <= tolerance)
    w.requires_grad_(), c.requires_grad_()
    expected, centroids = dense(w, c, 1e-4, needed)
    exact = torch.autograd.grad(expected, [w, c], g)
    soft, new = dkm(w, c, 1e-4, 5, tolerance)
    torch.testing.assert_close((soft, new), (expected, centroids), atol=1e-14, rtol=0)
    found = torch.autograd.grad(soft, [w, c], g)
    torch.testing.assert_close(found, exact, atol=1e-9 * max(x.abs().max().item() for x in exact), rtol=1e-9)


def test_many_long_centroids_are_left_to_pytorch():
    """The kernels' accumulators would overflow the stack: it ended in a segmentation fault."""
    w, c = torch.randn(1, 512, 4096), torch.randn(256, 512)
    found = passes.passes_over(w, c, 1.0)
    assert type(found) is passes.Passes and found.sums(c)[0].shape == (256,)
