"""`fused`: compiles an elementwise function to one kernel, or runs it in plain PyTorch if it cannot be compiled.

The wrapped functions take flat tensors and run at memory speed once fused; in eager PyTorch each of their operations
reads and writes the whole tensor. TORCH_COMPILE_DISABLE=1 (PyTorch's own switch) turns fusion off.
"""

import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from r2.config import first_line

# Where there is a CUDA toolkit and no GPU, the first compilation would warn of that.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


class fused:
    """Compile `function` on first use for any tensor length; where that fails, say so once and use it as it is.

    The function itself runs where a compiled kernel does not pay or does not fit: short tensors on a CPU, float64
    (used to check formulas), inside a graph that is to be differentiated again, and while torch.export records it.
    """

    at_least = 256  # elements of the first argument from which a kernel pays on a CPU

    def __init__(self, function: Callable):
        self.plain = function
        self._compiled: list[tuple[Any, int]] = []  # with the number of elements that it was laid out for
        self._fails = False
        self._chosen: dict[tuple, Callable] = {}

    def __call__(self, first: torch.Tensor, *rest: torch.Tensor | float | None) -> Any:
        # torch.compile of a whole model fuses this function itself; an export records it for any length
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return self.plain(first, *rest)
        short = first.numel() < self.at_least and first.device.type != "cuda"  # where a launch costs the same for any
        if short or first.dtype == torch.float64 or torch.is_grad_enabled():
            return self.plain(first, *rest)
        # a kernel reads memory, which a fake tensor does not have, and is not seen by make_fx
        if type(first.data) is not torch.Tensor or get_proxy_mode() is not None:
            return self.plain(first, *rest)
        args = (first, *rest)
        kind = (
            first.device, torch.get_num_threads(), torch.is_autocast_enabled(first.device.type),
            *[(a.dtype, a.shape, a.stride()) if isinstance(a, torch.Tensor) else a for a in args],
        )  # fmt: skip
        if kind not in self._chosen:
            self._chosen[kind] = self._kernel(args)
        return self._chosen[kind](*args)

    def _kernel(self, args: tuple) -> Callable:
        """One that is right for these arguments. What torch.compile returns would look for it anew at every call, which
        takes longer than most kernels."""
        # `.data` is neither a view nor part of a graph: the compiler would make one more kernel for each kind.
        args = tuple(a.data if isinstance(a, torch.Tensor) else a for a in args)
        elements = args[0].numel()
        for kernel, meant in self._compiled:
            # A reduction on a GPU is split among blocks for the first length, or for a short one not split at all.
            suits = not args[0].is_cuda or meant / 8 <= elements <= 8 * meant
            if suits and kernel.guard_check(*args):
                return kernel
        if self._fails or os.environ.get("TORCH_COMPILE_DISABLE") == "1":
            return self.plain
        try:
            options: dict[str, Any] = {_ROUNDS: True} if args[0].is_cuda and divides_as_pytorch() else {}
            compiled: Any = torch.compile(self.plain, dynamic=True, fullgraph=True, options=options)
            kernel = compiled.aot_compile((args, {}))
        except Exception as error:  # no C++ compiler or Triton on this machine
            reason = first_line(error)
            warnings.warn(f"{self.plain.__name__} is not fused, and slower: {reason}", stacklevel=4)
            self._fails = True
            return self.plain
        kernel.disable_guard_check()
        self._compiled.append((kernel, elements))
        return kernel


_ROUNDS = "eager_numerics.division_rounding"  # of Inductor: Triton's own division is approximate


@functools.cache
def divides_as_pytorch() -> bool:
    """Whether this version of Inductor can be told to round a quotient on a GPU as PyTorch does."""
    from torch._inductor import config

    return hasattr(getattr(config, "eager_numerics", None), "division_rounding")


def exactly(kernel: fused, like: torch.Tensor) -> Callable:
    """`kernel` where its result is PyTorch's to the last bit, as that of `decode` is: not in 16 bits, whose roundings
    between operations a compiled kernel leaves out, and on a GPU not where it cannot be told to round quotients."""
    exact = like.dtype in (torch.float32, torch.float64) and (not like.is_cuda or divides_as_pytorch())
    return kernel if exact else kernel.plain


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """All elements: in memory order and without a copy if `dense`, else a copy in logical order."""
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        if torch.compiler.is_compiling() or torch.is_grad_enabled():  # a compiler does not fuse across as_strided
            return tensor.permute(0, 2, 3, 1).reshape(-1)
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.reshape(-1)


def dense(tensor: torch.Tensor) -> bool:
    """Contiguous or channels_last."""
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def unflat(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `flat`: `values` in the shape and memory format of `like`."""
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            n, c, h, w = like.shape
            return values.view(n, h, w, c).permute(0, 3, 1, 2)
        return values.as_strided(like.shape, like.stride())
    return values.view(like.shape)


def matching(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`grad` in the memory format of `like`, so that both flatten in one order."""
    return grad if grad.stride() == like.stride() else torch.empty_like(like).copy_(grad)


def argmax_abs(w: torch.Tensor) -> torch.Tensor:
    """Index (1,) of the largest |w|."""
    # The maxima of rows first, so each weight is read once: a CPU's argmax is slow, a compiled one on a GPU one block.
    width = 1024 if w.device.type == "cuda" else 64
    rows = w[: w.numel() // width * width].view(-1, width)
    candidates = [torch.arange(rows.numel(), w.numel(), device=w.device)]
    if len(rows):
        for extreme in (rows.amax(1).argmax(), rows.amin(1).argmin()):
            candidates.append(extreme * width + torch.arange(width, device=w.device))
    index = torch.cat(candidates)
    # index_select, since an index by a 0-d tensor makes the host wait for the device
    largest = w.index_select(0, index).abs().argmax()
    return index.index_select(0, largest.view(1))
