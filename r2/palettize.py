"""DKM: differentiable k-means palettization (Cho et al. 2021), of single weights or of vectors of `dim` weights.

With D the squared Euclidean distances of the vectors W (n, d) to the centroids C (k, d), each iteration is

    A = softmax(-D / temperature) over the centroids,   C' = A^T W / colsum(A),   and finally   W~ = A C'

The gradient flows through every iteration. The attention A is never stored: each pass over the weights recomputes it,
so the extra memory is that of one small piece. For float32, a pass is a C++ kernel on a CPU (passes.cpp, compiled on
first use by torch.compile's C++ compiler) and a Triton kernel on a GPU (gpu.py); otherwise it is chunked PyTorch.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r2.clustering.kmeans import initial_centroids
from r2.clustering.passes import Passes, alive, on_host, passes_over
from r2.kernels import flat, unflat
from r2.quantizers.layers import Operation, Quantizer


def dkm(
    vectors: Tensor, centroids: Tensor, temperature: float, iterations: int = 5, tolerance: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Soft-assigned vectors (n, d) and the updated, detached centroids (k, d).

    A of the last iteration comes from the centroids before it, the output from those after it (as in coremltools).
    Both inputs get their true gradient, through A and every iteration. A cluster without weight keeps its centroid.

    Everything is exact to rounding (float64 inputs in float64, all others in float32), but for 2^16 or more single
    float32 weights on a CPU with 8 or more centroids (or fewer, where tolerance 0 asks for many iterations): these are
    interpolated, at float32's accuracy; `passes.Grid` bounds its error.

    Args:
        vectors: (n, d).
        centroids: (k, d) to start from.
        temperature: squared units of the weights.
        iterations: at least 1.
        tolerance: stop once no centroid moves further, in units of the weights; 0 runs all iterations.
    """
    n, d = vectors.shape
    if centroids.ndim != 2 or centroids.shape[1] != d:
        raise ValueError(f"vectors {tuple(vectors.shape)} and centroids {tuple(centroids.shape)} do not fit")
    if not temperature > 0 or iterations < 1:
        raise ValueError(f"temperature {temperature} must be above 0 and iterations {iterations} at least 1")
    soft, new = _dkm(vectors.t().reshape(1, d, n), centroids, temperature, iterations, tolerance)
    return soft.reshape(d, n).t(), new


