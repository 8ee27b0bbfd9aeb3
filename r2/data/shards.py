"""ImageNet as shards: tar files of images at the size that the crops need, from scripts/prepare_imagenet.py.

A shard is a plain tar in WebDataset's layout, <number>.<jpg or webp> beside <number>.cls. Its index, an .npz of the
same name, holds the offset of each image. So every image needs one read, and the order of an epoch is that of the image
folder from which the shards were made, resumable at any step.

Training images are JPEG with a shorter side of at most `stored_size`. Their crops follow the folder's distribution:
area, aspect ratio and flip are the same draws; the position is another draw, since torchvision draws it in whole
pixels. Validation images have exactly that shorter side and are lossless: with image_size = 7/8 stored_size they give
exactly the pixels of the image folder.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from r2.config import Count, CountOrZero, UserError
from r2.data.batches import Data
from r2.data.images import Images
from r2.paths import script

FORMAT = 1
MANIFEST = "manifest.json"  # its presence says that all shards are complete
# The arrays of a shard's index, one entry per image; sizes (n, 2) are heights and widths.
INDEX = ("offsets", "lengths", "labels", "sizes", "names")


class Tars:
    """The images of one split in its shards; see `images.Source`."""

    def __init__(self, root: Path, shards: list[dict]):
        self._paths = [root / Path(shard["file"]).name for shard in shards]
        found: dict[str, list[np.ndarray]] = {name: [] for name in INDEX}
        self._written: list[tuple[int, int]] = []  # size and time of each shard
        for path, shard in zip(self._paths, shards, strict=True):
            index = read_index(path)
            self._written.append(_written(path) if path.exists() else (0, 0))
            size = self._written[-1][0]
            if size != shard["bytes"] or len(index["labels"]) != shard["images"]:
                raise UserError(
                    f"{path}: has {size} bytes and {len(index['labels'])} images, not {shard['bytes']} and "
                    f"{shard['images']}; delete it and prepare it again"
                )
            for name in INDEX:
                found[name].append(index[name])
        self._shards = np.repeat(np.arange(len(shards)), [shard["images"] for shard in shards])
        arrays = (np.concatenate(found[name]) for name in INDEX)
        self._offsets, self._lengths, self.labels, self.sizes, self.names = arrays
        self._open: dict[int, int] = {}  # of this process

    def read(self, index: int) -> Tensor:
        shard, length = int(self._shards[index]), int(self._lengths[index])
        if shard not in self._open:
            self._open[shard] = os.open(self._paths[shard], os.O_RDONLY)
            if _written(self._open[shard]) != self._written[shard]:
                raise UserError(f"{self._paths[shard]}: was replaced while a run reads it; start the run again")
        encoded = torch.empty(length, dtype=torch.uint8)
        if os.preadv(self._open[shard], [encoded.numpy().data], int(self._offsets[index])) != length:
            raise OSError("the shard ends early")
        return encoded

    def name(self, index: int) -> str:
        return f"{self._paths[self._shards[index]]}: {os.fsdecode(self.names[index])}"

    def __getstate__(self) -> dict:
        return {**vars(self), "_open": {}}  # an open file belongs to its process


def _written(file: Path | int) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def read_index(shard: Path) -> dict[str, np.ndarray]:
    """The index beside a shard.

    Raises:
        UserError: it is missing or damaged.
    """
    path = shard.with_suffix(".npz")
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in (*INDEX, "key", "bytes", "sha256", "skipped")}
    except Exception as error:  # numpy has no error of its own
        raise UserError(f"{path}: is not the index of a shard ({error}); prepare the shards again") from None


def read_manifest(root: Path) -> dict[str, Any]:
    """What the shards in `root` hold.

    Raises:
        UserError: there are none, they are unfinished, or of another version.
    """
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(
            f"data.root={root}: there is no readable {MANIFEST}; make or finish the shards with "
            f"{script('prepare_imagenet')} --source <ImageNet> --out {root}"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path}: is not of this version of r2; prepare the shards again")
    return manifest


class Shards(Images):
    """Shards of both splits in one folder."""

    image_size: int

    def __init__(
        self,
        root: str,
        num_classes: int,
        image_size: int,
        stored_size: int,
        workers: int,
        on_bad_image: str,
        calibration_images: int,
    ):
        manifest = read_manifest(Path(root))
        classes = len(manifest["classes"])
        if classes != num_classes:
            raise UserError(f"data.root={root}: the shards hold {classes} classes, not {num_classes}")
        if manifest["stored_size"] != stored_size:
            raise UserError(f"data.stored_size={stored_size}: the shards in {root} hold {manifest['stored_size']}")
        if image_size * 8 // 7 > stored_size:
            raise UserError(
                f"data.image_size={image_size}: needs images stored at {image_size * 8 // 7}, not {stored_size}; "
                "prepare them with that --size"
            )
        self._train_tars, val = (Tars(Path(root), manifest[split]) for split in ("train", "val"))
        super().__init__(self._train_tars, val, num_classes, image_size, workers, on_bad_image, calibration_images)


def imagenet_shards(
    root: str,
    image_size: Count = 224,
    stored_size: Count = 256,
    workers: CountOrZero = 8,
    on_bad_image: Literal["error", "skip"] = "error",
    calibration_images: Count = 2000,
) -> Data:
    """ImageNet-1k in shards; the images, their order and the kind of crops are those of `imagenet`."""
    return Shards(root, 1000, image_size, stored_size, workers, on_bad_image, calibration_images)
