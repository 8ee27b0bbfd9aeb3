"""Small data sets, decoded once into one uint8 tensor per split on the device and augmented there in batches."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from r2.config import Count, UserError, first_line
from r2.data.batches import Data, mix, unawaited
from r2.dist import World


class Memory(Data):
    """A small data set as one uint8 tensor per split on the device, augmented in batches.

    Args:
        train, val: (images (n, c, h, w) uint8 with 1 or 3 channels, labels (n,)).
        flip: mirror at random; wrong for digits.
    """

    image_size: int

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor],
        num_classes: int,
        calibration_images: int,
        augment: bool,
        flip: bool,
    ):
        self._train, self._val = train, val
        self.num_classes, self.calibration_images = num_classes, calibration_images
        self.train_images, self.val_images = len(train[0]), len(val[0])
        self.image_size = train[0].shape[-1]
        self.augment, self.flip, self.padding = augment, flip, self.image_size // 8
        sample = train[0].float() / 255
        self.mean = sample.mean((0, 2, 3)).view(1, -1, 1, 1)
        self.std = sample.std((0, 2, 3)).view(1, -1, 1, 1)

    def to(self, world: World) -> "Data":
        device = world.device
        self._train = (self._train[0].to(device), self._train[1].to(device))
        self._val = (self._val[0].to(device), self._val[1].to(device))
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        if self.augment:
            p = self.padding
            self._padded = torch.nn.functional.pad(self._train[0], (p, p, p, p))
        return super().to(world)

    def _contents(self) -> Iterator[np.ndarray]:
        yield from (tensor.cpu().numpy() for split in (self._train, self._val) for tensor in split)

    def _batches(
        self, indices: Tensor, size: int, seed: int, epoch: int, train: bool | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self._val if train is False else self._train
        for batch in unawaited(indices, self.world.device).split(size):
            if train and self.augment:
                x = self._crop(batch, seed, epoch)
            else:
                x = images[batch]
            x = (x.float() / 255 - self.mean) / self.std
            yield x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last), labels[batch]

    def _crop(self, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """A random shift of each image and, where it makes sense, its mirror; drawn per image and epoch."""
        shifts = 2 * self.padding + 1
        if getattr(self, "_drawn", None) != (seed, epoch):
            generator = torch.Generator().manual_seed(mix(seed, epoch, 2))
            draw = torch.randint(0, shifts * shifts * 2, (self.train_images,), generator=generator)
            self._draw, self._drawn = unawaited(draw, self.world.device), (seed, epoch)
        draw = self._draw[indices]
        size = torch.arange(self.image_size, device=draw.device)
        rows = (draw // 2 % shifts)[:, None] + size
        columns = (draw // 2 // shifts)[:, None] + size
        if self.flip:
            columns = torch.where(draw[:, None] % 2 == 1, columns.flip(1), columns)
        channels = torch.arange(self._padded.shape[1], device=draw.device)
        return self._padded[
            indices[:, None, None, None],
            channels[:, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]


def digits(image_size: Count = 32, augment: bool = True, calibration_images: Count = 256) -> Data:
    """scikit-learn's 1,797 digits (8x8, enlarged); every fifth image of each class is held out."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images).float().unsqueeze(1) * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=image_size, mode="bilinear", align_corners=False)
    images, labels = images.round().clamp(0, 255).byte(), torch.from_numpy(source.target).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[(labels == digit).nonzero().flatten()[::5]] = True
    train, val = (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])
    return Memory(train, val, 10, calibration_images, augment, flip=False)


def fashion_mnist(root: str, image_size: Count = 32, augment: bool = True, calibration_images: Count = 1024) -> Data:
    """Fashion-MNIST, 60,000 + 10,000 images of 28x28, padded to `image_size`."""
    if image_size < 28:
        raise UserError(f"data.image_size={image_size}: Fashion-MNIST is padded, so at least 28")
    debian = Path("/usr/share/datasets/fashion-mnist")
    places = [Path(root), Path(root) / "FashionMNIST" / "raw", debian]
    folder = next((p for p in places if _idx_file(p, "train-images-idx3-ubyte")), None)
    if folder is None:
        from torchvision.datasets import FashionMNIST

        try:
            FashionMNIST(root, download=True)
        except Exception as error:
            reason = first_line(error)
            raise UserError(
                f"data.root={root}: no Fashion-MNIST there, nor in {debian} (apt install dataset-fashion-mnist), "
                f"and it cannot be downloaded ({reason})"
            ) from None
        folder = places[1]
    before = (image_size - 28) // 2
    after = image_size - 28 - before

    def split(name: str, count: int) -> tuple[Tensor, Tensor]:
        images = _read_idx(folder, f"{name}-images-idx3-ubyte", 16).view(-1, 1, 28, 28)
        labels = _read_idx(folder, f"{name}-labels-idx1-ubyte", 8)
        if len(images) != len(labels) or len(images) != count:
            raise UserError(f"{folder}: {name} has {len(images)} images and {len(labels)} labels, not {count}")
        return torch.nn.functional.pad(images, (before, after, before, after)), labels.long()

    return Memory(split("train", 60_000), split("t10k", 10_000), 10, calibration_images, augment, flip=True)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _read_idx(folder: Path, name: str, header: int) -> Tensor:
    path = _idx_file(folder, name)
    if path is None:
        raise UserError(f"{folder}: {name}[.gz] is missing")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    values = np.frombuffer(content, np.uint8, offset=min(header, len(content)))
    if name.endswith("images-idx3-ubyte") and values.size % 784:
        raise UserError(f"{path}: is truncated")
    return torch.from_numpy(values.copy())


def cifar10(root: str, augment: bool = True, calibration_images: Count = 1024) -> Data:
    """CIFAR-10 through torchvision, extracted or not, downloaded into `root` if absent."""
    from torchvision.datasets import CIFAR10

    folder = Path(root).parent if Path(root).name == CIFAR10.base_folder else root
    try:
        sets = [CIFAR10(folder, train=train, download=True) for train in (True, False)]
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"data.root={root}: no CIFAR-10 there, and it cannot be downloaded ({reason}); put "
            f"{CIFAR10.base_folder} or {CIFAR10.filename} there"
        ) from None
    train, val = [(torch.from_numpy(s.data).permute(0, 3, 1, 2), torch.tensor(s.targets)) for s in sets]
    return Memory(train, val, 10, calibration_images, augment, flip=True)


def fake(
    train_images: Count = 256,
    val_images: Count = 100,
    num_classes: Count = 10,
    image_size: Count = 32,
    calibration_images: Count = 64,
) -> Data:
    """Noise over one fixed pattern per class: learnable in seconds, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 128, (num_classes, 3, image_size, image_size), generator=generator)

    def split(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % num_classes
        noise = torch.randint(0, 128, (count, 3, image_size, image_size), generator=generator)
        return (patterns[labels] + noise).byte(), labels

    return Memory(split(train_images), split(val_images), num_classes, calibration_images, False, flip=False)