def _dkm(
    blocks: Tensor, centroids: Tensor, temperature: float | Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """`dkm` of vectors in blocks (b, d, m): vector i of block b is blocks[b, :, i]; temperature () may be a tensor."""
    exact = torch.float64 if blocks.dtype == torch.float64 else torch.float32
    soft, new = _DKM.apply(blocks.to(exact), centroids.to(exact), temperature, iterations, tolerance)
    return soft.to(blocks.dtype), new.to(centroids.dtype)


class _DKM(torch.autograd.Function):
    """Iteration t goes from `before[t]` to `after[t]`.

    Once an iteration has moved no centroid by more than the tolerance, the following ones start where it started and
    so repeat it, bit for bit: the result, and the gradient, is that of stopping there, but no one has to look. Where
    looking costs no wait for a device, the loop ends instead.
    """

    @staticmethod
    def forward(ctx, w, start, temperature, iterations, tolerance):  # type: ignore[no-untyped-def]
        w = w.contiguous()
        passes = passes_over(w, start, temperature, iterations if tolerance == 0 else 1)  # most stop at once
        before, after, counts, settled = [start], [], [], []
        for t in range(iterations):
            c = before[t]
            count, total = passes.sums(c)
            counts.append(count)
            after.append(torch.where(alive(count, w)[:, None], (total / count[:, None]).to(w.dtype), c))
            settled.append((after[t] - c).abs().max() <= tolerance if tolerance > 0 else None)
            if t + 1 == iterations or (settled[t] is not None and on_host(w) and settled[t].numpy()):
                break
            before.append(after[t] if settled[t] is None else torch.where(settled[t], c, after[t]))
        soft = passes.output(before[-1], after[-1])
        ctx.settled = settled
        ctx.save_for_backward(w, torch.stack(before), torch.stack(after), torch.stack(counts))
        passes.w, ctx.passes = w[:0], passes  # autograd keeps the weights, and knows if they changed meanwhile
        ctx.mark_non_differentiable(after[-1])
        return soft, after[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        w, before, after, counts = ctx.saved_tensors
        passes = copy.copy(ctx.passes)
        passes.w = w
        # d: the loss's gradient in after[t]; past: in before[t], by way of the iterations that repeat this one
        d, past = passes.pull(grad.contiguous(), before[-1]), 0.0
        for t in reversed(range(len(counts))):
            living = alive(counts[t], w)[:, None]
            # C' = S / N: the gradient in S, and in N where A v stands for A dN
            u = torch.where(living, d / counts[t][:, None], 0.0)
            v = -(u * after[t]).sum(1)
            wanted = t > 0 or ctx.needs_input_grad[1]
            started = passes.back(before[t], after[-1], u, v, wanted, last=t == len(counts) - 1)
            d = started + torch.where(living, 0.0, d) + past if wanted else None
            if t > 0 and (repeated := ctx.settled[t - 1]) is not None:
                d, past = torch.where(repeated, 0.0, d), torch.where(repeated, d, 0.0)
        return passes.gradient(), d.to(w.dtype) if ctx.needs_input_grad[1] else None, None, None, None


def relative_temperature(bits: int, dim: int = 1) -> float:
    """A temperature in variances of a layer's weights that leaves some weights soft, and every centroid its own.

    min(0.2 / L, 1 / L^2) of the L = 2^(bits / dim) levels per weight: 0.1, 0.05, 0.0039 for 1, 2 and 4 bits. With
    the first nearly every layer is still soft at the end of training; half of it hardens many, twice it costs ten
    points or more at 1 bit (docs/pilots.md). The second keeps centroids apart: two of them merge at twice
    their cluster's variance (Rose 1990), and that of L clusters of uniform weights is 1 / L^2 of the layer's.
    """
    levels = 2 ** (bits / dim)
    return min(0.2 / levels, 1 / levels**2)


def vectorize(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Vectors (n, dim) of a weight (out, ...) and the tail (out % dim, ...) that has no vector.

    coremltools' layout: `dim` consecutive output channels at the same place; for dim 1 the weights in their order.
    """
    whole = weight.shape[0] - weight.shape[0] % dim
    head, tail = weight[:whole], weight[whole:]
    return (head if dim == 1 else head.transpose(0, -1)).reshape(-1, dim), tail


def unvectorize(vectors: Tensor, tail: Tensor, like: Tensor) -> Tensor:
    """The inverse of `vectorize`, in the shape and memory format of `like`."""
    shape = [like.shape[0] - len(tail), *like.shape[1:]]
    if vectors.shape[1] == 1:
        head = vectors.reshape(shape)
    else:
        shape[0], shape[-1] = shape[-1], shape[0]
        head = vectors.reshape(shape).transpose(0, -1)
    out = torch.cat([head, tail]) if len(tail) else head
    last = like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    return out.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def hard(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Index (n,) uint8 of the nearest of at most 256 centroids; of equal centroids the first."""
    if vectors.shape[1] == 1:
        ordered, order = centroids.flatten().sort(stable=True)
        order = order[torch.searchsorted(ordered, ordered)]  # equal centroids: the first of them
        middle = (ordered[1:] + ordered[:-1]) / 2
        return order.to(torch.uint8)[torch.bucketize(vectors.flatten(), middle, out_int32=True)]
    out = torch.empty(len(vectors), dtype=torch.uint8, device=vectors.device)
    piece = 1 << 16 if vectors.device.type == "cpu" else 1 << 22  # what a cache holds; on a GPU, what memory does
    for i in range(0, len(vectors), piece):
        x = vectors[i : i + piece].t().contiguous()
        least = torch.full_like(x[0], math.inf)
        for j, c in enumerate(centroids):
            distance = sum((x[a] - c[a]).square() for a in range(len(c)))
            out[i : i + piece].masked_fill_(distance < least, j)
            least = torch.minimum(least, distance)  # type: ignore[arg-type]
    return out


class Palette(Quantizer):
    """The DKM palette of one layer: soft weights while training, the nearest centroid afterwards.

    Centroids start from k-means, then from those of the last step, without gradient. Centroids that coincide would stay
    together for ever; a training step first moves the repeated ones apart by a hundredth of sqrt(temperature).
    If `dim` does not divide the output channels, the last of them stay as they are; `tail` counts those weights.

    Args:
        bits: of a code, 1 to 8; a weight takes bits / dim.
        dim: consecutive output channels in one vector.
        temperature: of the attention, in squared units of the weights; `relative`: in variances of the layer's weight.
        iterations, tolerance: see `dkm`.
    """

    centroids: Tensor
    layer_temperature: Tensor

    def __init__(
        self,
        bits: int,
        dim: int = 1,
        temperature: float = 1e-4,
        relative: bool = False,
        iterations: int = 5,
        tolerance: float = 1e-4,
    ):
        super().__init__()
        if not 1 <= bits <= 8 or dim < 1 or not temperature > 0 or iterations < 1:
            raise ValueError(f"impossible palette: {bits=}, {dim=}, {temperature=}, {iterations=}")
        self.weight_bits, self.dim = bits, dim
        self.temperature, self.relative = temperature, relative
        self.iterations, self.tolerance = iterations, tolerance
        self.register_buffer("centroids", torch.zeros(2**bits, dim))
        self.register_buffer("layer_temperature", torch.tensor(float(temperature)))

    @torch.no_grad()
    def initialise(
        self, inputs: Sequence[Tensor] | None, weight: Tensor, operation: Operation | None, seed: int = 0
    ) -> None:
        """Centroids by k-means, and the temperature in force; the layer's input and operation do not matter."""
        vectors, _ = vectorize(weight, self.dim)
        if len(vectors):
            self.centroids.copy_(initial_centroids(vectors, len(self.centroids), seed))
        variance = float(weight.double().var()) if self.relative and weight.numel() > 1 else 0.0
        self.layer_temperature.fill_(self.temperature * (variance if variance > 0 else 1.0))

    def weight(self, w: Tensor) -> Tensor:
        if not self.training:
            return self.decode(self.encode(w), w)
        whole = w.shape[0] - self.tail_channels(w)
        if not whole:
            return w
        start = self._separated()
        head = w if whole == w.shape[0] else w[:whole]  # a slice of everything would cost two copies of the gradient
        blocks = flat(w).view(1, 1, -1) if self.dim == 1 else _blocks(head, self.dim)
        soft, new = _dkm(blocks, start, self.layer_temperature, self.iterations, self.tolerance)
        with torch.no_grad():
            self.centroids.copy_(new)
        if self.dim == 1:
            return unflat(soft.view(-1), w)
        soft = _unblocks(soft, head)
        return soft if head is w else torch.cat([soft, w[whole:]])

    @torch.no_grad()
    def _separated(self) -> Tensor:
        c = self.centroids.clone()
        same = (c[:, None] == c[None]).all(2).tril(-1).sum(1)  # how many before each are equal to it
        return c + same[:, None] * (0.01 * self.layer_temperature.sqrt())

    @torch.no_grad()
    def soft_share(self, w: Tensor) -> float | None:
        """Share of the vectors whose largest attention is below 0.99, 0 where training is plain k-means.

        None where the layer has no vector.
        """
        vectors = vectorize(w, self.dim)[0].float()
        if not len(vectors):
            return None
        passes = Passes(vectors.t()[None], self.centroids, float(self.layer_temperature))
        soft = sum((attention.amax(0) < 0.99).sum() for _, _, attention in passes.attention(self.centroids))
        return int(soft) / len(vectors)

    def tail_channels(self, w: Tensor) -> int:
        return w.shape[0] % self.dim

    def tail(self, w: Tensor) -> int:
        """Number of weights without a code."""
        return self.tail_channels(w) * w[0].numel()

    @torch.no_grad()
    def encode(self, w: Tensor) -> Tensor:
        """Codes (n,) uint8 in the order of `vectorize`."""
        return hard(vectorize(w, self.dim)[0], self.centroids)

    @torch.no_grad()
    def decode(self, codes: Tensor, like: Tensor) -> Tensor:
        tail = like[like.shape[0] - self.tail_channels(like) :]
        return unvectorize(self.centroids.index_select(0, codes.int()).to(like.dtype), tail, like)

    def coverage(self, w: Tensor) -> tuple[int, int]:
        left_out = self.tail(w)
        return (w.numel() - left_out) // self.dim, left_out

    def settings(self) -> dict[str, Any]:
        names = ("dim", "temperature", "relative", "iterations", "tolerance")
        return {"bits": self.weight_bits, **{name: getattr(self, name) for name in names}}


def _blocks(w: Tensor, dim: int) -> Tensor:
    """Vectors (b, dim, m) of a weight in memory order, which `_dkm` does not care about: a view where m is long.

    One block on a device, where a pass launches its kernels for every block, and they cost more than the copy.
    """
    if w.ndim == 4 and w.is_contiguous(memory_format=torch.channels_last):
        w = w.permute(0, 2, 3, 1)
    blocks = w.reshape(w.shape[0] // dim, dim, -1)
    return blocks if on_host(w) and blocks.shape[2] >= 256 else blocks.transpose(0, 1).reshape(1, dim, -1)


def _unblocks(blocks: Tensor, like: Tensor) -> Tensor:
    n, dim = like.shape[0], blocks.shape[1]
    if blocks.shape[0] != n // dim:
        blocks = blocks.view(dim, n // dim, -1).transpose(0, 1).contiguous()
    return unflat(blocks.reshape(-1), like)
