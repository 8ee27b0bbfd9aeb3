"""The interface of a data set: train, validation and calibration batches, on the device and ready for the model.

Order and augmentation are pure functions of (seed, epoch, position). So a run can stop and resume at any step, with any
number of workers, and N processes see the same global batches as one.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from r2.config import ImageSize, height_and_width
from r2.dist import World
from r2.models import Inputs

IGNORED = -100  # label of an image that could not be decoded; cross_entropy's ignore_index


def chunk(inputs: Inputs, parts: int) -> list[Inputs]:
    """Micro-batches of a batch, as `Tensor.chunk` cuts them."""
    if isinstance(inputs, Tensor):
        return list(inputs.chunk(parts))
    columns = zip(*(tensor.chunk(parts) for tensor in inputs.values()), strict=True)
    return [dict(zip(inputs, column, strict=True)) for column in columns]


def unawaited(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, from pinned memory: for any other the host would wait."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def mix(*parts: int) -> int:
    """One well-spread 63-bit seed of several integers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, epoch, 1)))


class Data:
    """What a run needs of a data set. Where a name says image, it counts examples: pairs of sentences, for text.

    Attributes:
        num_classes, image_size: of the task.
        train_images, val_images: counts.
        calibration_images: how many training images calibrate a quantizer.
    """

    num_classes: int
    image_size: ImageSize
    train_images: int
    val_images: int
    calibration_images: int
    skipped: int = 0  # undecodable images that this rank has met since `count_skipped`

    def to(self, world: World) -> "Data":
        """Bind to a device and a place among the ranks."""
        self.world = world
        return self

    def close(self) -> None:
        """Stop worker processes, if there are any; whoever has built a data set has to, or the program may not end."""

    def describe(self) -> str:
        height, width = height_and_width(self.image_size)
        return (
            f"{self.train_images:,} training and {self.val_images:,} validation images, {self.num_classes} classes, "
            f"{height}x{width}"
        )

    def count_skipped(self) -> int:
        """How often any rank has left an undecodable image out since the last call; all ranks have to ask."""
        count, self.skipped = torch.tensor(float(self.skipped), device=self.world.device), 0
        return int(self.world.all_reduce(count))

    def fingerprint(self) -> str:
        """The examples of both splits in their order, as counts and eight hex digits.

        A resumed run compares it. For images in files it covers names and labels, not pixels.
        """
        total = hashlib.sha256()
        for array in self._contents():
            total.update(np.ascontiguousarray(array).data)
        return f"{self.train_images} + {self.val_images} examples, {total.hexdigest()[:8]}"

    def _contents(self) -> Iterator[np.ndarray]:
        """Arrays that tell this data set from any other."""
        raise NotImplementedError

    def steps(self, batch_size: int) -> int:
        """Global batches per epoch; the incomplete last one is dropped."""
        return max(1, self.train_images // batch_size)

    def train(self, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[Inputs, Tensor]]:
        """This rank's part of each global batch from step `start`: inputs, labels (n,)."""
        n = self.steps(batch_size) * batch_size
        indices = _order(self.train_images, seed, epoch)
        if n > self.train_images:  # fewer images than one batch: some come twice
            indices = indices.repeat(-(-n // self.train_images))
        mine = indices[:n].view(-1, batch_size)[start:, self._mine(batch_size)]
        return self._batches(mine.flatten(), mine.shape[1], seed, epoch, train=True)

    def val(self, batch_size: int) -> Iterator[tuple[Inputs, Tensor]]:
        """This rank's share of the validation images, each once."""
        indices = torch.arange(self.world.rank, self.val_images, self.world.size)
        return self._batches(indices, batch_size, 0, 0, train=False)

    def calibration(self, batch_size: int, seed: int, epoch: int = 0) -> Iterator[tuple[Inputs, Tensor]]:
        """Seeded training images without augmentation, the same on every rank."""
        count = min(self.calibration_images, self.train_images)
        return self._batches(_order(self.train_images, seed, epoch)[:count], batch_size, 0, 0, train=None)

    def _mine(self, batch_size: int) -> slice:
        local = batch_size // self.world.size
        return slice(self.world.rank * local, (self.world.rank + 1) * local)

    def _batches(
        self, indices: Tensor, size: int, seed: int, epoch: int, train: bool | None
    ) -> Iterator[tuple[Inputs, Tensor]]:
        """`size` of the examples (n,) at a time, without waiting for the device, which has steps to do meanwhile.

        Args:
            train: True for augmented training images, None for plain ones, False for validation images.
        """
        raise NotImplementedError
