"""The fastest passes over the vectors of one layer that there are: `passes_over` chooses.

In PyTorch they are in plain.py, for a GPU in gpu.py; here are the C++ kernels for a CPU.
"""

import functools
import math
import os
import warnings
from ctypes import CDLL, c_float, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from r2.clustering.plain import Passes
from r2.config import first_line

NATIVE_FROM = 1 << 11  # fewer vectors are quicker through PyTorch than compiling is worth
GRID_FROM = 1 << 16  # fewer weights than this are always evaluated one by one
PARALLEL_FROM = 1 << 15  # fewer weights take one thread
MOST = 1 << 13  # numbers of all centroids; beyond, the kernels' accumulators would overflow stack or registers
_PIECE = 1 << 12  # as in passes.cpp


def on_host(x: Tensor) -> bool:
    """Whether the host can look at a value without waiting for a device."""
    return x.device.type == "cpu"


def passes_over(w: Tensor, centroids: Tensor, temperature: float | Tensor, iterations: int = 1) -> "Passes":
    """The fastest passes over the vectors (b, d, m), for about so many iterations; none of them waits for a device.

    Args:
        temperature: a number, or () on the vectors' device.
    """
    (k, d), n = centroids.shape, w.shape[0] * w.shape[2]
    if k * (d + 1) > MOST:
        return Passes(w, centroids, temperature)
    # Of a graph that is compiled as a whole, the compiler makes the kernels. Beyond 2^31 their indices would overflow.
    if w.is_cuda and w.dtype == torch.float32 and w.numel() < 1 << 31 and not torch.compiler.is_compiling():
        kernels = _triton()
        return kernels(w, centroids, temperature) if kernels else Passes(w, centroids, temperature)
    if w.dtype != torch.float32 or not on_host(w) or n < NATIVE_FROM or _library(k, d) is None:
        return Passes(w, centroids, temperature)
    temperature = float(temperature)
    if temperature <= 1e-30:
        return Passes(w, centroids, temperature)
    if d == 1 and k * iterations >= 8 and n >= GRID_FROM:
        return Grid.of(w, centroids, temperature) or Native(w, centroids, temperature)
    return Native(w, centroids, temperature)


def alive(count: Tensor, w: Tensor) -> Tensor:
    """Which clusters have weight. The float32 kernel has no attention below 2^-60."""
    numbers = w.shape[0] * w.shape[2]
    return count > numbers * (1e-300 if w.dtype == torch.float64 else 2.0**-59)


