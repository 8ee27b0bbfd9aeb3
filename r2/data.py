"""The data sets: one `Data` object with train, val and calibration batches, as normalised tensors on the device.

Order and augmentation are pure functions of (seed, epoch, position), so a run can stop at any step and go on, with
any number of workers, and N processes see the same global batches as one.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from r2.config import Count, CountOrZero, UserError
from r2.dist import World

IGNORED = -100  # label of an image that could not be decoded; cross_entropy's ignore_index
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _mix(*parts: int) -> int:
    """One well-spread 63-bit seed of several integers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(_mix(seed, epoch, 1)))


class Data:
    """What a run needs of a data set.

    Attributes:
        num_classes, image_size: of the task.
        train_images, val_images: counts.
        calibration_images: how many training images calibrate a quantizer.
    """

    num_classes: int
    image_size: int
    train_images: int
    val_images: int
    calibration_images: int
    skipped: int = 0  # undecodable images met so far

    def to(self, world: World) -> "Data":
        """Bind to a device and a place among the ranks."""
        self.world = world
        return self

    def describe(self) -> str:
        return (
            f"{self.train_images:,} training and {self.val_images:,} validation images, {self.num_classes} classes, "
            f"{self.image_size}x{self.image_size}"
        )

    def steps(self, batch_size: int) -> int:
        """Global batches per epoch; the incomplete last one is dropped."""
        return max(1, self.train_images // batch_size)

    def train(self, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's part of each global batch from step `start`: images (n, 3, h, w) float, labels (n,)."""
        n = self.steps(batch_size) * batch_size
        order = _order(self.train_images, seed, epoch)
        if n > self.train_images:  # fewer images than one batch: some come twice
            order = order.repeat(-(-n // self.train_images))
        batches = order[:n].view(-1, batch_size)[start:]
        return self._batches(batches[:, self._mine(batch_size)], seed, epoch, train=True)

    def val(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the validation images, each once."""
        indices = torch.arange(self.world.rank, self.val_images, self.world.size)
        return self._batches(indices.split(batch_size), 0, 0, train=False)

    def calibration(self, batch_size: int, seed: int, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Seeded training images without augmentation, the same on every rank."""
        count = min(self.calibration_images, self.train_images)
        return self._batches(_order(self.train_images, seed, epoch)[:count].split(batch_size), 0, 0, train=None)

    def _mine(self, batch_size: int) -> slice:
        local = batch_size // self.world.size
        return slice(self.world.rank * local, (self.world.rank + 1) * local)

    def _batches(self, batches: Any, seed: int, epoch: int, train: bool | None) -> Iterator[tuple[Tensor, Tensor]]:
        """`train`: True for augmented training images, None for plain ones, False for validation images."""
        raise NotImplementedError


class Memory(Data):
    """A small data set as one uint8 tensor per split on the device, augmented in batches.

    Args:
        train, val: (images (n, c, h, w) uint8 with 1 or 3 channels, labels (n,)).
        flip: mirror at random; wrong for digits.
    """

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

    def _batches(self, batches: Any, seed: int, epoch: int, train: bool | None) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self._val if train is False else self._train
        for indices in batches:
            indices = indices.to(self.world.device)
            if train and self.augment:
                x = self._crop(indices, seed, epoch)
            else:
                x = images[indices]
            x = (x.float() / 255 - self.mean) / self.std
            yield x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last), labels[indices]

    def _crop(self, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """A random shift of each image and, where it makes sense, its mirror; drawn per image and epoch."""
        shifts = 2 * self.padding + 1
        if getattr(self, "_drawn", None) != (seed, epoch):
            generator = torch.Generator().manual_seed(_mix(seed, epoch, 2))
            draw = torch.randint(0, shifts * shifts * 2, (self.train_images,), generator=generator)
            self._draw, self._drawn = draw.to(self.world.device), (seed, epoch)
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
            reason = str(error).splitlines()[0]
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
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    values = np.frombuffer(content, np.uint8, offset=min(header, len(content)))
    if name.endswith("images-idx3-ubyte") and values.size % 784:
        raise UserError(f"{path}: is truncated")
    return torch.from_numpy(values.copy())


def cifar10(root: str, augment: bool = True, calibration_images: Count = 1024) -> Data:
    """CIFAR-10 through torchvision, downloaded into `root` if absent."""
    from torchvision.datasets import CIFAR10

    try:
        sets = [CIFAR10(root, train=train, download=True) for train in (True, False)]
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"data.root={root}: no CIFAR-10 there, and it cannot be downloaded ({reason})") from None
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


class Folder(Data):
    """root/{train,val}/<class>/<image>: decoded and augmented in worker processes, normalised on the device."""

    def __init__(
        self,
        root: str,
        num_classes: int,
        image_size: int,
        workers: int,
        on_bad_image: str,
        calibration_images: int,
    ):
        from torchvision.datasets import ImageFolder

        splits = {}
        for split in ("train", "val"):
            folder = Path(root) / split
            classes = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
            if len(classes) != num_classes:
                raise UserError(f"data.root={root}: {folder} has {len(classes)} class folders, not {num_classes}")
            try:
                splits[split] = ImageFolder(str(folder))
            except FileNotFoundError as error:
                raise UserError(f"data.root={root}: {str(error).splitlines()[0]}") from None
        if splits["train"].classes != splits["val"].classes:
            names = sorted(set(splits["train"].classes) ^ set(splits["val"].classes))
            raise UserError(f"data.root={root}: train and val differ in class folders: {', '.join(names[:5])}")
        self._samples = {name: _Samples(s.samples, image_size, on_bad_image) for name, s in splits.items()}
        self.train_images, self.val_images = (len(splits[name].samples) for name in ("train", "val"))
        self.num_classes, self.image_size, self.workers = num_classes, image_size, workers
        self.calibration_images = calibration_images
        self._loaders: dict[tuple, Any] = {}

    def describe(self) -> str:
        counts = np.bincount(self._samples["train"]._labels, minlength=self.num_classes)
        return f"{super().describe()}, {counts.min():,} to {counts.max():,} training images per class"

    def to(self, world: World) -> "Data":
        as_image = {"device": world.device, "dtype": torch.float32}
        self.mean = torch.tensor(_IMAGENET_MEAN, **as_image).view(1, 3, 1, 1) * 255  # type: ignore[arg-type]
        self.std = torch.tensor(_IMAGENET_STD, **as_image).view(1, 3, 1, 1) * 255  # type: ignore[arg-type]
        return super().to(world)

    def _batches(self, batches: Any, seed: int, epoch: int, train: bool | None) -> Iterator[tuple[Tensor, Tensor]]:
        from torch.utils.data import DataLoader

        samples = self._samples["val" if train is False else "train"]
        # An index carries its own random seed, so a worker needs no state and may persist.
        keys = [[(int(i), _mix(seed, epoch, int(i)) if train else -1) for i in batch] for batch in batches]
        name = (train,)
        if name not in self._loaders:
            self._loaders[name] = DataLoader(
                samples,
                batch_sampler=_Keys(),
                num_workers=self.workers,
                persistent_workers=self.workers > 0,
                pin_memory=self.world.device.type == "cuda",
                worker_init_fn=_one_thread,
            )
        loader = self._loaders[name]
        loader.batch_sampler.keys = keys
        for images, labels in loader:
            bad = int((labels == IGNORED).sum())
            self.skipped += bad
            if bad == len(labels):
                raise UserError(f"no image of a whole batch of {bad} can be decoded; look at the data folder")
            x = images.to(self.world.device, non_blocking=True)
            x = (x.float() - self.mean) / self.std
            yield (
                x.contiguous(memory_format=torch.channels_last),
                labels.to(self.world.device, non_blocking=True),
            )


class _Keys:
    """The batches of the coming pass; a DataLoader keeps its sampler, so its content changes instead."""

    keys: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


class _Samples(torch.utils.data.Dataset):
    """(index, seed) to a uint8 image (3, size, size) and its label; seed -1 is the validation crop."""

    def __init__(self, samples: list[tuple[str, int]], image_size: int, on_bad_image: str):
        from torchvision.transforms import v2

        # Arrays, not a list of tuples: workers share them without copying on every reference count.
        self._paths = np.array([path for path, _ in samples], dtype=np.bytes_)
        self._labels = np.array([label for _, label in samples], dtype=np.int64)
        self.image_size, self.on_bad_image = image_size, on_bad_image
        self._train = v2.Compose([v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()])
        self._val = v2.Compose([v2.Resize(image_size * 8 // 7, antialias=True), v2.CenterCrop(image_size)])
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        from torchvision.io import ImageReadMode, decode_image

        index, seed = key
        path = self._paths[index].decode()
        try:
            image = decode_image(path, mode=ImageReadMode.RGB)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if self.on_bad_image == "error":
                raise UserError(f"{path}: cannot be decoded ({reason}); data.on_bad_image=skip leaves it out") from None
            if path not in self._told:
                self._told.add(path)
                print(f"r2: skipped {path}: {reason}", flush=True)
            return torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8), IGNORED
        if seed < 0:
            return self._val(image), int(self._labels[index])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._train(image), int(self._labels[index])


def imagenet(
    root: str,
    image_size: Count = 224,
    workers: CountOrZero = 8,
    on_bad_image: Literal["error", "skip"] = "error",
    calibration_images: Count = 2000,
) -> Data:
    """ImageNet-1k in the ImageFolder layout; the paper's data."""
    return Folder(root, 1000, image_size, workers, on_bad_image, calibration_images)


def imagenette(
    root: str,
    image_size: Count = 128,
    workers: CountOrZero = 8,
    on_bad_image: Literal["error", "skip"] = "error",
    calibration_images: Count = 1024,
) -> Data:
    """Ten ImageNet classes (fastai's imagenette2), downloaded into `root` by torchvision if absent."""
    folder = next((p for p in (Path(root), Path(root) / "imagenette2") if (p / "train").is_dir()), None)
    if folder is None:
        from torchvision.datasets import Imagenette

        try:
            Path(root).mkdir(parents=True, exist_ok=True)
            Imagenette(root, download=True)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"data.root={root}: no imagenette there, and it cannot be downloaded ({reason})") from None
        folder = Path(root) / "imagenette2"
    return Folder(str(folder), 10, image_size, workers, on_bad_image, calibration_images)
