"""Image folders, root/{train,val}/<class>/<image>: ImageNet and Imagenette."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from r2.config import Count, CountOrZero, UserError
from r2.data.batches import IGNORED, Data, mix
from r2.dist import World, ignore_stop_signals

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
        keys = [[(int(i), mix(seed, epoch, int(i)) if train else -1) for i in batch] for batch in batches]
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
    ignore_stop_signals()


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
