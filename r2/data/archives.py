"""Sources of scripts/prepare_imagenet.py: ImageNet as image folders or as the official tars."""

import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from r2.config import UserError, first_line
from r2.data.folder import Visible, class_folders, is_image, misplaced

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
Map = Callable[[Callable, Iterable, str], list]  # (function, items, what it does) to the results, in order


class Entry(NamedTuple):
    """One encoded image: `length` bytes of a file from `offset`."""

    path: str
    offset: int
    length: int
    label: int
    name: str  # <class>/<file>


Splits = dict[str, list[Entry]]


def from_folder(source: Path) -> tuple[list[str], Splits]:
    """The classes, and the images of both splits in the order of torchvision's ImageFolder."""
    splits: Splits = {}
    classes: dict[str, list[str]] = {}
    for split in ("train", "val"):
        if not class_folders(source / split):
            advice = misplaced(source / split) or f"{source / split} has no class folders"
            raise UserError(f"--source {source}: {advice}")
        try:
            found = Visible(str(source / split))
        except FileNotFoundError as error:
            raise UserError(f"--source {source}: {first_line(error)}") from None
        names, classes[split] = found.classes, found.classes
        splits[split] = [
            Entry(path, 0, os.path.getsize(path), label, f"{names[label]}/{Path(path).name}")
            for path, label in found.samples
        ]
    if classes["train"] != classes["val"]:
        names = sorted(set(classes["train"]) ^ set(classes["val"]))
        raise UserError(f"--source {source}: train and val differ in class folders: {', '.join(names[:5])}")
    return classes["train"], splits


def from_archives(source: Path, parallel: Map) -> tuple[list[str], Splits]:
    """The same of the official files. Nothing is extracted: no name inside an archive becomes a path."""
    wnids, truth = read_devkit(source / DEVKIT)
    train, val = str(source / TRAIN), str(source / VAL)
    inner = [(train, offset, name[:-4]) for name, offset, _ in members((train, 0)) if name.endswith(".tar")]
    classes = sorted(wnid for *_, wnid in inner)
    if classes != sorted(wnids.values()):
        raise UserError(f"{train}: its {len(classes)} class archives are not the {len(wnids)} classes of {DEVKIT}")
    label = {wnid: i for i, wnid in enumerate(classes)}
    splits: Splits = {"train": [], "val": []}
    for (*_, wnid), found in zip(inner, parallel(members, inner, "reading"), strict=True):
        splits["train"] += [
            Entry(train, at, n, label[wnid], f"{wnid}/{name}") for name, at, n in found if is_image(name)
        ]
    found = sorted(member for member in members((val, 0)) if is_image(member[0]))
    if len(found) != len(truth):
        raise UserError(f"{val}: has {len(found)} images, the ground truth in {DEVKIT} {len(truth)}")
    for (name, at, n), number in zip(found, truth, strict=True):  # ILSVRC2012_val_00000001.JPEG is line 1
        splits["val"].append(Entry(val, at, n, label[wnids[number]], f"{wnids[number]}/{name}"))
    # An image folder's order: by class, then by file.
    return classes, {split: sorted(entries, key=lambda e: (e.label, e.name)) for split, entries in splits.items()}


def members(archive: tuple) -> list[tuple[str, int, int]]:
    """(file name without folders, offset, length) of the files of a tar (path, offset of the tar in that file, ...).

    Names that begin with a dot are left out.
    """
    path, offset = archive[:2]
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                files = [(Path(m.name).name, m.offset_data, m.size) for m in tar if m.isfile()]
        size = os.path.getsize(path)
        if files and files[-1][1] + files[-1][2] > size:
            raise tarfile.ReadError("it ends early")
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path}: cannot be read as a tar ({error}); download it again") from None
    return [file for file in files if not file[0].startswith(".")]


def read_devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """The class name of each ILSVRC2012_ID, and the IDs of the validation images in the order of their names."""
    from scipy.io import loadmat

    wanted = {name: b"" for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                file = tar.extractfile(member) if name in wanted else None
                if file is not None:
                    wanted[name] = file.read(1 << 26)
        meta, truth = wanted.values()
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = [synset for synset in synsets if synset["num_children"] == 0]
        return {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in leaves}, [int(line) for line in truth.split()]
    except Exception as error:  # scipy's reader raises many kinds
        raise UserError(f"{path}: is not the development kit ({error}); download it again") from None
