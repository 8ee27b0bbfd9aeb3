"""What needs CUDA: DKM's kernels, streams, autocast, compiled models and NCCL. pytest -m gpu"""

import json

import pytest
import torch
from conftest import SMALL
from test_palettize import compare

from r2 import palettize
from r2.clustering import passes
from r2.data.images import Images
from r2.dist import World
from r2.palettize import Palette

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
COMPILED = {"TORCH_COMPILE_DISABLE": "0"}  # conftest's environment turns the kernels off


@pytest.fixture
def on_gpu(monkeypatch):
    """`compare` hands its tensors over on the CPU; `dkm` computes on the GPU."""
    pytest.importorskip("triton")
    plain = palettize.dkm

    def there(vectors, centroids, *arguments, **named):
        soft, new = plain(vectors.cuda(), centroids.cuda(), *arguments, **named)
        return soft.cpu(), new.cpu()

    monkeypatch.setattr("test_palettize.dkm", there)


@pytest.mark.parametrize("n", [300, 100_003])
@pytest.mark.parametrize("k, d", [(2, 1), (4, 1), (16, 1), (256, 1), (4, 2), (16, 4), (8, 3), (256, 8)])
def test_dkm_equals_the_formula(k, d, n, on_gpu):
    if k > n // 2 or k * n > 1 << 22:
        n = 5003
    w = torch.zeros(1, d, n, device="cuda")
    assert type(passes.passes_over(w, torch.zeros(k, d, device="cuda"), 1e-4)).__name__ == "Kernels"
    limits = (1e-6, 1e-4) if d == 8 else (2e-7, 2e-5)  # of float32's own rounding of |w - c|^2 over the temperature
    compare(n, k, d, 1e-4, 3, torch.float32, *limits)


@pytest.mark.parametrize("bits, dim", [(1, 1), (4, 1), (4, 4)])
def test_a_step_of_dkm_waits_for_nothing_repeats_its_bits_and_stores_no_attention(bits, dim):
    pytest.importorskip("triton")
    w = (0.02 * torch.randn(512, 512, 3, 3, device="cuda")).requires_grad_()
    palette, grad = Palette(bits, dim, 0.05, True, tolerance=0.0), torch.randn_like(w)
    palette.initialise(None, w.cpu(), None)
    start = palette.cuda().centroids.clone()

    def step():
        palette.centroids.copy_(start)
        w.grad = None
        palette.weight(w).backward(grad)
        return palette.centroids.clone(), w.grad

    first = [x.clone() for x in step()]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.cuda.max_memory_allocated() - before <= 8 * w.nbytes


class _Pixels:
    """Encoded images of noise."""

    def __init__(self, count):
        import numpy as np

        self.labels, self.names = np.arange(count) % 3, np.arange(count).astype("S")

    def read(self, index):
        from torchvision.io import encode_png

        generator = torch.Generator().manual_seed(index)
        return encode_png(torch.randint(0, 256, (3, 40, 48), generator=generator, dtype=torch.uint8))

    def name(self, index):
        return str(index)


def test_batches_beside_the_model_are_those_of_the_cpu():
    """While the model's stream is busy, so that a batch which it did not wait for would be another one."""
    found = []
    for device in ("cpu", "cuda"):
        data = Images(_Pixels(96), _Pixels(8), 3, 32, 0, "error", 4).to(World(device=torch.device(device)))
        batches = []
        for images, labels in data.train(32, seed=1, epoch=0):
            if device == "cuda":
                torch.cuda._sleep(20_000_000)  # clock ticks
            batches.append((images.double().cpu(), labels.cpu()))
        found.append(batches)
    for (x, y), (u, v) in zip(*found, strict=True):
        torch.testing.assert_close(u, x, atol=1e-5, rtol=0)
        assert torch.equal(y, v)


@pytest.mark.parametrize("extra", [["recipe.precision=bf16"], ["recipe.precision=fp16"], ["recipe.compile=true"]])
@pytest.mark.parametrize("stage", ["ewgs", "lsq", "pact", "dkm"])
def test_stages_on_one_gpu(r2, stage, extra):
    done = r2(*SMALL, "devices=1", "reg=margin", f"stage={stage}", *extra, timeout=600, env=COMPILED)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = r2.out.glob("*/record.json")
    assert json.loads(path.read_text())["device"]["type"] == "cuda"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_over_nccl(r2):
    done = r2(*SMALL, "devices=2", "recipe.sync_bn=true", "reg=smm", "stage=ewgs", timeout=600, env=COMPILED)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = r2.out.glob("*/record.json")
    assert json.loads(path.read_text())["processes"] == 2
