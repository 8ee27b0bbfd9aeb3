"""DKM's kernels for a GPU, without one: what they compute in Triton's interpreter, and that they compile.

TRITON_INTERPRET=1 python -m pytest tests/test_triton.py    # those that the interpreter runs, one by one
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_palettize
import torch
from test_palettize import compare, problem

from r2 import palettize
from r2.clustering import passes
from r2.palettize import dkm

pytest.importorskip("triton", reason="comes with PyTorch's wheels for CUDA")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="is run by test_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@pytest.fixture
def kernels(monkeypatch):
    """Whatever `dkm` is given goes through the kernels."""
    from r2.clustering.gpu import Kernels

    monkeypatch.setattr(palettize, "passes_over", lambda w, c, temperature, iterations=1: Kernels(w, c, temperature))
    return Kernels


@compiled
@pytest.mark.parametrize("chosen", ["777 or 100-3-3 or dead", pytest.param("test", marks=pytest.mark.slow)])
def test_in_the_interpreter(chosen):
    """In a process of its own: Triton reads the variable when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


# no length is a multiple of a block's; those beyond 2048 take several programs
@in_interpreter
@pytest.mark.parametrize(
    "n, k, d", [(2100, 2, 1), (333, 16, 1), (260, 256, 1), (777, 4, 2), (170, 16, 4), (257, 256, 8), (100, 3, 3)]
)
def test_values_and_gradients(n, k, d, kernels):
    compare(n, k, d, 1e-4, 3, torch.float32, 2e-7, 1e-5)


@in_interpreter
def test_soft_attention(kernels):
    compare(1000, 4, 1, 1e-3, 1, torch.float32, 2e-7, 1e-5)


@in_interpreter
@pytest.mark.parametrize("temperature", [1e-12, 1e-35])
def test_hard_attention(temperature, kernels):
    test_palettize.test_small_temperature_is_hard_k_means(500, torch.float32, temperature)
    w, c, g = (x.float() for x in problem(500, 4, 2))
    w.requires_grad_()
    dkm(w, c, temperature)[0].backward(g)
    assert torch.isfinite(w.grad).all()


@in_interpreter
def test_a_dead_cluster(kernels):
    test_palettize.test_a_cluster_without_weight_keeps_its_centroid(50)


@in_interpreter
def test_several_blocks_are_as_good_as_one(kernels):
    """And a temperature on the device is as good as a number."""
    w, c, g = (x.float() for x in problem(3 * 70, 4, 2))
    blocks = w.view(3, 70, 2).transpose(1, 2).contiguous()
    found = []
    for vectors, temperature in ((w.t()[None].contiguous(), 1e-4), (blocks, torch.tensor(1e-4))):
        vectors = vectors.clone().requires_grad_()
        soft, new = palettize._dkm(vectors, c, temperature, 2, 0.0)
        grad = g.t()[None] if len(vectors) == 1 else g.view(3, 70, 2).transpose(1, 2)
        soft.backward(grad)
        found.append([x.transpose(1, 2).reshape(-1, 2) for x in (soft.detach(), vectors.grad)] + [new])
    for one, several in zip(*found, strict=True):
        torch.testing.assert_close(several, one, atol=1e-5 * one.abs().max().item(), rtol=0)


@in_interpreter
def test_every_run_gives_the_same_bits(kernels):
    w, c, _ = (x.float() for x in problem(5003, 4, 1))
    first, second = (kernels(w.t()[None].contiguous(), c, 1e-4).sums(c) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@compiled
def test_the_plain_form_stands_in_where_there_is_no_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "r2.clustering.gpu", None)  # an import of it fails
    passes._triton.cache_clear()
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    try:
        with pytest.warns(UserWarning, match="DKM has no kernels for this GPU"):
            assert passes._triton() is None
    finally:
        passes._triton.cache_clear()


def binary(kernel, k, d, capability, **flags):
    """The kernel compiled for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from r2.clustering import gpu

    names = kernel.arg_names
    constants = {name: value for name, value in {**gpu.constants(k, d), **flags}.items() if name in names}
    signature = {n: "constexpr" if n in constants else "i32" if n == "m" else "*fp32" for n in names}
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": gpu.warps(k, d)}).asm


def compiles(k, d, capability):
    from r2.clustering import gpu

    variants = [(gpu.sums, {"ONES": ones}) for ones in (True, False)] + [(gpu.output, {})]
    variants += [(gpu.back, {"GRAD": last, "SUMS": wanted}) for last in (True, False) for wanted in (True, False)]
    for kernel, flags in variants:
        asm = binary(kernel, k, d, capability, **flags)
        assert asm["cubin"][:4] == b"\x7fELF" and f"sm_{capability}" in asm["ptx"]
        assert not re.search(r"^\s*(@\S+\s+)?(atom|red)\.", asm["ptx"], re.MULTILINE)  # sums in no fixed order


@compiled
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability):
    compiles(4, 1, capability)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("bits, dim", [(1, 1), (4, 1), (8, 1), (2, 2), (4, 4), (3, 3), (8, 8)])
def test_kernels_of_every_size_compile(bits, dim):
    compiles(2**bits, dim, 90)
