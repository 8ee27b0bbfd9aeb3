"""The passes of plain.py as Triton kernels, for float32 on a GPU; passes.cpp has the CPU versions.

A program processes PIECE vectors of one block, BLOCK of them at a time against all centroids, and keeps its sums in
registers: float32 within a piece, and the caller adds the pieces in float64. There are no atomics, so every run gives
the same bits. Tiles are (D, K, BLOCK), vectors last: threads are along the vectors, and if BLOCK is long enough the
softmax over K stays within a thread.

Importing this module imports Triton, which comes with PyTorch's CUDA wheels.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from r2.clustering.plain import Passes

PIECE = 2048  # vectors of one program
TILE = 4096  # numbers (D, K, BLOCK) at once: 32 registers of each of 128 threads for one such tile
SHARPEST = 1e30  # the largest 1 / temperature, so that its product with a distance of 0 is 0


@triton.jit
def _centroids(p, inside, D: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr):
    """Rows of D numbers as a tile (DP, KP, 1), 0 where not `inside`."""
    a, j = tl.arange(0, DP)[:, None, None], tl.arange(0, KP)[None, :, None]
    return tl.load(p + j * D + a, mask=inside, other=0.0)


@triton.jit
def _vectors(p, i, end, m, D: tl.constexpr, DP: tl.constexpr):
    """Vectors `i` of a block that starts at p, as a tile (DP, 1, BLOCK), 0 beyond `end`."""
    a = tl.arange(0, DP)[:, None, None]
    return tl.load(p + a * m + i[None, None, :], mask=(a < D) & (i < end)[None, None, :], other=0.0)


@triton.jit
def _attention(x, c, temperature, i, end, K: tl.constexpr, KP: tl.constexpr, SHARPEST: tl.constexpr):
    """A (KP, BLOCK), 0 beyond K and `end`."""
    distance = tl.sum((x - c) * (x - c), axis=0)
    distance = tl.where(tl.arange(0, KP)[:, None] < K, distance, float("inf"))
    sharpness = 1.4426950408889634 * tl.minimum(1 / temperature, SHARPEST)  # log2(e) / temperature
    e = tl.exp2((tl.min(distance, axis=0)[None, :] - distance) * sharpness)
    return tl.where((i < end)[None, :], e / tl.sum(e, axis=0)[None, :], 0.0)


@triton.jit
def sums(
    w, x, c, temperature, out, m,
    ONES: tl.constexpr, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, SHARPEST: tl.constexpr,
):  # fmt: skip
    """out[piece] (K, D) = A^T x; with ONES (K, 1 + D), colsum(A) first."""
    WIDTH: tl.constexpr = D + ONES
    piece, per = tl.program_id(0), tl.cdiv(m, PIECE)
    start, begin = piece // per * D * m, piece % per * PIECE
    end = tl.minimum(begin + PIECE, m)
    a, j = tl.arange(0, DP)[:, None, None], tl.arange(0, KP)[None, :, None]
    inside = (a < D) & (j < K)
    centroids, t = _centroids(c, inside, D, KP, DP), tl.load(temperature)
    count = tl.zeros((KP, BLOCK), tl.float32)
    total = tl.zeros((DP, KP, BLOCK), tl.float32)
    for at in range(begin, end, BLOCK):
        i = at + tl.arange(0, BLOCK)
        v = _vectors(w + start, i, end, m, D, DP)
        A = _attention(v, centroids, t, i, end, K, KP, SHARPEST)
        if ONES:
            count += A
            total += A[None] * v
        else:
            total += A[None] * _vectors(x + start, i, end, m, D, DP)
    a, j = tl.arange(0, DP)[:, None], tl.arange(0, KP)[None, :]
    row = out + (piece * K + j) * WIDTH
    tl.store(row + ONES + a, tl.sum(total, axis=2), mask=(a < D) & (j < K))
    if ONES:
        j = tl.arange(0, KP)
        tl.store(out + (piece * K + j) * WIDTH, tl.sum(count, axis=1), mask=j < K)


@triton.jit
def output(
    w, c, following, temperature, y, m,
    K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, SHARPEST: tl.constexpr,
):  # fmt: skip
    """y = A following."""
    piece, per = tl.program_id(0), tl.cdiv(m, PIECE)
    start, begin = piece // per * D * m, piece % per * PIECE
    end = tl.minimum(begin + PIECE, m)
    a, j = tl.arange(0, DP)[:, None, None], tl.arange(0, KP)[None, :, None]
    inside = (a < D) & (j < K)
    centroids, t = _centroids(c, inside, D, KP, DP), tl.load(temperature)
    after = _centroids(following, inside, D, KP, DP)
    a = tl.arange(0, DP)[:, None]
    for at in range(begin, end, BLOCK):
        i = at + tl.arange(0, BLOCK)
        A = _attention(_vectors(w + start, i, end, m, D, DP), centroids, t, i, end, K, KP, SHARPEST)
        tl.store(y + start + a * m + i[None, :], tl.sum(A[None] * after, axis=1), mask=(a < D) & (i < end)[None, :])


@triton.jit
def back(
    w, g, c, following, u, v, temperature, dw, out, m,
    GRAD: tl.constexpr, SUMS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, PIECE: tl.constexpr, SHARPEST: tl.constexpr,
):  # fmt: skip
    """`Passes.back`: dw is started with GRAD, which only the last iteration has, and else added to.

    out[piece] (K, D) = slope sum(z (w - c)) where SUMS.
    """
    piece, per = tl.program_id(0), tl.cdiv(m, PIECE)
    start, begin = piece // per * D * m, piece % per * PIECE
    end = tl.minimum(begin + PIECE, m)
    a, j = tl.arange(0, DP)[:, None, None], tl.arange(0, KP)[None, :, None]
    inside = (a < D) & (j < K)
    centroids, t = _centroids(c, inside, D, KP, DP), tl.load(temperature)
    slope = 2 * tl.minimum(1 / t, SHARPEST)
    after, pull = _centroids(following, inside, D, KP, DP), _centroids(u, inside, D, KP, DP)
    shift = tl.load(v + tl.arange(0, KP), mask=tl.arange(0, KP) < K, other=0.0)[:, None]
    total = tl.zeros((DP, KP, BLOCK), tl.float32)
    a = tl.arange(0, DP)[:, None]
    for at in range(begin, end, BLOCK):
        i = at + tl.arange(0, BLOCK)
        x = _vectors(w + start, i, end, m, D, DP)
        A = _attention(x, centroids, t, i, end, K, KP, SHARPEST)
        q = tl.sum(x * pull, axis=0) + shift
        if GRAD:
            q += tl.sum(_vectors(g + start, i, end, m, D, DP) * after, axis=0)
        z = A * (q - tl.sum(A * q, axis=0)[None, :]) * slope
        d = tl.sum(A[None] * pull + z[None] * centroids, axis=1)
        to, here = dw + start + a * m + i[None, :], (a < D) & (i < end)[None, :]
        if not GRAD:
            d += tl.load(to, mask=here, other=0.0)
        tl.store(to, d, mask=here)
        if SUMS:
            total += z[None] * (x - centroids)
    if SUMS:
        j = tl.arange(0, KP)[None, :]
        tl.store(out + (piece * K + j) * D + a, tl.sum(total, axis=2), mask=(a < D) & (j < K))


def constants(k: int, d: int) -> dict[str, int | float]:
    """What every kernel is compiled for, of k centroids of d numbers."""
    kp, dp = triton.next_power_of_2(k), triton.next_power_of_2(d)
    block = min(512, max(8, TILE // (kp * dp)))
    return {"K": k, "D": d, "KP": kp, "DP": dp, "BLOCK": block, "PIECE": PIECE, "SHARPEST": SHARPEST}


def warps(k: int, d: int) -> int:
    """Of 32 threads, per program: more where the shortest block still makes a tile that is large."""
    return 4 if k * d <= 512 else 8


class Kernels(Passes):
    """The passes as Triton kernels, for float32 vectors (b, d, m) on a GPU; the host waits for none of them."""

    def __init__(self, w: Tensor, centroids: Tensor, temperature: float | Tensor):
        super().__init__(w, centroids, temperature)
        if isinstance(temperature, Tensor):
            self.heat = temperature.float()
        else:
            self.heat = torch.full((), temperature, device=w.device)
        self.m = w.shape[2]
        self.pieces = w.shape[0] * -(-self.m // PIECE)

    def call(self, kernel: triton.JITFunction, *arguments: Tensor, **flags: bool) -> None:
        settings = {**flags, **constants(self.k, self.d), "num_warps": warps(self.k, self.d)}
        with torch.cuda.device_of(self.w):  # Triton launches on the current device
            kernel[(self.pieces,)](*arguments, self.m, **settings)

    def partial(self, width: int) -> Tensor:
        return torch.empty(self.pieces, self.k, width, device=self.w.device)

    def sums(self, c: Tensor) -> tuple[Tensor, Tensor]:
        out = self.partial(1 + self.d)
        self.call(sums, self.w, self.w, c.contiguous(), self.heat, out, ONES=True)
        total = out.sum(0, dtype=torch.float64)
        return total[:, 0], total[:, 1:]

    def output(self, c: Tensor, following: Tensor) -> Tensor:
        y = torch.empty_like(self.w)
        self.call(output, self.w, c.contiguous(), following.contiguous(), self.heat, y)
        return y

    def pull(self, grad: Tensor, c: Tensor) -> Tensor:
        self.grad, self.dw = grad, torch.empty_like(self.w)
        out = self.partial(self.d)
        self.call(sums, self.w, grad, c.contiguous(), self.heat, out, ONES=False)
        return out.sum(0, dtype=torch.float64)

    def back(self, c: Tensor, final: Tensor, u: Tensor, v: Tensor, wanted: bool, last: bool) -> Tensor | None:
        out = self.partial(self.d) if wanted else self.dw  # which is not written as sums
        c, final, u, v = (x.to(c.dtype).contiguous() for x in (c, final, u, v))  # u and v come in float64
        self.call(back, self.w, self.grad, c, final, u, v, self.heat, self.dw, out, GRAD=last, SUMS=wanted)
        return out.sum(0, dtype=torch.float64) if wanted else None
