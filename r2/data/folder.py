"""Image folders, root/{train,val}/<class>/<image>: ImageNet, Imagenette, your own; or listed in CSV files."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from r2.config import Count, CountOrZero, Fraction, ImageSize, Place, Seed, UserError, first_line
from r2.data.batches import Data
from r2.data.images import Images
from r2.paths import script


class Visible(ImageFolder):
    """ImageFolder without names that begin with a dot: macOS's ._x.jpg beside x.jpg, .ipynb_checkpoints."""

    def __init__(self, root: str):
        super().__init__(root, is_valid_file=lambda path: is_image(path[len(root) :]))

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = class_folders(Path(directory))
        return names, {name: label for label, name in enumerate(names)}


def class_folders(split: Path) -> list[str]:
    """The names of the folders that are classes, in the order of their labels; none if there is no such split."""
    try:
        return sorted(p.name for p in split.iterdir() if p.is_dir() and p.name[0] != ".") if split.is_dir() else []
    except PermissionError as error:
        raise UserError(f"{split}: cannot be read ({error.strerror})") from None


def misplaced(split: Path) -> str:
    """What to do where images lie as archives and downloads leave them, without class folders; empty if they do not."""
    official = f"{script('prepare_imagenet')} --source DIR --out SHARDS reads the official archives as they are"
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

    def __init__(self, root: str, names: Sequence[str], labels: Sequence[int]):
        self._root = root
        # Arrays, not a list of tuples: workers share them without copying on every reference count.
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, dtype=np.int64)

    @classmethod
    def found(cls, root: str, samples: list[tuple[str, int]]) -> "Files":
        """As ImageFolder has them, each path with `root` in front."""
        return cls(root, [path[len(root) + 1 :] for path, _ in samples], [label for _, label in samples])

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
        image_size: ImageSize,
        workers: int,
        on_bad_image: str,
        calibration_images: int,
    ):
        folders = [Path(root) / split for split in ("train", "val")]
        classes = [class_folders(folder) for folder in folders]
        alone = sorted(set(classes[0]) ^ set(classes[1]))
        differ = f"train and val differ in class folders: {', '.join(alone[:5])}" if alone else ""
        wanted = max(1, len(classes[0])) if num_classes is None else num_classes
        for folder, names in zip(folders, classes, strict=True):
            if not names and (advice := misplaced(folder)):
                raise UserError(f"data.root={root}: {advice}")
            if not folder.is_dir():
                raise UserError(
                    f"data.root={root}: there is no folder {folder}; set data.root to one that has "
                    "train/<class>/<image> and val/<class>/<image>"
                )
            if len(names) != wanted:
                more = f"; {differ}" if differ else "" if num_classes is None else "; images of your own: data=folder"
                raise UserError(f"data.root={root}: {folder} has {len(names)} class folders, not {wanted}{more}")
        if differ:
            raise UserError(f"data.root={root}: {differ}")
        try:
            train, val = (Files.found(str(folder), Visible(str(folder)).samples) for folder in folders)
        except FileNotFoundError as error:
            raise UserError(f"data.root={root}: {first_line(error)}") from None
        super().__init__(train, val, len(classes[0]), image_size, workers, on_bad_image, calibration_images)


def _held_out(labels: Sequence[int], classes: Sequence[str], fraction: float, seed: int) -> list[bool]:
    """Which images are for validation: a part of every class, drawn by seed.

    Raises:
        UserError: nothing is left of a class for one of both.
    """
    found, generator = torch.tensor(labels), torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, name in enumerate(classes):
        mine = (found == label).nonzero().flatten()
        count = round(fraction * len(mine))
        if not 0 < count < len(mine):
            raise UserError(
                f"data.val_fraction={fraction:g}: leaves the class {name} of {len(mine)} images without images for "
                f"{'validation' if count == 0 else 'training'}"
            )
        held_out[mine[torch.randperm(len(mine), generator=generator)[:count]]] = True
    return held_out.tolist()


def _split(root: str, names: Sequence[str], labels: Sequence[int], val: Sequence[bool]) -> list[Files]:
    """The images for training and those for validation."""
    parts = ([i for i, held_out in enumerate(val) if held_out == part] for part in (False, True))
    return [Files(root, [names[i] for i in part], [labels[i] for i in part]) for part in parts]


class Split(Images):
    """One folder of <class>/<image>, of which a part of every class, drawn by seed, is for validation."""

    def __init__(self, root: Path, fraction: float, seed: int, image_size: ImageSize, workers: int, on_bad_image: str,
                 calibration_images: int):  # fmt: skip
        try:
            found = Visible(str(root))
        except FileNotFoundError as error:
            raise UserError(f"data.root={root}: {first_line(error)}") from None
        names = [path[len(str(root)) + 1 :] for path, _ in found.samples]
        held_out = _held_out(found.targets, found.classes, fraction, seed)
        train, val = _split(str(root), names, found.targets, held_out)
        super().__init__(train, val, len(found.classes), image_size, workers, on_bad_image, calibration_images)


