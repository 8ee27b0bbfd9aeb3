"""`fused`: the compiled kernels against the functions that they were made of, and which kernel a call gets."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from r2.kernels import fused

COMPILED = """
import warnings
import torch
from r2.kernels import fused

warnings.simplefilter("error")
calls = []

@fused
def scaled(x, by, plus):
    calls.append(x.shape)  # while it is traced
    return torch.round(x * by) if plus is None else (torch.round(x * by) + plus).sum(-1)

def held(x, by, plus=None):
    with torch.no_grad():
        assert torch.allclose(scaled(x, by, plus), scaled.plain(x, by, plus), rtol=1e-5, atol=1e-4)

for n in (4096, 5000, 4099, 8192):
    held(torch.randn(n), torch.tensor(3.0))                 # one kernel
assert len(scaled._compiled) == 1, calls
held(torch.randn(9000)[::2], torch.tensor(3.0))             # other strides
held(torch.randn(4096), torch.randn(4096))                  # as long as x
held(torch.randn(64, 64), torch.randn(64, 64), torch.randn(64))     # where sizes agree by chance
held(torch.randn(64, 128), torch.randn(64, 128), torch.randn(128))  # and where not
held(torch.randn(4500).bfloat16(), torch.tensor(4.0))             # a product without rounding
threads = torch.get_num_threads()
torch.set_num_threads(threads + 1)
held(torch.randn(4096), torch.tensor(3.0))
made = len(scaled._compiled)
torch.set_num_threads(threads)
held(torch.randn(4096), torch.tensor(3.0))
assert len(scaled._compiled) == made
print("fine")
"""


@pytest.mark.slow
def test_every_call_gets_a_kernel_that_is_right_for_it():
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize("error, said", [(RuntimeError("no compiler\nat all"), "no compiler"),
                                         (AssertionError(), "AssertionError")])  # fmt: skip
def test_without_a_compiler_the_function_runs_as_it_is(error, said, monkeypatch):
    @fused
    def doubled(x):
        return 2 * x

    class Failing:
        def aot_compile(self, arguments):
            raise error

    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    monkeypatch.setattr(torch, "compile", lambda function, **options: Failing())
    x = torch.ones(5000)
    with torch.no_grad(), pytest.warns(UserWarning, match=f"doubled is not fused, and slower: {said}$"):
        assert torch.equal(doubled(x), 2 * x)
    with torch.no_grad():
        assert torch.equal(doubled(torch.ones(6000)), torch.full((6000,), 2.0))  # and warns once


def test_a_fake_tensor_and_a_trace_get_the_function_itself():
    """A kernel would read memory that a fake tensor does not have, and a trace would not see it."""

    @fused
    def tripled(x):
        return 3 * x

    tripled._kernel = lambda args: pytest.fail("a kernel was asked for")
    with torch.no_grad():
        with FakeTensorMode():
            assert tripled(torch.empty(5000)).shape == (5000,)
        traced = make_fx(lambda x: tripled(x))(torch.ones(5000))
        assert torch.equal(traced(torch.full((5000,), 2.0)), torch.full((5000,), 6.0))
