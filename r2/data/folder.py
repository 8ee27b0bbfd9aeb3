"""Image folders, root/{train,val}/<class>/<image>: ImageNet, Imagenette and your own."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from r2.config import Count, CountOrZero, Fraction, Place, Seed, UserError
from r2.data.batches import Data
from r2.data.images import Images


class Visible(ImageFolder):
    """ImageFolder without names that begin with a dot: macOS's ._x.jpg beside x.jpg, .ipynb_checkpoints."""

    def __init__(self, root: str):
        super().__init__(root, is_valid_file=lambda path: is_image(path[len(root) :]))

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = class_folders(Path(directory))
        return names, {name: label for label, name in enumerate(names)}


def class_folders(split: Path) -> list[str]:
    """The names of the folders that are classes, in the order of their labels; none where there is no such split."""
    return sorted(p.name for p in split.iterdir() if p.is_dir() and p.name[0] != ".") if split.is_dir() else []


def misplaced(split: Path) -> str:
    """What to do where images lie as archives and downloads leave them, without class folders; empty if they do not."""
    official = "python scripts/prepare_imagenet.py --source DIR --out SHARDS reads the official archives as they are"
    names = sorted(os.listdir(split)) if split.is_dir() else []
    if image := next(filter(is_image, names), None):
        return (
            f"{split} has images outside of class folders ({image}); move each into a folder named after its class, as "
            f"in train, or: {official}, for data=imagenet_shards"
        )
    if archive := next((name for name in names if name.endswith(".tar")), None):
        return f"{split} has archives ({archive}); extract each into a folder of its name, or: {official}"
    if next(split.parent.glob("ILSVRC2012_img_*.tar"), None):
        official = official.replace("DIR", str(split.parent))
        return f"{split.parent} has archives, not {split.name}/<class>/<image>; {official}, for data=imagenet_shards"
    return ""


def is_image(path: str) -> bool:
    """By its extension; nothing on the way to it may begin with a dot."""
    return path.lower().endswith(IMG_EXTENSIONS) and f"{os.sep}." not in os.sep + path


class Files:
    """The images of one split as files; see `images.Source`."""

    def __init__(self, root: str, samples: list[tuple[str, int]]):
        self._root = root
        # Arrays, not a list of tuples: workers share them without copying on every reference count.
        self.names = np.array([os.fsencode(path[len(root) + 1 :]) for path, _ in samples])
        self.labels = np.array([label for _, label in samples], dtype=np.int64)

    def read(self, index: int) -> Tensor:
        return torch.from_numpy(np.fromfile(self.name(index), np.uint8))  # torchvision's reader wants a name in UTF-8

    def name(self, index: int) -> str:
        return os.path.join(self._root, os.fsdecode(self.names[index]))


class Folder(Images):
    """root/{train,val}/<class>/<image>; `num_classes` None counts the classes."""

    def __init__(
        self,
        root: str,
        num_classes: int | None,
        image_size: int,
        workers: int,
        on_bad_image: str,
        calibration_images: int,
    ):
        folders = [Path(root) / split for split in ("train", "val")]
        classes = [class_folders(folder) for folder in folders]
        alone = sorted(set(classes[0]) ^ set(classes[1]))
        differ = f"train and val differ in class folders: {', '.join(alone[:5])}" if alone else ""
        for folder, names in zip(folders, classes, strict=True):
            if not names and (advice := misplaced(folder)):
                raise UserError(f"data.root={root}: {advice}")
            if len(names) != (len(classes[0]) if num_classes is None else num_classes):
                more = f"; {differ}" if differ else "" if num_classes is None else "; images of your own: data=folder"
                raise UserError(f"data.root={root}: {folder} has {len(names)} class folders, not {num_classes}{more}")
        if differ:
            raise UserError(f"data.root={root}: {differ}")
        try:
            train, val = (Files(str(folder), Visible(str(folder)).samples) for folder in folders)
        except FileNotFoundError as error:
            raise UserError(f"data.root={root}: {str(error).splitlines()[0]}") from None
        super().__init__(train, val, len(classes[0]), image_size, workers, on_bad_image, calibration_images)


class Split(Images):
    """One folder of <class>/<image>, of which a part of every class, drawn by seed, is for validation."""

    def __init__(self, root: Path, fraction: float, seed: int, image_size: int, workers: int, on_bad_image: str,
                 calibration_images: int):  # fmt: skip
        try:
            found = Visible(str(root))
        except FileNotFoundError as error:
            raise UserError(f"data.root={root}: {str(error).splitlines()[0]}") from None
        labels, generator = torch.tensor(found.targets), torch.Generator().manual_seed(seed)
        held_out: set[int] = set()
        for label, name in enumerate(found.classes):
            mine = (labels == label).nonzero().flatten()
            count = round(fraction * len(mine))
            if not 0 < count < len(mine):
                raise UserError(
                    f"data.val_fraction={fraction:g}: leaves the class {name} of {len(mine)} images without images for "
                    f"{'validation' if count == 0 else 'training'}"
                )
            held_out.update(mine[torch.randperm(len(mine), generator=generator)[:count]].tolist())
        parts = ([s for i, s in enumerate(found.samples) if (i in held_out) == val] for val in (False, True))
        train, val = (Files(str(root), part) for part in parts)
        super().__init__(train, val, len(found.classes), image_size, workers, on_bad_image, calibration_images)


def folder(
    root: Place,
    image_size: Count = 224,
    val_fraction: Fraction = 0.2,
    split_seed: Seed = 0,
    workers: CountOrZero = 8,
    on_bad_image: Literal["error", "skip"] = "error",
    calibration_images: Count = 1024,
) -> Data:
    """Images of your own in the ImageFolder layout, of as many classes as there are folders.

    Args:
        root: with train/ and val/, or with one folder per class (or train/ alone), of which `val_fraction` of every
            class becomes validation images, drawn by `split_seed`.
    """
    place = Path(root)
    if (place / "train").is_dir() and (place / "val").is_dir():
        return Folder(root, None, image_size, workers, on_bad_image, calibration_images)
    whole = place / "train" if (place / "train").is_dir() else place
    if not class_folders(whole):
        raise UserError(f"data.root={root}: there is no folder of images there, {whole}/<class>/<image>")
    return Split(whole, val_fraction, split_seed, image_size, workers, on_bad_image, calibration_images)


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
