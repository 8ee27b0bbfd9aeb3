"""k-means, which initialises DKM."""

import math

import numpy as np
import torch
from torch import Tensor

from r2.clustering.passes import passes_over

GROUPS = 1024  # of neighbouring weights, among which the optimal clustering is searched
SAMPLE, STARTS = 1 << 14, 10  # vectors that k-means++ starts from, and how often


def initial_centroids(vectors: Tensor, k: int, seed: int = 0) -> Tensor:
    """k-means centroids (k, d) of vectors (n, d), the same for the same vectors and seed; computed on the CPU.

    Single weights need no seed: the optimal clustering of at most 1024 groups of neighbours (all of them, if there are
    no more), refined by Lloyd's algorithm on the sorted weights. Vectors: k-means++ and Lloyd on a sample, the best of
    several, then Lloyd on all. Fewer distinct vectors than k give repeated centroids.
    """
    vectors = vectors.detach().to("cpu", torch.float64 if vectors.dtype == torch.float64 else torch.float32)
    found = _scalar_kmeans(vectors.flatten(), k) if vectors.shape[1] == 1 else _vector_kmeans(vectors, k, seed)
    return found.to(vectors.dtype)


def _scalar_kmeans(w: Tensor, k: int) -> Tensor:
    w = torch.from_numpy(np.sort(w.numpy())).double()  # a third of torch.sort's time
    n = len(w)
    centre = w.mean()  # sums about it lose no digits
    w = w - centre
    zero = torch.zeros(1, dtype=torch.float64)
    first, second = torch.cat([zero, w.cumsum(0)]), torch.cat([zero, (w * w).cumsum(0)])
    edges = torch.arange(n + 1)
    if n > GROUPS:  # equal counts and equal widths, so that outliers stand alone
        even = torch.linspace(0, n, GROUPS // 2 + 1, dtype=torch.float64).long()
        width = torch.searchsorted(w, torch.linspace(w[0].item(), w[-1].item(), GROUPS // 2, dtype=torch.float64))
        edges = torch.cat([even, width]).unique()
    edges = _optimal_edges(edges, first[edges], second[edges], k)
    for _ in range(1000):
        sums, counts = first[edges].diff(), edges.diff()
        c = sums[counts > 0] / counts[counts > 0]
        moved = torch.cat([edges[:1], torch.searchsorted(w, (c[1:] + c[:-1]) / 2), edges[-1:]])
        if torch.equal(moved, edges):
            break
        edges = moved
    c = c + centre
    return torch.cat([c, c[-1:].expand(k - len(c))])[:, None]


def _optimal_edges(edges: Tensor, first: Tensor, second: Tensor, k: int) -> Tensor:
    """The k + 1 or fewer of `edges` that bound the best clusters, by dynamic programming over the last cluster."""
    count = (edges[None] - edges[:, None]).clamp(min=1)
    cost = (second[None] - second[:, None]) - (first[None] - first[:, None]) ** 2 / count
    # cost[i, j] of one cluster between edges i and j; clusters may not be empty
    cost = cost.masked_fill_(edges[None] <= edges[:, None], math.inf).clamp_(min=0)
    best, starts = cost[0].clone(), []
    k = min(k, len(edges) - 1)
    for _ in range(k - 1):
        best, start = (best[:, None] + cost).min(0)
        starts.append(start)
    at = len(edges) - 1
    chosen = [at]
    for start in reversed(starts):
        at = int(start[at])
        chosen.append(at)
    return edges[torch.tensor([*reversed(chosen)]) if at == 0 else torch.tensor([0, *reversed(chosen)])]


def _vector_kmeans(vectors: Tensor, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(vectors)
    few = vectors if n <= SAMPLE else vectors[torch.randint(n, (SAMPLE,), generator=generator)]
    found = [_lloyd(few, _plus_plus(few, k, generator), 50) for _ in range(STARTS)]
    return _lloyd(vectors, min(found, key=lambda x: x[1])[0], 100)[0]


def _plus_plus(vectors: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++: each further centroid is a vector, drawn by its squared distance to those before."""
    chosen = [int(torch.randint(len(vectors), (1,), generator=generator))]
    distance = torch.full((len(vectors),), math.inf, dtype=torch.float64)
    for _ in range(k - 1):
        distance = torch.minimum(distance, (vectors - vectors[chosen[-1]]).double().square().sum(1))
        mass = distance.cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * mass[-1]
        chosen.append(min(int(torch.searchsorted(mass, draw, right=True)), len(vectors) - 1))
    return vectors[chosen].clone()


def _lloyd(vectors: Tensor, c: Tensor, iterations: int) -> tuple[Tensor, float]:
    """Centroids after k-means and their inertia: DKM's sums at a temperature that leaves one cluster each."""
    w = vectors.t().contiguous()[None]
    passes = passes_over(w, c, 1e-29)
    for _ in range(iterations):
        count, total = passes.sums(c)
        moved = torch.where(count[:, None] > 0.5, total / count[:, None], c.double()).to(c.dtype)
        if torch.equal(moved, c):
            break
        c = moved
    count, total = passes.sums(c)
    fit = (count[:, None] * c.double() ** 2 - 2 * total * c.double()).sum()
    return c, float(w.double().square().sum() + fit)