class Native(Passes):
    """The passes as C++ kernels, for float32 on a CPU. A piece's sums are float32, the pieces' sum float64."""

    def __init__(self, w: Tensor, centroids: Tensor, temperature: float):
        super().__init__(w, centroids, temperature)
        self.sharpness = math.log2(math.e) / temperature
        self.sizes = (w.shape[0], w.shape[2])

    def call(self, name: str, *arguments: Tensor | float | int | None) -> None:
        library = _library(self.k, self.d)
        converted = []
        for x in arguments:
            if isinstance(x, Tensor):
                converted.append(c_void_p(x.data_ptr()))
            else:
                converted.append(c_float(x) if isinstance(x, float) else c_void_p(x) if x is None else c_int64(x))  # type: ignore[arg-type]
        threads = torch.get_num_threads() if self.w.numel() >= PARALLEL_FROM else 1
        getattr(library, f"r2_{name}")(*converted, c_int64(threads))

    def pieces(self, sizes: tuple[int, ...], width: int) -> Tensor:
        count = math.prod(sizes[:-1]) * -(-sizes[-1] // _PIECE)
        return torch.empty(count, self.k, width, dtype=torch.float64)

    def sums(self, c: Tensor) -> tuple[Tensor, Tensor]:
        out = self.pieces(self.sizes, 1 + self.d)
        self.call("sums", self.w, c.contiguous(), self.sharpness, out, *self.sizes)
        total = out.sum(0)
        return total[:, 0], total[:, 1:]

    def output(self, c: Tensor, following: Tensor) -> Tensor:
        y = torch.empty_like(self.w)
        self.call("output", self.w, c.contiguous(), following.contiguous(), self.sharpness, y, *self.sizes)
        return y

    def pull(self, grad: Tensor, c: Tensor) -> Tensor:
        self.grad, self.dw = grad, torch.empty_like(self.w)
        out = self.pieces(self.sizes, self.d)
        self.call("pull", self.w, grad, c.contiguous(), self.sharpness, out, *self.sizes)
        return out.sum(0)

    def back(self, c: Tensor, final: Tensor, u: Tensor, v: Tensor, wanted: bool, last: bool) -> Tensor | None:
        out = self.pieces(self.sizes, self.d) if wanted else None
        c, final, u, v = (x.to(c.dtype).contiguous() for x in (c, final, u, v))
        grad = self.grad if last else None
        self.call("back", self.w, grad, c, final, u, v, self.sharpness, self.slope, self.dw, out, *self.sizes)
        return None if out is None else out.sum(0)


class Grid(Native):
    """Single weights and many centroids: everything is a function of one number, known at the nodes of a grid.

    The grid's step h is a power of two, so a weight's cell and its fraction in it are exact. Sums over weights take
    each function as linear between nodes (every weight is dealt to its two neighbours), what is evaluated per weight
    (W~, and the gradient as grad beta(w) + alpha(w)) is a cubic through four nodes. With r = 2 h gap / temperature,
    gap the largest distance of neighbouring centroids (or 4 sqrt(temperature), if that is larger), h is chosen so
    that r <= 1/32, or 1/8 where the grid would be too long; beyond that there is no grid. Between two centroids an
    attention has second and fourth derivatives of at most 0.1 (r/h)^2 and 0.13 (r/h)^4, W~ gap times that. So

        the linear error of an attention is at most 0.1 r^2 / 8    = 1.2e-5 (2e-4 at r = 1/8), with either sign
        the cubic error of W~ is at most 0.13 * 0.0235 r^4 gap     = 3e-9 gap (7e-7 gap)

    in the middle between two centroids, and far less in the mean over weights, which is what sums see.
    """

    LONGEST = 1 << 16

    def __init__(self, w: Tensor, centroids: Tensor, temperature: float, low: float, high: float, step: float):
        super().__init__(w, centroids, temperature)
        self.scale, self.first = 1 / step, math.floor(low / step) - 1
        self.size = math.floor(high / step) - self.first + 3
        self.nodes = torch.arange(self.first, self.first + self.size).float().mul_(step)
        self.mass = self.deposit(None)

    @classmethod
    def of(cls, w: Tensor, centroids: Tensor, temperature: float) -> "Grid | None":
        """The grid of these weights; None where it would not be accurate."""
        low, high = (float(x) for x in w.aminmax())
        step = cls.step(low, high, w.numel(), centroids, temperature)
        return None if step is None else cls(w, centroids, temperature, low, high, step)

    @classmethod
    def step(cls, low: float, high: float, count: int, centroids: Tensor, temperature: float) -> float | None:
        """The distance of the nodes; None where a grid would not be accurate."""
        gap = centroids.flatten().sort().values.diff().max().item()
        widest = temperature / (2 * max(gap, 4 * math.sqrt(temperature)))  # r = 1
        if not (math.isfinite(high - low) and math.isfinite(widest) and widest > 1e-30):
            return None
        step = 2.0 ** math.floor(math.log2(widest / 32))
        while (high - low) / step > min(cls.LONGEST, count // 4) - 8:
            step *= 2
        far = max(abs(low), abs(high)) / step > 1 << 23  # beyond it float32 has no fractions
        return None if far or step > widest / 8 else step

    def deposit(self, grad: Tensor | None) -> Tensor:
        """Sums of grad (or of 1) at the nodes, each weight dealt to its two neighbours."""
        cells = torch.zeros(4, self.size, 2, dtype=torch.float64)
        self.call("grid_deposit", self.w, grad, self.scale, self.first, cells, self.size, self.w.numel())
        amount, moment = cells.sum(0).unbind(1)
        amount = amount - moment
        amount[1:] += moment[:-1]
        return amount.float()

    def lookup(self, grad: Tensor | None, y: Tensor, z: Tensor | None) -> Tensor:
        """y(w), or grad y(w) + z(w), of functions given at the nodes."""
        out, table = torch.empty_like(self.w), torch.empty(self.size, 4 if grad is None else 8)
        self.call("grid_lookup", self.w, grad, self.scale, self.first, y, z, table, self.size, out, self.w.numel())
        return out

    def sums(self, c: Tensor) -> tuple[Tensor, Tensor]:
        out = self.pieces((1, self.size), 2)
        rows = torch.stack([self.mass, self.mass * self.nodes])
        self.call("grid_sums", self.nodes, rows, c.contiguous(), self.sharpness, out, self.size)
        total = out.sum(0)
        return total[:, 0], total[:, 1:]

    def output(self, c: Tensor, following: Tensor) -> Tensor:
        y = torch.empty(self.size)
        self.call("output", self.nodes, c.contiguous(), following.contiguous(), self.sharpness, y, 1, self.size)
        return self.lookup(None, y, None)

    def pull(self, grad: Tensor, c: Tensor) -> Tensor:
        self.grad, self.at_nodes = grad, self.deposit(grad)
        self.alpha, self.beta = torch.zeros(self.size), torch.empty(self.size)
        out = self.pieces((1, self.size), 1)
        self.call("pull", self.nodes, self.at_nodes, c.contiguous(), self.sharpness, out, 1, self.size)
        return out.sum(0)

    def back(self, c: Tensor, final: Tensor, u: Tensor, v: Tensor, wanted: bool, last: bool) -> Tensor | None:
        out = self.pieces((1, self.size), 1)
        c, final, u, v = (x.to(c.dtype).contiguous() for x in (c, final, u, v))
        grad, beta = (self.at_nodes, self.beta) if last else (None, None)
        self.call("grid_back", self.nodes, self.mass, grad, c, final, u, v, self.sharpness, self.slope, self.alpha,
                  beta, out, self.size)  # fmt: skip
        return out.sum(0)

    def gradient(self) -> Tensor:
        return self.lookup(self.grad, self.beta, self.alpha)


@functools.cache
def _triton() -> "type[Passes] | None":
    """The GPU passes; None, with a warning, if there is no Triton to compile them."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return None
    try:
        from r2.clustering.gpu import Kernels

        if torch.cuda.is_available():
            from triton.runtime import driver

            driver.active.get_current_target()  # needs a C compiler and the system's libcuda
    except Exception as error:
        warnings.warn(f"DKM has no kernels for this GPU, and is slower: {first_line(error)}", stacklevel=2)
        return None
    return Kernels


@functools.cache
def _library(k: int, d: int) -> CDLL | None:
    """The kernels for k centroids of d numbers; None, and a warning, where nothing compiles them."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return None
    source = Path(__file__).with_suffix(".cpp").read_text()
    try:
        from torch._inductor.codecache import CppCodeCache

        flags = ("-ffp-contract=fast", "-ffinite-math-only", "-Wno-psabi")
        return CppCodeCache.load(f"#define K {k}\n#define D {d}\n{source}", extra_flags=flags)
    except Exception as error:  # no C++ compiler on this machine
        reason = first_line(error)
        warnings.warn(f"DKM is not compiled, and slower: {reason}", stacklevel=2)
        return None