def _rows(root: str, file: str, said: str) -> list[tuple[str, str, int]]:
    """The images of a CSV: name relative to `root`, label, and line.

    Raises:
        UserError: the file cannot be read, or a row is not of an image that is there; names the line.
    """
    found: dict[str, tuple[str, int]] = {}
    try:
        with open(Path(root, file), newline="", encoding="utf-8-sig") as text:
            rows = csv.DictReader(text, strict=True)
            if rows.fieldnames is None or not {"path", "label"} <= set(rows.fieldnames):
                raise UserError(f"{said}: its first line has to name the columns path and label")
            for row in rows:
                path, label = (row["path"] or "").strip(), (row["label"] or "").strip()
                at = f"{said}, line {rows.line_num}"
                if not path or not label or None in row:
                    raise UserError(f"{at}: has to be a path and a label under {','.join(rows.fieldnames)}")
                if not path.lower().endswith(IMG_EXTENSIONS):
                    raise UserError(
                        f"{at}: {path} does not have the extension of an image; known are {' '.join(IMG_EXTENSIONS)}"
                    )
                if not Path(root, path).is_file():
                    raise UserError(f"{at}: there is no image {Path(root, path)}")
                if path in found:
                    raise UserError(f"{at}: {path} stands in line {found[path][1]} already")
                found[path] = (str(int(label)) if label.isdecimal() else label, rows.line_num)
    except OSError as error:
        raise UserError(f"{said}: cannot be read ({error.strerror}); it is looked for in data.root={root}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{said}: is no CSV in UTF-8 ({error})") from None
    if not found:
        raise UserError(f"{said}: lists no image")
    return [(path, label, line) for path, (label, line) in found.items()]


def _numbered(labels: list[str], said: str) -> list[str]:
    """The classes of training labels, in the order of their numbers: names in alphabetical order, or the integers.

    Raises:
        UserError: labels are integers, but not 0 to n - 1.
    """
    used = set(labels)
    classes = sorted(used)
    if all(label.isdecimal() for label in used):
        classes = [str(number) for number in range(len(used))]
        if missing := [number for number in classes if number not in used]:
            raise UserError(f"{said}: has no image of label {missing[0]}; integers have to be 0 to {len(classes) - 1}")
    return classes


class Listed(Images):
    """The images of CSV files whose first line is `path,label`; without one for validation, a part of every class."""

    def __init__(self, root: str, train_csv: str, val_csv: str | None, fraction: float, seed: int,
                 image_size: ImageSize, workers: int, on_bad_image: str, calibration_images: int):  # fmt: skip
        train_said, val_said = f"data.train_csv={train_csv}", f"data.val_csv={val_csv}"
        rows = _rows(root, train_csv, train_said)
        classes = _numbered([label for _, label, _ in rows], train_said)
        number = {name: i for i, name in enumerate(classes)}
        names, labels = [name for name, _, _ in rows], [number[label] for _, label, _ in rows]
        if val_csv is None:
            train, val = _split(root, names, labels, _held_out(labels, classes, fraction, seed))
        else:
            train, listed = Files(root, names, labels), _rows(root, val_csv, val_said)
            if strange := next(((label, line) for _, label, line in listed if label not in number), None):
                raise UserError(f"{val_said}, line {strange[1]}: {strange[0]} is no label of {train_csv}")
            val = Files(root, [name for name, _, _ in listed], [number[label] for _, label, _ in listed])
        super().__init__(train, val, len(classes), image_size, workers, on_bad_image, calibration_images)


def folder(
    root: Place,
    image_size: ImageSize = 224,
    train_csv: str | None = None,
    val_csv: str | None = None,
    val_fraction: Fraction = 0.2,
    split_seed: Seed = 0,
    workers: CountOrZero = 8,
    on_bad_image: Literal["error", "skip"] = "error",
    calibration_images: Count = 1024,
) -> Data:
    """Images of your own in the ImageFolder layout, of as many classes as there are folders, or listed in CSV files.

    Args:
        root: with train/ and val/, or with one folder per class (or train/ alone), of which `val_fraction` of every
            class becomes validation images, drawn by `split_seed`.
        image_size: of a square, or height and width.
        train_csv, val_csv: files in `root` with the columns path, relative to `root`, and label, a name or a number
            from 0 on; without `val_csv`, `val_fraction` of every class is held out.
    """
    if train_csv is not None:
        return Listed(root, train_csv, val_csv, val_fraction, split_seed, image_size, workers, on_bad_image,
                      calibration_images)  # fmt: skip
    if val_csv is not None:
        raise UserError(f"data.val_csv={val_csv}: goes with data.train_csv")
    place = Path(root)
    if (place / "train").is_dir() and (place / "val").is_dir():
        return Folder(root, None, image_size, workers, on_bad_image, calibration_images)
    whole = place / "train" if (place / "train").is_dir() else place
    if not class_folders(whole):
        raise UserError(f"data.root={root}: there is no folder of images there, {whole}/<class>/<image>")
    return Split(whole, val_fraction, split_seed, image_size, workers, on_bad_image, calibration_images)


def imagenet(
    root: str,
    image_size: ImageSize = 224,
    workers: CountOrZero = 8,
    on_bad_image: Literal["error", "skip"] = "error",
    calibration_images: Count = 2000,
) -> Data:
    """ImageNet-1k in the ImageFolder layout; the paper's data."""
    return Folder(root, 1000, image_size, workers, on_bad_image, calibration_images)


def imagenette(
    root: str,
    image_size: ImageSize = 128,
    workers: CountOrZero = 8,
    on_bad_image: Literal["error", "skip"] = "error",
    calibration_images: Count = 1024,
) -> Data:
    """Ten ImageNet classes (fastai's imagenette2), downloaded into `root` by torchvision if absent."""
    places = [Path(root, name) for name in ("", "imagenette2", "imagenette2-320", "imagenette2-160")]
    folder = next((place for place in places if (place / "train").is_dir()), None)
    if folder is None:
        from torchvision.datasets import Imagenette

        try:
            Path(root).mkdir(parents=True, exist_ok=True)
            Imagenette(root, download=True)
        except Exception as error:
            reason = first_line(error)
            raise UserError(
                f"data.root={root}: no imagenette there, and it cannot be downloaded ({reason}); put the extracted "
                "imagenette2 there"
            ) from None
        folder = Path(root) / "imagenette2"
    return Folder(str(folder), 10, image_size, workers, on_bad_image, calibration_images)
