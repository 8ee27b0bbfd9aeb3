"""The passes over the vectors of one layer that DKM and k-means consist of, in PyTorch.

Vectors (b, d, m) are stored in blocks: vector i of block b is w[b, :, i]. No pass stores the attention
A = softmax(-|w - c|^2 / temperature): each recomputes it, a piece of the vectors at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Passes:
    """The passes over the vectors of one layer (b, d, m), in PyTorch; sums come in float64 (where there is one).

    `back` follows `pull` of the loss's gradient; `gradient` is what the iterations have added up to.
    """

    def __init__(self, w: Tensor, centroids: Tensor, temperature: float | Tensor):
        self.w, self.temperature = w, temperature
        self.slope = 2 / temperature
        self.k, self.d = centroids.shape
        self.wide = torch.float32 if w.device.type == "mps" else torch.float64

    def attention(self, c: Tensor) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """(index of a piece, its vectors (d, p), their attention (k, p)) for every piece."""
        pieces = max(1, (1 << 18 if self.w.device.type == "cpu" else 1 << 24) // self.k)
        for b in range(self.w.shape[0]):
            for i in range(0, self.w.shape[2], pieces):
                at = (b, slice(None), slice(i, i + pieces))
                x = self.w[at]
                distance = torch.zeros(self.k, x.shape[1], dtype=x.dtype, device=x.device)
                for a in range(self.d):
                    distance += (x[a] - c[:, a, None]).square_()
                least = distance.amin(0)
                yield at, x, torch.softmax((least - distance).div_(self.temperature), 0)

    def sums(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """colsum(A) (k,) and A^T W (k, d)."""
        count: Any = 0.0
        total: Any = 0.0
        for _, x, A in self.attention(c):
            A = A.to(self.wide)
            count = count + A.sum(1)
            total = total + A @ x.t().to(self.wide)
        return count, total

    def output(self, c: Tensor, following: Tensor) -> Tensor:
        y = torch.empty_like(self.w)
        for at, _, A in self.attention(c):
            y[at] = following.t() @ A
        return y

    def pull(self, grad: Tensor, c: Tensor) -> Tensor:
        """A^T grad (k, d)."""
        self.grad, self.dw = grad, torch.zeros_like(self.w)
        total: Any = 0.0
        for at, _, A in self.attention(c):
            total = total + (A @ grad[at].t()).to(self.wide)
        return total

    def back(self, c: Tensor, final: Tensor, u: Tensor, v: Tensor, wanted: bool, last: bool) -> Tensor | None:
        """One iteration backwards: adds to the vectors' gradient, returns that of `c` (k, d) where wanted.

        With q = W u + v, and for the last iteration + grad final: z = A (q - sum(A q)),
        dW = A u + slope z c, dc = slope sum(z (W - c)).
        """
        u, v = u.to(c.dtype), v.to(c.dtype)
        total: Any = 0.0
        for at, x, A in self.attention(c):
            q = torch.addmm(v[:, None], u, x)
            if last:
                q += final @ self.grad[at]
            z = A * (q - (A * q).sum(0)) * self.slope
            self.dw[at] += u.t() @ A + c.t() @ z
            if wanted:
                total = total + (z @ x.t() - c * z.sum(1, keepdim=True)).to(self.wide)
        return total if wanted else None

    def gradient(self) -> Tensor:
        return self.dw
